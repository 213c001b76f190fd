"""How a fusion audit looks on a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from resvit_engines.audit.record import AuditRecord, SkippedAudit
from resvit_engines.console import table

_WORDS = {"conv": "convolutions", "gemm": "matrix products", "attention": "attention kernels"}


def audit_tables(audit: AuditRecord | SkippedAudit) -> list[Table | str]:
    """The engine in figures, beside the FP16 engine's where there is one, and then the findings."""
    if isinstance(audit, SkippedAudit):
        return audit_lines(audit)
    engines = [("this engine", audit.totals)] + ([("FP16 engine", audit.fp16)] if audit.fp16 else [])
    rows = [
        ("kernels", *(str(totals.kernels) for _, totals in engines)),
        *(
            (f"{word} in 8 bits", *(f"{totals.eight_bits[kind]} of {totals.products[kind]}" for _, totals in engines))
            for kind, word in _WORDS.items()
        ),
        ("kernels that compute nothing", *(str(totals.reformats) for _, totals in engines)),
        ("activations moved", *(_megabytes(totals.activation_bytes) for _, totals in engines)),
        ("weights read", *(_megabytes(totals.constant_bytes) for _, totals in engines)),
    ]
    title = f"What fused for {audit.subject.target}"
    return [table(title, ("", *(name for name, _ in engines)), rows), *audit_lines(audit)]


def audit_lines(audit: AuditRecord | SkippedAudit) -> list[Table | str]:
    """The findings alone."""
    return [escape(sentence) for sentence in audit.sentences]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"
