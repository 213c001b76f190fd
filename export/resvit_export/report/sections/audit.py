"""The fusion audit, ready to be laid out: figures beside the FP16 engine's, findings, attention blocks and Q/DQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resvit_engines.audit.findings import Fate
from resvit_engines.audit.kernel_totals import KernelTotals
from resvit_engines.audit.record import AttentionRecord, AuditRecord, SkippedAudit
from resvit_export.report.layout import wording

_WORDS = {"conv": "Convolutions", "gemm": "Matrix products", "attention": "Attention kernels"}
_FATES = {
    Fate.CONSUMED: "consumed by an 8-bit kernel",
    Fate.INSIDE: "inside one kernel",
    Fate.HIGHER: "the product runs in a higher precision",
    Fate.SEPARATE: "undone by a kernel of its own",
    Fate.UNLISTED: "named by no kernel",
}


@dataclass(frozen=True)
class Fusion:
    """What the section shows.

    ``rows`` hold a term, this engine's figure and the FP16 engine's (empty without one); ``attention`` name, head
    size, lengths, mask and outcome; ``pairs`` tensor and outcome of each activation, the consumed ones last.
    """

    engine: str
    sentences: list[str]
    rows: list[tuple[str, str, str]]
    compared: bool
    attention: list[tuple[str, str, str, str, str]]
    pairs: list[tuple[str, str]]


def fusion_from_audit(audit: AuditRecord | SkippedAudit) -> Fusion:
    """Lay out an audit; one that was skipped has its sentence alone."""
    if isinstance(audit, SkippedAudit):
        return Fusion("", list(audit.sentences), [], False, [], [])
    subject, fp16 = audit.subject, audit.fp16
    builder = f"{subject.builder} {subject.version}"
    return Fusion(
        engine=f"{builder}, SM {subject.sm / 10:.1f}" if subject.sm else builder,
        sentences=list(audit.sentences if subject.stands_in else audit.sentences[1:]),
        rows=[(term, value(audit.totals), value(fp16) if fp16 else "") for term, value in _FIGURES],
        compared=fp16 is not None,
        attention=[_block(block) for block in audit.attention],
        pairs=sorted(
            ((pair.tensor, _FATES[pair.fate]) for pair in audit.pairs if not pair.weight),
            key=lambda row: row[1] == _FATES[Fate.CONSUMED],
        ),
    )


def _eight_bits(kind: str) -> Callable[[KernelTotals], str]:
    return lambda totals: f"{totals.eight_bits[kind]} of {totals.products[kind]}"


_FIGURES: tuple[tuple[str, Callable[[KernelTotals], str]], ...] = (
    ("Kernels", lambda totals: f"{totals.kernels:,}"),
    *((f"{word} in 8 bits", _eight_bits(kind)) for kind, word in _WORDS.items()),
    ("Kernels that compute nothing", lambda totals: f"{totals.reformats:,}"),
    ("Activations moved", lambda totals: wording.size(totals.activation_bytes)),
    ("Weights read", lambda totals: wording.size(totals.constant_bytes)),
)


def _block(block: AttentionRecord) -> tuple[str, str, str, str, str]:
    query, key = block.lengths
    lengths = wording.plain(query) if query == key else f"{wording.plain(query)}, {wording.plain(key)}"
    outcome = {True: "one kernel", None: "not shown"}.get(block.fused, wording.plural(block.kernels, "kernel"))
    return block.name, wording.plain(block.head_size), lengths, block.mask, outcome
