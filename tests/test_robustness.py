"""What goes wrong on other people's machines: each ends in one clear message, its exit code, and no damage."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from conftest import BEFORE_QUANTIZE
from resvit_calibrate.runtime.runner import scorable_opset
from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

MODEL = ["--model", "resvit:embed-nano", "--checkpoint", "runs/demo/embed-nano.pt"]
BUILD = ["build", "--target", "jetson-orin", *MODEL, "--data", "fashion-mnist", "--run", "runs/r"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "resvit_export", *arguments]


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    """Run a command that must fail with ``code``; returns what it said, which is never a traceback."""
    capfd.readouterr()
    assert run(list(arguments)) == code, capfd.readouterr().err
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert errors.count("error:") == 1
    assert "→" in errors
    return errors


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGKILL, signal.SIGINT),
        pytest.param(
            (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL), marks=pytest.mark.slow
        ),
    ],
    ids=["short", "full"],
)
def test_killed_at_any_moment_a_run_continues_to_the_same_result(
    workspace: Path, seeded: Callable[..., str], signals: tuple[signal.Signals, ...]
) -> None:
    undisturbed = [*BUILD[:-1], seeded("runs/whole/r", "jetson-orin")]
    assert run([*undisturbed, "--quiet"]) == 0
    expected = next(Path("runs/whole/r").glob("bundle-*/*.resvit")).read_bytes()
    dice = random.Random(0)
    kills = 0
    for number in signals:
        child = subprocess.Popen(command(*BUILD), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(dice.uniform(1.5, 8.0))
        child.send_signal(number)
        output, _ = child.communicate()
        if child.returncode == 0:
            break
        kills += 1
        if number != signal.SIGKILL:
            assert child.returncode == ExitCode.INTERRUPTED, output.decode()
            assert b"interrupted" in output.lower(), output.decode()
            assert b"Traceback" not in output
    assert kills
    subprocess.run(command(*BUILD, "--quiet"), check=True, capture_output=True)
    assert next(Path("runs/r").glob("bundle-*/*.resvit")).read_bytes() == expected
    assert not [path for path in Path("runs/r").rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a mount namespace of its own",
)
def test_a_full_disk_is_named_and_nothing_is_damaged(workspace: Path) -> None:
    (workspace / "small").mkdir()
    script = (
        f"mount -t tmpfs -o size=700k tmpfs small && {sys.executable} -m resvit_export "
        + " ".join(BUILD[:-1])
        + " small/r; code=$?; ls -A small/r; exit $code"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.SYSTEM, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert ".tmp" not in done.stdout


def test_a_folder_that_cannot_be_written(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "/proc/resvit" in said(capfd, "fold", *MODEL, "--run", "/proc/resvit", code=ExitCode.SYSTEM)
    Path("file").write_text("")
    assert "file" in said(capfd, "fold", *MODEL, "--run", "file/run", code=ExitCode.SYSTEM)


@pytest.mark.parametrize("keep", [0, 1, 1000])
def test_a_truncated_checkpoint(workspace: Path, capfd: pytest.CaptureFixture[str], keep: int) -> None:
    path = Path("runs/demo/embed-nano.pt")
    path.write_bytes(path.read_bytes()[:keep])
    assert "embed-nano.pt" in said(capfd, "fold", *MODEL, code=ExitCode.INPUT)


def test_nan_in_the_weights_names_the_tensor(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path("runs/demo/embed-nano.pt")
    saved = torch.load(path, weights_only=True)
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name].view(-1)[0] = float("nan")
    torch.save(saved, path)
    assert name in said(capfd, "fold", *MODEL, code=ExitCode.INPUT)


@pytest.mark.whole
def test_a_network_that_gives_nan_is_refused(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(1, 16, 3)\n"
        "        self.head = torch.nn.Linear(16, 10)\n"
        "    def forward(self, x):\n"
        "        return self.head(torch.sqrt(self.conv(x) - 1e3).mean((2, 3)))\n"
    )
    normal = ["--preprocess", "mean=0.3", "--preprocess", "std=0.4", "--input-shape", "1x28x28"]
    arguments = ["calibrate", "--model", "net.py:Net", "--data", "fashion-mnist", *normal]
    assert "NaN" in said(capfd, *arguments, code=ExitCode.INPUT)


def npz(path: str, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return path


@pytest.mark.whole
@pytest.mark.usefixtures("exported")
def test_a_shape_that_does_not_fit(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", *MODEL, "--preprocess", "size=32x32", "--data", "fashion-mnist"]
    assert "28x28" in said(capfd, *arguments, code=ExitCode.INPUT)
    odd = npz("odd.npz", images=np.zeros((8, 28), np.uint8), labels=np.zeros(8, np.int64))
    assert "odd.npz" in said(capfd, "calibrate", *MODEL, "--data", odd, code=ExitCode.INPUT)


@pytest.mark.whole
@pytest.mark.usefixtures("exported")
def test_a_data_set_with_one_class(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 28, 28), np.uint8)
    data = npz("one.npz", images=pixels, labels=np.zeros(64, np.int64))
    assert "class" in said(capfd, "validate", *MODEL, "--data", data, code=ExitCode.INPUT)


@pytest.mark.whole
@pytest.mark.usefixtures("exported")
def test_a_truncated_data_file(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 28, 28), np.uint8)
    path = Path(npz("cut.npz", images=pixels, labels=np.arange(64) % 10))
    path.write_bytes(path.read_bytes()[:5000])
    assert "cut.npz" in said(capfd, "calibrate", *MODEL, "--data", "cut.npz", code=ExitCode.INPUT)


@pytest.mark.slow
@pytest.mark.whole
def test_grey_images_for_a_colour_model(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dice = np.random.default_rng(0)
    for index in range(48):
        folder = Path("photos of cats") / f"class {index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 255, (40, 50), np.uint8), "L").save(folder / f"{index}.png")
    colour = ["--model", "resvit:embed-nano", "--model-arg", "in_channels=3"]
    colour += ["--preprocess", "mean=0.5,0.5,0.5", "--preprocess", "std=0.5,0.5,0.5"]
    assert run(["calibrate", *colour, "--data", "photos of cats"]) == 0
    assert "grey" in capfd.readouterr().err.lower()


@pytest.mark.whole
@pytest.mark.usefixtures("exported")
def test_broken_images_are_named_and_too_many_stop(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dice = np.random.default_rng(0)
    for index in range(330):
        folder = Path("images") / str(index % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 255, (28, 28), np.uint8), "L").save(folder / f"{index}.png")
    Path("images/0/0.png").write_bytes(b"not an image")
    assert run(["calibrate", *MODEL, "--data", "images"]) == 0
    assert "0.png" in capfd.readouterr().err
    for index in range(10, 200, 10):
        Path(f"images/0/{index}.png").write_bytes(b"")
    assert "1%" in said(capfd, "calibrate", *MODEL, "--data", "images", code=ExitCode.INPUT).replace(" %", "%")


@pytest.mark.slow
@pytest.mark.whole
def test_an_onnx_with_external_data(
    workspace: Path, capfd: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/torch", "jetson-orin", stages=("fold", "export"))
    assert run(["export", *MODEL, "--run", "runs/torch"]) == 0
    source = next(Path("runs/torch").glob("export-*/model.onnx"))
    Path("big").mkdir()
    onnx.save(onnx.load(source), "big/m.onnx", save_as_external_data=True, location="m.onnx.data")
    assert Path("big/m.onnx.data").stat().st_size > 100_000
    normal = ["--preprocess", "mean=0.286", "--preprocess", "std=0.353"]
    arguments = ["build", "--model", "big/m.onnx", "--target", "rtx-4090", "--data", "fashion-mnist", *normal]
    assert run(arguments) == 0
    shutil.copy("big/m.onnx", "alone.onnx")
    assert "m.onnx.data" in said(capfd, "export", "--model", "alone.onnx", "--run", "runs/alone", code=ExitCode.INPUT)


@pytest.mark.whole
def test_an_onnx_that_is_quantised_already(
    workspace: Path, capfd: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/q", "jetson-orin")
    assert run(["quantize", *MODEL, "--data", "fashion-mnist", "--target", "jetson-orin", "--run", "runs/q"]) == 0
    model = next(Path("runs/q").glob("quantize-*/model.onnx"))
    message = said(capfd, "export", "--model", str(model), "--run", "runs/again", code=ExitCode.INPUT)
    assert "quantised" in message


@pytest.mark.whole
@pytest.mark.skipif(scorable_opset() < 23, reason="this ONNX Runtime scores no opset 23, so none is exported")
def test_an_onnx_too_new_for_the_target(
    workspace: Path, capfd: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/new", "rtx-4090", stages=("fold", "export"))
    assert run(["export", *MODEL, "--target", "rtx-4090", "--run", "runs/new"]) == 0
    model = next(Path("runs/new").glob("export-*/model.onnx"))
    arguments = ["export", "--model", str(model), "--target", "jetson-orin", "--run", "runs/old"]
    assert "opset 20" in said(capfd, *arguments, code=ExitCode.IMPOSSIBLE)


@pytest.mark.whole
def test_patterns_must_match_something(
    workspace: Path, capfd: pytest.CaptureFixture[str], seeded: Callable[..., str]
) -> None:
    seeded("runs/embed-nano", "rtx-4090", stages=BEFORE_QUANTIZE)
    arguments = ["quantize", *MODEL, "--data", "fashion-mnist", "--target", "rtx-4090", "--exclude", "blocks.9*"]
    assert "blocks.9*" in said(capfd, *arguments, code=ExitCode.INPUT)


@pytest.mark.whole
def test_a_model_that_does_not_say_its_normalisation(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
    )
    arguments = ["calibrate", "--model", "net.py:make", "--input-shape", "1x28x28", "--data", "fashion-mnist"]
    assert "mean=" in said(capfd, *arguments, code=ExitCode.INPUT)


def test_a_checkpoint_that_does_not_fit_names_the_keys(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = said(capfd, "fold", *MODEL, "--model-arg", "num_classes=7", code=ExitCode.INPUT)
    assert "head" in message
    assert "7" in message


def test_a_checkpoint_that_would_run_code_is_refused(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, ("exploded", "w"))

    Path("bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    said(capfd, "fold", *MODEL[:2], "--checkpoint", "bomb.pt", code=ExitCode.INPUT)
    assert not Path("exploded").exists()
