"""A graph as the fused layers that TensorRT makes of it, each with its work, for the cost model.

The rules are those seen in the layers that TensorRT lists (``benchmarks/results/predictions.md``) and, for what those
engines do not have, in the kernels of TensorRT for RTX: bias, activation and residual add run inside the convolution
or linear layer before them; a norm is a kernel of its own (two for a GroupNorm) with the activation behind it;
attention is one kernel, behind one that rearranges operands where they come packed; views cost nothing. Where a
residual add follows a norm it is a kernel of its own.

Of a float graph, whose precisions are still to be chosen, every product's operand and a convolution's shortcut count as
quantised where the product is. Of a graph with Q/DQ those edges do where Q/DQ stands, and nothing fuses through one: so
of two convolutions that are added the one that writes floats takes the add, and where both do, that of the shortcut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from resvit_engines.targets.layer_work import IMAGE_CHANNELS, Format, LayerKind, LayerWork, Read
from resvit_quantize.graph.analysis import Analysis, Product, analyse
from resvit_quantize.graph.network import constant
from resvit_quantize.graph.product_shapes import matrix_shape, skips_positions
from resvit_quantize.graph.quantised_edges import Edges, QuantisedEdge
from resvit_quantize.graph.regions import AttentionBlock, attention_blocks, is_view
from resvit_quantize.graph.shapes import static_shapes

_NORMS = frozenset(
    {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization", "RMSNormalization"}
)
_TWO_KERNELS = frozenset({"GroupNormalization", "InstanceNormalization"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_SEPARATE = frozenset({"Concat", "Resize", "Pad", "ReduceMean", "ReduceSum", "ReduceMax", "Expand", "Softmax"})
"""Neither pointwise nor a view: a generated kernel of its own."""
_COMMUTING = frozenset({"MaxPool", "Pad", "Transpose"})
"""They move elements only, in 8 bits as well."""
_COPIES = frozenset({"Cast", "Transpose"})
"""Views inside the network, where the kernels beside them read and write what they make; kernels at its borders."""
_NORMALISING = frozenset({"Add", "Sub", "Mul", "Div"})
"""With a constant they make an image of pixels."""
_WHOLE = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_MOST_BEHIND = 24
"""Pointwise nodes that one kernel is followed through before it is given up that they close."""


def layers_from_graph(
    model: ir.Model, batch: int = 1, analysis: Analysis | None = None, edges: Edges | None = None
) -> tuple[LayerWork, ...]:
    """Group the nodes of a float graph (as :func:`network_from_onnx` returns it) into fused layers.

    ``batch`` is the number of images per call where the graph leaves it open. Tensors whose shape cannot be told
    count as empty, so that their layer costs its kernels alone. ``edges`` are those of a graph that had Q/DQ (none, of
    one that is to run in floats): then formats are those that the graph says.
    """
    return _Grouping(model, batch, analysis or analyse(model), edges).layers()


@dataclass
class _Layer:
    kind: LayerKind
    anchor: ir.Node
    out: ir.Value
    nodes: list[ir.Node] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    block: AttentionBlock | None = None
    pools: bool = False


class _Grouping:
    def __init__(self, model: ir.Model, batch: int, analysis: Analysis, edges: Edges | None) -> None:
        self.model = model
        self.analysis = analysis
        self.edges = edges
        self.shapes = static_shapes(model, batch)
        first = [v.shape[0] for v in model.graph.inputs if v.shape is not None and len(v.shape)]
        self.images = 1 if first and isinstance(first[0], int) else batch
        self.order = {node: i for i, node in enumerate(model.graph)}
        self.root: dict[ir.Value, ir.Value] = {}
        self.owner: dict[ir.Node, _Layer] = {}
        self.fused: list[_Layer] = []
        self.born: dict[ir.Value, tuple[int, int]] = {}
        """Of each root: weighted layers before it, and its place in the graph."""

    def layers(self) -> tuple[LayerWork, ...]:
        """All layers in the order of the graph, between those that convert the inputs and the outputs."""
        for node in self.model.graph:
            for value in node.outputs:
                viewed = node.inputs[0] if self._is_view(node) and node.inputs else None
                self.root[value] = self.root.get(viewed, viewed) if viewed in self.analysis.data else value
                self.born[value] = self.analysis.depth.get(value, 0), self.order[node]
        blocks = {node: block for block in attention_blocks(self.analysis) for node in block.nodes}
        for node in self.model.graph:
            if node in self.owner or self._is_view(node) or not self._reads(node):
                continue
            layer = self._layer(node, blocks.get(node))
            self.owner.update(dict.fromkeys(layer.nodes, layer))
            self.fused.append(layer)
            self._absorb(layer)
        inputs = [self._input(v) for v in self.model.graph.inputs if v in self.analysis.data]
        return (*inputs, *(self._work(layer) for layer in self.fused), *self._outputs())

    def _layer(self, node: ir.Node, block: AttentionBlock | None) -> _Layer:
        if block is not None:
            anchor = block.products[0].node
            return _Layer(LayerKind.ATTENTION, anchor, block.output, list(block.nodes), list(block.products), block)
        product = self.analysis.of.get(node)
        return _Layer(self._kind(node), node, node.outputs[0], [node], [product] if product else [])

    def _is_view(self, node: ir.Node) -> bool:
        """Whether a node costs nothing.

        What makes floats of an input in whole numbers costs and, where formats are known, all that converts or moves
        inputs or outputs.
        """
        if node.op_type not in _COPIES or not is_view(node):
            return is_view(node)
        if self.edges is None:
            whole = (given := node.inputs[0]) is not None and given.dtype not in _FLOATS
            return not (whole and node.op_type == "Cast" and self._is_given(given))
        if node.op_type == "Transpose":
            return not self._is_given(node.inputs[0])
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        pooled = before is not None and before.op_type in _POOLS  # A pool does not convert.
        return not (pooled or node.outputs[0].is_graph_output() or self._is_given(node.inputs[0]))

    def _is_given(self, value: ir.Value | None) -> bool:
        """Whether a value is an input of the network, moved or converted at most."""
        while value is not None and (node := value.producer()) is not None and node.op_type in {*_COPIES, "Pad"}:
            value = node.inputs[0]
        return value is not None and value.producer() is None and value in self.analysis.data

    def _is_image(self, value: ir.Value | None) -> bool:
        """Whether a value is the network's image: moved, converted or normalised at most."""
        if value is None:
            return False
        given = value
        while (node := given.producer()) is not None and node.op_type in _NORMALISING and len(self._reads(node)) == 1:
            given = self._reads(node)[0]
        if not self._is_given(given):
            return False
        shape = self.shapes.get(str(value.name), ())
        return len(shape) == 4 and (shape[1] <= IMAGE_CHANNELS or shape[3] <= IMAGE_CHANNELS < min(shape[1:3]))

    def _root(self, value: ir.Value) -> ir.Value:
        return self.root.get(value, value)

    def _leaves(self, value: ir.Value) -> bool:
        """Whether a root, or a view of it, is an output of the graph."""
        return any(self._root(v) is value for v in self.model.graph.outputs)

    def _reads(self, node: ir.Node) -> list[ir.Value]:
        return [v for v in node.inputs if v in self.analysis.data]

    def _kind(self, node: ir.Node) -> LayerKind:
        product = self.analysis.of.get(node)
        if product is not None and product.weight is None:
            return LayerKind.CONV if node.op_type.startswith("Conv") else LayerKind.ATTENTION
        if product is not None:
            return LayerKind.GEMM if node.op_type in ("MatMul", "Gemm") else LayerKind.CONV
        if node.op_type in _NORMS:
            return LayerKind.NORM
        return LayerKind.POOL if node.op_type in _POOLS else LayerKind.POINTWISE

    def _users(self, value: ir.Value) -> set[ir.Node]:
        """The nodes that read a root, be it through views."""
        users: set[ir.Node] = set()
        ends = [value]
        while ends:
            for use in ends.pop().uses():
                if self._is_view(use.node) and use.node in self.order:
                    ends += use.node.outputs
                else:
                    users.add(use.node)
        return users

    def _absorb(self, layer: _Layer) -> None:
        """Let the layer take in the pointwise nodes behind it, as long as one value alone leaves it."""
        if layer.kind is LayerKind.POOL or layer.kind is LayerKind.ATTENTION or self._moves(layer.anchor):
            return
        inside: list[ir.Node] = []
        open_values = {layer.out}
        while len(inside) < _MOST_BEHIND:
            node = self._next_behind(layer, open_values, set(inside))
            if node is None:
                self._absorb_pool(layer)
                return
            inside.append(node)
            open_values.add(node.outputs[0])
            open_values = {v for v in open_values if self._leaves(v) or self._users(v) - set(inside)}
            if len(open_values) == 1:
                layer.nodes += inside
                self.owner.update(dict.fromkeys(inside, layer))
                layer.out = next(iter(open_values))
                inside = []

    def _next_behind(self, layer: _Layer, open_values: set[ir.Value], inside: set[ir.Node]) -> ir.Node | None:
        """The first pointwise node that reads an open value and otherwise only what is there already."""
        users = {user for value in open_values for user in self._users(value)} - inside
        for node in sorted(users, key=lambda n: self.order.get(n, -1)):
            if node not in self.order or node in self.owner or not self._pointwise(node):
                continue
            others = [v for v in map(self._root, self._reads(node)) if v not in open_values]
            if layer.kind is LayerKind.NORM and others:
                continue
            if any(self._edge(node, v) for v in open_values):
                continue
            if all(self._is_there(layer, node, v) for v in others):
                return node
        return None

    def _edge(self, node: ir.Node, root: ir.Value) -> QuantisedEdge | None:
        """The Q/DQ between a root and a node that reads it."""
        places = [i for i, value in enumerate(node.inputs) if value is not None and self._root(value) is root]
        return next((self.edges[node, i] for i in places if (node, i) in self.edges), None) if self.edges else None

    def _is_there(self, layer: _Layer, node: ir.Node, other: ir.Value) -> bool:
        """Whether a layer may take in a node that reads ``other`` as well: it comes before what the layer writes."""
        before = self.born.get(other, (0, -1)) < self.born[layer.out]
        if self.edges is None or layer.kind is not LayerKind.CONV:
            return before
        if self._edge(node, other):
            return True
        producer = other.producer()
        if producer is None or self._kind(producer) is not LayerKind.CONV or layer.out.producer() is not layer.anchor:
            return before
        # Two convolutions: where neither stands before the other, that of the shorter way adds.
        return before if self._feeds(producer, layer.anchor) else not before

    def _feeds(self, before: ir.Node, node: ir.Node) -> bool:
        """Whether a node stands anywhere before another."""
        seen = {node}
        ends = [node]
        while ends:
            for value in ends.pop().inputs:
                producer = value.producer() if value is not None else None
                if producer is before:
                    return True
                if producer is not None and producer not in seen and self.order[producer] > self.order[before]:
                    seen.add(producer)
                    ends.append(producer)
        return False

    def _absorb_pool(self, layer: _Layer) -> None:
        """Let an 8-bit convolution of an image take in the max pool behind it, where that writes 8 bits."""
        users = self._users(layer.out)
        product = self.analysis.of.get(layer.anchor)
        if not self.edges or layer.kind is not LayerKind.CONV or product is None or len(users) != 1:
            return
        pool = next(iter(users))
        if pool.op_type != "MaxPool" or not self._is_image(layer.anchor.inputs[0]) or self._leaves(layer.out):
            return
        readers = self._users(pool.outputs[0])
        edges = {e.scale if (e := self._edge(reader, pool.outputs[0])) else None for reader in readers}
        if (layer.anchor, 0) in self.edges and len(edges) == 1 and None not in edges:
            layer.nodes.append(pool)
            self.owner[pool] = layer
            layer.out = pool.outputs[0]
            layer.pools = True

    def _moves(self, node: ir.Node) -> bool:
        """Whether a node only moves elements, so that it may do so in 8 bits."""
        return self.edges is not None and node.op_type in _COMMUTING

    def _pointwise(self, node: ir.Node) -> bool:
        kind = self._kind(node)
        plain = node not in self.analysis.of and not is_view(node) and node.op_type not in _SEPARATE
        return kind is LayerKind.POINTWISE and plain and len(node.outputs) == 1

    def _work(self, layer: _Layer) -> LayerWork:
        reads = self._boundary(layer)
        rearranged = self._rearranged(layer)
        floats = self._floats(layer.out)
        weights = {v for n in layer.nodes for v in n.inputs if v is not None and constant(v) is not None}
        return LayerWork(
            name=str(layer.anchor.name),
            kind=layer.kind,
            reads=tuple(reads),
            writes=str(self.root[layer.out].name),
            written=self._elements(layer.out),
            macs=sum(p.macs for p in layer.products) * self.images,
            weights=sum(math.prod(self.shapes.get(str(v.name), ())) for v in weights),
            kernels=1 + (layer.anchor.op_type in _TWO_KERNELS) + bool(rearranged),
            moved=sum(self._elements(v) for v in rearranged),
            nodes=tuple(p.name for p in layer.products),
            shape=matrix_shape(layer.products[0], self.shapes, self.images) if len(layer.products) == 1 else None,
            members=tuple(str(node.name) for node in layer.nodes),
            floats=floats,
            image=self._is_image(layer.out),
            commutes=layer.anchor.op_type in _COMMUTING and len(layer.nodes) == 1,
            copies=self.edges is not None and layer.anchor.op_type in _COPIES and len(layer.nodes) == 1,
            pools=layer.pools,
        )

    def _floats(self, value: ir.Value) -> Format:
        """What a number is in a tensor. Where precisions are still to be chosen, floats are FP16 in the end."""
        if value.dtype in _WHOLE and value.producer() is None:
            return Format.INT8
        return Format.FP32 if self.edges is not None and value.dtype is ir.DataType.FLOAT else Format.FP16

    def _boundary(self, layer: _Layer) -> Iterable[Read]:
        """What the layer reads from others: by root, never more than the whole tensor."""
        members = set(layer.nodes)
        seen: dict[tuple[ir.Value, QuantisedEdge | None], tuple[dict[ir.Value, None], bool]] = {}
        for node in layer.nodes:
            for value in self._reads(node):
                source = self._root(value)
                producer = source.producer()
                if producer is not None and producer in members:
                    continue
                edge = self._edge(node, source)
                values, follows = seen.get((source, edge), ({}, True))
                values[value] = None
                seen[source, edge] = values, follows and self._quantised_operand(layer, node)
        return [
            self._read(layer, source, edge, list(values), follows) for (source, edge), (values, follows) in seen.items()
        ]

    def _read(
        self, layer: _Layer, source: ir.Value, edge: QuantisedEdge | None, values: list[ir.Value], follows: bool
    ) -> Read:
        elements = min(sum(map(self._elements, values)), self._elements(source))
        if skips_positions(layer.anchor, self.shapes) and layer.anchor.inputs[0] in values and layer.anchor.inputs[1]:
            out = self._elements(layer.anchor.outputs[0])
            elements = min(elements, out * self.shapes[str(layer.anchor.inputs[1].name)][1])
        if edge is not None:
            return Read(str(source.name), elements, form=edge.form, scale=edge.scale)
        if (form := self._floats(source)) is Format.INT8:
            return Read(str(source.name), elements, form=form)
        return Read(str(source.name), elements, follows and self.edges is None)

    def _quantised_operand(self, layer: _Layer, node: ir.Node) -> bool:
        """A weighted product's activation, or the shortcut that a convolution's kernel adds."""
        if layer.kind is LayerKind.CONV:
            return node is layer.anchor or (node.op_type == "Add" and len(self._reads(node)) == 2)
        return layer.kind is LayerKind.GEMM and node is layer.anchor

    def _rearranged(self, layer: _Layer) -> list[ir.Value]:
        """Operands of attention that are parts of one tensor (packed Q, K, V), and so are copied apart first."""
        operands = layer.block.operands if layer.block else ()
        roots = [self._root(v) for v in operands]
        return [v for v, root in zip(operands, roots, strict=True) if root is not v and roots.count(root) > 1]

    def _input(self, value: ir.Value) -> LayerWork:
        """The kernel that casts an FP32 input; inputs of other types are read as they are.

        Where formats are known, a Cast of the graph's own does that, or the kernel that quantises.
        """
        size = self._elements(value)
        if self.edges is not None or value.dtype is not ir.DataType.FLOAT:
            return LayerWork(
                str(value.name), LayerKind.INPUT, (), str(value.name), size, kernels=0,
                floats=self._floats(value), image=self._is_image(value),
            )  # fmt: skip
        return LayerWork(
            f"{value.name} (cast)",
            LayerKind.POINTWISE,
            (Read(f"{value.name} (FP32)", size, form=Format.FP32),),
            str(value.name),
            size,
            image=self._is_image(value),
            copies=True,
        )

    def _outputs(self) -> Iterable[LayerWork]:
        """The kernels that cast to FP32 outputs. Where formats are known, a Cast of the graph's own does that."""
        found = dict.fromkeys(self.model.graph.outputs) if self.edges is None else {}
        for value in found:
            root = self._root(value)
            if value.dtype is ir.DataType.FLOAT and root.producer() is not None and value in self.analysis.data:
                size = self._elements(value)
                yield LayerWork(
                    f"{value.name} (cast)",
                    LayerKind.POINTWISE,
                    (Read(str(root.name), size),),
                    f"{value.name} (FP32)",
                    size,
                    floats=Format.FP32,
                    copies=True,
                )

    def _elements(self, value: ir.Value) -> int:
        shape = self.shapes.get(str(value.name))
        return 0 if shape is None else math.prod(shape)
