"""A run's work over several workers: parts are joined to the very bytes of one process, and workers are lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from resvit_calibrate.answers.parts import Parts
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT
from resvit_engines.records import record_from_file
from resvit_export.cli.main import run as command
from resvit_export.pipeline import Pipeline
from resvit_export.recipe.recipe import Recipe
from resvit_export.run import Run, runs_for
from resvit_export.run_folder import RunFolder, read_record
from resvit_export.settle import measured
from resvit_export.stage import RECORD, File
from resvit_export.stages.score import AskFloat
from resvit_export.sweep.cluster import (
    UnlikeWorkerError,
    cluster_at,
    idle_of,
    spread_over,
    versions_here,
    workers_of,
)
from resvit_export.sweep.divide import Divided, divide
from resvit_export.sweep.part import Part, Spread
from resvit_export.sweep.plan import Task, sweep_from_toml
from resvit_export.sweep.ranges import Range, _gaps
from resvit_export.sweep.store import RunStore
from resvit_export.sweep.work import task_done
from resvit_quantize.sensitivity import brute_force
from resvit_quantize.sensitivity.known_noise import KnownNoise, NoiseSource
from resvit_quantize.sensitivity.method import Method

T = TypeVar("T")
NUMBERS = itertools.count()
MEASURED = brute_force.measured_noise
SWEEP = """
targets = ["jetson-orin"]
precisions = ["int8"]
[models.small]
model = {{ name = "resvit:embed-nano", checkpoint = "runs/demo/embed-nano.pt" }}
[recipe]
data = {{ images = "fashion-mnist", calibration_images = {calibration}, validation_images = {images} }}
"""
UNDECIDED = """validate = { max_drop = 0.51 }
quantize = { calibrator = "max" }
"""
"""Ranges of four images and so narrow a limit leave the plain recipe undecided on 1,000: a search follows."""


def task_of(folder: Path, images: int, more: str = "") -> Task:
    (folder / "sweep.toml").write_text(SWEEP.format(images=images, calibration=4 if more else 32) + more)
    (task,) = sweep_from_toml(folder / "sweep.toml")
    return task


class Workers:
    """Do parts in this process, the last first, each in a copy of the run; some may be lost, or the run be killed."""

    def __init__(self, place: Path, lost: Sequence[int] = (), killed_after: int | None = None) -> None:
        self.place, self.lost, self.killed_after = place, lost, killed_after
        self.sent: list[Part] = []

    def spread(self, parts: Sequence[Part[T]]) -> Iterator[tuple[int, T]]:
        for index, part in reversed(list(enumerate(parts))):
            if len(self.sent) == self.killed_after:
                raise KeyboardInterrupt
            self.sent.append(part)
            if index not in self.lost:
                # The run may lie elsewhere on that worker.
                elsewhere = self.place.with_name(f"{self.place.name}-worker-{next(NUMBERS)}")
                shutil.copytree(self.place, elsewhere)
                yield index, part.done(elsewhere)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(part.first, part.last) for part in self.sent if isinstance(part, Range)]

    def divides(self, name: str, workers: int, least: int) -> Callable[[Run], None]:
        return lambda run: divide(run, name, self.spread, workers, least=least)


def stages_of(run: Path) -> dict[str, dict[str, str]]:
    """What every finished stage of a run wrote, by the digests of its files."""
    return {
        record.parent.name: {name: output.sha256 for name, output in read_record(record.parent).outputs.items()}
        for record in run.glob(f"*/{RECORD}")
    }


@pytest.mark.slow
def test_a_validation_that_is_divided_says_the_same_to_the_byte(workspace: Path) -> None:
    task = task_of(workspace, 300)
    places = [workspace / name for name in ("whole", "divided", "lame")]
    whole = task_done(task, places[0])
    assert [one.bundle for one in whole.targets if one.bundle]
    workers = Workers(places[1])
    assert task_done(task, places[1], workers.divides(task.name, 3, 64)).targets == whole.targets
    assert workers.ranges == [(256, 300), (128, 256), (0, 128)]  # each ends a batch
    # A worker that is lost costs time alone, and what is of another run is not taken.
    lame = Workers(places[2], lost=[1])
    assert task_done(task, places[2], lame.divides(task.name, 3, 64)).targets == whole.targets
    (found,) = runs_for(task.recipe, RunFolder(places[1] / task.name, SILENT), SILENT)
    assert not list((places[1] / task.name).glob("unfinished/*"))
    asked = [AskFloat(Pipeline(found).questions, File.of(workspace / "runs/demo/embed-nano.pt"))]
    bare = tuple((type(one), {"model": one.model}) for one in asked)
    part = Range(found.recipe, task.name, workspace, bare, ("0" * 64,), 0, 32)
    assert part.done(places[1]) == {}


@pytest.mark.slow
def test_parts_that_were_answered_before_a_kill_are_not_asked_again(workspace: Path) -> None:
    task = task_of(workspace, 300)
    whole = task_done(task, workspace / "whole")
    place = workspace / "killed"
    with pytest.raises(KeyboardInterrupt):
        task_done(task, place, (first := Workers(place, killed_after=1)).divides(task.name, 3, 64))
    assert first.ranges == [(256, 300)]
    # With other workers, too.
    assert task_done(task, place, (second := Workers(place)).divides(task.name, 2, 64)).targets == whole.targets
    assert second.ranges == [(128, 256), (0, 128)]


class Kept:
    """Stands for a store with these parts."""

    def __init__(self, *parts: tuple[int, int]) -> None:
        self.parts = parts

    def kept(self) -> list[object]:
        return [type("PartRecord", (), {"first": first, "last": last}) for first, last in self.parts]


@pytest.mark.parametrize(
    ("parts", "gaps"),
    [
        ([()], [(0, 100)]),
        ([((0, 100),)], []),
        ([((0, 30), (60, 100))], [(30, 60)]),
        ([((30, 60),)], [(0, 30), (60, 100)]),
        ([((0, 50), (30, 60), (50, 70))], [(70, 100)]),  # of two divisions
        ([((0, 50), (50, 100)), ((0, 50),)], [(50, 100)]),  # what only some have answered
        ([((0, 50),), ((0, 40),)], [(0, 100)]),
    ],
)
def test_what_is_not_answered_yet(parts: list[tuple[tuple[int, int], ...]], gaps: list[tuple[int, int]]) -> None:
    assert _gaps([Kept(*one) for one in parts], 100) == gaps  # type: ignore[misc]


class Numbers:
    """Answers that are numbers."""

    def __init__(self, values: Sequence[int]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        np.savez(path, values=np.array(self.values))


def test_of_parts_that_are_kept_the_damaged_ones_count_for_nothing(tmp_path: Path) -> None:
    store = Parts(tmp_path / "parts", "0" * 64)
    assert store.kept() == []
    for first in (0, 3, 9):
        store.write(Numbers(range(3)), first, {}, None)
    assert [(part.first, part.last) for part in store.kept()] == [(0, 3), (3, 6), (9, 12)]
    assert Parts(tmp_path / "parts", "1" * 64).kept() == []
    (tmp_path / "parts/000000003.npz").write_bytes(b"")
    (tmp_path / "parts/000000009.json").write_bytes(b"{}")
    (tmp_path / "parts/banana.json").write_bytes(b"{}")
    assert [(part.first, part.last) for part in store.kept()] == [(0, 3)]


BY_FORCE = """
[model]
name = "resvit:embed-nano"
checkpoint = "runs/demo/embed-nano.pt"
[data]
images = "fashion-mnist"
calibration_images = 32
[quantize]
precision = "int8"
"""


def sensitivity_in(workspace: Path, name: str, prepare: Callable[[Run], None] | None = None) -> bytes:
    """The file that brute force on 16 images writes in a run folder, whose stages before are the same everywhere."""
    from resvit_export.recipe.file import recipe_from_toml

    (workspace / "recipe.toml").write_text(BY_FORCE)
    recipe: Recipe = recipe_from_toml(workspace / "recipe.toml")
    folder = RunFolder(workspace / "runs" / name, SILENT)
    (run,) = runs_for(recipe, folder, SILENT)
    with folder.locked():
        if prepare is not None:
            prepare(run)
        found = measured(Pipeline(run), 16, Method.BRUTE_FORCE)
    assert not list(folder.path.glob("unfinished/*"))
    return found.content("sensitivity.json")


@pytest.mark.slow
def test_brute_force_that_is_divided_or_killed_measures_the_same_to_the_byte(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sensitivity_in(workspace, "whole")
    document = json.loads(whole)
    sources = sum(1 + sum(kind in layer["damage"] for layer in document["layers"]) for kind in ("int8", "fp8"))
    assert sources > 20

    # One worker is lost.
    workers = Workers(workspace / "runs", lost=[1])
    seen = measuring(monkeypatch)
    assert sensitivity_in(workspace, "divided", workers.divides("divided", 3, 64)) == whole
    assert len(workers.sent) == 3
    together = [source for part in workers.sent for source in part.sources]  # type: ignore[attr-defined]
    assert len(together) == len(set(together)) == sources
    lost = workers.sent[1].sources  # type: ignore[attr-defined]
    assert sorted(map(str, seen)) == sorted(map(str, together))
    assert seen[-len(lost) :] == list(lost)  # by the run itself

    # The run is killed while parts are done, and then while it works alone: nothing is measured twice.
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        sensitivity_in(workspace, "killed", Workers(workspace / "runs", killed_after=1).divides("killed", 3, 64))
    stop = len(seen) + 2
    seen = measuring(monkeypatch, seen, stop)
    with pytest.raises(KeyboardInterrupt):
        sensitivity_in(workspace, "killed")
    seen = measuring(monkeypatch, seen)
    assert sensitivity_in(workspace, "killed") == whole
    assert len(seen) == len(set(seen)) == sources


def measuring(
    monkeypatch: pytest.MonkeyPatch, seen: list[NoiseSource] | None = None, stop: int | None = None
) -> list[NoiseSource]:
    """What is measured from now on, behind ``seen``; when there are ``stop``, the process is stopped."""
    seen = [] if seen is None else seen

    def counted(formats: object, bits: object, batches: object, wanted: object) -> Iterator[tuple[NoiseSource, float]]:
        for one, noise in MEASURED(formats, bits, batches, wanted):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(one)
            yield one, noise

    monkeypatch.setattr(brute_force, "measured_noise", counted)
    return seen


def test_noise_that_is_kept_is_read_back_to_the_bit(tmp_path: Path) -> None:
    store = KnownNoise(tmp_path / "unfinished/sensitivity-0", "0" * 64)
    assert store.read() == {}
    noise = {
        NoiseSource("int8", None): 1 / 3,
        NoiseSource("fp8", 'odd "[0]"/Conv'): 5e-324,
        NoiseSource("int8", "x"): 0.0,
    }
    store.write(noise)
    assert store.read() == noise
    assert KnownNoise(store.folder, "1" * 64).read() == {}
    for damaged in ("{", "[]", '{"key": 3}', json.dumps({"key": "0" * 64, "noise": [{"precision": 8}]})):
        (store.folder / "noise.json").write_text(damaged)
        assert store.read() == {}
    store.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_whose_trials_are_done_ahead_ends_the_same_to_the_byte(workspace: Path) -> None:
    task = task_of(workspace, 1000, UNDECIDED)
    whole = task_done(task, workspace / "whole")
    (serial,) = (workspace / "whole" / task.name).glob("search-*/search.json")
    looks = json.loads(serial.read_text())["looks"]
    assert len(looks) > 2
    # Of three at once the one that comes first is lost: the run does it itself.
    ahead = Workers(workspace / "ahead", lost=[0])
    assert task_done(task, workspace / "ahead", ahead.divides(task.name, 3, 2000)).targets == whole.targets
    assert len(ahead.sent) >= len(looks) - 1
    # Trials that the search did not come to are not part of the run.
    assert stages_of(workspace / "ahead" / task.name) == stages_of(workspace / "whole" / task.name)


@pytest.mark.parametrize(
    ("workers", "idle", "images", "at_once"),
    [
        (1, 1, 600, 1),
        (2, 2, 600, 2),
        (16, 16, 600, 16),
        (16, 16, 6000, 16),  # three ranges against four questions at once
        (16, 16, 10_000, 1),  # five
        (16, 2, 600, 2),
        (16, 0, 600, 1),
        (16, 16, 50_000, 1),
    ],
)
def test_trials_are_done_ahead_where_that_is_faster_than_ranges(
    workers: int, idle: int, images: int, at_once: int
) -> None:
    def spread(parts: Sequence[Part[T]]) -> Iterator[tuple[int, T]]:
        raise AssertionError("nothing is sent")

    checked: Spread = spread
    assert max(Divided("x", checked, workers, lambda: idle).trials_at_once(images), 1) == at_once


@pytest.mark.parametrize(
    ("name", "files"),
    [("../quantize-0123456789ab", {}), ("quantize", {}), ("quantize-0123456789ab", {"../x": b""})],
)
def test_what_is_no_stage_is_not_taken(tmp_path: Path, name: str, files: dict[str, bytes]) -> None:
    with pytest.raises(ResvitError, match="is no finished stage"):
        RunFolder(tmp_path / "run", SILENT).take(name, files)
    assert not list(tmp_path.rglob("*"))


def test_one_pass_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["sensitivity", "--model", "resvit:embed-nano", "--on", "local"]) == ExitCode.INPUT
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Fine(Part[str]):
    """Says its run's name."""

    def done(self, place: Path | RunStore) -> str:
        return f"{self.name} in {place}"


