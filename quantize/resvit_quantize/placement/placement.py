"""Which edges get a Q/DQ pair, and why the others do not: TensorRT's rules for a ResNet+ViT hybrid.

The rules follow NVIDIA's "Best practices for explicit quantization": Q/DQ on the inputs of weighted layers, on a
convolutional residual only where it lets conv+add+relu become one kernel, and nowhere else.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.analysis import Analysis, HybridPart, Product
from resvit_quantize.graph.network import constant, int_attribute
from resvit_quantize.placement.patterns import nodes_matching
from resvit_quantize.placement.positions import position_products
from resvit_quantize.settings import QuantizeSettings

_CHOSEN = "chosen for this network, by the search or on held-back images"
_SMALL = 16
_FP8_FILTER = 32
_LARGE_HEAD = 0.05
"""Share of the multiply-accumulates from which a head is said to cost something."""
_NORM_PARTS = frozenset({"GroupNormalization", "InstanceNormalization", "BatchNormalization", "Reshape", "Mul", "Add"})


class Shortcuts(str, enum.Enum):
    """Which residual additions of the trunk read their shortcut in 8 bits."""

    CONV = "conv"
    """Those that a convolution feeds directly: conv, add and activation become one 8-bit kernel."""
    SHARED = "shared"
    """Also those behind a norm whose shortcut is a convolution's 8-bit input anyway: then it is written once, in
    8 bits, where it would be written and read in FP16 as well. No tensor is quantised for it alone."""


@dataclass(frozen=True, eq=False)
class Edge:
    """Input ``index`` of ``node``, to be read through the Q/DQ pair of its tensor."""

    node: ir.Node
    index: int
    reason: str
    precision: Precision


@dataclass(frozen=True, eq=False)
class Weight:
    """The constant input of ``node``, to be stored in 8 bits with one scale per slice along ``axis``."""

    node: ir.Node
    index: int
    axis: int
    precision: Precision


EdgeKey: TypeAlias = tuple[str, Precision]
"""What makes two Q/DQ pairs one: the tensor's name and the precision."""
WeightKey: TypeAlias = tuple[str, int, Precision]
"""What makes two stored weights one: the constant's name, the channel axis and the precision."""


def edge_key(edge: Edge) -> EdgeKey:
    """The identity of the Q/DQ pair that an edge reads through."""
    value = edge.node.inputs[edge.index]
    return str(value and value.name), edge.precision


def weight_key(weight: Weight) -> WeightKey:
    """The identity of a stored weight."""
    value = weight.node.inputs[weight.index]
    return str(value and value.name), weight.axis, weight.precision


@dataclass(frozen=True, eq=False)
class Placement:
    """Where Q/DQ goes: activation edges, weights, and a sentence for every product, quantised or not."""

    edges: tuple[Edge, ...]
    weights: tuple[Weight, ...]
    reasons: dict[str, str]


def place(
    analysis: Analysis,
    precision: Precision,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    precisions: Mapping[str, Precision] | None = None,
    shortcuts: Shortcuts = Shortcuts.SHARED,
) -> Placement:
    """Choose the edges to quantise.

    ``precisions`` gives nodes, by name, a precision of their own; those that the rules would leave in FP16 are
    quantised if it says so.
    ``shortcuts`` says which of the trunk's residual additions are quantised on their shortcut's side.

    Raises :class:`ResvitError` for patterns that match nothing.
    """
    adds = _residual_adds(analysis, shortcuts)
    nodes = [p.node for p in analysis.products] + list(adds)
    wanted = nodes_matching(include, nodes, "--include")
    refused = nodes_matching(exclude, nodes, "--exclude")
    edges: list[Edge] = []
    weights: list[Weight] = []
    reasons: dict[str, str] = {}
    chosen: dict[ir.Node, Precision] = {}
    positions = position_products(analysis)
    total = analysis.weighted_macs
    for product in analysis.products:
        node = product.node
        own = (precisions or {}).get(product.name)
        used = own or precision
        why_not = _impossible(product)
        if why_not is None and node in refused:
            why_not = "excluded by the recipe"
        if why_not is None and node not in wanted and own is None:
            why_not = _unwise(product, precision, total) or positions.get(node)
        if not used.quantises:
            why_not = _CHOSEN if own else f"{used.value.upper()} was asked for"
        if why_not is not None:
            reasons[product.name] = why_not
            continue
        reason = "included by the recipe" if node in wanted else f"weighted {node.op_type} of the {product.part.value}"
        reasons[product.name] = reason
        chosen[node] = used
        edges.append(Edge(node, 0, reason, used))
        weights.append(Weight(node, 1, channel_axis(node), used))
    shared = {(edge.node.inputs[edge.index], edge.precision) for edge in edges}
    for add, (shortcut, convolution) in adds.items():
        tensor = add.inputs[shortcut]
        if convolution.outputs[0] not in add.inputs and (tensor, chosen.get(convolution)) not in shared:
            continue
        if add not in refused and convolution in chosen:
            reason = "shortcut of a residual that a convolution feeds"
            edges.append(Edge(add, shortcut, reason, chosen[convolution]))
    return Placement(tuple(edges), tuple(weights), reasons)


def _impossible(product: Product) -> str | None:
    """Why a product cannot be quantised at all."""
    node = product.node
    if product.weight is None:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            return "its weight is computed from the image"
        return "attention matrix products stay in FP16"
    if not product.is_layer:
        left = product.weight is node.inputs[0]
        return "the weight is the left operand" if left else f"{node.op_type} has no 8-bit kernel"
    weight = constant(product.weight)
    if weight is None or weight.dtype != np.float32:
        return "the weight is not an FP32 constant"
    if node.op_type in ("MatMul", "Gemm") and weight.ndim != 2:
        return f"the weight has {weight.ndim} dimensions"
    if node.op_type == "Gemm" and int_attribute(node, "transA"):
        return "the activation is transposed"
    if node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1:
        return "grouped transposed convolution"
    return "no input" if node.inputs[0] is None else None


