"""What ends a run is said before its first long stage: before a calibration image is read, or a channel pruned."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

TORCH = """
import torch
from torch import nn


class Net(nn.Sequential):
    input_shape = (3, 8, 8)


def make(classes=10):
    return Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
               nn.Linear(8, classes))


class OneBatch(Net):
    def forward(self, x):
        return super().forward(x.reshape(1, -1, 8, 8)[:, :3]) + 0 * x.mean((1, 2, 3))[:, None]


def coupled():
    return OneBatch(*make())
"""
METRIC = "def fails(outputs, known):\n    raise ValueError('no such output')\n"
DATA, OTHER = "data.npz", "other.npz"


def model(
    *behind: onnx.NodeProto,
    classes: int = 10,
    shape: tuple[int | str, ...] = (3, 8, 8),
    outputs: tuple[tuple[str, list[int | str]], ...] = (),
) -> onnx.ModelProto:
    """A small classifier; ``behind`` are nodes that read its classes ``y`` [N, K]."""
    random = np.random.default_rng(0)
    arrays = {"w": (8, 3, 3, 3), "f": (8, classes)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "f"], ["y"]),
        *behind,
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs or (("y", ["N", classes]),)],
            [numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


DET = model(
    helper.make_node("Constant", [], ["square"], value_ints=[-1, 3, 3]),
    helper.make_node("Constant", [], ["from"], value_ints=[0]),
    helper.make_node("Constant", [], ["to"], value_ints=[9]),
    helper.make_node("Constant", [], ["axis"], value_ints=[1]),
    helper.make_node("Slice", ["y", "from", "to", "axis"], ["nine"]),
    helper.make_node("Reshape", ["nine", "square"], ["matrices"]),
    helper.make_node("Det", ["matrices"], ["d"]),
    helper.make_node("Unsqueeze", ["d", "axis"], ["e"]),
    helper.make_node("Mul", ["y", "e"], ["z"]),
    outputs=(("z", ["N", 10]),),
)
TWO = model(helper.make_node("Relu", ["y"], ["z"]), outputs=(("y", ["N", 10]), ("z", ["N", 10])))
FILMS = model(shape=(3, 4, 8, 8))
COUPLED = model(
    helper.make_node("Constant", [], ["first"], value_ints=[0]),
    helper.make_node("ReduceMean", ["y", "first"], ["m"]),
    helper.make_node("Sub", ["y", "m"], ["z"]),
    outputs=(("z", ["N", 10]),),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks, images and a metric, in which nothing calibrates and nothing prunes."""

    def too_late(*_: object, **__: object) -> Any:
        raise AssertionError("a long stage began")

    random = np.random.default_rng(0)
    arrays = {"images": random.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8), "labels": np.arange(40) % 10}
    np.savez(tmp_path / DATA, **arrays)
    np.savez(tmp_path / OTHER, images=255 - arrays["images"], labels=arrays["labels"])
    (tmp_path / "net.py").write_text(TORCH)
    (tmp_path / "metric.py").write_text(METRIC)
    for name, made in (("seven", model(classes=7)), ("det", DET), ("two", TWO), ("films", FILMS), ("coupled", COUPLED),
                       ("open", model(shape=(3, "h", "w"))), ("fine", model())):  # fmt: skip
        (tmp_path / f"{name}.onnx").write_bytes(made.SerializeToString())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resvit_calibrate.ranges.collect.collect_statistics", too_late)
    monkeypatch.setattr("resvit_export.stages.prune.Prune.fill", too_late)
    return tmp_path


def without_modelopt(patch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "modelopt" else find(name, *rest))


def without_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))


