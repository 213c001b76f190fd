"""The page of two engines side by side: it needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.audit.compare.comparison import KINDS
from resvit_engines.audit.compare.text import sentences_of
from resvit_engines.files import write_atomic
from resvit_export.report.layout import wording
from resvit_export.report.layout.template import environment

if TYPE_CHECKING:
    from resvit_engines.audit.compare.comparison import EngineComparison, Row, Side


@dataclass(frozen=True)
class Bars:
    """One line of a chart: two bars, each its share in % of the longest, and what stands beside them."""

    name: str
    first: str
    second: str
    widths: tuple[float, float]
    ratio: str
    detail: str = ""


def write_comparison_page(path: Path, found: EngineComparison) -> None:
    """Write the page as UTF-8, whole or not at all."""
    page = environment().get_template("compare.html.j2")
    title, *sentences = sentences_of(found)
    text = page.render(
        a=found.a.name,
        b=found.b.name,
        sentence=title,
        sentences=sentences,
        timed=found.timed,
        figures=_figures(found),
        kinds=_kinds(found),
        slower=[_bars(row, found.slower) for row in found.slower],
        moves=_moves(found),
        operators=[_cells(row) for row in found.rows],
        only=[(found.a.name, _names(found.only(True))), (found.b.name, _names(found.only(False)))],
    )
    write_atomic(path, text.encode())


def _figures(found: EngineComparison) -> list[tuple[str, str, str]]:
    first, second = found.totals
    rows = [("Kernels", f"{len(found.a.kernels):,}", f"{len(found.b.kernels):,}")]
    if found.a.detailed and found.b.detailed:
        eights = [sum(totals.eight_bits.values()) for totals in (first, second)]
        rows.append(("Products in 8 bits", f"{eights[0]:,}", f"{eights[1]:,}"))
        rows.append(("Activations moved", wording.size(first.activation_bytes), wording.size(second.activation_bytes)))
    if found.a.timed or found.b.timed:
        rows.append(("All layers, with a profiler", _us(found.a.total_us), _us(found.b.total_us)))
    if found.a.latency_us is not None or found.b.latency_us is not None:
        rows.append(("Latency", _us(found.a.latency_us), _us(found.b.latency_us)))
    return rows


def _kinds(found: EngineComparison) -> list[Bars]:
    amounts = {
        kind: times if found.timed else (float(counts[0]), float(counts[1])) for kind, counts, times in found.kinds
    }
    longest = max((value or 0.0 for pair in amounts.values() for value in pair), default=0.0) or 1.0
    lines = []
    for kind, counts, times in found.kinds:
        before, after = (value or 0.0 for value in amounts[kind])
        ratio = times[1] / times[0] if found.timed and times[0] and times[1] is not None else None
        texts = [
            wording.plural(count, "kernel") + (f", {_us(us)}" if us is not None else "")
            for count, us in zip(counts, times, strict=True)
        ]
        widths = (round(100 * before / longest, 2), round(100 * after / longest, 2))
        lines.append(Bars(KINDS[kind].capitalize(), texts[0], texts[1], widths, _ratio(ratio)))
    return lines


def _bars(row: Row, rows: Sequence[Row]) -> Bars:
    longest = max((side.us or 0.0 for each in rows for side in (each.a, each.b)), default=0.0) or 1.0
    widths = (round(100 * (row.a.us or 0.0) / longest, 2), round(100 * (row.b.us or 0.0) / longest, 2))
    return Bars(row.operator, _us(row.a.us), _us(row.b.us), widths, _ratio(row.ratio), ", ".join(row.differences))


def _moves(found: EngineComparison) -> list[tuple[str, str, str]]:
    first, second = found.moves(True), found.moves(False)

    def cell(side: dict[str, tuple[int, float | None]], what: str) -> str:
        count, us = side.get(what, (0, None))
        return wording.NOTHING if not count else f"{count:,}" + (f" ({_us(us)})" if us is not None else "")

    return [(what, cell(first, what), cell(second, what)) for what in dict.fromkeys((*first, *second))]


def _cells(row: Row) -> tuple[str, str, str, str, str, str, str]:
    return (
        row.operator,
        _us(row.a.us),
        _us(row.b.us),
        _ratio(row.ratio),
        ", ".join(row.differences),
        _nodes(row.a),
        _nodes(row.b),
    )


def _nodes(side: Side) -> str:
    if side.kernel is None:
        return wording.NOTHING
    nodes = " + ".join(side.kernel.kernel.layers) or side.kernel.kernel.name
    return f"{side.precision}: {nodes}" if side.precision else nodes


def _names(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row.operator, _us(row.a.us if row.a.kernel else row.b.us)) for row in rows]


def _us(us: float | None) -> str:
    return wording.NOTHING if us is None else f"{wording.number(us, 1)} \N{MICRO SIGN}s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{wording.number(value, 2)}{wording.TIMES}"
