"""Where an engine leaves the path of its ONNX: every layer's output, side by side, by Polygraphy.

Every tensor that is compared becomes an output of the graph, and an output cannot be fused away. So this compares the
arithmetic of layers, not of the fused kernels of the shipped engine; name a few tensors to keep the rest fused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.gpu import local_sm
from resvit_engines.run.npy import read_array
from resvit_engines.trt.api import load_tensorrt

if TYPE_CHECKING:
    import onnx

# Quantised values differ by a step where rounding differs; what they stand for is compared behind the dequantisation.
_NOT_COMPARED = frozenset({"QuantizeLinear", "Constant", "ConstantOfShape", "Shape"})


@dataclass(frozen=True)
class LayerDifference:
    """One tensor, in the order of the graph: the node that makes it, and how far the two sides are apart.

    ``error`` is the norm of the difference over the norm of the reference's values, 0 where they are equal and
    infinite where one side is not finite; ``largest`` is the greatest difference of a single value.
    """

    tensor: str
    node: str
    op: str
    error: float
    largest: float


def compare_layers(
    model: Path, arrays: Mapping[str, np.ndarray[Any, Any]], against: Any = None, only: Sequence[str] = ()
) -> tuple[LayerDifference, ...]:
    """Run ``model`` in ONNX Runtime and ``against`` on the same ``arrays`` and compare every tensor, or ``only`` some.

    ``against`` turns the bytes of the ONNX, all compared tensors being its outputs, into a runner of Polygraphy;
    TensorRT builds and runs them where it is not given, which needs its GPU.

    Raises:
        ResvitError: MISSING without Polygraphy or TensorRT, INPUT for a tensor that the graph does not have.
    """
    import onnx

    from resvit_calibrate.runtime.runner import onnx_runner

    comparator, onnxrt, severity = _polygraphy()
    graph = onnx.load(model).graph
    makers = {name: node for node in graph.node for name in node.output if name and node.op_type not in _NOT_COMPARED}
    if unknown := [name for name in only if name not in makers]:
        raise ResvitError(
            f"The graph has no tensor {unknown[0]!r} to compare.", f"Its first ones are {', '.join(list(makers)[:5])}."
        )
    names = [name for name in makers if not only or name in only]
    shown = _with_outputs(model, names)
    with severity:
        runners = [
            onnxrt(onnx_runner(shown, optimize=False).session, name="ONNX Runtime"),
            (against or tensorrt_runner)(shown),
        ]
        results = comparator.run(runners, data_loader=[dict(arrays)])
    (_, (reference,)), (_, (other,)) = results
    return tuple(
        _difference(name, makers[name], np.asarray(reference[name]), np.asarray(other[name])) for name in names
    )


def first_departure(differences: Sequence[LayerDifference], tolerance: float = 0.1) -> LayerDifference | None:
    """The first tensor of the graph that is further apart than ``tolerance``; None where none is.

    What comes behind it inherits its error.
    """
    return next((difference for difference in differences if difference.error > tolerance), None)


def input_of(model: Path, images: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Images [N, C, H, W] of a ``.npy`` file under the name of the only input of ``model``.

    A model of a fixed batch gets its first images.

    Raises:
        ResvitError: INPUT for a file that is no such array, or a graph with several inputs.
    """
    from resvit_export.to_onnx.onnx_file import bounded_model

    graph = bounded_model(model).graph
    constants = {item.name for item in graph.initializer}
    names = [item.name for item in graph.input if item.name not in constants]
    if len(names) != 1:
        raise ResvitError(f"{model} has {len(names)} inputs: {', '.join(names)}.", "Compare a model of one input.")
    array = read_array(images, "input")
    wanted = [
        item.dim_value
        for item in next(item for item in graph.input if item.name == names[0]).type.tensor_type.shape.dim
    ]  # 0 where it is dynamic
    if array.ndim != len(wanted) or any(b not in (0, a) for a, b in zip(array.shape[1:], wanted[1:], strict=True)):
        raise ResvitError(
            f"{images} has the shape {list(array.shape)}, and {model.name} reads {wanted} (0 is any size).",
            "Give images that are prepared for this model.",
        )
    return {names[0]: array[: wanted[0] or None]}


def optimised_runner(model: bytes) -> Any:
    """Polygraphy's runner for ONNX Runtime with its optimiser, which has been seen to break quantised graphs."""
    from resvit_calibrate.runtime.runner import onnx_runner

    _, onnxrt, _ = _polygraphy()
    return onnxrt(onnx_runner(model).session, name="ONNX Runtime, optimised")


def tensorrt_runner(model: bytes) -> Any:
    """Polygraphy's runner for TensorRT: strongly typed, as our own engines are.

    Raises:
        ResvitError: MISSING without TensorRT or a GPU.
    """
    load_tensorrt("tensorrt")
    if local_sm() is None:
        raise ResvitError(
            "Comparing with TensorRT runs it, and this machine has no NVIDIA GPU with a working driver.",
            "Run this where the engine runs, or compare --against onnxruntime.",
            ExitCode.MISSING,
        )
    from polygraphy.backend.trt import EngineFromNetwork, TrtRunner

    return TrtRunner(EngineFromNetwork(tensorrt_network(model)), name="TensorRT")


def tensorrt_network(model: bytes) -> Any:
    """Polygraphy's loader of the network that TensorRT parses."""
    from polygraphy.backend.trt import NetworkFromOnnxBytes

    return NetworkFromOnnxBytes(model, strongly_typed=True)


def _polygraphy() -> tuple[Any, Any, Any]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it asks for a package that colours its log
            from polygraphy.backend.onnxrt import OnnxrtRunner
            from polygraphy.comparator import Comparator
            from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise ResvitError(
            f"Comparing layers needs Polygraphy, which does not import: {error}.",
            "pip install 'resvit-export[host]'.",
            ExitCode.MISSING,
        ) from error
    return Comparator, OnnxrtRunner, G_LOGGER.verbosity(G_LOGGER.CRITICAL)


def _with_outputs(model: Path, names: Sequence[str]) -> bytes:
    import onnx
    from polygraphy.backend.onnx import modify_outputs

    # TensorRT's parser takes no output without a type. Polygraphy takes the types of inner tensors where they are
    # known, and forgets those of the outputs that were there.
    typed = onnx.shape_inference.infer_shapes(onnx.load(model))
    typed.graph.value_info.extend(typed.graph.output)
    shown: onnx.ModelProto = modify_outputs(typed, outputs=list(names))
    return bytes(shown.SerializeToString())


def _difference(
    name: str, node: onnx.NodeProto, reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]
) -> LayerDifference:
    expected, found = reference.astype(np.float64), other.astype(np.float64).reshape(reference.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(found - expected)
        scale, noise = float(np.linalg.norm(expected)), float(np.linalg.norm(apart))
    if not np.isfinite(noise) or not np.isfinite(scale):
        return LayerDifference(name, node.name, node.op_type, float("inf"), float("inf"))
    error = noise / scale if scale else float("inf") if noise else 0.0
    return LayerDifference(name, node.name, node.op_type, error, float(apart.max(initial=0.0)))
