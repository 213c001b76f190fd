"""Quantise/dequantise pairs on activation edges, and weights stored in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from resvit_engines.targets.table import Precision
from resvit_quantize.graph.network import add_initializer
from resvit_quantize.placement.grid import (
    StoredWeight,
    largest_level,
    quantise_weight,
    require_finite,
    scale_from_amax,
    unsigned_grid,
)
from resvit_quantize.placement.placement import EdgeKey, Placement, Weight, WeightKey, edge_key, weight_key

_STORED: dict[Precision, Any] = {Precision.INT8: np.int8, Precision.FP8: ml_dtypes.float8_e4m3fn}


def insert_qdq(
    model: ir.Model,
    placement: Placement,
    amax: Mapping[EdgeKey, float],
    stored: Mapping[WeightKey, StoredWeight],
    bits: int = 8,
    floors: Mapping[str, float] | None = None,
) -> None:
    """Put the placement into the graph, in place and in FP32.

    ``amax`` gives the clip of each tensor at each precision, ``stored`` the 8-bit form of weights (see
    ``weight_key``); a weight that it leaves out is rounded to nearest. A tensor's pair is shared by all of its
    consumers of one precision, who alone read through it. A weight's 8-bit copy is shared, its DequantizeLinear
    is not: TensorRT folds each into its consumer.

    ``floors`` gives the lowest value of tensors by name, 0 or below: INT8 activations are then unsigned bytes between
    it and the clip, and the weights stay signed.
    """
    names = {str(v.name) for v in model.graph.initializers.values()}
    zeros: dict[Precision, ir.Value] = {}
    pairs: dict[tuple[ir.Value, Precision], ir.Value] = {}
    for edge in placement.edges:
        value = edge.node.inputs[edge.index]
        assert value is not None
        key = value, edge.precision
        if key not in pairs:
            low = (floors or {}).get(edge_key(edge)[0])
            if low is None and edge.precision not in zeros:
                zero = np.zeros((), _STORED[edge.precision])
                zeros[edge.precision] = add_initializer(model, _new("qdq/zero", names), zero)
            alone = not any(known is value for known, _ in pairs)
            base = str(value.name) if alone else f"{value.name}/{edge.precision.value}"
            clip = amax[edge_key(edge)]
            if low is None:
                scale, zero_point = scale_from_amax(clip, edge.precision, bits), zeros[edge.precision]
            else:
                scale, level = unsigned_grid(low, clip)
                zero_point = add_initializer(model, f"{base}/zero", level)
            pairs[key] = _pair(model, value, base, scale, zero_point, bits)
        edge.node.replace_input_with(edge.index, pairs[key])
    kept: dict[WeightKey, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for place in placement.weights:
        weight = place.node.inputs[place.index]
        assert weight is not None
        identity = weight_key(place)
        if identity not in kept:
            kept[identity] = _store(model, place, weight, stored.get(identity), names, bits)
        node = ir.node(
            "DequantizeLinear",
            kept[identity],
            {"axis": place.axis},
            name=f"{place.node.name}/weight/DequantizeLinear",
        )
        _describe(node.outputs[0], f"{place.node.name}/weight/dq", weight)
        model.graph.insert_before(place.node, node)
        place.node.replace_input_with(place.index, node.outputs[0])
    for name, _, _ in kept:
        value = model.graph.initializers[name]
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name, None)


def _store(
    model: ir.Model, place: Weight, weight: ir.Value, stored: StoredWeight | None, names: set[str], bits: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The initialisers of a weight's 8-bit values, its scales and their zero points."""
    array = require_finite(place)
    if stored is None:
        stored = StoredWeight(*quantise_weight(array, place.axis, place.precision, bits))
    name = _new(f"{weight.name}/{place.precision.value}", names)
    return (
        add_initializer(model, name, stored.values),
        add_initializer(model, f"{name}/scale", stored.scale),
        add_initializer(model, f"{name}/zero", np.zeros(stored.scale.shape, _STORED[place.precision])),
    )


def _pair(
    model: ir.Model,
    value: ir.Value,
    base: str,
    scale_array: np.ndarray,
    zero: ir.Value,
    bits: int,
) -> ir.Value:
    """Q and DQ right behind ``value``'s producer, named after ``base``; returns the dequantised value."""
    scale = add_initializer(model, f"{base}/scale", scale_array)
    nodes: list[ir.Node] = []
    source = value
    if bits < 8 and zero.dtype is ir.DataType.INT8:
        end = scale_array * np.float32(largest_level(Precision.INT8, bits))
        ends = [add_initializer(model, f"{base}/{side}", sign * end) for side, sign in (("low", -1), ("high", 1))]
        nodes.append(ir.node("Clip", [value, *ends], name=f"{base}/Clip"))
        source = nodes[0].outputs[0]
        _describe(source, f"{base}/clipped", value)
    quantise = ir.node("QuantizeLinear", [source, scale, zero], name=f"{base}/QuantizeLinear")
    quantise.outputs[0].name = f"{base}/q"
    quantise.outputs[0].shape = value.shape
    quantise.outputs[0].type = ir.TensorType(zero.dtype or ir.DataType.INT8)
    back = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero], name=f"{base}/DequantizeLinear")
    _describe(back.outputs[0], f"{base}/dq", value)
    nodes += [quantise, back]
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.insert_after(producer, nodes)
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
