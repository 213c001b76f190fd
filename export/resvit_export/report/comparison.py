"""Runs side by side: one table, and one picture of accuracy over latency with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_calibrate.gate.comparison import DECIBELS, SHARE
from resvit_engines.bench.bench import BenchReport
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic
from resvit_engines.progress import SILENT
from resvit_engines.targets.speed_verdict import SpeedVerdict
from resvit_export.recipe.file import recipe_from_toml
from resvit_export.report.layout import wording
from resvit_export.report.layout.pictures import ticks_between
from resvit_export.report.layout.template import environment
from resvit_export.run_folder import NotFinishedError, RunFolder

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline
    from resvit_export.records.verdict import VerdictRecord

WIDTH, HEIGHT = 640, 360
"""Units of the picture's inside."""
_LEFT = 108
"""And of the room for the numbers beside it, in a phone's large type."""
_MEASURED, _PREDICTED = "measured", "predicted"
_EMPTY = 0.08
"""Of an axis, on either side of the outermost points."""


@dataclass(frozen=True)
class Entry:
    """One target of a run. ``value`` is the metric of what ships, ``size`` the bytes of its engine, else of its ONNX.

    ``latency_ms`` is of one call of ``batch`` images, ``by`` says whether it was measured on the device or predicted.
    """

    run: str
    target: str
    precision: str
    release: int
    metric: str
    lower_is_better: bool
    unit: str
    original: float
    value: float
    drop: float | None
    interval: tuple[float | None, float | None]
    verdict: str
    latency_ms: float
    batch: int
    by: str
    speed: SpeedVerdict
    size: int

    @property
    def name(self) -> str:
        """What it is called: its run, target and precision."""
        return f"{self.run}, {self.target}, {self.precision}"

    @property
    def value_text(self) -> str:
        """The metric as people read it."""
        if self.unit == SHARE:
            return wording.percent(self.value)
        return f"{wording.number(self.value, 1)} dB" if self.unit == DECIBELS else wording.number(self.value, 4)

    @property
    def drop_name(self) -> str:
        """What ``drop_text`` tells: how much was lost, or by how much the SQNR keeps the least one."""
        return wording.drop_name(self.unit)

    @property
    def drop_text(self) -> str:
        """The drop as people read it, with its unit."""
        return wording.drop(self.drop, self.unit)

    def better_than(self, other: Entry) -> bool:
        """Whether its metric is the better one."""
        return self.value < other.value if self.lower_is_better else self.value > other.value

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "run": self.run,
            "target": self.target,
            "precision": self.precision,
            "release": self.release,
            "metric": self.metric,
            "unit": self.unit,
            "lower_is_better": self.lower_is_better,
            "original": self.original,
            "value": self.value,
            "drop": self.drop,
            "interval": list(self.interval),
            "verdict": self.verdict,
            "latency_ms": self.latency_ms,
            "batch": self.batch,
            "latency_by": self.by,
            "speed": self.speed.to_json(),
            "bytes": self.size,
        }


def entries_of(runs: Sequence[Path], settled: Callable[[Pipeline], Pipeline]) -> list[Entry]:
    """What is known of every target of these run folders; no stage is done and nothing is written.

    ``settled`` gives the pipeline of what ships, where a rejection led to another one.

    Raises:
        ResvitError: INPUT for a folder that is no run, one that is not validated, and runs of different metrics.
    """
    for folder in runs:
        if not (folder / "recipe.toml").is_file():
            raise ResvitError(f"{folder} is not the folder of a run: it has no recipe.toml.", "Name a folder of --run.")
    found = [entry for run in runs for entry in _entries(run, settled)]
    metrics = list(dict.fromkeys(entry.metric for entry in found))
    if len(metrics) > 1:
        raise ResvitError(
            f"These runs are judged by different metrics: {', '.join(metrics)}.", "Compare runs of one task at a time."
        )
    return found


def pareto_front(entries: Sequence[Entry]) -> list[Entry]:
    """Those than which none is both as accurate and as fast, the fastest first."""
    front: list[Entry] = []
    best_first = sorted(entries, key=lambda entry: entry.value if entry.lower_is_better else -entry.value)
    for entry in sorted(best_first, key=lambda entry: entry.latency_ms):
        if not front or entry.better_than(front[-1]):
            front.append(entry)
    return front


def write_comparison(entries: Sequence[Entry], path: Path) -> None:
    """Write the page, whole or not at all. Raises ``ResvitError`` if Jinja2 is not installed."""
    page = environment().get_template("comparison.html.j2")
    fronts = {target: pareto_front(group) for target, group in _by_target(entries).items()}
    best = {entry for front in fronts.values() for entry in front}
    document = page.render(
        entries=[(entry, entry in best) for entry in entries],
        metric=entries[0].metric + (", dB" if entries[0].unit == DECIBELS else ""),
        drop_name=entries[0].drop_name,
        picture=_picture(entries, fronts),
        box=(WIDTH, HEIGHT),
        left=_LEFT,
        size=wording.size,
        number=wording.number,
    )
    write_atomic(path, document.encode())


