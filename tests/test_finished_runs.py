"""Runs that came to a verdict: what is told of them when their data have moved, and what a refused try leaves."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from resvit_export.cli.main import run
from test_order_of_checks import NORMAL, model

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, data in ``here`` and the finished run ``r``; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    random = np.random.default_rng(0)
    (folder / "here").mkdir()
    images = random.integers(0, 255, (60, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "here" / "data.npz", images=images, labels=np.arange(60) % 10)
    (folder / "net.onnx").write_bytes(model().SerializeToString())
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as told:
        patch.chdir(folder)
        assert run([*BUILD, "--data", "here/data.npz"]) == 0
    lines = told.getvalue().splitlines()
    assert lines.index(STEPS) < next(index for index, line in enumerate(lines) if line.startswith("calibrate: "))
    return folder


BUILD = ["build", "--model", "net.onnx", "--target", "jetson-orin", "--task", "other", "--even-if-slower", *NORMAL,
         "--calibration-images", "20", "--latency-budget", "1.2x", "--run", "r"]  # fmt: skip
STEPS = (
    "images: resize stretched to 8 x 8, bilinear; channels RGB; normalise pixels / 255, less mean 0.5, over std 0.5; "
    "as said by your settings (mean, std), what is usual"
)


@pytest.fixture
def place(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same folder, and its data at another place than the run was made with."""
    shutil.move(built / "here", built / "there")
    before = (built / "r" / "recipe.toml").read_bytes()
    monkeypatch.chdir(built)
    yield built
    (built / "r" / "recipe.toml").write_bytes(before)
    shutil.move(built / "there", built / "here")


def test_a_finished_run_is_reported_and_compared_without_its_data(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("r/report.html").read_text()
    assert "What comes next" in page
    assert "ssh://USER@HOST" in page
    assert "pixels / 255, less mean 0.5, over std 0.5" in page
    assert run(["report", "--run", "r"]) == 0
    assert Path("r/report.html").read_text() == page
    capsys.readouterr()
    assert run(["report", "r", "--out", "one.html", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert (entry["run"], entry["metric"], entry["unit"]) == ("r", "SQNR", "dB")
    # Also where the data are there, and others than they were.
    (place / "here").mkdir()
    np.savez(place / "here" / "data.npz", images=np.zeros((60, 8, 8, 3), np.uint8), labels=np.arange(60) % 10)
    assert run(["report", "r", "--out", "one.html"]) == 0
    shutil.rmtree(place / "here")


def test_settings_that_choose_other_images_are_not_the_finished_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del place
    assert run(["report", "--run", "r", "--seed", "1"]) == 3
    assert "here/data.npz" in capsys.readouterr().err


def test_what_is_kept_of_images_is_held_to_its_form(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kept,) = (place / "r" / "images").iterdir()
    before = kept.read_text()
    for text in ("", "[]", before.replace('"count": 20', '"count": "many"'), before[:-20]):
        kept.write_text(text)
        assert run(["report", "r", "--out", "one.html"]) == 3
        assert "does not exist" in capsys.readouterr().err
    kept.write_text(before)


def test_the_run_that_is_missing_is_the_one_that_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del place
    assert run(["report", "r", "nosuch"]) == 3
    assert "nosuch is not the folder of a run" in capsys.readouterr().err


def test_a_refused_try_leaves_the_run_as_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("r/recipe.toml").read_bytes()
    np.savez(place / "broken.npz", pictures=np.zeros(3))
    assert run(["build", "--run", "r", "--data", "broken.npz"]) == 3
    assert "recipe.toml is as before" in capsys.readouterr().err
    assert Path("r/recipe.toml").read_bytes() == recipe
    assert run(["report", "--run", "r"]) == 0
