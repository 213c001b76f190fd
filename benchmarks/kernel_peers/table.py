"""Results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def static_table(rows: Sequence[dict[str, Any]]) -> str:
    """What compiled code tells; batches that run the same code share a line."""
    parts = [
        "# What the kernels compile to",
        "",
        "Nothing here was timed. Registers, spills and shared memory are what `ptxas` 13.1 reports; occupancy follows "
        "from them; `mma` counts tensor-core instructions in the code, `loads` reads of global memory by bytes. "
        "`floor` is the larger of bytes over bandwidth and operations over peak by the target's data sheet, plus the "
        "fixed cost of a kernel (`resvit_engines/targets/speeds.py`): no kernel can be faster, and ours will be "
        "slower. Blocks, MB and floor are for the batches in their order.",
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        parts += ["", f"## {target} (SM {own[0]['sm'] / 10:.1f})", ""]
        head = ("kernel", "shape", "type", "batch", "registers", "spills", "shared", "occupancy", "mma", "loads",
                "threads", "blocks", "MB", "floor us")  # fmt: skip
        lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in own:
            if "refused" not in row:
                lines.setdefault(_code(row), []).append(row)
        parts += _lines(head, (_static_cells(code, batches) for code, batches in lines.items()))
        refused = {row["refused"] for row in own if "refused" in row}
        parts += ["", *sorted(f"- not there: {reason}" for reason in refused)] if refused else []
    return "\n".join(parts)


def _code(row: dict[str, Any]) -> tuple[str, ...]:
    """The first cells: what is the same for batches that run the same code."""
    return (
        row["kind"], row["model"], row["dtype"], str(row["registers"]), str(row["spill_bytes"]),
        str(row["shared_bytes"]), f"{row['occupancy']:.0%}", _counts(row["mma"]), _counts(row["loads"]),
        str(row["threads"]),
    )  # fmt: skip


def _static_cells(code: Sequence[str], batches: Sequence[dict[str, Any]]) -> list[str]:
    blocks = (str(math.prod(row["grid"])) for row in batches)
    moved = (f"{row['bytes'] / 1e6:.3g}" for row in batches)
    floors = (f"{row['floor_us']:.3g}" for row in batches)
    numbers = (str(row["batch"]) for row in batches)
    return [*code[:3], ", ".join(numbers), *code[3:], *(", ".join(cells) for cells in (blocks, moved, floors))]


def _counts(counts: dict[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"


def measured_table(gpu: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Times of ours, of every other way, and of the floor."""
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in gpu["peak_tops"].items() if peak)
    parts = [
        f"# {gpu['device']} (SM {gpu['sm'] / 10:.1f})",
        "",
        f"Measured first: {gpu['bandwidth_gb_s']:.0f} GB/s copying, {peaks} T(FL)OPS multiplying. PyTorch "
        f"{gpu['torch']}. Medians in microseconds; a ratio above 1 means that ours is faster; `of floor` is the floor "
        "over ours.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        timed = [row for row in own if "best_other_us" in row]
        names = list(dict.fromkeys(name for row in timed for name in row["others_us"]))
        head = ("shape", "type", "batch", "ours", *names, "best", "ratio", "floor", "of floor")
        parts += [
            "",
            f"## {kind}",
            "",
            *_lines(head, (_measured_cells(row, names) for row in timed)),
            "",
            _sums(timed),
            "",
        ]
        parts += [f"- {row['model']} {row['dtype']}: {row['refused']}" for row in own if "refused" in row]
    return "\n".join(parts)


def _measured_cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    others = [f"{row['others_us'][name]:.1f}" if name in row["others_us"] else "-" for name in names]
    ratio, share = row["best_other_us"] / row["ours_us"], row["floor_us"] / row["ours_us"]
    return [
        row["model"], row["dtype"], str(row["batch"]), f"{row['ours_us']:.1f}", *others, row["best_other"],
        f"{ratio:.2f}", f"{row['floor_us']:.1f}", f"{share:.0%}",
    ]  # fmt: skip


def _sums(rows: Sequence[dict[str, Any]]) -> str:
    """The least ratio by type and batch: what a goal is held against."""
    found = []
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        least = min(row["best_other_us"] / row["ours_us"] for row in own)
        share = min(row["floor_us"] / row["ours_us"] for row in own)
        found.append(f"{dtype} batch {batch}: at least {least:.2f}x the best other, {share:.0%} of the floor")
    return "; ".join(found) + "."


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
