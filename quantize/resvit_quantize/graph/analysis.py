"""Which part of the hybrid a matrix product belongs to, and how much work it is.

The parts are read from structure, not from names: attention is where two computed tensors are multiplied, the
linear layers around and behind it are the transformer, the convolutions before it the stem, the trunk and the
bridge, and the product that no other one follows is the head.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import onnx_ir as ir

from resvit_engines.errors import ResvitError
from resvit_quantize.graph.network import constant, module_of
from resvit_quantize.graph.shapes import observed_shapes, static_shapes

_LINEAR = frozenset({"MatMul", "Gemm"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", *_LINEAR})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_OTHERS = frozenset({"Einsum", "DeformConv", "ConvInteger", "MatMulInteger", *_RECURRENT})
"""Products that are counted and stay in FP16: nothing places 8 bits around them."""
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "DeformConv"})
_JOIN = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Sum", "Where", "Max", "Min"})
_POOL = frozenset({"MaxPool", "AveragePool"})


class HybridPart(str, enum.Enum):
    """Parts of a ResNet+ViT hybrid."""

    STEM = "stem"
    TRUNK = "trunk"
    BRIDGE = "bridge"
    """Convolutions that turn the trunk's map into tokens, or tokens back into a map."""
    TRANSFORMER = "transformer"
    HEAD = "head"


@dataclass(frozen=True, eq=False)
class Product:
    """A node that multiplies matrices: by a weight, or (``weight`` is ``None``) two computed tensors."""

    node: ir.Node
    part: HybridPart
    macs: int
    """Multiply-accumulates for one image; 0 only between computed tensors whose shapes cannot be told."""
    rows: int | None
    """Rows per image: a linear layer's tokens, the positions that a convolution reads and writes, whichever are more;
    ``None`` if unknown."""
    weight: ir.Value | None
    is_layer: bool
    """Whether it is a convolution or linear layer as 8 bits know them: activation first, weight second."""

    @property
    def name(self) -> str:
        """The node's name, unique in the graph."""
        return str(self.node.name)

    @property
    def module(self) -> str:
        """The dotted module path, empty if unknown."""
        return module_of(self.node)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the placement rules need to know about a graph."""

    products: tuple[Product, ...]
    of: dict[ir.Node, Product]
    depth: dict[ir.Value, int]
    """Most weighted nodes on any way from a graph input to the value."""
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    """Shapes for one image by value name, where they can be told."""
    data: frozenset[ir.Value] = field(repr=False)
    """Values that depend on a graph input's content."""

    @property
    def weighted_macs(self) -> int:
        """Multiply-accumulates of all products by weights, for one image."""
        return sum(product.macs for product in self.products if product.weight is not None)


def analyse(model: ir.Model) -> Analysis:
    """Find the products of a float graph, their parts, and their multiply-accumulates for one image of usual size.

    Shapes that cannot be inferred are taken from two runs on random images.

    Raises:
        ResvitError: where a product with a weight has no shape that is the same for every image, so that its work
            would be left out of every figure.
    """
    flow = _Flow(model)
    shapes = static_shapes(model)
    open_ones = [n for n in flow.products if _macs(n, shapes) is None]
    if open_ones:
        shapes |= observed_shapes(model, [v for n in open_ones for v in (*n.inputs, *n.outputs) if v is not None])
    parts = _parts(flow)
    products = []
    for node in flow.products:
        macs = _macs(node, shapes)
        if macs is None and node in flow.weighted:
            raise ResvitError(
                f"How much work {node.op_type} '{node.name}' is cannot be told: its shapes depend on the image.",
                "Export the network for one image size, with a fixed number of whatever it selects.",
            )
        weight = flow.weighted.get(node)
        is_layer = weight is not None and node.op_type in _WEIGHTED and weight is node.inputs[1]
        products.append(Product(node, parts[node], macs or 0, _rows(node, shapes), weight, is_layer))
    return Analysis(tuple(products), {p.node: p for p in products}, flow.depth, shapes, frozenset(flow.data))


