"""Sweeps: what the file says, one after another and over a local Ray cluster, with workers that die."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from conftest import ROOT
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import Precision
from resvit_export.cli.main import run
from resvit_export.sweep.plan import sweep_from_toml
from resvit_export.sweep.spread import outcomes_by_ray, outcomes_here

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
    assert run(["sweep", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in said["tasks"]] == ["one-fp8", "two-fp8"]
    codes = {target["exit_code"] for task in said["tasks"] for target in task["targets"]}
    assert codes == {int(ExitCode.IMPOSSIBLE)}
    assert said == json.loads((tmp_path / "out/sweep.json").read_text())
    assert said["report"] is None


@pytest.mark.parametrize("address", ["banana", "127.0.0.1:6379", "ray://", "ray://head", "ray://head:port"])
def test_an_address_that_is_none_is_refused_at_once(tmp_path: Path, address: str) -> None:
    with pytest.raises(ResvitError, match="There is no Ray cluster") as refused:
        list(outcomes_by_ray((), tmp_path, address))
    assert refused.value.code is ExitCode.INPUT


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
    over = {outcome.name: outcome for outcome in outcomes_by_ray([*dead, *alive], workspace / "ray", "local")}
    assert over["dead-int8"].lost
    assert over["dead-int8"].targets == ()
    assert [over[task.name].targets for task in alive] == [
        outcome.targets for outcome in outcomes_here(alive, workspace / "here")
    ]


def test_the_page_s_sweep_file_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    assert len(sweep_from_toml(written(tmp_path, block))) == 4
