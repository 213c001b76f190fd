"""Timings as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resvit_engines.bench.bench import PERCENTILES, BenchReport
from resvit_engines.bench.compare import Comparison
from resvit_engines.console import table

if TYPE_CHECKING:
    from rich.table import Table


def report_lines(report: BenchReport) -> list[Table | str]:
    """One runner: its figures, under which conditions, and what speaks against them."""
    return [_table("Timed", {report.label: report}), *_notes([report])]


def comparison_lines(comparison: Comparison, *, brief: bool = False) -> list[Table | str]:
    """Several runners side by side, and the verdict on each; only the verdicts where ``brief``."""
    verdicts = [f"{name}: {said}." for name, said in comparison.verdicts.items()]
    if brief:
        return list(verdicts)
    title = f"Timed in {comparison.rounds} rounds, in turn"
    return [_table(title, comparison.reports), *_notes(list(comparison.reports.values())), *verdicts]


def _table(title: str, reports: dict[str, BenchReport]) -> Table:
    on_gpu = any(report.gpu_ms for report in reports.values())
    rows = []
    for name, report in reports.items():
        cells = [name, *(f"{report.latency_ms[f'p{percent}']:.3f}" for percent in PERCENTILES)]
        cells.append(f"{report.images_per_second:.1f}")
        if on_gpu:
            cells.append(f"{report.gpu_ms['p50']:.3f}" if report.gpu_ms else "")
            cells.append("" if report.device_mib is None else f"{report.device_mib:.0f}")
        rows.append(cells)
    columns = ["", *(f"p{percent} ms" for percent in PERCENTILES), "images/s"]
    return table(title, [*columns, "GPU p50 ms", "GPU MiB"] if on_gpu else columns, rows)


def _notes(reports: list[BenchReport]) -> list[str]:
    first = reports[0]
    streams = "" if first.streams == 1 else f", {first.streams} streams"
    graph = ", by CUDA graph" if all(report.cuda_graph for report in reports) else ""
    conditions = first.before.sentence if first.gpu_ms else "on the processor: power mode and GPU clocks do not apply"
    warnings = dict.fromkeys(warning for report in reports for warning in report.warnings)
    return [
        *dict.fromkeys(report.label for report in reports),
        f"batch {first.batch}{streams}{graph}; {conditions}; host memory at most {first.host_peak_mib} MiB",
        *warnings,
    ]
