"""One task of a sweep, done wherever it is: a run folder, and what came of every target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file, write_atomic
from resvit_engines.progress import SILENT
from resvit_export.sweep.plan import Task
from resvit_export.sweep.store import RunStore

if TYPE_CHECKING:
    from resvit_export.report.comparison import Entry
    from resvit_export.run import Run
    from resvit_export.run_folder import RunFolder

_RECIPE = "recipe.toml"


@dataclass(frozen=True)
class TargetOutcome:
    """What came of one target: the ``exit_code`` of its build, and its verdict, or what refused it and the ``fix``.

    ``bundle`` is the SHA-256 of the bundle, None where there is none; ``finished`` tells that it was validated.
    """

    target: str
    exit_code: int
    said: str
    bundle: str | None = None
    finished: bool = False
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "exit_code": self.exit_code,
            "said": self.said,
            **({"fix": self.fix} if self.fix else {}),
            "bundle": self.bundle,
        }


@dataclass(frozen=True)
class Outcome:
    """What came of a task. ``lost`` says why it did not end, empty where it did; ``seconds`` is wall-clock time.

    ``entries`` are what a comparison shows of it, and ``left_out`` says why it cannot be compared.
    """

    name: str
    targets: tuple[TargetOutcome, ...]
    seconds: float
    lost: str = ""
    entries: tuple[Entry, ...] = ()
    left_out: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "targets": [one.to_json() for one in self.targets],
            "seconds": round(self.seconds, 3),
            **({"lost": self.lost} if self.lost else {}),
        }


def task_done(task: Task, place: Path | RunStore, divide: Callable[[Run], None] | None = None) -> Outcome:
    """Build all targets of a task in ``place/NAME``; what is finished there is not done again.

    With a store the run lies in a scratch folder of this machine, and every stage goes into the store when it is
    finished. ``divide`` may let others do parts of a run's work. A target that cannot be, or that fails, is
    told in its outcome and does not end the others.
    """
    if isinstance(place, Path):
        return _done(task, place / task.name, None, divide)
    path = place.scratch / task.name
    place.meet(task.name, path)
    outcome = _done(task, path, lambda stage: place.keep(task.name, stage), divide)
    for file in (path / _RECIPE, *path.glob("report-*.html")):
        if file.is_file():
            place.keep(task.name, file)
    return outcome


def _done(
    task: Task, path: Path, finished: Callable[[Path], None] | None, divide: Callable[[Run], None] | None
) -> Outcome:
    from resvit_export.run_folder import RunFolder

    begin = time.monotonic()
    folder = RunFolder(path, SILENT, finished)
    refused = {target: error for target in task.recipe.targets if (error := _refusal(task, folder, target))}
    possible = [target for target in task.recipe.targets if target not in refused]
    found = {target: _refused(target, error) for target, error in refused.items()}
    if possible:
        found |= {one.target: one for one in _built(task, folder, possible, divide)}
    outcomes = tuple(found[target] for target in task.recipe.targets)
    entries, left_out = _compared(path) if any(one.finished for one in outcomes) else ((), "")
    return Outcome(task.name, outcomes, time.monotonic() - begin, entries=entries, left_out=left_out)


def _compared(path: Path) -> tuple[tuple[Entry, ...], str]:
    """What a comparison shows of a run, or why it cannot."""
    from resvit_export.report.comparison import entries_of
    from resvit_export.tune import settled

    try:
        return tuple(entries_of([path], settled)), ""
    except ResvitError as error:
        return (), error.problem


def _refusal(task: Task, folder: RunFolder, target: str) -> ResvitError | None:
    """Why a target cannot do what is asked for, before any work."""
    from resvit_export.pipeline import Pipeline
    from resvit_export.run import runs_for

    try:
        for run in runs_for(task.for_targets(target), folder, SILENT):
            Pipeline(run)
    except ResvitError as error:
        return error
    return None


def _built(
    task: Task, folder: RunFolder, targets: list[str], divide: Callable[[Run], None] | None
) -> Iterator[TargetOutcome]:
    from resvit_export.api import build_run, opened
    from resvit_export.recipe.file import recipe_to_toml
    from resvit_export.run import runs_for

    recipe = task.for_targets(*targets)
    finished: list[str] = []
    try:
        with opened(recipe, folder, runs_for(recipe, folder, SILENT)) as runs:
            for target, run in zip(targets, runs, strict=True):
                if divide is not None:
                    divide(run)
                try:
                    built = build_run(run, report=f"report-{target}.html")
                except ResvitError as error:
                    yield _refused(target, error)
                    continue
                finished.append(target)
                bundle = sha256_file(built.bundle) if built.bundle else None
                yield TargetOutcome(target, int(built.exit_code), built.verdict.kind.value, bundle, True)
            if finished and finished != targets:
                # The recipe is what a comparison reads: it names what is there.
                write_atomic(folder.path / _RECIPE, recipe_to_toml(task.for_targets(*finished)).encode())
    except ResvitError as error:
        for target in targets:
            if target not in finished:
                yield _refused(target, error)


def _refused(target: str, error: ResvitError) -> TargetOutcome:
    return TargetOutcome(target, int(error.code), error.problem, fix=error.fix)
