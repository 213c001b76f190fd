"""Parts of a graph that run as one: views that cost nothing, and attention from Q K^T to P V."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from resvit_quantize.graph.analysis import Analysis, Product
from resvit_quantize.graph.network import constant

_RESHAPED = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
_PICKED = frozenset({"Cast", "Split", "Slice", "Gather"})
_LONGEST = 12
"""Nodes between Q K^T and P V: scale, mask, softmax, casts."""


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One attention: its products (one ``Attention`` node, or Q K^T and P V), and all of its nodes but views."""

    products: tuple[Product, ...]
    nodes: tuple[ir.Node, ...]
    operands: tuple[ir.Value, ...]
    """Q, K and V as they enter, before any scaling that belongs to the block."""

    @property
    def output(self) -> ir.Value:
        """What P V gives."""
        return self.products[-1].node.outputs[0]


def is_view(node: ir.Node) -> bool:
    """Whether a node only rearranges or picks elements; TensorRT does that while reading, or in the kernel before."""
    return node.op_type in _RESHAPED | _PICKED and not node.domain


def attention_blocks(analysis: Analysis) -> tuple[AttentionBlock, ...]:
    """All attention blocks, in order; a product of two computed tensors without a softmax behind it is none."""
    blocks: list[AttentionBlock] = []
    taken: set[ir.Node] = set()
    for product in analysis.products:
        if product.weight is not None or product.node in taken:
            continue
        block = _block(product, analysis)
        if block is not None:
            blocks.append(block)
            taken.update(block.nodes)
    return tuple(blocks)


def _block(product: Product, analysis: Analysis) -> AttentionBlock | None:
    node = product.node
    if node.op_type in ("Attention", "MultiHeadAttention"):
        whole = tuple(v for v in node.inputs[:3] if v is not None)
        return AttentionBlock((product,), (node,), whole)
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    between = _until_product(node, analysis)
    if not any(inner.op_type == "Softmax" for inner in between):
        return None
    mix = analysis.of[between[-1]]
    behind = between[-2].outputs[0]
    heads = [_unscaled(v, analysis) for v in node.inputs[:2]]
    value = next((v for v in mix.node.inputs[:2] if v is not behind), None)
    nodes = (*(n for _, scalings in heads for n in scalings), node, *(n for n in between if not is_view(n)))
    operands = tuple(v for v in (*(v for v, _ in heads), value) if v is not None)
    return AttentionBlock((product, mix), nodes, operands)


def next_in_chain(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value; of a guarded softmax, the Where; else None.

    A guard is Where(IsNaN(p), 0, p): PyTorch's exporter writes it behind a masked softmax, for rows that see nothing.
    """
    readers = list(dict.fromkeys(use.node for use in value.uses()))
    if len(readers) == 2:
        tests = [node for node in readers if node.op_type == "IsNaN" and not node.domain]
        readers = [
            node for node in readers if is_guard(node, value) and node.inputs[0] in [t.outputs[0] for t in tests]
        ]
    elif len(value.uses()) != 1:
        return None
    return readers[0] if len(readers) == 1 else None


def is_guard(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node is Where(..., 0, p) for the result p of a softmax, which ``next_in_chain`` has looked at."""
    producer = value.producer()
    if node.op_type != "Where" or node.domain or producer is None or producer.op_type != "Softmax":
        return False
    zero = constant(node.inputs[1])
    return zero is not None and not zero.any() and zero.size == 1 and node.inputs[2] is value


def _until_product(node: ir.Node, analysis: Analysis) -> list[ir.Node]:
    """The chain behind ``node``, up to and with the next product of two computed tensors; else empty.

    Each is read by nothing but the next.
    """
    chain: list[ir.Node] = []
    here = node
    while len(chain) <= _LONGEST:
        following = next_in_chain(here.outputs[0])
        if following is None:
            return []
        here = following
        chain.append(here)
        if here in analysis.of:
            return chain if analysis.of[here].weight is None else []
    return []


def _unscaled(value: ir.Value | None, analysis: Analysis) -> tuple[ir.Value | None, list[ir.Node]]:
    """The operand in front of multiplications by a constant that only it passes through, and those nodes."""
    scalings: list[ir.Node] = []
    here, found = value, value
    while here is not None and (producer := here.producer()) is not None and len(here.uses()) == 1:
        inputs = [v for v in producer.inputs if v is not None and v in analysis.data]
        if len(inputs) != 1:
            break
        if producer.op_type in ("Mul", "Div"):
            scalings.append(producer)
            found = inputs[0]
        elif not is_view(producer):
            break
        here = inputs[0]
    return found, scalings
