"""What an audit finds: the fate of each Q/DQ pair and attention block, and the sum of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from resvit_engines.audit.attention_rules import Breach
from resvit_engines.audit.expectation import Attention, Consumer, Plugin, QdqPair
from resvit_engines.audit.kernel_totals import KernelTotals


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

    ``stands_in`` says what the kernels rest on where they are not those of the target's own engine; empty otherwise.
    ``predicted``: no engine was compiled, and the kernels are those that the builder's rules give.
    """

    target: str
    sm: int | None
    builder: str
    version: str
    batch: int
    stands_in: str = ""
    predicted: bool = False


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


@dataclass(frozen=True)
class Moved:
    """A kernel that computes nothing, or one that works in FP32: what it does, its bytes and nodes."""

    kernel: str
    what: str
    bytes: int | None
    layers: tuple[str, ...]


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
    plugin_layers: int
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
