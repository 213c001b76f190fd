"""Which further edges ONNX Runtime wants Q/DQ on, for its 8-bit kernels on processors.

What it makes of Q/DQ its optimiser decides node by node (``qdq_selector_action_transformer.cc``):

- A convolution becomes ``QLinearConv`` only where everything that reads it, or the ReLU or Clip behind it, reads
  through one QuantizeLinear. Otherwise it computes in FP32, with weights that were rounded for nothing.
- An addition becomes ``QLinearAdd`` where both sides and what it writes are 8 bits.
- A MatMul needs 8 bits on what it reads alone: ``MatMulIntegerToFloat`` writes FP32, which a LayerNorm, GELU or softmax
  behind it wants anyway.
- Operators that only move elements run on bytes, where they read and write the same grid. A MaxPool would too, and take
  thirteen times as long as in FP32 (64x112x112, 3x3: 6.8 ms against 0.5): it gets two grids, a hair apart.

So Q/DQ go around whole chains of convolutions and their residual additions, and in transformer blocks only in front of
the linear layers.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysis import Analysis
from resvit_quantize.graph.network import constant
from resvit_quantize.placement.placement import Edge, Placement

_CLOSED = frozenset({"Conv", "Gemm"})
"""Layers whose 8-bit kernels write 8 bits."""
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_MAPS = 4
"""Dimensions of a tensor of image maps [N, C, H, W]."""


def placed_for_onnxruntime(analysis: Analysis, placement: Placement) -> Placement:
    """The placement with an edge for every reader of what an 8-bit convolution or addition writes.

    A shortcut's edges of TensorRT's rules go: they follow from both sides of an addition here. Convolutions whose
    output is one of the graph's are left in FP32, since nothing can be put behind them.
    """
    outside = {w.node for w in placement.weights if w.node.op_type != "MatMul" and _written(w.node) is None}
    outside |= {w.node for w in placement.weights if w.node.op_type == "ConvTranspose"}
    weights = tuple(w for w in placement.weights if w.node not in outside)
    layers = {weight.node for weight in weights}
    edges = [edge for edge in placement.edges if edge.node in layers]
    eight: dict[ir.Value, None] = {}
    for edge in edges:
        if (value := edge.node.inputs[edge.index]) is not None:
            eight[value] = None
    written = {_written(node) for node in layers if node.op_type in _CLOSED}
    for value in written:
        if value is not None:
            eight[value] = None
    # In the graph's order, so that an addition knows of the one before it.
    nodes = {value.producer(): None for value in analysis.depth if value.producer() is not None}
    for node in nodes:
        if node is None or node.op_type != "Add" or node in layers or not _is_of_maps(node, analysis):
            continue
        if all(value in eight for value in node.inputs) and (result := _written(node)) is not None:
            eight[result] = None
            written.add(result)
    seen = {(edge.node, edge.index) for edge in edges}
    for value in eight:
        if value not in written:
            continue
        for use in value.uses():
            if (use.node, use.idx) not in seen:
                seen.add((use.node, use.idx))
                edges.append(Edge(use.node, use.idx, "written in 8 bits", Precision.INT8))
    # What else is read in 8 bits is read so by additions too, where the other side is.
    for node in nodes:
        if node is None or node.op_type != "Add" or not _is_of_maps(node, analysis):
            continue
        if all(value in eight for value in node.inputs) and _written(node) in written:
            for index in range(2):
                if (node, index) not in seen:
                    seen.add((node, index))
                    edges.append(Edge(node, index, "side of an addition in 8 bits", Precision.INT8))
    reasons = dict(placement.reasons)
    for node in outside:
        reasons[str(node.name)] = "ONNX Runtime has no 8-bit kernel for it here"
    return dataclasses.replace(placement, edges=tuple(edges), weights=weights, reasons=reasons)


def _written(node: ir.Node) -> ir.Value | None:
    """What a layer writes, behind the activation that becomes one with it; None where the graph itself puts it out."""
    value = node.outputs[0]
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type in _ACTIVATIONS and not value.is_graph_output():
        value = uses[0].node.outputs[0]
    return None if value.is_graph_output() else value


def _is_of_maps(add: ir.Node, analysis: Analysis) -> bool:
    """Whether both sides are computed, and of image maps."""
    return len(add.inputs) == 2 and all(
        value is not None
        and value in analysis.data
        and constant(value) is None
        and value.shape is not None
        and len(value.shape) == _MAPS
        for value in add.inputs
    )
