"""Whatever code of the user's reads belongs to what its results are known by."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resvit_calibrate.readers.user.code import Reads, changed_since, module_from, user_files, watched
from resvit_calibrate.tasks.other import Other
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT
from resvit_export.loading.load import program_digest
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.source import NetworkSource, known_by_name
from resvit_export.loading.spec import ModelSpec
from resvit_export.run_folder import RunFolder
from resvit_export.stages.fold import Fold

NETWORK = """
import os, pathlib
import torch
from torch import nn
from {package}.parts import SCALE
from {package} import late

HERE = pathlib.Path(__file__).parent


class Net(nn.Module):
    input_shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(16, 3)
        self.task_options = {{"names": (HERE / "names.txt").read_text()}}
        if (HERE / "w.pt").exists():
            self.load_state_dict(torch.load(HERE / "w.pt"))
        self.factor = float(os.environ.get("FACTOR_OF_A_TEST", "1")) * len(list(HERE.glob("*.tag")))

    def forward(self, x):
        shift = float((HERE / "lazy.txt").read_text())
        with torch.no_grad():
            y = late.change(x)
        return (self.f(y.flatten(1)) * SCALE + shift) * self.factor


def make():
    return Net()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A package whose factory imports, loads, lists and asks; its name is the test's own, as modules stay imported."""
    package = tmp_path / f"user_{abs(hash(request.node.name))}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("SCALE = 1.0\n")
    (package / "late.py").write_text("def change(x):\n    return x * 2\n")
    (package / "net.py").write_text(NETWORK.format(package=package.name))
    (package / "names.txt").write_text("cat dog")
    (package / "lazy.txt").write_text("0.5")
    (package / "one.tag").write_text("")
    monkeypatch.chdir(tmp_path)
    return package


def weights(package: Path) -> None:
    torch.save({"f.weight": torch.ones(3, 16), "f.bias": torch.zeros(3)}, package / "w.pt")


def digest(package: Path) -> str:
    """What a fresh process knows the network by."""
    import sys

    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]
    for cached in package.glob("__pycache__/*"):
        cached.unlink()
    source = NetworkSource(ModelSpec(f"{package.name}.net:make"))
    return source.digest


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "a module that it imports": lambda p, _: (p / "parts.py").write_text("SCALE = 2.0\n"),
    "what runs without gradients": lambda p, _: (p / "late.py").write_text("def change(x):\n    return x * 3\n"),
    "weights that appear": lambda p, _: weights(p),
    "a file that its forward reads": lambda p, _: (p / "lazy.txt").write_text("0.7"),
    "a folder that it lists": lambda p, _: (p / "two.tag").write_text(""),
    "a variable of the environment": lambda _, patch: patch.setenv("FACTOR_OF_A_TEST", "3"),
    "what it says of its outputs": lambda p, _: (p / "names.txt").write_text("dog cat"),
}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_a_factory_reads_changes_what_its_network_is_known_by(
    project: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, pytest.MonkeyPatch], Any]
) -> None:
    before = digest(project)
    assert digest(project) == before
    change(project, monkeypatch)
    assert digest(project) != before


@pytest.mark.whole
def test_a_comment_in_a_module_changes_no_network_but_its_code(project: Path) -> None:
    before = digest(project)
    source = NetworkSource(ModelSpec(f"{project.name}.net:make"))
    code = source.code
    assert source.with_checkpoint(project / "names.txt").digest != source.digest
    (project / "parts.py").write_text("SCALE = 1.0  # as it was\n")
    assert digest(project) == before
    assert NetworkSource(ModelSpec(f"{project.name}.net:make")).code != code


