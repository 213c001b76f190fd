"""Sweeps: what the file says, one after another and over a local Ray cluster, with workers that die."""

from __future__ import annotations

import importlib.machinery
import json
import re
import sys
import types
import warnings
from pathlib import Path

import pytest

from conftest import ROOT
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.targets.table import Precision
from resvit_export.cli.main import run
from resvit_export.cli.sweep import _exit_code
from resvit_export.recipe.file import recipe_from_toml
from resvit_export.sweep.cluster import require_same, versions_here
from resvit_export.sweep.plan import sweep_from_toml
from resvit_export.sweep.spread import outcomes_by_ray, outcomes_here
from resvit_export.sweep.work import Outcome, TargetOutcome

SWEEP = """
targets = ["jetson-orin", "l4", "l4"]
precisions = ["int8", "fp8"]
[models.one]
model = { name = "net.py:make", input_shape = "3x8x8" }
[models.two]
model = { name = "resvit:embed-nano" }
data = { seed = 5 }
[recipe]
data = { images = "fashion-mnist", seed = 3, calibration_images = 64 }
"""


def written(folder: Path, text: str) -> Path:
    (folder / "sweep.toml").write_text(text)
    return folder / "sweep.toml"


def test_every_model_in_every_precision_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")
    tasks = sweep_from_toml(written(tmp_path, SWEEP))
    assert [task.name for task in tasks] == ["one-int8", "one-fp8", "two-int8", "two-fp8"]
    assert all(task.recipe.targets == ("jetson-orin", "l4") for task in tasks)
    assert [task.recipe.precision for task in tasks] == [Precision.INT8, Precision.FP8] * 2
    assert [task.recipe.seed for task in tasks] == [3, 3, 5, 5]
    assert {task.recipe.calibration_images for task in tasks} == {64}
    assert tasks[0].recipe.model == f"{tmp_path / 'net.py'}:make"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("targets = ", "aims = "), "has an entry that does not exist: aims"),
        (('targets = ["jetson-orin", "l4", "l4"]', "targets = []"), "has no list of targets"),
        (('precisions = ["int8", "fp8"]', "precisions = [8]"), "has no list of precisions"),
        (("[models.one]", '[models."../one"]'), "is no name"),
        (("seed = 5", 'sed = "x"'), "a setting that does not exist: data.sed"),
        (("[recipe]", '[recipe]\ntarget = { name = "l4" }'), "target.name is said for one model or for all"),
        (("[recipe]", "[recipe"), "is not valid TOML"),
        (("[models.one]", '[models.one]\ntargets = ["l4"]'), "targets stands below [models.one]"),
        (("[recipe]", '[recipe]\nprecisions = ["int8"]'), "precisions stands below [recipe]"),
        (("[recipe]", "[budgets]\n[recipe]"), "budgets that are no tables"),
        (("[recipe]", "[budgets]\nsmall = 3\n[recipe]"), "budgets.small is no table"),
        (("[recipe]", '[budgets."a/b"]\n[recipe]'), "the budget 'a/b' is no name"),
        (("[recipe]", '[budgets.""]\n[recipe]'), "the budget '' is no name"),
        (("[recipe]", "[budgets.x]\nsearch = { latency_budget = 3 }\n[recipe]"), "latency_budget"),
        (
            (
                "[models.two]",
                '[models.one-int8]\nmodel = { name = "resvit:embed-nano" }\n[budgets.x]\n[budgets.int8-x]\n'
                "[models.two]",
            ),
            "two runs would be called one-int8-int8-x",
        ),
    ],
)
def test_what_is_no_sweep_is_refused_with_its_place(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    with pytest.raises(ResvitError, match=re.escape(says)) as refused:
        sweep_from_toml(written(tmp_path, SWEEP.replace(*change)))
    assert refused.value.code is ExitCode.INPUT
    assert refused.value.fix


def test_a_sweep_without_models_or_file(tmp_path: Path) -> None:
    with pytest.raises(ResvitError, match="names no models"):
        sweep_from_toml(written(tmp_path, 'targets = ["l4"]\nprecisions = ["int8"]\nmodels = {}'))
    with pytest.raises(ResvitError, match="There is no sweep at"):
        sweep_from_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize("own", ["", '[recipe.targets.l5]\nlike = "l4"\n'])
def test_a_target_that_there_is_none_of_is_refused_before_anything(tmp_path: Path, own: str) -> None:
    path = written(tmp_path, SWEEP.replace('"l4", "l4"', '"l5"') + own)
    if own:
        assert len(sweep_from_toml(path)) == 4
        return
    with pytest.raises(ResvitError, match=r"(?s)sweep\.toml: There is no target called 'l5'.*l4") as refused:
        sweep_from_toml(path)
    assert refused.value.code is ExitCode.IMPOSSIBLE


def test_every_budget_is_a_task_of_its_own(tmp_path: Path) -> None:
    budgets = "[budgets.tight]\nvalidate = { max_drop = 0.25 }\n[budgets.fast]\nsearch = { latency_budget = '0.7x' }\n"
    tasks = sweep_from_toml(written(tmp_path, SWEEP + "validate = { max_drop = 2.0 }\n" + budgets))
    assert [task.name for task in tasks][:4] == ["one-int8-tight", "one-int8-fast", "one-fp8-tight", "one-fp8-fast"]
    assert [(task.recipe.max_drop, task.recipe.latency_budget) for task in tasks][:2] == [(0.25, None), (2.0, "0.7x")]
    assert len({task.name for task in tasks}) == 8


def test_it_is_said_which_task_begins(tmp_path: Path) -> None:
    told = Told()
    tasks = sweep_from_toml(written(tmp_path, REFUSED))
    outcomes = outcomes_here(tasks, tmp_path / "out", told)
    assert next(outcomes).name == "one-fp8"
    assert told.lines == ["1 of 2 begins: one-fp8"]


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("name", ["resvit-export", "torch", "onnxruntime", "numpy", "onnx"])
def test_a_worker_with_other_versions_is_refused(tmp_path: Path, name: str) -> None:
    require_same(tmp_path, versions_here())
    assert all(versions_here().values())
    with pytest.raises(ResvitError, match=f"A worker has {name} .*, and this machine 0.0.1"):
        require_same(tmp_path, {**versions_here(), name: "0.0.1"})


@pytest.mark.parametrize("out", ["gs://bucket/x", "s3:/bucket/x", "file:///tmp/x", "https://store/x"])
def test_a_place_that_is_none_is_refused_at_once(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, REFUSED)
    assert run(["sweep", str(path), "--out", out]) == ExitCode.INPUT
    assert sorted(tmp_path.iterdir()) == [path]


REFUSED = """
targets = ["jetson-orin", "a100"]
precisions = ["fp8"]
[models.one]
model = { name = "resvit:embed-nano" }
[models.two]
model = { name = "resvit:mobile-nano" }
[recipe]
data = { images = "fashion-mnist" }
"""


def test_what_cannot_be_is_an_outcome_and_not_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, REFUSED)
    assert run(["sweep", str(path), "--out", str(tmp_path / "out"), "--json"]) == ExitCode.IMPOSSIBLE
    said = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in said["tasks"]] == ["one-fp8", "two-fp8"]
    codes = {target["exit_code"] for task in said["tasks"] for target in task["targets"]}
    assert codes == {int(ExitCode.IMPOSSIBLE)}
    assert all(target["fix"] for task in said["tasks"] for target in task["targets"])
    assert said == json.loads((tmp_path / "out/sweep.json").read_text())
    assert said["report"] is None


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([(3, False), (3, False)], 3),
        ([(6, False), (7, False)], 3),
        ([(6, False), (4, True)], 0),
        ([(0, True)], 0),
    ],
)
def test_the_exit_code_tells_whether_any_row_was_made(rows: list[tuple[int, bool]], code: int) -> None:
    outcomes = [Outcome("a", (TargetOutcome("l4", said, "", None, made),), 1.0) for said, made in rows]
    assert _exit_code(outcomes) == code
    assert _exit_code([*outcomes, Outcome("b", (), 1.0, "it was killed")]) == ExitCode.SYSTEM