class _Flow:
    """One pass each way over a graph; sets of products are bit masks over their order."""

    def __init__(self, model: ir.Model) -> None:
        self.nodes = list(model.graph)
        self.data: set[ir.Value] = set(model.graph.inputs)
        self.products: list[ir.Node] = []
        self.bit: dict[ir.Node, int] = {}
        self.weighted: dict[ir.Node, ir.Value] = {}
        """The weight of each product that has one."""
        self.above: dict[ir.Value, int] = {}
        self.nearest: dict[ir.Value, int] = {}
        self.depth: dict[ir.Value, int] = {}
        for node in self.nodes:
            self._down(node)
        self.below: dict[ir.Node, int] = {}
        self.next_weighted: dict[ir.Node, int] = {}
        for node in reversed(self.nodes):
            self._up(node)

    def operands(self, node: ir.Node) -> list[ir.Value]:
        """Inputs that carry image data."""
        return [value for value in node.inputs if value in self.data]

    def _down(self, node: ir.Node) -> None:
        inputs = self.operands(node)
        if node.op_type in ("Shape", "Size"):
            return
        if inputs or any(True for _ in captured_values(node) if _ in self.data):
            self.data.update(node.outputs)
        is_product, weight = _operands_of_product(node, self.data)
        above = nearest = depth = 0
        for value in inputs:
            above |= self.above.get(value, 0)
            nearest |= self.nearest.get(value, 0)
            depth = max(depth, self.depth.get(value, 0))
        if is_product:
            self.bit[node] = 1 << len(self.products)
            self.products.append(node)
            above |= self.bit[node]
            if weight is not None:
                self.weighted[node] = weight
                nearest = self.bit[node]
                depth += 1
        for output in node.outputs:
            self.above[output], self.nearest[output], self.depth[output] = above, nearest, depth

    def _up(self, node: ir.Node) -> None:
        below = following = 0
        for output in node.outputs:
            if output not in self.data:
                continue
            for use in output.uses():
                below |= self.below.get(use.node, 0) | self.bit.get(use.node, 0)
                if use.node in self.weighted:
                    following |= self.bit[use.node]
                else:
                    following |= self.next_weighted.get(use.node, 0)
        self.below[node], self.next_weighted[node] = below, following


def _operands_of_product(node: ir.Node, data: set[ir.Value]) -> tuple[bool, ir.Value | None]:
    """Whether a node multiplies matrices with a computed one among them, and by which weight."""
    if node.domain not in ("", "ai.onnx") and node.op_type not in _ATTENTION:
        return False, None
    if node.op_type in _ATTENTION:
        return True, None
    if node.op_type not in _WEIGHTED | _OTHERS:
        return False, None
    operands = [value for value in node.inputs[: None if node.op_type == "Einsum" else 2] if value is not None]
    if len(operands) < 2 or not any(value in data for value in operands):
        return False, None
    # A weight that is computed from constants at every call is one as well, on whichever side it stands.
    weights = [value for value in operands if value not in data]
    return True, weights[-1] if weights else None


def _parts(flow: _Flow) -> dict[ir.Node, HybridPart]:
    attention = [n for n in flow.products if n not in flow.weighted]
    attention_bits = sum(flow.bit[n] for n in attention)
    around = 0
    for node in attention:
        around |= flow.next_weighted[node]
        for value in node.inputs[:3]:
            around |= flow.nearest.get(value, 0) if value is not None else 0
    parts: dict[ir.Node, HybridPart] = {}
    for node in flow.products:
        above = flow.above[node.outputs[0]] & ~flow.bit[node]
        if node not in flow.weighted:
            parts[node] = HybridPart.TRANSFORMER
        elif above and not flow.below[node] and _is_head(node, flow):
            parts[node] = HybridPart.HEAD
        elif around & flow.bit[node] or (node.op_type in _LINEAR and above & attention_bits):
            parts[node] = HybridPart.TRANSFORMER
    inside = sum(flow.bit[n] for n, part in parts.items() if part is HybridPart.TRANSFORMER)
    stem = _stem(flow)
    for node in flow.products:
        if node in parts:
            continue
        behind = flow.nearest.get(node.inputs[0], 0) if node.inputs[0] is not None else 0
        if node in stem:
            parts[node] = HybridPart.STEM
        elif (flow.next_weighted[node] | behind) & inside:
            parts[node] = HybridPart.BRIDGE
        else:
            parts[node] = HybridPart.TRUNK
    return parts


def _is_head(node: ir.Node, flow: _Flow) -> bool:
    """Whether a last product makes the prediction: linear or 1x1, and no residual joins it on its way out."""
    if node.op_type not in _WEIGHTED:
        return False
    weight = constant(flow.weighted[node])
    if node.op_type not in _LINEAR and (weight is None or math.prod(weight.shape[2:]) != 1):
        return False
    return not any(_joins(reached, flow) for reached in _forward(node))


