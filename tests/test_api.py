"""Building from Python: the guide's example as it stands, and what a caller can rely on."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from conftest import CHECKPOINT, ROOT
from resvit_calibrate.gate.gate import VerdictKind
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT, Reporter, Silent
from resvit_engines.targets.speed_verdict import SpeedKind
from resvit_export import Built, build
from resvit_export.api import opened, recipe_from_settings
from resvit_export.loading.source import NetworkSource
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.reference import resvit_model
from resvit_export.recipe.file import recipe_from_toml, recipe_to_toml
from resvit_export.recipe.recipe import Recipe
from resvit_export.run import Sources
from resvit_export.run_folder import RunFolder
from resvit_export.stage import RECORD, Artifact, Record, Stage

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FEW = {"validation_images": 600, "calibration_images": 64, "search": False}


class Nothing(Artifact):
    """Of ``Step``."""


@dataclass(frozen=True)
class Step(Stage[Nothing]):
    """A stage that does nothing."""

    name: ClassVar[str] = "step"
    artifact: ClassVar[type[Artifact]] = Nothing

    def fill(self, folder: Path, reporter: Reporter) -> None:
        del reporter
        (folder / "done").write_text("")


@pytest.mark.parametrize(
    ("code", "judged", "works", "within", "kept"),
    [
        (ExitCode.INPUT, True, False, "before", "before"),
        (ExitCode.IMPOSSIBLE, True, False, "before", "before"),
        (ExitCode.INPUT, True, True, "now", "now"),  # so that a kill is gone on from
        (ExitCode.INPUT, False, False, "now", "now"),
        (ExitCode.NOT_FASTER, True, False, "before", "now"),
        (None, True, False, "before", "now"),
        (None, True, True, "now", "now"),
    ],
)
def test_what_is_refused_before_any_work_does_not_become_the_recipe_of_a_finished_run(
    tmp_path: Path, code: ExitCode | None, judged: bool, works: bool, within: str, kept: str
) -> None:
    recipes = {name: Recipe(model="resvit:embed-nano", data=name) for name in ("before", "now")}
    folder = RunFolder(tmp_path, SILENT)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipes["before"]))
    if judged:
        (tmp_path / "validate-0123").mkdir()
        record = Record("validate", "0" * 64, {}, {}, {}, 1.0, 1)
        (tmp_path / "validate-0123" / RECORD).write_text(json.dumps(record.to_json()))
    with contextlib.suppress(ResvitError), opened(recipes["now"], folder, []):
        if works:
            folder.do(Step())
        assert recipe_from_toml(tmp_path / "recipe.toml").data.endswith(within)
        if code is not None:
            raise ResvitError("cannot be used", "", code)
    assert recipe_from_toml(tmp_path / "recipe.toml").data.endswith(kept)


def example() -> str:
    """The code of the guide's part "From Python", its cells one after the other."""
    part = (ROOT / "docs" / "guide.md").read_text().partition("## From Python\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL))
    return code.replace("embed-mini", "embed-nano")  # whose trained weights the tests have


def trained() -> nn.Module:
    model = resvit_model("embed-nano")
    model.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["state_dict"])
    return model


@pytest.mark.slow
@pytest.mark.whole
def test_the_example_of_the_guide_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    (workspace / "notebook.py").write_text(example())
    made = runpy.run_path(str(workspace / "notebook.py"))
    built, again, said = made["built"], made["again"], capsys.readouterr().out

    assert built.verdict.kind is VerdictKind.ACCEPTED
    assert built.exit_code is ExitCode.OK
    assert [row.stage for row in built.verdict.rows] == ["pytorch", "onnx float", "onnx int8"]
    assert all(f"\n{row.stage}: top-1 0.9" in said for row in built.verdict.rows)
    assert built.speed.sentence in said
    assert built.quantized.macs_share > 0.98
    assert built.engine.bytes > 0
    assert built.plan is None
    assert built.device is None
    assert built.folder == Path("runs/notebook")
    assert built.bundle.suffix == ".resvit"
    assert all(path.is_file() for path in (built.bundle, built.onnx, built.report))

    names = ["fold", "export", "calibrate", "quantize", "validate", "predict", "compile", "audit", "bundle"]
    assert [stage.stage for stage in built.stages] == names
    assert not any(stage.reused for stage in built.stages)
    assert all(stage.reused for stage in again.stages)
    assert [stage.digest for stage in again.stages] == [stage.digest for stage in built.stages]

    # By name and checkpoint, from stages that the command line did: the same network, bit for bit.
    run = seeded("runs/named", "rtx-4090", stages=("fold", "export"))
    named = build("resvit:embed-nano", "fashion-mnist", "rtx-4090", run=run, checkpoint=CHECKPOINT, **FEW)
    assert named.stages[0].reused
    assert not named.stages[2].reused
    assert named.onnx.read_bytes() == built.onnx.read_bytes()
    assert named.exported == built.exported