@pytest.mark.parametrize(
    "address",
    ["ray://head:99999", "ray://head:0", "banana", "127.0.0.1:6379", "ray://", "ray://head", "ray://head:port"],
)
def test_an_address_that_is_none_is_refused_at_once(tmp_path: Path, address: str) -> None:
    with pytest.raises(ResvitError, match="There is no Ray cluster") as refused:
        list(outcomes_by_ray((), tmp_path, address))
    assert refused.value.code is ExitCode.INPUT


def test_a_cluster_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: object) -> None:
        warnings.warn("Ray Client connection timed out.", UserWarning, stacklevel=1)
        raise ConnectionError("ray client connection timeout")

    ray = types.ModuleType("ray")
    ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    vars(ray).update(init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ResvitError, match="ray://head:10001 cannot be used: ray client connection") as refused:
            list(outcomes_by_ray((), tmp_path, "ray://head:10001"))
    assert refused.value.code is ExitCode.MISSING


def test_without_ray_it_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResvitError, match="Ray is not installed") as refused:
        list(outcomes_by_ray(sweep_from_toml(written(tmp_path, REFUSED)), tmp_path, "local"))
    assert refused.value.code is ExitCode.MISSING


DEADLY = """
import os, signal
from torch import nn

def make():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_over_ray_outcomes_are_the_same_and_a_killed_worker_costs_its_task_alone(workspace: Path) -> None:
    pytest.importorskip("ray")
    (workspace / "deadly.py").write_text(DEADLY)
    alive = sweep_from_toml(written(workspace, REFUSED))
    dead = sweep_from_toml(
        written(
            workspace,
            'targets = ["l4"]\nprecisions = ["int8"]\nmodels.dead.model = { name = "deadly.py:make", '
            'input_shape = "1x28x28" }\nrecipe.data.images = "fashion-mnist"',
        )
    )
    (workspace / "ray").mkdir()
    told = Told()
    outcomes = outcomes_by_ray([*dead, *alive], workspace / "ray", "local", reporter=told)
    over = {outcome.name: outcome for outcome in outcomes}
    assert {f"begins: {task.name}" for task in [*dead, *alive]} == set(told.lines)
    assert over["dead-int8"].lost
    assert over["dead-int8"].targets == ()
    assert [over[task.name].targets for task in alive] == [
        outcome.targets for outcome in outcomes_here(alive, workspace / "here")
    ]


DIVIDED = """
targets = ["jetson-orin"]
precisions = ["int8"]
[models.small]
model = { name = "resvit:embed-nano", checkpoint = "runs/demo/embed-nano.pt" }
[recipe]
data = { images = "fashion-mnist", calibration_images = 32, validation_images = 300 }
"""


@pytest.mark.slow
def test_budgets_are_built_one_after_another_and_compared(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = "[budgets.loose]\nvalidate = { max_drop = 60.0 }\n[budgets.tight]\nvalidate = { max_drop = 0.5 }\n"
    path = written(workspace, DIVIDED + budgets)
    assert run(["sweep", str(path), "--out", str(workspace / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in said["tasks"]] == ["small-int8-loose", "small-int8-tight"]
    assert {entry["run"] for entry in said["entries"]} == {"small-int8-loose", "small-int8-tight"}
    codes = [task["targets"][0]["exit_code"] for task in said["tasks"]]
    assert codes[0] == 0
    kept = [recipe_from_toml(workspace / "out" / task["name"] / "recipe.toml").max_drop for task in said["tasks"]]
    assert kept == [60.0, 0.5]


@pytest.mark.slow
def test_over_ray_a_validation_is_divided(workspace: Path) -> None:
    pytest.importorskip("ray")
    tasks = sweep_from_toml(written(workspace, DIVIDED))
    found = []
    for name, least in (("whole", 1000), ("divided", 64)):
        (workspace / name).mkdir()
        found += outcomes_by_ray(tasks, workspace / name, "local", least)
    assert not [outcome.lost for outcome in found if outcome.lost]
    assert found[0].targets[0].bundle
    assert found[0].targets == found[1].targets


def test_the_page_s_sweep_file_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    assert [len(sweep_from_toml(written(tmp_path, "\n".join(blocks[:count])))) for count in (1, 2)] == [4, 8]