ONNX: list[tuple[list[str], ExitCode, str]] = [
    (["--model", "seven.onnx"], ExitCode.INPUT, "10 classes|label 9"),
    (["--model", "det.onnx"], ExitCode.IMPOSSIBLE, "Det"),
    (["--model", "two.onnx"], ExitCode.INPUT, "output_0"),
    (["--model", "films.onnx"], ExitCode.INPUT, "image"),
    (["--model", "coupled.onnx"], ExitCode.INPUT, "other images"),
    (["--model", "open.onnx"], ExitCode.INPUT, "--input-shape 3x224x224"),
    (["--model", "fine.onnx", "--shape", "x=1x3x9x9"], ExitCode.INPUT, "x is"),
    (["--model", "fine.onnx", "--target", "jetson-orin", "--precision", "fp8"], ExitCode.IMPOSSIBLE, "fp8"),
    (["--model", "fine.onnx", "--exclude", "blocks.9*"], ExitCode.INPUT, "blocks.9"),
    (["--model", "fine.onnx", "--include", "blocks.9*"], ExitCode.INPUT, "blocks.9"),
    (["--model", "fine.onnx", "--task", "detection"], ExitCode.INPUT, "boxes"),
    (["--model", "fine.onnx", "--task", "other", "--metric", "metric.py:fails"], ExitCode.INPUT, "no such output"),
    (["--model", "fine.onnx", "--recover", "--train-data", OTHER], ExitCode.INPUT, "also"),
]


def refused(capfd: pytest.CaptureFixture[str], command: str, *arguments: str) -> tuple[int, str]:
    capfd.readouterr()
    code = run([command, "--target", "rtx-4090", "--data", DATA, "--run", "r", *arguments])
    said = capfd.readouterr().err
    assert "→" in said
    assert "a long stage began" not in said
    return code, said


NORMAL = ["--preprocess", "mean=0.5", "--preprocess", "std=0.5"]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("arguments", "code", "words"), ONNX, ids=lambda value: "-".join(value) if isinstance(value, list) else ""
)
def test_what_ends_a_run_is_said_before_the_first_calibration_image(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode, words: str
) -> None:
    del folder
    got, said = refused(capfd, "build", *NORMAL, "--validation-data", OTHER, *arguments)
    assert got == code, said
    assert any(word in said for word in words.split("|")), said


@pytest.mark.whole
@pytest.mark.parametrize(
    ("change", "arguments", "code", "words"),
    [
        (without_room, [], ExitCode.SYSTEM, "disk is full before"),
        (without_modelopt, ["--quantizer", "modelopt"], ExitCode.MISSING, "ModelOpt is not installed"),
    ],
)
def test_what_the_machine_lacks_is_said_before_the_first_calibration_image(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    arguments: list[str],
    code: ExitCode,
    words: str,
) -> None:
    del folder
    change(monkeypatch)
    got, said = refused(capfd, "build", *NORMAL, "--model", "fine.onnx", *arguments)
    assert got == code, said
    assert words in said


@pytest.mark.whole
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "net.py:make", "--model-arg", "classes=7"], ExitCode.INPUT, "10 classes|label 9"),
        (["--model", "net.py:coupled", "--batch", "1:2:4"], ExitCode.INPUT, "other images|batch"),
        (["--model", "net.py:make", "--train-data", OTHER, "--validation-data", OTHER], ExitCode.INPUT, "also"),
    ],
)
def test_what_ends_a_run_is_said_before_anything_is_pruned(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode, words: str
) -> None:
    del folder
    got, said = refused(capfd, "build", *NORMAL, "--prune-macs", "0.5", *arguments)
    assert got == code, said
    assert any(word in said for word in words.split("|")), said


ALONE = """
class Alone(Net):
    def forward(self, x):
        return super().forward(x.view(1, 3, 8, 8))


def alone():
    return Alone(*make())
"""


@pytest.mark.whole
@pytest.mark.parametrize("name", ["coupled", "alone"])
def test_batch_1_is_said_where_a_network_is_exported_for_it_and_not_where_another_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    del folder
    with Path("net.py").open("a") as code:
        code.write(ALONE)
    command = ["export", "--model", f"net.py:{name}", "--target", "rtx-4090"]
    assert run([*command, "--run", "r"]) == 0
    assert capfd.readouterr().err.count("exported for batch 1") == 1
    assert run([*command, "--run", "four", "--batch", "4"]) == ExitCode.INPUT
    assert "exported for batch 1" not in capfd.readouterr().err


