"""The tables of ``docs/accuracy.md``, from the results that ``quantizers.py`` and ``engine_work.py`` wrote.

    python benchmarks/accuracy_tables.py

Replaces what stands between the markers ``<!-- tables: NAME -->`` and ``<!-- end -->`` of that page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from machine import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
TRAINED = ("embed-nano", "fpn-nano", "dual-nano", "elpv")
MOBILE = ("mobile-nano", "elpv-mobile", "PP-OCRv5", "PP-OCRv4")
"""Mobile hybrids: ours, and recognisers of text that others trained, of which a line counts as one answer."""


def results(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The results that are there, by model."""
    paths = {name: RESULTS / f"quantizers-{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def comparison(names: tuple[str, ...], precision: str, bits: int, *, ablation: bool = False) -> str:
    """One row for each quantiser: drop, agreement and SQNR on each of these models."""
    found = results(names)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for model, result in found.items():
        for row in result["rows"]:
            ours_less = "without" in row["settings"]
            wanted = (ours_less or row["name"] in ("ours-fast", "ours-best")) if ablation else not ours_less
            if wanted and (row["precision"], row["bits"]) == (precision, bits):
                rows.setdefault(row["label"], {})[model] = row
    models = [model for model in found if any(model in by_model for by_model in rows.values())]
    lines = ["| quantiser | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for label, by_model in rows.items():
        lines.append(f"| {label} | " + " | ".join(_cell(by_model.get(model)) for model in models) + " |")
    images = ", ".join(f"{model} {found[model]['test']['images']:,}" for model in models)
    tops = ", ".join(f"{model} {100 * found[model]['float_top1']:.2f}%" for model in models)
    return "\n".join(lines) + f"\n\nTest images: {images}. Float top-1: {tops}."


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    low, high = row["interval"]
    drop = f"{row['drop']:+.2f} [{low:+.2f}, {high:+.2f}]"
    covered = "" if row["macs_share"] >= 0.98 else f" ({100 * row['macs_share']:.0f}% MACs)"
    return f"{100 * row['agreement']:.2f}% · {row['sqnr_db']:.1f} dB · {drop}{covered}"


def cost(names: tuple[str, ...]) -> str:
    """Seconds and memory of each quantiser at 8 bits."""
    found = results(names)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for model, result in found.items():
        for row in result["rows"]:
            if row["status"] == "ok" and row["bits"] == 8 and "without" not in row["settings"]:
                rows.setdefault(f"{row['label']} ({row['precision'].upper()})", {})[model] = row
    lines = ["| quantiser | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for label, by_model in rows.items():
        cells = [f"{r['seconds']:.0f} s, {r['peak_mib']} MiB" if (r := by_model.get(m)) else "" for m in found]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Fill in the page."""
    tables = {
        "int8": comparison(TRAINED, "int8", 8),
        "int6": comparison(TRAINED, "int8", 6),
        "int5": comparison(TRAINED, "int8", 5),
        "fp8": comparison(TRAINED, "fp8", 8),
        "ablation-int8": comparison(TRAINED, "int8", 8, ablation=True),
        "ablation-int5": comparison(TRAINED, "int8", 5, ablation=True),
        "ablation-fp8": comparison(TRAINED, "fp8", 8, ablation=True),
        "mobile-int8": comparison(MOBILE, "int8", 8),
        "mobile-int6": comparison(MOBILE, "int8", 6),
        "mobile-int5": comparison(MOBILE, "int8", 5),
        "mobile-fp8": comparison(MOBILE, "fp8", 8),
        "mobile-ablation": comparison(MOBILE, "int8", 8, ablation=True),
        "cost": cost(TRAINED),
        "mobile-cost": cost(MOBILE),
    }
    text = PAGE.read_text()
    for name, table in tables.items():
        marker = re.compile(rf"(<!-- tables: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marker.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
