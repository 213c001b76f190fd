"""The fusion audit, ready to be laid out: figures beside the FP16 engine's, findings, attention blocks and Q/DQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resvit_export.report.layout import wording
from resvit_export.report.layout.data import Json

_WORDS = {"conv": "Convolutions", "gemm": "Matrix products", "attention": "Attention kernels"}
_FATES = {
    "consumed": "consumed by an 8-bit kernel",
    "inside": "inside one kernel",
    "higher": "the product runs in a higher precision",
    "separate": "undone by a kernel of its own",
    "unlisted": "named by no kernel",
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


def fusion_from_audit(audit: Json) -> Fusion:
    """Lay out ``audit.json``; one that was skipped has its sentence alone."""
    if "skipped" in audit:
        return Fusion("", list(audit["sentences"]), [], False, [], [])
    totals, fp16 = audit["totals"], audit.get("fp16")
    sm = audit.get("sm")
    builder = f"{audit['builder']} {audit['builder_version']}"
    return Fusion(
        engine=f"{builder}, SM {sm / 10:.1f}" if sm else builder,
        sentences=list(audit["sentences"][1:]) if not audit.get("stands_in") else list(audit["sentences"]),
        rows=[(term, value(totals), value(fp16) if fp16 else "") for term, value in _FIGURES],
        compared=fp16 is not None,
        attention=[_block(block) for block in audit["attention"]],
        pairs=sorted(
            ((str(pair["tensor"]), _FATES[pair["fate"]]) for pair in audit["pairs"] if not pair["weight"]),
            key=lambda row: row[1] == _FATES["consumed"],
        ),
    )


def _eight_bits(kind: str) -> Any:
    return lambda totals: f"{totals['in_8_bits'][kind]} of {totals['of'][kind]}"


_FIGURES = (
    ("Kernels", lambda totals: f"{totals['kernels']:,}"),
    *((f"{word} in 8 bits", _eight_bits(kind)) for kind, word in _WORDS.items()),
    ("Kernels that compute nothing", lambda totals: f"{totals['reformats']:,}"),
    ("Activations moved", lambda totals: wording.size(totals["activation_bytes"])),
    ("Weights read", lambda totals: wording.size(totals["constant_bytes"])),
)


def _block(block: Json) -> tuple[str, str, str, str, str]:
    query, key = block["lengths"]
    lengths = wording.plain(query) if query == key else f"{wording.plain(query)}, {wording.plain(key)}"
    outcome = {True: "one kernel", None: "not shown"}.get(block["fused"], wording.plural(block["kernels"], "kernel"))
    return block["name"], wording.plain(block["head_size"]), lengths, str(block["mask"]), outcome