def _unwise(product: Product, precision: Precision, total: int) -> str | None:
    """Why a product is better left in FP16; ``total`` is the multiply-accumulates of all products by weights."""
    if product.part is HybridPart.HEAD:
        share = product.macs / total if total else 0.0
        if share < _LARGE_HEAD:
            return "the head costs nothing in FP16 and often hurts in 8 bits"
        return f"the head often hurts in 8 bits; {head_cost(product, total)} (--include puts it there)"
    if product.rows == 1:  # the gate of a squeeze-and-excitation block above all: all channels of a map hang on it
        return "matrix-vector product: bound by memory, not by arithmetic"
    return _without_kernel(product, precision)


def _without_kernel(product: Product, precision: Precision) -> str | None:
    """Why no 8-bit kernel is fast at a product, None where one is."""
    weight = constant(product.weight)
    assert weight is not None
    node = product.node
    if node.op_type in ("MatMul", "Gemm"):
        small = min([*weight.shape, *([product.rows] if (product.rows or 1) > 1 else [])])
        return f"a dimension of {small} is under {_SMALL}" if small < _SMALL else None
    if precision is not Precision.FP8:
        return None
    groups = int_attribute(node, "group", 1)
    outputs, inputs = weight.shape[:2] if node.op_type == "Conv" else weight.shape[1::-1]
    channels = min(inputs, outputs // groups if node.op_type == "Conv" else outputs)
    if channels <= _SMALL:
        return f"FP8 convolution of {channels} channels, which has no fast kernel"
    taps = math.prod(weight.shape[2:])
    return f"FP8 convolution with a filter of {taps} taps has no kernel" if taps > _FP8_FILTER else None


def head_cost(product: Product, total: int) -> str:
    """What a head takes in FP16, of ``total`` multiply-accumulates and in weights."""
    weight = constant(product.weight)
    assert weight is not None
    share = product.macs / total if total else 0.0
    macs, mib = f"{share:.1%} of the multiply-accumulates", weight.size / (1 << 20)
    return f"in FP16 it takes {macs} and {2 * mib:.1f} MiB of weights, {mib:.1f} in 8 bits"


def large_heads(analysis: Analysis, precision: Precision) -> tuple[Product, ...]:
    """The heads that cost something in FP16 and can be computed in ``precision``; those that write places are none."""
    total = analysis.weighted_macs
    positions = position_products(analysis)
    return tuple(
        product
        for product in analysis.products
        if product.part is HybridPart.HEAD
        and product.macs >= _LARGE_HEAD * max(total, 1)
        and product.node not in positions
        and _impossible(product) is None
        and _without_kernel(product, precision) is None
    )


def channel_axis(node: ir.Node) -> int:
    """The axis of the weight that runs over output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if int_attribute(node, "transB") else 1
    return 1


def require_patterns(model: Path, settings: QuantizeSettings) -> None:
    """Refuse patterns that match nothing in the float ``model``, before its ranges are measured.

    Raises :class:`ResvitError` with the names nearest to the pattern, and for a model that cannot be read.
    """
    if settings.include or settings.exclude:
        place(graph_from_onnx(model).analysis, settings.precision, settings.include, settings.exclude)


def _residual_adds(analysis: Analysis, shortcuts: Shortcuts) -> dict[ir.Node, tuple[int, ir.Node]]:
    """Adds of two image tensors that a trunk convolution feeds: shortcut's index, and the convolution."""
    found: dict[ir.Node, tuple[int, ir.Node]] = {}
    trunk = {p.node for p in analysis.products if p.node.op_type == "Conv" and p.part is not HybridPart.TRANSFORMER}
    for conv in trunk:
        for end in _ends(conv, shortcuts):
            for use in end.uses():
                add, (first, second) = use.node, (*use.node.inputs, None, None)[:2]
                if add.op_type != "Add" or first not in analysis.data or second not in analysis.data:
                    continue
                fed = {v: source for v in (first, second) if (source := _fed_by(v, trunk, shortcuts)) is not None}
                if not fed or first is second:
                    continue
                # Where both sides are convolutions, the shallower one is the shortcut's projection.
                main = max(fed, key=lambda value: analysis.depth[value])
                found[add] = (1 if main is first else 0, fed[main])
    return found


def _ends(conv: ir.Node, shortcuts: Shortcuts) -> list[ir.Value]:
    """The convolution's output, and what norms and constants make of it on an unforked way."""
    ends = [conv.outputs[0]]
    while shortcuts is Shortcuts.SHARED:
        uses = list(ends[-1].uses())
        if len(uses) != 1 or not _is_normalising(uses[0].node):
            break
        ends.append(uses[0].node.outputs[0])
    return ends


def _fed_by(value: ir.Value | None, trunk: set[ir.Node], shortcuts: Shortcuts) -> ir.Node | None:
    """The trunk convolution whose output, or norm of it, ``value`` is and nothing else reads."""
    while value is not None and len(list(value.uses())) == 1:
        node = value.producer()
        if node is None or node in trunk:
            return node
        if shortcuts is Shortcuts.CONV or not _is_normalising(node):
            return None
        value = next((v for v in node.inputs if v is not None and constant(v) is None), None)
    return None


def _is_normalising(node: ir.Node) -> bool:
    """Whether a node is a norm over image maps, or a part of one: it has one computed operand."""
    computed = [v for v in node.inputs if v is not None and constant(v) is None]
    return node.op_type in _NORM_PARTS and len(computed) == 1
