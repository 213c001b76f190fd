"""Products that compute positions: what 8 bits cost there is seen at once, and what they gain is little.

Found from structure, backwards from where numbers are used as places: the grid that GridSample reads (deformable
attention's sampling points, Zhu et al. 2021), the scores that TopK selects queries by, and a detector's boxes and
scores. An error of one step of 8 bits in an offset moves what is sampled; in a score, which queries there are at all;
in a box, the box.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from resvit_quantize.graph.analysis import Analysis
from resvit_quantize.graph.network import constant

_LIGHT = frozenset(
    name
    for names in (
        ("Abs", "Add", "Div", "Exp", "Greater", "Less", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Sqrt", "Sub"),
        ("Clip", "Relu", "Sigmoid", "Softplus", "Tanh", "ReduceMax", "Where", "Cast", "Identity"),
        ("Concat", "Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice", "Split", "Squeeze", "Tile"),
        ("Transpose", "Unsqueeze"),
    )
    for name in names
)
"""What a number goes through and still is one of its product's, or a sum of such."""
_ACTIVATIONS = frozenset(["Add", "Gelu", "Relu", "Sigmoid", "Mul", "Tanh", "HardSwish", "Swish"])
_LINEAR = ("MatMul", "Gemm")
_COORDINATES = 8
"""Input features up to which a linear layer reads coordinates."""
_DEEP = 4
"""Linear layers of one head, at most."""


def position_products(analysis: Analysis) -> dict[ir.Node, str]:
    """Why each of the products that compute positions is better left in FP16, the reason by node."""
    if not analysis.products:
        return {}
    graph = analysis.products[0].node.graph
    assert isinstance(graph, ir.Graph)
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        if node.op_type == "GridSample":
            _mark(reasons, [node.inputs[1]], analysis, "its output says where GridSample reads")
        elif node.op_type == "TopK":
            _mark(reasons, [node.inputs[0]], analysis, "its output selects the queries", deep=False)
    for value, what in _detections(graph):
        _mark(reasons, [value], analysis, f"its output is the detector's {what}", deep=what == "boxes")
    for product in analysis.products:
        weight = constant(product.weight)
        if product.node.op_type in _LINEAR and weight is not None and min(weight.shape[:1]) <= _COORDINATES:
            for node in _behind(product.node, analysis):
                reasons.setdefault(node, "it codes a position")
    return reasons


def _mark(
    reasons: dict[ir.Node, str],
    values: Iterable[ir.Value | None],
    analysis: Analysis,
    reason: str,
    *,
    deep: bool = True,
) -> None:
    """Name the first products behind ``values``, and with ``deep`` all linear layers of the same head."""
    for node in _first_products(values, analysis):
        reasons.setdefault(node, reason)
        if deep and node.op_type in _LINEAR:
            for before in _head_of(node, analysis):
                reasons.setdefault(before, reason)


def _first_products(values: Iterable[ir.Value | None], analysis: Analysis) -> list[ir.Node]:
    """The weighted products that ``values`` come from through nothing but light operations."""
    found: dict[ir.Node, None] = {}
    seen: set[ir.Value] = set()
    pending = [value for value in values if value is not None]
    while pending:
        value = pending.pop()
        if value in seen or value not in analysis.data:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            continue
        if node in analysis.of:
            if analysis.of[node].weight is not None:
                found[node] = None
        elif node.op_type in _LIGHT and not node.domain:
            pending += [source for source in node.inputs if source is not None]
    return list(found)


def _head_of(node: ir.Node, analysis: Analysis) -> list[ir.Node]:
    """The linear layers before ``node`` that lead to it alone, with activations between."""
    found: list[ir.Node] = []
    here = node.inputs[0]
    while here is not None and len(found) < _DEEP:
        source = here.producer()
        readers = {use.node for use in here.uses()}
        if source is None or len(readers) > 2:
            break
        if source in analysis.of:
            if source.op_type not in _LINEAR or analysis.of[source].weight is None:
                break
            found.append(source)
        elif source.op_type not in _ACTIVATIONS:
            break
        computed = [value for value in source.inputs if value in analysis.data]
        here = computed[0] if computed else None
    return found


def _behind(node: ir.Node, analysis: Analysis) -> list[ir.Node]:
    """The linear layers that alone read ``node`` through activations."""
    found: list[ir.Node] = []
    here = node
    while len(found) < _DEEP:
        readers = list(dict.fromkeys(use.node for use in here.outputs[0].uses()))
        if len(readers) != 1:
            break
        here = readers[0]
        if here in analysis.of:
            if here.op_type not in _LINEAR or analysis.of[here].weight is None:
                break
            found.append(here)
        elif here.op_type not in _ACTIVATIONS or sum(value in analysis.data for value in here.inputs) != 1:
            break
    return found


def _detections(graph: ir.Graph) -> list[tuple[ir.Value, str]]:
    """Outputs [B, Q, 4] beside outputs [B, Q, K]: boxes and scores of the same queries or cells."""
    ranked = [value for value in graph.outputs if value.shape is not None and len(value.shape) == 3]
    boxes = [value for value in ranked if value.shape is not None and value.shape[2] == 4]
    counts = [value.shape[1] for value in boxes if value.shape is not None]
    scores = [v for v in ranked if v not in boxes and v.shape is not None and v.shape[1] in counts]
    return [(value, "boxes") for value in boxes] + [(value, "scores") for value in scores] if scores else []