@pytest.mark.slow
@pytest.mark.whole
def test_a_rejected_model_is_no_error(workspace: Path, seeded: Callable[..., str]) -> None:
    """A network of which pruning leaves too little, and which nothing trains afterwards."""
    import numpy as np

    from resvit_calibrate.readers.fashion_mnist import read_split

    images, labels = read_split("test")
    np.savez("few.npz", images=images[600:], labels=labels[600:], val_images=images[:600], val_labels=labels[:600])
    built = build(trained(), "few.npz", "jetson-orin", plugins="off", prune_macs=0.35, even_if_slower=True, **FEW)
    assert built.verdict.kind is VerdictKind.REJECTED
    assert built.rejection is not None
    assert built.rejection.fix
    assert (built.engine, built.plan, built.bundle) == (None, None, None)
    assert built.report.is_file()
    assert built.exit_code is ExitCode.REJECTED
    assert built.folder == Path("runs/EmbedHybrid")
    recipe = tomllib.loads((built.folder / "recipe.toml").read_text())
    assert recipe["data"]["images"] == str(workspace / "few.npz"), "the recipe must hold from wherever it is read"


class Scaled(nn.Module):
    """What tells two of them apart is in no tensor and in no ``repr``."""

    input_shape = (1, 28, 28)

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor, self.layer = factor, nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(images.flatten(1)) * self.factor
        return out


def digest(module: nn.Module) -> str:
    return NetworkSource(ModelSpec(f"object:{type(module).__name__}"), module).digest


