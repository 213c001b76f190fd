"""ONNX Runtime's sessions on the processor: as engines, with its 8-bit kernels, or as what the graph means.

The engine of a processor is the graph as ONNX Runtime's optimiser leaves it, before what depends on the very processor
(layouts of tensors): that is done when it is opened.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.audit.kernels import Kernel
from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_engines.machine import bytes_saturate
from resvit_engines.plugins.onnx_wire import records
from resvit_engines.trt.io_tensor import IoTensor

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE = _NODE_TEXTS = (2, 3, 4)

_TRANSPOSED = "MatmulTransposeFusion"
"""Its result on Transpose and MatMul in FP16 ends the process, up to 1.32 at least (onnxruntime issue 28392)."""
_BIASED = "MatMulAddFusion"
"""Makes a Gemm of MatMul and bias, for which there is no 8-bit kernel that writes FP32: the layer would be float."""
_MOVED = "QDQPropagationTransformer"
"""Moves Q/DQ over poolings and what only moves elements: a MaxPool of bytes is thirteen times as slow as of FP32.

Where Q/DQ belong the placement has decided (:mod:`resvit_quantize.placement.onnxruntime`).
"""
_LEFT_OUT = "optimization.disable_specified_optimizers"
_SATURATES = "session.x64quantprecision"
"""On x86 without VNNI, sums of two products of bytes saturate at 16 bits; with this, weights become unsigned there.

Asked for only there: ONNX Runtime takes processors with VNNI for such ones (since its pull request 27671), and unsigned
weights take three to four times as long on them.
"""


@dataclass(frozen=True)
class OptimisedOnnx:
    """What ONNX Runtime made of a graph: its version, inputs and outputs, and its nodes in order."""

    version: str
    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    kernels: tuple[Kernel, ...]


def load_onnxruntime() -> Any:
    """The package; raises ``ResvitError`` MISSING where it is not installed."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ResvitError(
            "ONNX Runtime is not installed: it runs engines of processors, and stands in for those of GPUs elsewhere.",
            "pip install onnxruntime, or run on the device that the engine is for.",
            ExitCode.MISSING,
        ) from error


def engine_options(ort: Any, threads: int | None = None, without: Sequence[str] = ()) -> Any:
    """Options of a session with 8-bit kernels; ``threads`` is one for each core that it may use, unless said.

    ``without`` names further steps of the optimiser that are left out.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come back as exceptions
    options.add_session_config_entry(_LEFT_OUT, ";".join([_MOVED, *without]))
    if bytes_saturate():
        options.add_session_config_entry(_SATURATES, "1")
    return options


def exact_options(ort: Any, *, optimize: bool = True) -> Any:
    """Options of a session that computes what the graph means, Q/DQ unfused; as written unless ``optimize``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(_LEFT_OUT, _TRANSPOSED)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def usable_cores() -> int:
    """How many cores this process may run on; 0, which leaves it to ONNX Runtime, where that cannot be asked."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def open_session(ort: Any, source: str | bytes, options: Any, name: object) -> Any:
    """A session on the processor; raises ``ResvitError`` INPUT, with ``name``, for what ONNX Runtime cannot load."""
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ResvitError(
            f"ONNX Runtime {ort.__version__} cannot load {name}: {first_line(error)}",
            "If the file is complete, an operator or external data file is missing; export it again.",
        ) from error


def optimised_onnx(source: Path, out: Path) -> OptimisedOnnx:
    """Write the graph as ONNX Runtime's optimiser leaves it, weights inside.

    Raises:
        ResvitError: MISSING without ONNX Runtime, BUILD where it cannot read or write the graph.
    """
    ort = load_onnxruntime()
    eight_bits = b"QuantizeLinear" in source.read_bytes()
    options = engine_options(ort, without=[_TRANSPOSED, *([_BIASED] if eight_bits else [])])
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    try:
        session = open_session(ort, str(source), options, source.name)
    except ResvitError as error:
        raise ResvitError(error.problem, error.fix, ExitCode.BUILD) from error
    if not out.is_file() or not out.stat().st_size:
        raise ResvitError(
            f"ONNX Runtime {ort.__version__} wrote no optimised graph of {source.name}.",
            "Export a smaller model: with its weights inside it must stay below 2 GiB.",
            ExitCode.BUILD,
        )
    return OptimisedOnnx(
        str(ort.__version__),
        _tensors(session.get_inputs()),
        _tensors(session.get_outputs()),
        _kernels(out.read_bytes()),
    )


def _tensors(tensors: Any) -> tuple[IoTensor, ...]:
    names = {"float": "float32", "float16": "float16", "double": "float64"}
    found = []
    for tensor in tensors:
        inner = tensor.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(size if isinstance(size, int) else -1 for size in tensor.shape)
        found.append(IoTensor(tensor.name, shape, names.get(inner, inner)))
    return tuple(found)


def _kernels(optimised: bytes) -> tuple[Kernel, ...]:
    """The nodes of the main graph in order, each one kernel: its type as ``QLinearConv``, its name, what it is of."""
    graph = next(value for number, _, value in records(optimised) if number == _MODEL_GRAPH)
    assert isinstance(graph, bytes)
    found = []
    for number, _, node in records(graph):
        if number != _GRAPH_NODE or not isinstance(node, bytes):
            continue
        texts: dict[int, str] = {}
        for field, _, value in records(node):
            if field in _NODE_TEXTS and isinstance(value, bytes):
                texts.setdefault(field, value.decode(errors="replace"))
        name = texts.get(_NODE_NAME) or texts.get(_NODE_OUTPUT, "")
        found.append(Kernel(name, texts.get(_NODE_OP_TYPE, ""), (), (), (), (), (name,)))
    return tuple(found)
