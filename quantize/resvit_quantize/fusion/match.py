"""What a search for fusable parts finds: matches and refusals."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.attention import AttentionConfig
from resvit_engines.kernels.bridge import BridgeConfig
from resvit_engines.kernels.deformable import DeformableConfig
from resvit_engines.kernels.numerics import EIGHT_BIT
from resvit_quantize.graph.network import constant

Config: TypeAlias = AttentionConfig | BridgeConfig | DeformableConfig


class Kind(str, enum.Enum):
    """What a node of ours takes over."""

    ATTENTION = "attention"
    BRIDGE = "bridge"
    DEFORMABLE = "deformable attention"


class RefusedError(Exception):
    """A part of the graph is left as it is; the text says why."""


@dataclass(frozen=True)
class Match:
    """One part that became, or can become, one node.

    ``nodes`` are those that it replaces, ``shapes`` those of its inputs at one image.
    """

    kind: Kind
    name: str
    op_type: str
    config: Config
    shapes: tuple[tuple[int, ...], ...]
    nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind.value, "name": self.name, "op_type": self.op_type, "replaces": list(self.nodes)}


@dataclass(frozen=True)
class Refusal:
    """One part that stays, and why."""

    kind: Kind
    name: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind.value, "name": self.name, "reason": self.reason}


@dataclass(frozen=True)
class FusionReport:
    """All that was found in one graph."""

    matches: tuple[Match, ...]
    refusals: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a run's ``fusion.json``."""
        return {
            "matches": [match.to_json() for match in self.matches],
            "refusals": [refusal.to_json() for refusal in self.refusals],
        }


TYPES = {
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT: "fp32",
    ir.DataType.BOOL: "bool",
}
"""Element types of ONNX by the kernels' names."""
ONNX_TYPES = {name: int(dtype) for dtype, name in TYPES.items()}


def type_of(value: ir.Value | None) -> str:
    """A value's element type by the kernels' name; ``unknown`` where it is none of theirs."""
    dtype = value.dtype if value is not None else None
    return "unknown" if dtype is None else TYPES.get(dtype, dtype.name.lower())


@dataclass(frozen=True, eq=False)
class Narrow:
    """A quantisation to one scale and zero points of zero, which is all that a kernel knows, or its inverse."""

    node: ir.Node
    dtype: str
    scale: float


def quantised_behind(value: ir.Value) -> Narrow | None:
    """The QuantizeLinear that alone reads a value, where a kernel can take it in."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "QuantizeLinear":
        return None
    return _narrow(uses[0].node, uses[0].node.outputs[0])


def dequantised_before(value: ir.Value) -> Narrow | None:
    """The DequantizeLinear that makes a value, where a kernel can read the 8-bit tensor in front of it instead."""
    node = value.producer()
    return None if node is None or node.op_type != "DequantizeLinear" else _narrow(node, node.inputs[0])


def is_symmetric(node: ir.Node) -> bool:
    """Whether a quantisation or its inverse has zeros for zero points."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(zero)
    return zero is None or (array is not None and not np.any(array))


def _narrow(node: ir.Node, stored: ir.Value | None) -> Narrow | None:
    scale, dtype = constant(node.inputs[1]), type_of(stored)
    if scale is None or scale.size != 1 or dtype not in EIGHT_BIT or not is_symmetric(node):
        return None
    return Narrow(node, dtype, float(scale.item()))