@pytest.mark.whole
def test_a_module_is_known_by_all_that_it_computes_and_stays_as_it_is() -> None:
    module = Scaled(2.0).train().to(torch.float64)
    assert digest(module) == digest(Scaled(2.0).to(torch.float64))
    assert digest(Scaled(2.0)) != digest(Scaled(3.0))
    assert module.training
    assert module.layer.weight.dtype is torch.float64
    module.layer.bias.data[0] += 1
    assert digest(module) != digest(Scaled(2.0).to(torch.float64))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("settings", "problem", "fix"),
    [
        ({"max_dorp": 0.5}, "no setting 'max_dorp'", "max_drop"),
        ({"qqq": 1}, "no setting 'qqq'", "max_drop"),
        ({"precision": "int4"}, "precision = 'int4' does not exist", "int8, fp8, fp16"),
        ({"calibration_images": 0}, "calibration_images = 0 is out of range", "from 1"),
        ({"search": "no"}, "search = 'no' is of the wrong type", "true or false"),
        ({"checkpoint": "missing.pt"}, "missing.pt does not exist", "--checkpoint"),
        ({"preprocess": {"meen": [0.5]}}, "preprocessing setting 'meen'", "mean"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_says_what_to_do(
    workspace: Path, settings: dict[str, Any], problem: str, fix: str
) -> None:
    with pytest.raises(ResvitError) as caught:
        build(Scaled(1.0), "fashion-mnist", "rtx-4090", **settings)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.code is ExitCode.INPUT


def test_an_unknown_target_and_data_are_errors_before_any_work(workspace: Path) -> None:
    with pytest.raises(ResvitError, match="jetson-oren") as caught:
        build(Scaled(1.0), "fashion-mnist", "jetson-oren")
    assert "jetson-orin" in caught.value.fix
    with pytest.raises(ResvitError, match="no-such-folder"):
        build(Scaled(1.0), "no-such-folder", "jetson-orin")
    assert not list(workspace.glob("runs/*/fold-*"))


@pytest.mark.parametrize(
    ("kind", "allowed", "rejection", "code"),
    [
        (ExitCode.OK, False, None, ExitCode.OK),
        (ExitCode.OK, True, None, ExitCode.OK),
        (ExitCode.OK, False, ExitCode.REJECTED, ExitCode.REJECTED),  # accepted, and not everything fused
        (ExitCode.REJECTED, False, ExitCode.REJECTED, ExitCode.REJECTED),
        (ExitCode.REJECTED, True, None, ExitCode.OK),
        (ExitCode.REJECTED, True, ExitCode.REJECTED, ExitCode.REJECTED),
        (ExitCode.UNDECIDED, False, None, ExitCode.UNDECIDED),
        (ExitCode.UNDECIDED, True, None, ExitCode.UNDECIDED),
    ],
)
@pytest.mark.parametrize("slower", [False, True])
def test_the_exit_code_of_a_build(
    kind: ExitCode, allowed: bool, rejection: ExitCode | None, code: ExitCode, slower: bool
) -> None:
    verdict = SimpleNamespace(verdict=SimpleNamespace(exit_code=kind))
    speed = SimpleNamespace(kind=SpeedKind.NOT_FASTER if slower else SpeedKind.NOT_KNOWN)
    validated = SimpleNamespace(verdict=verdict)
    pipeline: Any = SimpleNamespace(recipe=Recipe(allow_rejected=allowed), validated=validated, speed=speed)
    error = ResvitError("Not everything fused.", "Leave it out.", rejection) if rejection else None
    expected = ExitCode.NOT_FASTER if slower and code is ExitCode.OK else code
    assert Built(pipeline, (), Path("report.html"), error).exit_code is expected


class Pictures(Dataset[Any]):
    """Pictures of random pixels, with their classes."""

    targets = tuple(number % 10 for number in range(40))
    classes = tuple("abcdefghij")

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        random = np.random.default_rng(self.first + index)
        return random.integers(0, 256, (32, 32), np.uint8), self.targets[index]


def test_data_sets_in_memory_are_data(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resvit_export.api.build_run", lambda run: run)
    preprocess = Preprocess((28, 28), 1)
    train, held_out = Pictures(0), Pictures(1000)
    run: Any = build(Scaled(1.0), train, "l4", validation_data=held_out, train_data=train, calibration_images=9)
    assert run.recipe.data == run.recipe.train_data == "object:Pictures"
    assert run.recipe.validation_data == "object:Pictures_2"
    assert run.sources.require_images() == "object:Pictures"
    calibration, validation = run.sources.image_sets(preprocess)
    assert (len(calibration), len(validation), validation.class_names) == (9, 40, train.classes)
    assert len(run.sources.training_images(preprocess, 99)) == 40
    loader = DataLoader(TensorDataset(torch.zeros(12, 1, 28, 28), torch.arange(12)), batch_size=4)
    with pytest.raises(ResvitError, match="Every calibration image is also a validation image"):
        build(Scaled(1.0), loader, "l4").sources.image_sets(preprocess)  # type: ignore[attr-defined]
    again = recipe_from_settings({"model": "resvit:embed-nano", "data": "object:Pictures"})
    with pytest.raises(ResvitError, match="were an object in Python"):
        Sources(again, SILENT).require_images()


class Stopped(Silent):
    """Interrupts the work that begins so behind some of its steps; notes what is said."""

    def __init__(self, what: str, behind: int = 1) -> None:
        self.what, self.behind = what, behind
        self.lines: list[str] = []

    def track(self, items, what, total, weight=1, before=0):
        for number, item in enumerate(items):
            if what.startswith(self.what) and number == self.behind:
                raise KeyboardInterrupt
            yield item

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.slow
def test_an_interrupted_notebook_goes_on_where_it_stopped(workspace: Path, seeded: Callable[..., str]) -> None:
    folder = seeded("runs/mine", "rtx-4090", stages=("fold", "export"))
    settings = {"checkpoint": "runs/demo/embed-nano.pt", "run": folder, **FEW}

    def asked(reporter: Stopped) -> str:
        with pytest.raises(KeyboardInterrupt) as caught:
            build("resvit:embed-nano", "fashion-mnist", "rtx-4090", reporter=reporter, **settings)
        return str(caught.value)

    assert asked(Stopped("calibrate", behind=0)) == "what is finished is kept in runs/mine: the same call goes on there"
    first = Stopped("validate")
    asked(first)
    assert not any(line.startswith("validate goes on") for line in first.lines)
    again = Stopped("validate")
    asked(again)  # the folder is free again, and what was answered is there
    assert "calibrate: unchanged" in again.lines
    assert any(line.startswith("validate goes on where it was stopped") for line in again.lines)
    assert not list(Path(folder).glob(".*.tmp"))
