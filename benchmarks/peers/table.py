"""Rows as a Markdown table, and whether the goals are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

COVERED = {"int8": 0.98, "fp8": 0.90}
"""Full coverage: FP8 has no kernels for convolutions of few channels, and nobody's rules quantise such a stem."""
GOALS = {
    "int8": {"drop": 0.1, "agreement": 0.997, "sqnr_db": 40.0},
    "fp8": {"drop": 0.05, "agreement": 0.994, "sqnr_db": 33.0},
}
"""Largest drop in percentage points, least agreement (share) and SQNR (dB) at 8 bits."""


def markdown(rows: Sequence[Row], *, accurate: bool) -> str:
    """One table per precision and bits; the best agreement and SQNR among rows of full coverage are bold."""
    parts = []
    for precision, bits in dict.fromkeys((row["precision"], row["bits"]) for row in rows):
        group = [row for row in rows if (row["precision"], row["bits"]) == (precision, bits)]
        simulated = "" if bits == 8 else f", {bits} bits simulated"
        parts.append(f"### {precision.upper()}{simulated}\n\n{_table(group, accurate)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], accurate: bool) -> str:
    head = ["quantiser", "top-1 %", "drop, points [95%]"] if accurate else ["quantiser"]
    head += ["agreement %", "SQNR dB", "MACs in 8 bits %", "attention %", "seconds", "peak MiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    full = [row for row in rows if row["status"] == "ok" and row["macs_share"] >= COVERED[row["precision"]]]
    best = {name: max((row[name] or 0.0 for row in full), default=None) for name in ("agreement", "sqnr_db")}
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['label']} | {row['status']}: {row['reason']} |" + " |" * (len(head) - 2))
            continue
        low, high = row["interval"]
        cells = [row["label"]]
        if accurate:
            cells += [f"{100 * row['top1']:.2f}", f"{row['drop']:+.2f} [{low:+.2f}, {high:+.2f}]"]
        marks = {name: row in full and row[name] == best[name] for name in best}
        cells += [
            _marked(f"{100 * row['agreement']:.2f}", marks["agreement"]),
            _marked("-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}", marks["sqnr_db"]),
            f"{100 * row['macs_share']:.1f}",
            f"{100 * row['attention_share']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each of our 8-bit rows: which goals it meets, and which peers of full coverage agree more."""
    found = []
    for row in rows:
        if row["name"] not in ("ours-fast", "ours-best") or row["bits"] != 8 or row["status"] != "ok":
            continue
        goal = GOALS[row["precision"]]
        ahead = [
            other["name"]
            for other in rows
            if (other["precision"], other["bits"], other["status"]) == (row["precision"], 8, "ok")
            and not other["name"].startswith("ours")
            and other["macs_share"] >= COVERED[other["precision"]]
            and other["agreement"] >= row["agreement"]
        ]
        found.append(
            {
                "name": row["name"],
                "precision": row["precision"],
                "coverage": row["macs_share"] >= COVERED[row["precision"]],
                "drop": row["drop"] is None or row["drop"] <= goal["drop"],
                "agreement": row["agreement"] >= goal["agreement"],
                "sqnr": row["sqnr_db"] is None or row["sqnr_db"] >= goal["sqnr_db"],
                "peers_that_agree_as_much": ahead,
            }
        )
    return found


def notes(rows: Sequence[Row]) -> str:
    """What a reader must know about single rows, said once each."""
    lines = dict.fromkeys(f"- {row['label']}: {note}." for row in rows for note in row.get("notes", ()))
    return "\n".join(lines)


def _marked(text: str, best: bool) -> str:
    return f"**{text}**" if best else text
