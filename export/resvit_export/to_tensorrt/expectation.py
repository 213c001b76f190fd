"""What a quantised ONNX asks of the compiler: Q/DQ pairs and their readers, attention blocks, plugin nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from resvit_engines.audit.expectation import Attention, Consumer, Expectation, Plugin, QdqPair
from resvit_engines.plugins.names import DOMAIN
from resvit_export.to_onnx.onnx_file import bounded_model, reading
from resvit_quantize.graph.regions import is_view

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "MultiHeadAttention"})
_WHOLE = frozenset({"Attention", "MultiHeadAttention"})
_MASKS = frozenset({"Add", "Where"})
_PLAIN = frozenset({"Mul", "Div", "Cast", "QuantizeLinear", "DequantizeLinear", "Dropout", "Identity"})
"""What may stand between the products of one attention kernel, beside mask, softmax and views."""
_LONGEST = 14
"""Nodes between a product and the softmax."""
_TYPES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}


def expectation_from_onnx(path: Path, batch: int = 1) -> Expectation:
    """Read what the graph asks for; lengths and head sizes are those at ``batch``.

    Raises:
        ResvitError: INPUT where the file is no ONNX model.
    """
    graph = _Graph(_shaped(path, batch))
    return Expectation(
        tuple(graph.pairs()),
        tuple(graph.attention()),
        tuple(Plugin(_name(node), node.op_type) for node in graph.nodes if _is_plugin(node)),
    )


def _shaped(path: Path, batch: int) -> ir.Model:
    """The model with types and shapes at a fixed batch, as far as they can be told."""
    proto = bounded_model(path)
    with reading(path):
        return _at_batch(ir.serde.deserialize_model(proto), batch)


def _at_batch(model: ir.Model, batch: int) -> ir.Model:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    symbols = {str(v.shape[0]) for v in model.graph.inputs if v.shape and not isinstance(v.shape[0], int)}
    for value in (*model.graph.inputs, *model.graph.outputs, *(o for n in model.graph for o in n.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([batch if str(size) in symbols else size for size in value.shape])
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return model


def values_of_inputs(model: ir.Model) -> set[ir.Value]:
    """The values that depend on the content of a graph input; shapes do not."""
    data: set[ir.Value] = set(model.graph.inputs) - set(model.graph.initializers.values())
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type not in ("Shape", "Size") and any(value in data for value in node.inputs if value):
            data.update(node.outputs)
    return data


def attention_chains(model: ir.Model) -> tuple[tuple[ir.Node, ...], ...]:
    """The nodes of every attention that TensorRT computes: from its first product to its last, or ``Attention``."""
    return tuple(map(tuple, _Graph(model).chains()))


class _Graph:
    def __init__(self, model: ir.Model) -> None:
        self.nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        self.data = values_of_inputs(model)

    def pairs(self) -> Iterator[QdqPair]:
        """Every DequantizeLinear whose result is used."""
        for node in self.nodes:
            source = node.inputs[0] if node.inputs else None
            if node.op_type != "DequantizeLinear" or source is None:
                continue
            quantizer = source.producer()
            if quantizer is not None and quantizer.op_type != "QuantizeLinear":
                continue
            tensor = quantizer.inputs[0] if quantizer else source
            readers = tuple(dict.fromkeys(_readers(node.outputs[0])))
            if readers and tensor is not None:
                yield QdqPair(
                    str(tensor.name),
                    _name(quantizer) if quantizer else None,
                    _name(node),
                    _precision(node),
                    tensor not in self.data,
                    readers,
                )

    def attention(self) -> Iterator[Attention]:
        """Every ``Attention`` node, and every softmax between two products of computed tensors."""
        for chain in self.chains():
            yield self._whole(chain[0]) if chain[0].op_type in _WHOLE else self._block(chain)

    def chains(self) -> Iterator[list[ir.Node]]:
        """The nodes of each."""
        for node in self.nodes:
            if node.op_type in _WHOLE and not _is_plugin(node):
                yield [node]
            elif node.op_type == "Softmax" and node.inputs[0] is not None:
                before = self._back(node.inputs[0], _LONGEST)
                behind = self._forward(node.outputs[0], _LONGEST)
                if before and behind:
                    yield [*before, node, *behind]

    def _whole(self, node: ir.Node) -> Attention:
        query, key = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        heads = node.attributes.get_int("q_num_heads", 0) or node.attributes.get_int("num_heads", 0)
        width = _size(query, -1)
        if query is not None and query.shape is not None and len(query.shape) == 3 and heads and width:
            width //= heads
        causal = node.attributes.get_int("is_causal", 0)
        operands = [_dequantizer(value) for value in node.inputs[:2]]
        places = ("operands",) if all(operands) else ()
        return Attention(
            name=_module(node),
            nodes=(_name(node),),
            head_size=width,
            query_length=_size(query, -2),
            key_length=_size(key, -2),
            precision=_precision(operands[0]) if places and operands[0] else _type(query),
            mask="causal" if causal else self._mask([mask]),
            whole=True,
            quantized=places,
        )

    def _block(self, chain: list[ir.Node]) -> Attention:
        first, last = chain[0], chain[-1]
        inner = [node for node in chain[1:-1] if not is_view(node)]
        operands = [_dequantizer(value) for value in first.inputs[:2]]
        places = ["operands"] if all(operands) else []
        places += ["softmax"] if all(_dequantizer(value) for value in last.inputs[:2]) else []
        places += ["output"] if _is_quantised(last.outputs[0]) else []
        masks = [v for node in inner if node.op_type in _MASKS for v in node.inputs if v and not _made_in(v, chain)]
        allowed = _MASKS | _PLAIN | {"Softmax"}
        return Attention(
            name=_module(next(node for node in chain if node.op_type == "Softmax")),
            nodes=tuple(_name(node) for node in (first, *inner, last)),
            head_size=_size(first.inputs[0], -1),
            query_length=_size(first.outputs[0], -2),
            key_length=_size(first.outputs[0], -1),
            precision=_precision(operands[0]) if "operands" in places and operands[0] else _type(first.inputs[0]),
            mask=self._mask(masks),
            whole=False,
            quantized=tuple(places),
            foreign=tuple(dict.fromkeys(node.op_type for node in inner if node.op_type not in allowed)),
        )

    def _mask(self, masks: Sequence[ir.Value | None]) -> str:
        there = [value for value in masks if value is not None]
        if not there:
            return "none"
        return "computed" if any(value in self.data for value in there) else "constant"

    def _is_mix(self, node: ir.Node) -> bool:
        """Whether a node multiplies two computed tensors."""
        return node.op_type == "MatMul" and all(value in self.data for value in node.inputs[:2])

    def _back(self, value: ir.Value, steps: int) -> list[ir.Node]:
        """The chain of nodes from the product behind which ``value`` stands, that first; empty if there is none."""
        node = value.producer()
        if node is None or not steps:
            return []
        if self._is_mix(node):
            return [node]
        if node.op_type in _PRODUCTS or node.op_type == "Softmax":
            return []
        for source in node.inputs:
            if source is not None and source in self.data and (found := self._back(source, steps - 1)):
                return [*found, node]
        return []

    def _forward(self, value: ir.Value, steps: int) -> list[ir.Node]:
        """The chain of nodes up to the product that reads ``value``, that last; empty if there is none."""
        for use in value.uses() if steps else ():
            node = use.node
            if self._is_mix(node):
                return [node]
            if node.op_type not in _PRODUCTS and node.op_type != "Softmax" and node.outputs:
                found = self._forward(node.outputs[0], steps - 1)
                if found:
                    return [node, *found]
        return []


def _readers(value: ir.Value) -> Iterator[Consumer]:
    """What computes with a value, views between them left out."""
    for use in value.uses():
        node = use.node
        if is_view(node):
            for output in node.outputs:
                yield from _readers(output)
        elif node.op_type != "QuantizeLinear":
            yield Consumer(_name(node), node.op_type, node.op_type in _PRODUCTS)


def _is_quantised(value: ir.Value) -> bool:
    return any(
        use.node.op_type == "QuantizeLinear"
        or (is_view(use.node) and any(_is_quantised(out) for out in use.node.outputs))
        for use in value.uses()
    )


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear in front of a value, views between them left out."""
    node = value.producer() if value is not None else None
    while node is not None and is_view(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _precision(dequantizer: ir.Node) -> str:
    """The stored type: that of the zero point, else of the tensor itself."""
    zero = dequantizer.inputs[2] if len(dequantizer.inputs) > 2 else None
    for value in (zero, dequantizer.inputs[0]):
        dtype = value.dtype if value is not None else None
        if dtype is not None:
            return _TYPES.get(dtype, dtype.name.lower())
    return "uint8"


def _type(value: ir.Value | None) -> str:
    dtype = value.dtype if value is not None else None
    return "unknown" if dtype is None else _TYPES.get(dtype, dtype.name.lower())


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) < -axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _made_in(value: ir.Value, chain: list[ir.Node]) -> bool:
    return value.producer() in chain


def _is_plugin(node: ir.Node) -> bool:
    return node.domain == DOMAIN or "plugin_namespace" in node.attributes


def _name(node: ir.Node) -> str:
    """The node's name as TensorRT's parser gives it: after its first output where it has none."""
    return node.name or (f"node_of_{node.outputs[0].name}" if node.outputs else "")


def _module(node: ir.Node) -> str:
    return _name(node).rpartition("/")[0] or _name(node)