def _entries(folder: Path, settled: Callable[[Pipeline], Pipeline]) -> Iterator[Entry]:
    from resvit_export.pipeline import Pipeline
    from resvit_export.run import runs_for

    place = RunFolder(folder, SILENT)
    with place.looking_back():
        try:
            for run in runs_for(recipe_from_toml(folder / "recipe.toml"), place, SILENT):
                run.require_target()
                yield _entry(settled(Pipeline(run)), folder)
        except NotFinishedError as error:
            raise ResvitError(
                f"{folder} is not finished: {error.problem}", f"Run: resvit-export build --run {folder}"
            ) from error


def _entry(pipeline: Pipeline, folder: Path) -> Entry:
    from resvit_calibrate.tasks.kinds import lower_is_better

    run = pipeline.run
    record, speed = pipeline.validated.verdict, pipeline.speed
    first, last = record.rows[0], record.rows[-1]
    if first.value is None or last.value is None:
        raise ResvitError(f"{folder} has no finite {first.metric} to compare.", "Leave it out.")
    measured = _measured(pipeline, record)
    if measured is not None:
        latency, by, size = measured
    elif run.require_target().on_cpu:
        raise ResvitError(
            f"Nothing has timed {folder}, and no time of a processor is predicted.",
            f"Time it there: resvit-export build --run {folder} --device ssh://USER@HOST, or leave it out.",
        )
    else:
        costs = pipeline.predicted.costs
        latency, by, size = costs.chosen.milliseconds, _PREDICTED, pipeline.model.path.stat().st_size
    return Entry(
        folder.name,
        run.require_target().name,
        pipeline.ships.value.upper(),
        run.recipe.release,
        first.metric,
        lower_is_better(record.task),
        first.unit,
        first.value,
        last.value,
        last.drop,
        last.interval,
        record.kind.value,
        latency,
        run.recipe.batch_range[1],
        by,
        speed,
        size,
    )


def _measured(pipeline: Pipeline, record: VerdictRecord) -> tuple[float, str, int] | None:
    """Milliseconds of the engine on its device, and its size; None where it never ran there."""
    from resvit_calibrate.gate.gate import VerdictKind
    from resvit_export.stages.device import newest_on_device

    if record.kind is VerdictKind.REJECTED and not pipeline.recipe.allow_rejected:
        return None
    try:
        there = newest_on_device(pipeline.run.folder, pipeline.bundled.bundle)
    except ResvitError:  # refused, or never bundled
        return None
    if there is None or there.result.job.rehearsal or not isinstance(there.result.job.bench, BenchReport):
        return None
    bench = there.result.job.bench
    return (bench.gpu_ms or bench.latency_ms)["p50"], _MEASURED, there.result.job.engine.bytes


def _by_target(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.target, []).append(entry)
    return groups


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    name: str
    best: bool
    number: int


@dataclass(frozen=True)
class _Picture:
    points: list[_Point]
    fronts: list[tuple[str, str]]
    """Target and SVG path of the step line through its front."""
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def _picture(entries: Sequence[Entry], fronts: dict[str, list[Entry]]) -> _Picture:
    low_x, high_x = _span([entry.latency_ms for entry in entries], zero=True)
    low_y, high_y = _span([entry.value for entry in entries], zero=False)

    def x_of(value: float) -> float:
        return round(WIDTH * (value - low_x) / (high_x - low_x), 1)

    def y_of(value: float) -> float:
        return round(HEIGHT * (high_y - value) / (high_y - low_y), 1)

    best = {entry for front in fronts.values() for entry in front}
    points = [
        _Point(x_of(entry.latency_ms), y_of(entry.value), entry.name, entry in best, index + 1)
        for index, entry in enumerate(entries)
    ]
    paths = []
    for target, front in fronts.items():
        steps = [f"M{x_of(front[0].latency_ms)} {y_of(front[0].value)}"]
        steps += [f"H{x_of(entry.latency_ms)}V{y_of(entry.value)}" for entry in front[1:]]
        paths.append((target, "".join(steps) + f"H{WIDTH}"))
    share = entries[0].unit == SHARE
    ticks_x, digits_x = ticks_between(low_x, high_x)
    ticks_y, digits_y = ticks_between(100 * low_y if share else low_y, 100 * high_y if share else high_y)
    return _Picture(
        points,
        paths,
        [(x_of(tick), wording.number(tick, digits_x)) for tick in ticks_x],
        [(y_of(tick / 100 if share else tick), wording.number(tick, digits_y) + ("%" * share)) for tick in ticks_y],
    )


def _span(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    """The ends of an axis, with room beside the outermost points."""
    low, high = (0.0 if zero else min(values)), max(values)
    room = (high - low) * _EMPTY or max(abs(high), 1.0) * 0.01
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ResvitError("A run has a metric or latency that is not finite.", "Leave it out of the comparison.")
    return (low if zero else low - room), high + room