@pytest.mark.whole
def test_an_edited_neighbour_folds_again_and_an_unchanged_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "edited_neighbour.py").write_text("SCALE = 1.0\n")
    (tmp_path / "build.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn
            from edited_neighbour import SCALE
            class Net(nn.Module):
                input_shape = (1, 4, 4)
                def forward(self, x):
                    return x.flatten(1) * SCALE
            """
        )
    )

    def folded() -> bool:
        import sys

        sys.modules.pop("edited_neighbour", None)
        folder = RunFolder(tmp_path / "run", SILENT)  # as another command opens it
        return folder.do(Fold(NetworkSource(ModelSpec(f"{tmp_path / 'build.py'}:Net")))).reused

    assert [folded(), folded()] == [False, True]
    (tmp_path / "edited_neighbour.py").write_text("SCALE = -10.0\n")
    assert [folded(), folded()] == [False, True]


@pytest.mark.parametrize(
    ("model", "arguments", "named"),
    [
        ("resvit:embed-nano", {}, True),
        ("timm:resnet18", {"num_classes": 5}, True),
        ("timm:resnet18", {"checkpoint_path": "w.pth"}, False),
        ("timm:resnet18", {"pretrained": True}, False),
        ("torchvision.models:resnet18", {}, True),
        ("torchvision.models:resnet18", {"weights": "DEFAULT"}, False),
        ("net.py:make", {}, False),
        ("package.net:make", {}, False),
        ("net.pt2", {}, True),
    ],
)
def test_what_may_read_anything_is_known_by_its_program(model: str, arguments: dict[str, Any], named: bool) -> None:
    assert known_by_name(ModelSpec(model, model_args=arguments)) is named


@pytest.mark.whole
def test_names_of_outputs_and_parts_without_gradients_are_in_the_digest() -> None:
    class Net(nn.Module):
        def __init__(self, name: str, factor: float) -> None:
            super().__init__()
            self.name, self.factor = name, factor

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                y = x * self.factor
            return {self.name: y + 1}

    made = {
        program_digest(program_from_module(Net(name, factor), (1, 2, 2))[0])
        for name, factor in (("a", 2.0), ("b", 2.0), ("a", 3.0), ("a", 2.0))
    }
    assert len(made) == 3


METRIC = """
import os, pathlib
import numpy as np
from metric_neighbour import HALF
HERE = pathlib.Path(__file__).parent
TABLE = np.load(HERE / "table.npy")

def score(outputs, known):
    late = (HERE / "late.txt").read_text() if (HERE / "late.txt").exists() else open(HERE / "default.txt").read()
    os.listdir(HERE / "folder"), os.getenv("METRIC_OF_A_TEST")
    return np.full(len(outputs["logits"]), HALF * TABLE[0] + float(late))
"""


@pytest.fixture
def metric(tmp_path: Path) -> Path:
    import sys

    sys.modules.pop("metric_neighbour", None)
    (tmp_path / "metric_neighbour.py").write_text("HALF = 0.5\n")
    np.save(tmp_path / "table.npy", np.array([0.5]))
    (tmp_path / "default.txt").write_text("0.1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "metric.py").write_text(METRIC)
    return tmp_path


METRIC_CHANGES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Any], str]] = {
    "its own file": (lambda p, _: (p / "metric.py").write_text(METRIC + "#"), "metric.py"),
    "a module": (lambda p, _: (p / "metric_neighbour.py").write_text("HALF = 0.25\n"), "metric_neighbour.py"),
    "an array read on import": (lambda p, _: np.save(p / "table.npy", np.array([0.6])), "table.npy"),
    "a file read late": (lambda p, _: (p / "default.txt").write_text("0.2"), "default.txt"),
    "a folder": (lambda p, _: (p / "folder/new").write_text(""), "folder"),
    "a variable": (lambda _, patch: patch.setenv("METRIC_OF_A_TEST", "1"), "METRIC_OF_A_TEST"),
}


@pytest.mark.parametrize(("change", "what"), METRIC_CHANGES.values(), ids=METRIC_CHANGES)
def test_what_a_metric_reads_is_written_down(
    metric: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, pytest.MonkeyPatch], Any], what: str
) -> None:
    from resvit_calibrate.images.image_set import Batch

    task = Other({}, f"{metric / 'metric.py'}:score")
    assert task.function is not None
    assert task.reads is not None
    batch = Batch(np.zeros((2, 1, 2, 2), np.float32), np.zeros(2, np.int64))
    outputs = {"logits": np.zeros((2, 3), np.float32)}
    assert task._scores(task.function, outputs, batch, np.ones(2, np.bool_)).tolist() == [0.35, 0.35]
    assert changed_since(task.reads.digests) is None
    change(metric, monkeypatch)
    changed = changed_since(task.reads.digests)
    assert changed is not None
    assert Path(changed).name == what


def test_what_is_read_elsewhere_is_not_written_down_and_other_programs_are_told(tmp_path: Path) -> None:
    reads = Reads()
    (tmp_path / "a").write_text("1")
    os.mkfifo(tmp_path / "pipe")
    with watched(reads):
        (tmp_path / "a").read_text()
        (tmp_path / "written").write_text("2")
        Path(np.__file__).read_text()
        os.system("true")
        os.environ.get("SOMETHING_OF_A_TEST")
    (tmp_path / "b").write_text("3")
    assert set(reads.digests) == {f"file:{tmp_path / 'a'}", "variable:SOMETHING_OF_A_TEST"}
    assert reads.unseen == {"started another program"}
    assert changed_since({f"file:{tmp_path / 'pipe'}": "x"}) == str(tmp_path / "pipe")
    assert changed_since({"unknown:x": "y"}) == "x"


def test_modules_that_a_module_refers_to_are_its_sources(project: Path) -> None:
    module_from(f"{project.name}.net")
    names = {name.partition(".")[2] for name in user_files(f"{project.name}.net")}
    assert names == {"", "net", "parts", "late"}
    assert user_files("numpy", "torch.nn", "resvit_export.stage") == {}


def test_a_factory_whose_neighbour_is_missing_is_told_as_its_own_fault(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import no_such_neighbour_anywhere\n")
    with pytest.raises(ResvitError, match=r"net.py failed.*no_such_neighbour_anywhere"):
        NetworkSource(ModelSpec(f"{tmp_path / 'net.py'}:make")).digest  # noqa: B018