@dataclass(frozen=True)
class Deadly(Part[str]):
    """Ends its worker, as a machine does that loses power."""

    def done(self, place: Path | RunStore) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(place)


@dataclass(frozen=True)
class Refused(Part[str]):
    """Fails as a stage does."""

    def done(self, place: Path | RunStore) -> str:
        raise ResvitError(f"{place} is not what it was.", "Do it again.")


@pytest.mark.slow
def test_over_ray_a_worker_that_is_killed_costs_its_part_alone(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see this file
    parts = [kind(Recipe(), kind.__name__, tmp_path) for kind in (Fine, Deadly, Refused, Fine)]
    with cluster_at("local") as ray:
        found = dict(spread_over(ray, tmp_path, versions_here())(parts))
        assert found == {0: f"Fine in {tmp_path}", 3: f"Fine in {tmp_path}"}
        with pytest.raises(UnlikeWorkerError, match=r"A worker has torch .*, and this machine 0\.0\.1"):
            list(spread_over(ray, tmp_path, {**versions_here(), "torch": "0.0.1"})(parts[:1]))
        with pytest.raises(UnlikeWorkerError, match="does not see the folder"):
            list(spread_over(ray, tmp_path / "elsewhere", versions_here())(parts[:1]))
        assert workers_of(ray) >= idle_of(ray) >= 0


@pytest.mark.slow
def test_over_ray_brute_force_measures_the_same_to_the_byte(workspace: Path) -> None:
    pytest.importorskip("ray")
    line = "sensitivity --model resvit:embed-nano --checkpoint runs/demo/embed-nano.pt --data fashion-mnist".split()
    line += ["--method", "brute-force", "--images", "16", "--calibration-images", "32", "--quiet"]
    assert command([*line, "--run", "runs/here"]) == 0
    assert command([*line, "--run", "runs/over", "--on", "local"]) == 0
    here, over = (next(Path("runs").glob(f"{name}/sensitivity-*/{RECORD}")) for name in ("here", "over"))
    assert record_from_file(here).plain("outputs") == record_from_file(over).plain("outputs")