def _forward(node: ir.Node) -> list[ir.Node]:
    """All nodes behind ``node``."""
    found: dict[ir.Node, None] = {}
    open_ends = [node]
    while open_ends:
        for output in open_ends.pop().outputs:
            for use in output.uses():
                if use.node not in found:
                    found[use.node] = None
                    open_ends.append(use.node)
    return list(found)


def _joins(node: ir.Node, flow: _Flow) -> bool:
    return node.op_type in _JOIN and len(flow.operands(node)) > 1


def _stem(flow: _Flow) -> set[ir.Node]:
    """The first convolutions; of a deep stem all those of an unforked chain up to the first pooling."""
    stem: set[ir.Node] = set()
    for node in flow.products:
        if node not in flow.weighted or flow.above[node.outputs[0]] != flow.bit[node]:
            continue
        stem.add(node)
        chain: list[ir.Node] = []
        here = node
        while True:
            uses = list(here.outputs[0].uses())
            if len(uses) != 1 or _joins(uses[0].node, flow):
                break
            here = uses[0].node
            if here.op_type in _POOL:
                stem.update(chain)
                break
            if here in flow.bit:
                chain.append(here)
    return stem


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Outer values that a node's subgraphs read."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        graph = attribute.as_graph()
        for inner in ir.traversal.RecursiveGraphIterator(graph):
            found += [v for v in inner.inputs if v is not None and v.graph is not inner.graph]
    return found


def _rows(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> int | None:
    written = shapes.get(str(node.outputs[0].name))
    read = shapes.get(str(node.inputs[0] and node.inputs[0].name))
    if written is None or (node.op_type in _CONVOLUTIONS and read is None):
        return None
    if node.op_type in _CONVOLUTIONS:
        return max(math.prod(shape[2:]) for shape in (written, read or ()))
    return math.prod(written[:-1]) if node.op_type in _LINEAR else None


def _macs(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Multiply-accumulates of a product for one image; ``None`` where a shape is not known."""
    read = [shapes.get(str(v.name)) if v is not None else None for v in node.inputs]
    out = shapes.get(str(node.outputs[0].name))
    if node.op_type == "Einsum":
        return _einsum_macs(node, read)
    if len(read) < 2 or read[0] is None or read[1] is None:
        return None
    if node.op_type in _RECURRENT:  # X [S, B, I], W [D, G * H, I], R [D, G * H, H]
        inner = read[2] if len(read) > 2 else None
        return None if inner is None else math.prod(read[0][:2]) * (math.prod(read[1]) + math.prod(inner))
    if node.op_type in _ATTENTION:
        return _attention_macs(node, read)
    if node.op_type == "ConvTranspose":  # each input element spreads over Cout/group x kernel
        return math.prod(read[0]) * math.prod(read[1][1:])
    if out is None:
        return None
    if node.op_type in _CONVOLUTIONS:  # each output element sums over Cin/group x kernel
        return math.prod(out) * math.prod(read[1][1:])
    if node.op_type == "Gemm" and (flag := node.attributes.get("transA")) is not None and flag.as_int():
        return math.prod(out) * read[0][0]
    return math.prod(out) * read[0][-1]


def _einsum_macs(node: ir.Node, read: list[tuple[int, ...] | None]) -> int | None:
    """Every axis runs once; an ellipsis stands for the axes that the other labels leave."""
    left = node.attributes.get_string("equation", "").replace(" ", "").partition("->")[0]
    sizes: dict[str, int] = {}
    for side, shape in zip(left.split(","), read, strict=False):
        if shape is None:
            return None
        before, _, behind = side.partition("...")
        hidden = len(shape) - len(before) - len(behind)
        for label, size in zip([*before, *(f".{i}" for i in range(hidden, 0, -1)), *behind], shape, strict=False):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values())


def _attention_macs(node: ir.Node, read: list[tuple[int, ...] | None]) -> int | None:
    """``Q K^T`` and ``P V``; shapes are [B, H, S, D], or [B, S, H*D] with the head counts as attributes."""
    if len(read) < 3 or read[0] is None or read[1] is None or read[2] is None:
        return None
    q, k, v = read[0], read[1], read[2]
    if len(q) == 4:
        return q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    heads = [node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads") if name in node.attributes]
    width = v[2] // heads[1] * heads[0] if len(heads) == 2 else v[2]
    return q[0] * q[1] * k[1] * (q[2] + width)
