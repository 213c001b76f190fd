"""How much of a network a quantised graph really computes in 8 bits, whoever wrote the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from resvit_quantize.graph.analysis import Product, analyse
from resvit_quantize.graph.network import constant, network_from_onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
EIGHT_BITS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedMatMul", "FusedGemm"})
# What only moves values, or picks some of them: 8-bit values in, values of the same 8-bit grid out.
_MOVES = frozenset(
    {"Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Split"}
    | {"Gather", "MaxPool", "DepthToSpace", "SpaceToDepth", "Pad"}
)


@dataclass(frozen=True)
class Coverage:
    """``share`` of the multiply-accumulates of convolutions and weighted products that read 8 bits on both sides.

    ``attention`` is the same for products of two activations, which no goal counts.
    """

    share: float
    attention: float
    left: tuple[str, ...]
    """Float graph's names of the products that do not, largest first."""


def weighted_macs(model: Path) -> list[tuple[str, int]]:
    """Name and multiply-accumulates for one image of each convolution and weighted product of a float graph."""
    return [(product.name, product.macs) for product in _weighted(network_from_onnx(model))]


def coverage(model: Path, quantized: Path) -> Coverage:
    """Compare a quantised graph with the float graph that it was made from."""
    products, graph = analyse(network_from_onnx(model)).products, read_graph(quantized)
    weighted = [product for product in products if product.weight is not None]
    partners = matched(weighted, graph)
    named: dict[str | None, ir.Node] = {node.name: node for node in graph.graph}
    others = [product for product in products if product.weight is None]
    left = [p for p in weighted if not in_eight_bits(partners.get(p.name))]
    left.sort(key=lambda product: -product.macs)
    in_attention = [p for p in others if not in_eight_bits(named.get(p.name))]
    return Coverage(_share(weighted, left), _share(others, in_attention), tuple(product.name for product in left))


def read_graph(path: Path) -> ir.Model:
    """A graph from anyone's hand, its constants as initialisers and its functions inlined."""
    model = ir.load(path)
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    return model


def matched(products: list[Product], model: ir.Model) -> dict[str, ir.Node]:
    """For each float product the node that computes it: by name, by output, else by the weight's shape in order.

    Quantisers rename nodes, fuse biases (MatMul and Add to Gemm) and store weights transposed; none changes the
    order of two layers of equal shape.
    """
    nodes = [n for n in model.graph if n.op_type in _PRODUCTS and weight_of(n) is not None]
    found: dict[str, ir.Node] = {}
    rules: list[tuple[Callable[[Product], object], Callable[[ir.Node], object]]] = [
        (lambda p: p.name, lambda n: n.name),
        (lambda p: p.node.outputs[0].name, lambda n: n.outputs[0].name),
        (lambda p: _signature(p.weight), lambda n: _signature(weight_of(n))),
    ]
    for of_product, of_node in rules:
        taken = set(found.values())
        free: dict[object, list[ir.Node]] = {}
        for node in nodes:
            if node not in taken:
                free.setdefault(of_node(node), []).append(node)
        for product in products:
            if product.name not in found and (candidates := free.get(of_product(product))):
                found[product.name] = candidates.pop(0)
    return found


def in_eight_bits(node: ir.Node | None) -> bool:
    """Whether both operands come out of a DequantizeLinear that reads 8 bits."""
    return node is not None and all(_reads_eight_bits(value) for value in node.inputs[:2])


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initialiser behind a product's second operand, through Q/DQ and moves; ``None`` for a computed one."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in _MOVES | {QUANTIZE, DEQUANTIZE}:
            return None
        value = producer.inputs[0]
    return value if value is not None and constant(value) is not None else None


def _share(products: list[Product], left: list[Product]) -> float:
    total = sum(product.macs for product in products)
    return 1 - sum(product.macs for product in left) / total if total else 0.0


def _weighted(network: ir.Model) -> list[Product]:
    return [product for product in analyse(network).products if product.weight is not None]


def _signature(weight: ir.Value | None) -> tuple[int, ...]:
    array = constant(weight)
    return () if array is None else tuple(sorted(size for size in array.shape if size != 1))


def _reads_eight_bits(value: ir.Value | None) -> bool:
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == DEQUANTIZE:
            return stored_type(producer) in EIGHT_BITS
        if producer.op_type == "Concat":
            return all(_reads_eight_bits(part) for part in producer.inputs)
        if producer.op_type not in _MOVES:
            return False
        value = producer.inputs[0]
    return False


def stored_type(dequantize: ir.Node) -> ir.DataType | None:
    """What a DequantizeLinear reads; type inference is not relied upon."""
    value = dequantize.inputs[0]
    while value is not None:
        if value.const_value is not None:
            return value.const_value.dtype
        producer = value.producer()
        if producer is None or producer.op_type not in _MOVES | {QUANTIZE}:
            break
        if producer.op_type == QUANTIZE:
            zero = producer.inputs[2] if len(producer.inputs) > 2 else None
            if zero is not None and zero.const_value is not None:
                return zero.const_value.dtype
            wanted = producer.attributes.get("output_dtype")
            return ir.DataType(wanted.as_int()) if wanted is not None else ir.DataType.UINT8
        value = producer.inputs[0]
    return value.dtype if value is not None else None