BEFORE_FOLD = """
def ten_boxes():
    class Boxes(Net):
        def forward(self, x):
            return {"boxes": x.new_zeros(len(x), 5, 4) + x.mean(), "scores": x.new_ones(len(x), 5, 3) + x.mean()}
    return Boxes(nn.Conv2d(3, 8, 3))


def large(classes=10):
    class Large(Net):
        input_shape = (3, 16, 16)
    return Large(*make(classes))
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "net.py:make", "--model-arg", "classes=7"], "10 classes|label 9"),
        (["--model", "net.py:make", "--task", "detection"], "Detection reads|Detection needs"),
        (["--model", "net.py:make", "--task", "segmentation"], "masks|[B, K, h, w]"),
        (["--model", "net.py:ten_boxes", "--task", "detection"], "needs boxes for every image"),
        (["--model", "net.py:coupled", "--batch", "1:2:4"], "other images"),
        (["--model", "net.py:make", "--task", "other", "--metric", "metric.py:fails"], "no such output"),
        (["--model", "net.py:make", "--data", "unlabelled.npz", "--task", "classification"], "no labels"),
        (["--model", "net.py:make", "--data", "loader.py:wrong_size"], "8, 8"),
    ],
)
def test_what_data_and_outputs_tell_is_said_before_the_network_is_folded(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    def too_late(*_: object, **__: object) -> Any:
        raise AssertionError("a long stage began")

    monkeypatch.setattr("resvit_export.stages.fold.Fold.fill", too_late)
    with Path("net.py").open("a") as code:
        code.write(BEFORE_FOLD)
    with np.load(DATA) as arrays:
        np.savez(folder / "unlabelled.npz", images=arrays["images"])
    Path("loader.py").write_text(
        "import numpy as np\n"
        "def wrong_size(split):\n"
        "    for i in range(8):\n"
        "        yield np.full((2, 3, 9, 9), i + 0.5 * (split == 'validation'), np.float32), np.arange(2)\n"
    )
    got, said = refused(capfd, "build", *NORMAL, *arguments)
    assert got == ExitCode.INPUT, said
    assert any(word in said for word in words.split("|")), said
    assert "exported for batch 1" not in said
    assert not list(Path("r").glob("fold-*"))


def one_class() -> None:
    np.savez("bad.npz", images=np.zeros((20, 8, 8, 3), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None],
             labels=np.zeros(20, np.int64))  # fmt: skip


def mostly_broken() -> None:
    for index in range(12):
        place = Path("bad") / f"class{index % 2}" / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))


def nothing() -> None:
    """There is no such thing on this machine."""


@pytest.mark.parametrize("command", ["build", "calibrate", "validate"])
@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (one_class, ["--data", "bad.npz"], "are of one class"),
        (one_class, ["--validation-data", "bad.npz"], "are of one class"),
        (mostly_broken, ["--data", "bad"], "8 of 8 images of bad that were tried cannot be read"),
        (nothing, ["--data", "fashion-mnist"], "dataset-fashion-mnist"),
        (nothing, ["--validation-data", "fashion-mnist"], "dataset-fashion-mnist"),
    ],
)
def test_what_data_alone_tell_is_said_before_the_network_is_loaded(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    make: Callable[[], None],
    arguments: list[str],
    words: str,
) -> None:
    def too_late(*_: object, **__: object) -> Any:
        raise AssertionError("a long stage began")

    monkeypatch.setattr("resvit_export.loading.load.load_network", too_late)
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(folder / "nowhere"))
    make()
    got, said = refused(capfd, command, "--model", "net.py:make", "--task", "classification", *NORMAL, *arguments)
    assert got == ExitCode.INPUT, said
    assert words in said


def test_a_few_broken_images_are_skipped_later_and_refused_nowhere(folder: Path) -> None:
    from PIL import Image

    from resvit_calibrate.data.first_look import open_sources, require_usable
    from resvit_calibrate.images.image_set import DataSpec

    mostly_broken()
    for index in range(3, 12):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(f"bad/class{index % 2}/{index}.png")
    spec = DataSpec(str(folder / "bad"))
    require_usable(open_sources(spec), spec)
