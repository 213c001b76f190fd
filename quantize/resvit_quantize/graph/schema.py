"""What an ONNX operator's schema says about running it in FP16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

_TYPED_BY_ATTRIBUTE = ("dtype", "output_datatype", "output_dtype")


@dataclass(frozen=True)
class Slots:
    """For each input and output of a node, whether the schema lets it be FP16."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


def half_slots(node: ir.Node, opset_imports: dict[str, int]) -> Slots | str:
    """Which slots turn from FP32 to FP16 together, or the reason why none may.

    Slots that share a type variable turn together; a slot of fixed type (the scales of Resize, the mean that
    LayerNormalization returns) keeps its type.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opset_imports.get(node.domain, opset_imports.get(domain, 0))
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return f"no schema is known for {node.domain or 'ai.onnx'}::{node.op_type}"
    if any(name in node.attributes for name in _TYPED_BY_ATTRIBUTE):
        return f"{node.op_type} fixes its output type by an attribute"
    halves = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    inputs = tuple(_type(schema.inputs, i) in halves for i in range(len(node.inputs)))
    outputs = tuple(_type(schema.outputs, i) in halves for i in range(len(node.outputs)))
    slots = zip((*node.inputs, *node.outputs), (*inputs, *outputs), strict=True)
    if not any(may and is_float(value) for value, may in slots):
        return f"{node.op_type} has no FP16 form"
    return Slots(inputs, outputs)


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is an FP32 tensor."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def is_opaque(value: ir.Value | None) -> bool:
    """Whether a value is a sequence, an optional, or of unknown type."""
    return value is not None and not isinstance(value.type, ir.TensorType)


def holds_graph(node: ir.Node) -> bool:
    """Whether a node is a control-flow operator with subgraphs."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _type(formal: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """The type variable of slot ``index``; the last formal parameter may be variadic."""
    return str(formal[min(index, len(formal) - 1)].type_str) if formal else ""
