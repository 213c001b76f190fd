"""Attention's scale in the copy that TensorRT reads: on the queries alone, where it errs on queries and keys scaled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_engines.targets.faults import Pattern, is_rewritten
from resvit_engines.targets.table import Target
from resvit_export.to_tensorrt.expectation import attention_chains
from resvit_quantize.graph.network import add_initializer, constant
from resvit_quantize.graph.regions import is_view


@dataclass(frozen=True, eq=False)
class Scaling:
    """A node that multiplies ``value`` by the scalar ``factor``; ``place`` is the input that holds the constant."""

    node: ir.Node
    value: ir.Value
    place: int
    factor: float


def both_scaled(first: ir.Node) -> tuple[Scaling, Scaling] | None:
    """How queries and keys are scaled in front of the first product of attention; None unless both are, by constants.

    PyTorch exports ``scaled_dot_product_attention`` so: each is multiplied by the root of the scale.
    """
    query, key = (_scaling(value) for value in first.inputs[:2])
    return (query, key) if query is not None and key is not None else None


def rewrite_scaling(network: ir.Model, target: Target) -> int:
    """Scale the queries alone, in place, where the target's TensorRT errs on both; returns how many were changed."""
    if not is_rewritten(target, Pattern.BOTH_SCALED):
        return 0
    count = 0
    for first, *_ in attention_chains(network):
        found = both_scaled(first) if first.op_type == "MatMul" else None
        if found is not None:
            _join(network, *found)
            count += 1
    return count


def _join(network: ir.Model, query: Scaling, key: Scaling) -> None:
    factor = query.factor * key.factor
    held = constant(query.node.inputs[query.place])
    assert held is not None
    said = np.full(held.shape, factor if query.node.op_type == "Mul" else 1.0 / factor, held.dtype)
    query.node.replace_input_with(query.place, add_initializer(network, f"{query.node.name}/scale", said))
    key.node.outputs[0].replace_all_uses_with(key.value)
    key.node.graph.remove(key.node, safe=True)  # type: ignore[union-attr]  # it is a node of the network's graph


def _scaling(value: ir.Value | None) -> Scaling | None:
    """The scaling in front of a value, with views between them, that nothing else reads."""
    while value is not None and _is_read_once(value) and (node := value.producer()) is not None:
        if node.op_type in ("Mul", "Div") and not node.domain and len(node.inputs) == 2:
            for place in (1, 0) if node.op_type == "Mul" else (1,):
                held, other = constant(node.inputs[place]), node.inputs[1 - place]
                if held is not None and held.size == 1 and other is not None and held.item():
                    factor = float(held.item())
                    return Scaling(node, other, place, factor if node.op_type == "Mul" else 1.0 / factor)
            return None
        if not is_view(node):
            return None
        value = node.inputs[0]
    return None


def _is_read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()
