"""A graph with Q/DQ read as the float graph that it stands for, and which of its edges carry 8 bits.

TensorRT reads Q/DQ that way: the pairs are no work of their own, but say in which format a tensor passes to a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from resvit_engines.targets.layer_work import Format
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.network import add_initializer, fold_constants, named_model
from resvit_quantize.graph.regions import is_view
from resvit_quantize.graph.shapes import at_size, sizes_of_graph

_FORMATS = {ir.DataType.INT8: Format.INT8, ir.DataType.UINT8: Format.INT8, ir.DataType.FLOAT8E4M3FN: Format.FP8}
_PASSED = frozenset({"MaxPool", "Pad"})
"""What may stand, beside views, between a DequantizeLinear and the layer that it is for: it moves elements only."""
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class QuantisedEdge:
    """The Q/DQ between a tensor and one reader: its format, its scale, and the names of both nodes."""

    form: Format
    scale: str
    quantize: str
    dequantize: str


Edges = Mapping[tuple[ir.Node, int], QuantisedEdge]
"""By the reading node and the index of its input."""


@dataclass(frozen=True)
class QuantisedGraph:
    """The float graph, its quantised edges, and the products that multiply in 8 bits."""

    model: ir.Model
    edges: Edges
    eight_bit: Mapping[str, Precision] = field(default_factory=dict)


def quantised_edges(model: ir.Model) -> QuantisedGraph:
    """Take the Q/DQ out of a model (which is changed) and say where they stood.

    Weights that are stored in 8 bits become floats of the same shape, and of no account otherwise: the result tells
    work and formats, not values. A QuantizeLinear that something else than a DequantizeLinear reads stays.
    """
    _infer(model)
    types = {value: value.dtype for node in model.graph for value in node.outputs}
    edges: dict[tuple[ir.Node, int], QuantisedEdge] = {}
    weights: set[ir.Value] = set()
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        source, quantizer = _source(node)
        if source is None:
            continue
        if source.is_initializer():
            source = _float_weight(model, node, source)
            weights.add(source)
        else:
            form = _FORMATS.get(_stored(node), Format.INT8)
            scale = "" if node.inputs[1] is None else _scale_key(node.inputs[1])
            edge = QuantisedEdge(form, scale, str(quantizer.name) if quantizer else "", str(node.name))
            edges.update({(use.node, use.idx): edge for use in node.outputs[0].uses()})
        node.outputs[0].replace_all_uses_with(source)
    common.RemoveUnusedNodesPass()(model)
    here = set(model.graph)
    edges = {place: edge for place, edge in edges.items() if place[0] in here}
    for node in model.graph:
        if node.op_type in _PASSED or is_view(node):
            _pass_on(node, edges)
    eight = {
        str(node.name): Precision(edges[node, 0].form.value)
        for node in model.graph
        if node.op_type in _WEIGHTED
        and (node, 0) in edges
        and len(node.inputs) > 1
        and viewed(node.inputs[1]) in weights
    }
    fold_constants(model)
    _infer(model)
    for value, dtype in types.items():  # What a DequantizeLinear said of the type behind it went with it.
        if dtype is not None:
            value.dtype = dtype
    return QuantisedGraph(model, edges, eight)


def _infer(model: ir.Model) -> None:
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def quantised_graph_from_onnx(
    path: Path, batch: int = 1, change: Callable[[ir.Model], object] | None = None
) -> QuantisedGraph:
    """Read a model with Q/DQ, or without: one of several image sizes as it is at the usual one, for ``batch`` images.

    ``change`` is done to the model as it was read, in place. Raises ``ResvitError`` where the file cannot be read.
    """
    model = named_model(path)
    if change is not None:
        change(model)
    if (sizes := sizes_of_graph(model)) is not None:  # while the Q/DQ say where types change: without, nothing is told
        model = at_size(model, sizes.usual, batch)
    return quantised_edges(model)


def viewed(value: ir.Value | None) -> ir.Value | None:
    """What a value is a view of."""
    while value is not None and (node := value.producer()) is not None and is_view(node):
        value = node.inputs[0]
    return value


def _source(node: ir.Node) -> tuple[ir.Value | None, ir.Node | None]:
    """What a DequantizeLinear stands for, and its QuantizeLinear where it has one."""
    stored = node.inputs[0]
    if stored is None:
        return None, None
    producer = stored.producer()
    if producer is not None and producer.op_type == "QuantizeLinear":
        return producer.inputs[0], producer
    return (stored, None) if producer is None else (None, None)


def _stored(node: ir.Node) -> ir.DataType:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    for value in (zero, node.inputs[0]):
        if value is not None and value.dtype is not None:
            return value.dtype
    return ir.DataType.UINT8


def _scale_key(scale: ir.Value) -> str:
    """The scale itself where it is one constant number, so that equal scales are one; else its name."""
    if scale.const_value is not None and scale.const_value.size == 1:
        return repr(float(scale.const_value.numpy().reshape(-1)[0]))
    return str(scale.name)


def _float_weight(model: ir.Model, node: ir.Node, stored: ir.Value) -> ir.Value:
    """A constant of a stored weight's shape in the type of its scale."""
    scale = node.inputs[1]
    half = scale is not None and scale.dtype is ir.DataType.FLOAT16
    shape = stored.const_value.shape.numpy() if stored.const_value is not None else ()
    plain = np.broadcast_to(np.zeros((), np.float16 if half else np.float32), shape)
    return add_initializer(model, f"{node.outputs[0].name}/float", plain)


def _pass_on(node: ir.Node, edges: dict[tuple[ir.Node, int], QuantisedEdge]) -> None:
    """Say of the readers behind a node that only moves elements what is said of the node."""
    edge = edges.get((node, 0))
    if edge is None:
        return
    for output in node.outputs:
        for use in output.uses():
            edges.setdefault((use.node, use.idx), edge)
