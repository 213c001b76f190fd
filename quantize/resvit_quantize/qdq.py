"""Quantise/dequantise pairs on activation edges, and weights stored in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from resvit_engines.errors import ResvitError
from resvit_quantize.network import add_initializer, constant
from resvit_quantize.placement import Placement
from resvit_quantize.settings import Precision

LARGEST = {Precision.INT8: 127.0, Precision.FP8: 448.0}
"""What the largest magnitude maps to: the symmetric INT8 grid leaves -128 out, E4M3 ends at 448."""
_STORED: dict[Precision, Any] = {Precision.INT8: np.int8, Precision.FP8: ml_dtypes.float8_e4m3fn}
SMALLEST_SCALE = 2.0**-20
"""FP16 holds this scale and its neighbours to within 6%; smaller ones lose their digits."""
LARGEST_SCALE = 65504.0


def scale_from_amax(amax: np.ndarray | float, precision: Precision) -> np.ndarray:
    """The scale for a largest magnitude, FP32 but exact in FP16 and never too small for ``amax``.

    Rounding up keeps ``amax`` on the grid. Zeros (a channel without weights) get the smallest scale.
    """
    wanted = np.asarray(amax, np.float64) / LARGEST[precision]
    wanted = np.clip(wanted, SMALLEST_SCALE, LARGEST_SCALE)
    scale = wanted.astype(np.float16)
    low = scale.astype(np.float64) < wanted
    scale = np.nextafter(scale, np.where(low, np.float16(np.inf), scale))
    return scale.astype(np.float32)


def quantise_weight(weight: np.ndarray, axis: int, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel symmetric quantisation: (8-bit weights of ``weight``'s shape, FP32 scales along ``axis``)."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = scale_from_amax(np.abs(weight).max(axis=others, initial=0.0), precision)
    steps = weight / scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    if precision is Precision.INT8:
        return np.clip(np.rint(steps), -127, 127).astype(np.int8), scale
    return np.clip(steps, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn), scale


def insert_qdq(model: ir.Model, placement: Placement, amax: Mapping[str, float], precision: Precision) -> None:
    """Put the placement into the graph, in place and in FP32; ``amax`` gives each tensor's clip by name.

    A tensor's pair is shared by all of its quantised consumers, who alone read through it. A weight's 8-bit
    copy is shared, its DequantizeLinear is not: TensorRT folds each into its consumer.
    """
    names = {str(v.name) for v in model.graph.initializers.values()}
    zero = None
    pairs: dict[ir.Value, ir.Value] = {}
    for edge in placement.edges:
        value = edge.node.inputs[edge.index]
        assert value is not None
        if value not in pairs:
            zero = zero or add_initializer(model, _new("qdq/zero", names), np.zeros((), _STORED[precision]))
            pairs[value] = _pair(model, value, amax[str(value.name)], precision, zero)
        edge.node.replace_input_with(edge.index, pairs[value])
    stored: dict[tuple[ir.Value, int], tuple[ir.Value, ir.Value, ir.Value]] = {}
    for place in placement.weights:
        weight = place.node.inputs[place.index]
        assert weight is not None
        if (weight, place.axis) not in stored:
            array = constant(weight)
            assert array is not None
            if not np.isfinite(array).all():
                raise ResvitError(
                    f"The weight '{weight.name}' of {place.node.name} holds NaN or infinity.",
                    "Check the checkpoint; this layer was not trained.",
                )
            whole, scale = quantise_weight(array, place.axis, precision)
            name = _new(f"{weight.name}/{precision.value}", names)
            stored[weight, place.axis] = (
                add_initializer(model, name, whole),
                add_initializer(model, f"{name}/scale", scale),
                add_initializer(model, f"{name}/zero", np.zeros(scale.shape, _STORED[precision])),
            )
        node = ir.node(
            "DequantizeLinear",
            stored[weight, place.axis],
            {"axis": place.axis},
            name=f"{place.node.name}/weight/DequantizeLinear",
        )
        _describe(node.outputs[0], f"{place.node.name}/weight/dq", weight)
        model.graph.insert_before(place.node, node)
        place.node.replace_input_with(place.index, node.outputs[0])
    for weight, _ in stored:
        if not weight.uses() and not weight.is_graph_output():
            model.graph.initializers.pop(str(weight.name), None)


def _pair(model: ir.Model, value: ir.Value, amax: float, precision: Precision, zero: ir.Value) -> ir.Value:
    """Q and DQ right behind ``value``'s producer; returns the dequantised value."""
    scale = add_initializer(model, f"{value.name}/scale", scale_from_amax(amax, precision))
    quantise = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}/QuantizeLinear")
    quantise.outputs[0].name = f"{value.name}/q"
    quantise.outputs[0].shape = value.shape
    quantise.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(np.dtype(_STORED[precision])))
    back = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero], name=f"{value.name}/DequantizeLinear")
    _describe(back.outputs[0], f"{value.name}/dq", value)
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [quantise, back])
    else:
        model.graph.insert_after(producer, [quantise, back])
    return back.outputs[0]


def _describe(value: ir.Value, name: str, like: ir.Value) -> None:
    value.name, value.shape, value.type = name, like.shape, ir.TensorType(ir.DataType.FLOAT)


def _new(name: str, taken: set[str]) -> str:
    """``name``, or with a number behind it if it is taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate
