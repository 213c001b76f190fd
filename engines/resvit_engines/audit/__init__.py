"""What the compiler made of the graph: which Q/DQ and which attention fused, held against what the graph asks for."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.audit.attention_rules import Breach, breaches_of
from resvit_engines.audit.expectation import Attention, Consumer, Expectation, Plugin, QdqPair
from resvit_engines.audit.kernel_totals import PRODUCTS, KernelTotals, kernel_totals
from resvit_engines.audit.kernels import EIGHT_BITS, Kernel, Work

_OPAQUE = ("myelin",)
"""Layer types that hold kernels which the listing does not show."""


class Fate(str, enum.Enum):
    """What became of a Q/DQ pair where one node reads it."""

    CONSUMED = "consumed"
    """The kernel that computes the reader takes the 8-bit tensor: for a product, multiplies in 8 bits."""
    INSIDE = "inside"
    """Both happen inside one kernel: it rounds, but nothing is stored or multiplied in 8 bits."""
    HIGHER = "higher"
    """The product runs in a higher precision, though its input is quantised."""
    SEPARATE = "separate"
    """Dequantising is a kernel of its own."""
    UNLISTED = "unlisted"
    """No kernel names the reader: folded away, or inside a region that the listing does not open."""


_WORST = (Fate.SEPARATE, Fate.HIGHER, Fate.UNLISTED, Fate.INSIDE, Fate.CONSUMED)


@dataclass(frozen=True)
class Subject:
    """What was audited: target, compute capability, builder and its version, and the batch that it was compiled for.

    ``stands_in`` says for what, where the compiled engine is not the target's own; empty otherwise.
    """

    target: str
    sm: int | None
    builder: str
    version: str
    batch: int
    stands_in: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "sm": self.sm,
            "builder": self.builder,
            "builder_version": self.version,
            "batch": self.batch,
            "stands_in": self.stands_in,
        }


@dataclass(frozen=True)
class PairAudit:
    """The fate of one pair at each of its readers, with the kernels; ``alone`` is a kernel that only quantises it."""

    pair: QdqPair
    readers: tuple[tuple[Consumer, Fate, str], ...]
    alone: str

    @property
    def fate(self) -> Fate:
        """The worst of its readers'."""
        fates = {fate for _, fate, _ in self.readers}
        return next((fate for fate in _WORST if fate in fates), Fate.UNLISTED)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "tensor": self.pair.tensor,
            "precision": self.pair.precision,
            "weight": self.pair.weight,
            "fate": self.fate.value,
            "quantized_alone_by": self.alone,
            "readers": [
                {"node": reader.node, "op": reader.op, "fate": fate.value, "kernel": kernel}
                for reader, fate, kernel in self.readers
            ],
        }


@dataclass(frozen=True)
class AttentionAudit:
    """One block: the kernel that computes all of it, or None, and how many kernels touch it.

    ``fused`` is None where the listing does not open the region that the block lies in.
    """

    block: Attention
    fused: bool | None
    kernel: str
    precision: str
    kernels: int
    moves: int
    breaches: tuple[Breach, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        block = self.block
        return {
            "name": block.name,
            "fused": self.fused,
            "kernel": self.kernel,
            "precision": self.precision,
            "kernels": self.kernels,
            "moves": self.moves,
            "head_size": block.head_size,
            "lengths": [block.query_length, block.key_length],
            "mask": block.mask,
            "expected_precision": block.precision,
            "breaches": [{"rule": b.rule, "problem": b.problem, "mend": b.mend} for b in self.breaches],
        }


@dataclass(frozen=True)
class Moved:
    """A kernel that computes nothing, or one that works in FP32: what it does, its bytes and nodes."""

    kernel: str
    what: str
    bytes: int | None
    layers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kernel": self.kernel, "what": self.what, "bytes": self.bytes, "layers": list(self.layers)}


@dataclass(frozen=True)
class FusionAudit:
    """What fused and what did not, in one engine, beside the FP16 engine of the same network where there is one."""

    subject: Subject
    pairs: tuple[PairAudit, ...]
    attention: tuple[AttentionAudit, ...]
    reformats: tuple[Moved, ...]
    fp32: tuple[Moved, ...]
    plugins_expected: tuple[Plugin, ...]
    plugins_missing: tuple[Plugin, ...]
    plugins_found: int
    totals: KernelTotals
    fp16: KernelTotals | None = None

    @property
    def quantized_products(self) -> dict[str, bool]:
        """Every product that reads a quantised activation: whether it runs in 8 bits."""
        found: dict[str, bool] = {}
        for audit in self.pairs:
            for reader, fate, _ in audit.readers:
                if reader.product and not audit.pair.weight:
                    found[reader.node] = found.get(reader.node, True) and fate is Fate.CONSUMED
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a run's ``audit.json``; with the sentences that people read."""
        from resvit_engines.audit.text import failures_of, sentences_of

        failures = failures_of(self)
        return {
            **self.subject.to_json(),
            "pairs": [pair.to_json() for pair in self.pairs],
            "attention": [block.to_json() for block in self.attention],
            "reformats": [moved.to_json() for moved in self.reformats],
            "fp32": [moved.to_json() for moved in self.fp32],
            "plugins": {
                "expected": [plugin.node for plugin in self.plugins_expected],
                "missing": [plugin.node for plugin in self.plugins_missing],
                "layers_found": self.plugins_found,
            },
            "totals": self.totals.to_json(),
            "fp16": self.fp16.to_json() if self.fp16 else None,
            "sentences": list(sentences_of(self)),
            "fused": not failures,
            "failures": [{"problem": problem, "mend": mend} for problem, mend in failures],
        }


def audit_engine(
    subject: Subject,
    expectation: Expectation,
    kernels: Sequence[Kernel],
    io_names: Collection[str],
    fp16: Sequence[Kernel] | None = None,
) -> FusionAudit:
    """Compare the kernels of an engine with what its ONNX asks for.

    ``io_names`` are the network's inputs and outputs, which may be FP32. ``fp16`` are the kernels of the FP16 engine
    of the same network, batch and builder.
    """
    by_node: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for layer in kernel.layers:
            by_node.setdefault(layer, []).append(kernel)
    plugins = [kernel for kernel in kernels if kernel.work is Work.PLUGIN]
    named = {name for kernel in plugins for name in (kernel.name, *kernel.layers)}
    return FusionAudit(
        subject=subject,
        pairs=tuple(_pair(pair, by_node) for pair in expectation.pairs),
        attention=tuple(_attention(block, by_node) for block in expectation.attention),
        reformats=tuple(_moved(kernel, _movement(kernel)) for kernel in kernels if kernel.work is Work.REFORMAT),
        fp32=tuple(_moved(kernel, what) for kernel in kernels if (what := _full_precision(kernel, io_names))),
        plugins_expected=expectation.plugins,
        plugins_missing=tuple(plugin for plugin in expectation.plugins if plugin.node not in named),
        plugins_found=len(plugins),
        totals=kernel_totals(kernels),
        fp16=kernel_totals(fp16) if fp16 is not None else None,
    )


def _pair(pair: QdqPair, by_node: dict[str, list[Kernel]]) -> PairAudit:
    quantizers = by_node.get(pair.quantize, []) if pair.quantize else []
    alone = quantizers[0].name if quantizers and all(k.work is Work.REFORMAT for k in quantizers) else ""
    return PairAudit(pair, tuple((reader, *_fate(pair, reader, by_node)) for reader in pair.consumers), alone)


def _fate(pair: QdqPair, reader: Consumer, by_node: dict[str, list[Kernel]]) -> tuple[Fate, str]:
    """What happened at one reader, and the kernel that tells."""
    computing = [kernel for kernel in by_node.get(reader.node, []) if kernel.work is not Work.REFORMAT]
    dequantizers = by_node.get(pair.dequantize, [])
    if reader.product:
        products = [kernel for kernel in computing if kernel.work in PRODUCTS] or computing
        eight = next((kernel for kernel in products if kernel.precision in EIGHT_BITS), None)
        if eight is not None:
            return Fate.CONSUMED, eight.name
    else:
        products = computing
        shared = [kernel for kernel in computing if kernel in dequantizers]
        if shared:
            reads = next((kernel for kernel in shared if EIGHT_BITS & {*kernel.inputs}), None)
            return (Fate.CONSUMED, reads.name) if reads else (Fate.INSIDE, shared[0].name)
        reads = next((kernel for kernel in computing if EIGHT_BITS & {*kernel.inputs}), None)
        if reads and not dequantizers:
            return Fate.CONSUMED, reads.name
    own = [k for k in dequantizers if k.work is Work.REFORMAT and not EIGHT_BITS & {*k.outputs}]
    if own:
        return Fate.SEPARATE, own[0].name
    if reader.product and products:
        return Fate.HIGHER, products[0].name
    return Fate.UNLISTED, ""


def _attention(block: Attention, by_node: dict[str, list[Kernel]]) -> AttentionAudit:
    touching = list(dict.fromkeys(kernel for node in block.nodes for kernel in by_node.get(node, [])))
    ends = {block.nodes[0], block.nodes[-1]}
    opaque = [kernel for kernel in touching if kernel.type.lower() in _OPAQUE]
    whole = [k for k in touching if k.work is Work.ATTENTION]
    if not whole and not block.whole:
        candidates = [k for k in touching if k.work is not Work.REFORMAT and k not in opaque]
        whole = [k for k in candidates if ends <= {*k.layers}]
    fused = True if whole else (None if opaque or not touching else False)
    return AttentionAudit(
        block,
        fused,
        whole[0].name if whole else "",
        whole[0].precision if whole else "",
        len(touching),
        sum(kernel.work is Work.REFORMAT for kernel in touching),
        () if fused else breaches_of(block),
    )


def _movement(kernel: Kernel) -> str:
    reads, writes = {*kernel.inputs}, {*kernel.outputs}
    if EIGHT_BITS & writes and not EIGHT_BITS & reads:
        return "quantises"
    if EIGHT_BITS & reads and not EIGHT_BITS & writes:
        return "dequantises"
    return "moves" if reads == writes else "converts"


def _full_precision(kernel: Kernel, io_names: Collection[str]) -> str:
    """``reads FP32`` and so on, for tensors between kernels; empty where there is none."""
    sides = (("reads", kernel.inputs, kernel.input_names), ("writes", kernel.outputs, kernel.output_names))
    found = []
    for word, types, names in sides:
        known = names if len(names) == len(types) else ("",) * len(types)
        if any(dtype == "Float" and name not in io_names for dtype, name in zip(types, known, strict=True)):
            found.append(word)
    return f"{' and '.join(found)} FP32" if found else ""


def _moved(kernel: Kernel, what: str) -> Moved:
    return Moved(kernel.name, what, kernel.bytes_moved, kernel.layers)
