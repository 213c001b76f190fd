"""What a quantised graph holds, read from the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir as ir

from resvit_quantize.graph.analysis import Analysis, HybridPart
from resvit_quantize.qdq.half import KeptFloat
from resvit_quantize.qdq.held_back import HeldBackCheck

_NAMES = {
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT: "fp32",
}
_VIEWS = frozenset({"Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze"})


Suit: TypeAlias = Callable[[Path], "ir.Model | None"]
"""Rewrites a quantised ONNX file in place for a builder; the graph that it then holds, None where nothing changed."""


def as_it_is(out: Path) -> None:
    """A ``Suit`` that changes nothing."""
    del out


@dataclass(frozen=True)
class PartReport:
    """Convolutions and weighted matrix products of one part of the network, counted for one image."""

    nodes: int
    quantized_nodes: int
    macs: int
    quantized_macs: int


@dataclass(frozen=True)
class NodeReport:
    """One matrix product: the precision of its operands, and why."""

    name: str
    op: str
    group: str
    macs: int
    weighted: bool
    """Whether it multiplies by a weight; the products inside attention do not, and no share counts them."""
    precision: str
    reason: str


@dataclass(frozen=True)
class SmoothedTensor:
    """A tensor whose channels were scaled against its readers' weights, and the predicted gain in dB."""

    tensor: str
    strength: float
    gain_db: float


@dataclass(frozen=True)
class QuantizeReport:
    """What became of each matrix product; ``fp32`` lists all nodes that FP16 could not hold."""

    precision: str
    quantizer: str
    estimator: str
    groups: dict[str, PartReport]
    macs_share: float
    """Share of the multiply-accumulates of convolutions and weighted products that run in 8 bits, 0 to 1."""
    nodes: tuple[NodeReport, ...]
    fp32: tuple[KeptFloat, ...]
    effort: str
    clips: dict[str, float]
    """The clip of each quantised tensor that was not smoothed: beyond it, values are cut."""
    smoothed: tuple[SmoothedTensor, ...]
    bytes_before: int
    bytes_after: int
    held_back: HeldBackCheck | None = None
    """What was compared on held-back images; None where nothing was."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "nodes": [asdict(n) for n in self.nodes],
            "fp32": [asdict(n) for n in self.fp32],
            "smoothed": [asdict(n) for n in self.smoothed],
            "held_back": self.held_back.to_json() if self.held_back else None,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> QuantizeReport:
        """Read what ``to_json`` wrote."""
        parts = {
            "groups": {name: PartReport(**item) for name, item in document["groups"].items()},
            "nodes": tuple(NodeReport(**item) for item in document["nodes"]),
            "fp32": tuple(KeptFloat(**item) for item in document["fp32"]),
            "smoothed": tuple(SmoothedTensor(**item) for item in document["smoothed"]),
            "held_back": HeldBackCheck.from_json(held) if (held := document.get("held_back")) else None,
        }
        return cls(**{**document, **parts})


def report_from_graph(
    analysis: Analysis,
    model: ir.Model,
    reasons: Mapping[str, str],
    fp32: Sequence[KeptFloat],
    *,
    precision: str,
    quantizer: str,
    estimator: str,
    sizes: tuple[int, int],
    effort: str = "fast",
    clips: Mapping[str, float] | None = None,
    smoothed: Sequence[SmoothedTensor] = (),
    held_back: HeldBackCheck | None = None,
) -> QuantizeReport:
    """Compare the float graph's products with the nodes of the same name (or output) in ``model``.

    ``sizes`` are the files' bytes before and after.
    """
    found = {node.name: node for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    found_by_output = {o.name: node for node in found.values() for o in node.outputs}
    nodes = []
    for product in analysis.products:
        node = found.get(product.name) or found_by_output.get(product.node.outputs[0].name)
        kind = "unknown" if node is None else _operand_precision(node, product.weight is not None)
        nodes.append(
            NodeReport(
                product.name,
                product.node.op_type,
                product.part.value,
                product.macs,
                product.weight is not None,
                kind,
                reasons.get(product.name, ""),
            )
        )
    parts = {part.value: _count([n for n in nodes if n.weighted and n.group == part.value]) for part in HybridPart}
    macs = sum(part.macs for part in parts.values())
    quantized = sum(part.quantized_macs for part in parts.values())
    return QuantizeReport(
        precision=precision,
        quantizer=quantizer,
        estimator=estimator,
        groups=parts,
        macs_share=quantized / macs if macs else 0.0,
        nodes=tuple(nodes),
        fp32=tuple(fp32),
        effort=effort,
        clips=dict(clips or {}),
        smoothed=tuple(smoothed),
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        held_back=held_back,
    )


def _count(nodes: list[NodeReport]) -> PartReport:
    quantized = [node for node in nodes if node.precision in ("int8", "fp8")]
    return PartReport(len(nodes), len(quantized), sum(n.macs for n in nodes), sum(n.macs for n in quantized))


def _operand_precision(node: ir.Node, weighted: bool) -> str:
    """8 bits only where both operands are dequantised from 8 bits."""
    kinds = {_stored_type(value) for value in node.inputs[:2]}
    if len(kinds) == 1 or not weighted:
        return kinds.pop() if len(kinds) == 1 else _NAMES.get(_dtype(node.inputs[0]), "unknown")
    return _NAMES.get(_dtype(node.inputs[0]), "unknown")


def _stored_type(value: ir.Value | None) -> str:
    dtype = _dtype(value)
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "DequantizeLinear":
            dtype = _dtype(producer.inputs[0])
            break
        if producer.op_type not in _VIEWS:
            break
        value = producer.inputs[0]
    return _NAMES.get(dtype, "unknown")


def _dtype(value: ir.Value | None) -> ir.DataType:
    return (value.dtype if value is not None else None) or ir.DataType.UNDEFINED
