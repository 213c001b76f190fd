"""Whether ONNX Runtime computes Q/DQ as ONNX defines it, and the way around the one defect known.

Every score of a quantised graph rests on the runtime's QuantizeLinear. ONNX Runtime 1.23 and 1.24 on the CPU
truncate where they should round when the input is FP16, and nothing in the model shows it. So each process
tests its runtime once; where only that fails, QuantizeLinear gets its inputs cast to FP32, which changes no
value, in the copy that is scored.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_calibrate.runtime.sessions import (
    Array,
    onnxruntime_module,
    open_session,
    run_session,
    session_options,
)
from resvit_engines.errors import ResvitError, first_line

if TYPE_CHECKING:
    import onnx


_FP8_TYPES = (17, 18, 19, 20)  # TensorProto.FLOAT8E4M3FN to FLOAT8E5M2FNUZ


@dataclasses.dataclass(frozen=True)
class RuntimeHealth:
    """What the self-test found: which of the four kinds of Q/DQ are computed wrongly."""

    version: str
    wrong: tuple[str, ...]
    """For example ``("FP16 to INT8",)``; empty for a sound runtime."""
    wrong_with_casts: tuple[str, ...]
    """What stays wrong when QuantizeLinear gets FP32 input."""

    @property
    def exact(self) -> bool:
        """Whether Q/DQ graphs can be scored as they are."""
        return not self.wrong

    @property
    def exact_with_casts(self) -> bool:
        """Whether they can be scored with FP32 casts in front of QuantizeLinear."""
        return not self.wrong_with_casts


@functools.cache
def self_test() -> RuntimeHealth:
    """Compare the runtime's Q/DQ of FP16 and FP32 to INT8 and FP8 with numpy; once per process, a few ms."""
    kinds = {f"{source} to {target}": (source, target) for source in ("FP32", "FP16") for target in ("INT8", "FP8")}
    wrong = tuple(name for name, kind in kinds.items() if not _rounds_correctly(*kind, casts=False))
    again = tuple(name for name in wrong if not _rounds_correctly(*kinds[name], casts=name.endswith("INT8")))
    return RuntimeHealth(onnxruntime_module().__version__, wrong, again)


def runtime_note() -> str:
    """One sentence for the verdict: what scored the model, and what had to be worked around."""
    health = self_test()
    note = f"Scored by ONNX Runtime {health.version} on the CPU with Q/DQ unfused"
    if health.exact:
        return f"{note}."
    return (
        f"{note}; it computes {', '.join(health.wrong)} wrongly, so QuantizeLinear was given FP32 input in "
        "the copy that was scored (the same values; checked)."
    )


def _rounds_correctly(source: str, target: str, *, casts: bool) -> bool:
    """Whether Q rounds to nearest and saturates, and DQ multiplies, on values around every grid point."""
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    real, code = (np.float16, TensorProto.FLOAT16) if source == "FP16" else (np.float32, TensorProto.FLOAT)
    # ml_dtypes' FP8 has no numpy.dtype stub that mypy accepts.
    grid: Any = np.int8 if target == "INT8" else ml_dtypes.float8_e4m3fn
    scale = np.array(0.037, real)
    values = (np.random.default_rng(0).uniform(-20.0, 20.0, 4099)).astype(real)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
            helper.make_node("Cast", ["q"], ["steps"], to=TensorProto.FLOAT),
        ],
        "self_test",
        [helper.make_tensor_value_info("x", code, [None])],
        [
            helper.make_tensor_value_info("y", code, [None]),
            helper.make_tensor_value_info("steps", TensorProto.FLOAT, [None]),
        ],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(np.zeros((), grid), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if casts:
        _cast_quantizer_inputs(model)
    try:
        session = open_session(model.SerializeToString(), session_options())
        y, steps = run_session(session, ["y", "steps"], {"x": values})
    except ResvitError:
        return False
    exact = values.astype(np.float32) / scale.astype(np.float32)
    top = 127.0 if target == "INT8" else 448.0
    clipped = np.clip(exact, -128.0 if target == "INT8" else -top, top)
    if target == "INT8":
        spacing: Array = np.ones_like(clipped)
    else:  # three mantissa bits; below 2^-6 the spacing stays at 2^-9
        spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(clipped), 2.0**-6))) - 3.0)
    rounding = np.abs(steps - clipped) / spacing
    # FP16 multiplication rounds once more, by 2^-11 of the value.
    product = np.abs(y.astype(np.float32) - steps * scale.astype(np.float32)) / np.maximum(np.abs(y), 1e-3)
    return bool(rounding.max() <= 0.51 and product.max() <= 2.0**-10)


def with_float32_quantizers(model: Path | bytes) -> bytes | None:
    """Turn a model into one with FP32 casts in front of every QuantizeLinear to INT8; None if none quantises.

    External data stays where it is. Raises ResvitError for what is no ONNX file.
    """
    import onnx

    if isinstance(model, Path) and not model.is_file():
        raise ResvitError(f"There is no model file {model}.", "Check the path.")
    try:
        proto = (
            onnx.load_model_from_string(model)
            if isinstance(model, bytes)
            else onnx.load(model, load_external_data=False)
        )
    except Exception as error:
        what = str(model) if isinstance(model, Path) else "the model"
        raise ResvitError(
            f"{what} cannot be read as an ONNX model: {first_line(error)}",
            "Check the path, and that the file is complete.",
        ) from error
    return proto.SerializeToString() if _cast_quantizer_inputs(proto) else None


def _cast_quantizer_inputs(model: onnx.ModelProto) -> int:
    """Cast value and scale of every QuantizeLinear to integers to FP32, in functions and branches.

    Returns how many QuantizeLinear there are, of all kinds. FP8 is left alone: it has no such defect, and with
    casts the optimiser of the runtime (1.23 to 1.32) miscomputes it.
    """
    return sum(_cast_in(body) for body in (model.graph, *model.functions))


def _cast_in(body: onnx.GraphProto | onnx.FunctionProto) -> int:
    from onnx import TensorProto, helper

    count = 0
    nodes: list[onnx.NodeProto] = []
    fp8 = {tensor.name for tensor in getattr(body, "initializer", ()) if tensor.data_type in _FP8_TYPES}
    for node in body.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                count += _cast_in(attribute.g)
        if node.op_type == "QuantizeLinear":
            count += 1
            for position in (0, 1) if fp8.isdisjoint(node.input[2:]) else ():
                wide = f"{node.output[0]}/float32_{position}"
                nodes.append(helper.make_node("Cast", [node.input[position]], [wide], to=TensorProto.FLOAT))
                node.input[position] = wide
        nodes.append(node)
    if count:
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del body.node[:]
        body.node.extend(copies)
    return count
