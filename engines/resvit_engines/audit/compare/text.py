"""Two engines side by side as people read them: tables of at most 80 columns, and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resvit_engines.audit.compare.comparison import KINDS, EngineComparison, Row
from resvit_engines.console import table

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 12
_NAME, _DIFFERENCE = 30, 20
_NOTHING = "-"


def comparison_lines(found: EngineComparison, *, brief: bool = False) -> list[Table | str]:
    """The engines, kinds of kernels, and the operators that changed the most; sentences alone where ``brief``."""
    tables = () if brief else (_kinds(found), _operators(found))
    return [*tables, *sentences_of(found)]


def sentences_of(found: EngineComparison) -> tuple[str, ...]:
    """What came out, the most important first."""
    return tuple(
        text
        for text in (
            _result(found),
            _slower(found.slower),
            _only(found, True),
            _only(found, False),
            *(f"{engine.name}: {engine.note}" for engine in (found.a, found.b) if engine.note),
            f"Kernels are paired by {found.by.value}.",
        )
        if text
    )


def name_shown(name: str, most: int = _NAME) -> str:
    """A name that fits into a column: its end says more than its beginning."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def microseconds(us: float | None) -> str:
    """A time in microseconds, or a dash."""
    return _NOTHING if us is None else f"{us:,.1f}"


def _kinds(found: EngineComparison) -> Table:
    first, second = found.totals
    rows = [
        (KINDS[kind], str(counts[0]), str(counts[1]), *map(microseconds, times), _ratio(_over(times)))
        for kind, counts, times in found.kinds
    ]
    rows.append(
        ("all kernels", str(first.kernels), str(second.kernels), microseconds(found.a.total_us),
         microseconds(found.b.total_us), _ratio(_over((found.a.total_us, found.b.total_us))))
    )  # fmt: skip
    if found.a.detailed and found.b.detailed:
        eights = [str(sum(totals.eight_bits.values())) for totals in (first, second)]
        rows.append(("products in 8 bits", *eights, "", "", ""))
        moved = [f"{totals.activation_bytes / 1e6:,.1f}" for totals in (first, second)]
        rows.append(("MB of activations moved", *moved, "", "", ""))
    if found.a.latency_us is not None or found.b.latency_us is not None:
        latencies = (found.a.latency_us, found.b.latency_us)
        rows.append(("latency without profiler", "", "", *map(microseconds, latencies), _ratio(_over(latencies))))
    title = f"A: {name_shown(found.a.name, 34)}   B: {name_shown(found.b.name, 34)}"
    return table(title, ("", "A", "B", "A, us", "B, us", "B/A"), rows)


def _operators(found: EngineComparison) -> Table:
    shown = found.changed[:SHOWN]
    more = f", {len(shown)} of {len(found.rows)}" if len(found.rows) > len(shown) else ""
    if found.timed:
        rows = [
            (name_shown(row.operator), microseconds(row.a.us), microseconds(row.b.us), _ratio(row.ratio), _said(row))
            for row in shown
        ]
        columns = ("operator", "A, us", "B, us", "B/A", "in B")
        return _with_text_last(table(f"Operators by change of time{more}", columns, rows))
    rows = [(name_shown(row.operator), row.a.precision, row.b.precision, "", _said(row)) for row in shown]
    return _with_text_last(table(f"Operators{more}", ("operator", "A", "B", "", "in B"), rows))


def _with_text_last(built: Table) -> Table:
    built.columns[-1].justify = "left"
    return built


def _said(row: Row) -> str:
    text = ", ".join(row.differences)
    return text if len(text) <= _DIFFERENCE else f"{text[: _DIFFERENCE - 1]}…"


def _result(found: EngineComparison) -> str:
    a, b, ratio = found.a, found.b, found.ratio
    if ratio is None:
        untimed = " and ".join(engine.name for engine in (a, b) if not (engine.total_us or engine.latency_us)) or b.name
        return f"Of {untimed} no times are known: what was fused is compared, not how long it takes."
    by_latency = bool(a.latency_us and b.latency_us)
    what = "as a whole" if by_latency else "summed over the layers of a run with a profiler"
    pace = f"{1 / ratio:.2f} times as fast as" if ratio else "in no time against"
    return f"{b.name} runs {pace} {a.name}, {what}."


def _slower(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lost = sum(row.change_us for row in rows)
    named = ", ".join(f"{row.operator} ({microseconds(row.a.us)} to {microseconds(row.b.us)} us)" for row in rows[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"Slower in B by {lost:,.1f} us together: {named}{more}."


def _only(found: EngineComparison, first: bool) -> str:
    rows = found.only(first)
    if not rows:
        return ""
    names = ", ".join(row.operator for row in rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
    return f"With a kernel of its own in {'A' if first else 'B'} alone: {names}."


def _over(times: Sequence[float | None]) -> float | None:
    return times[1] / times[0] if times[0] and times[1] is not None else None


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
