"""The ways of docs/index.md, typed as they stand there, by people whose networks and data are small."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import test_data_boxes as boxes
import test_data_video as video
from conftest import ROOT
from hf_models import folder_of
from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

INDEX = (ROOT / "docs" / "index.md").read_text()
DECIDED = (ExitCode.OK, ExitCode.REJECTED, ExitCode.UNDECIDED)
"""How a build ends that went all the way; networks that nobody trained are judged as such."""


def commands(heading: str) -> list[str]:
    """The command lines under a heading of the page, each on one line; what installs is left out."""
    part = INDEX.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", part, flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line.startswith("resvit-export")]


def yolo_detector(folder: Path, seeded: Callable[..., str]) -> None:
    """A detector of which nobody has weights: such are drawn as keep signals apart; and a folder of Ultralytics."""
    del seeded
    folder_of("rt_detr", folder / "my-rtdetr")
    random = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 24)):
        rows = {}
        for number in range(count):
            left, top = (int(value) for value in random.integers(0, 20, 2))
            rows[f"{part}{number:03}"] = [(number % 3, left, top, left + 12, top + 10)]
        boxes.side(folder / "yolo" / "images" / part, folder / "yolo" / "labels" / part, rows)
    (folder / "yolo" / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnc: 10\nnames: [a, b, c, d, e, f, g, h, i, j]\n"
    )


def hugging_face(folder: Path, seeded: Callable[..., str]) -> None:
    """A model as ``save_pretrained`` leaves it, and a data set as it is pushed to the hub."""
    del seeded
    folder_of("vit", folder / "my-model", weights=True)
    random = np.random.default_rng(0)
    (folder / "my-images" / "data").mkdir(parents=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{n}" for n in range(10)])}
    )
    for part, count in (("train", 24), ("test", 60)):
        pictures = [Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)) for _ in range(count)]
        rows = datasets.Dataset.from_dict({"image": pictures, "label": [n % 10 for n in range(count)]}, features)
        rows.to_parquet(str(folder / "my-images" / "data" / f"{part}-00000-of-00001.parquet"))


def onnx_and_film(folder: Path, seeded: Callable[..., str]) -> None:
    """A network of which there is the graph alone, and a film."""
    seeded("exported", "jetson-orin", stages=("fold", "export"))
    shutil.copy(next((folder / "exported").glob("export-*/model.onnx")), folder / "model.onnx")
    images, _ = video.read_split("test")
    wall = np.asarray(images[:400]).reshape(20, 20, 28, 28).transpose(0, 2, 1, 3).reshape(560, 560)
    video.write(folder / "film.mp4", video.pan(np.stack([wall, wall // 2 + 60, 255 - wall // 3], 2), 120))


WAYS = {
    "A detector and boxes as YOLO or COCO have them": (yolo_detector, "mAP 50:95"),
    "A Hugging Face model and data set": (hugging_face, "top-1"),
    "An ONNX file, and a film or pictures without labels": (onnx_and_film, "SQNR"),
}


def test_every_way_has_its_command() -> None:
    headings = re.findall(r"^## (.*)$", INDEX, flags=re.MULTILINE)
    assert set(WAYS) <= set(headings)
    assert all(len(commands(heading)) == 1 for heading in WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("heading", WAYS)
def test_three_peoples_ways_run_as_they_are_written(
    heading: str, workspace: Path, seeded: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    prepare, metric = WAYS[heading]
    prepare(workspace, seeded)
    (line,) = commands(heading)
    # Networks of this size gain nothing from 8 bits, and a build says so and stops.
    code = run([*shlex.split(line)[1:], "--even-if-slower", "--no-search"])
    said = capfd.readouterr()
    assert code in DECIDED, said.err
    assert "Traceback" not in said.err
    (verdict,) = (file for file in Path("runs").glob("*/validate-*/verdict.json") if "exported" not in file.parts)
    assert json.loads(verdict.read_bytes())["metric"] == metric
    folder = verdict.parents[1]
    assert (folder / "report.html").is_file()
    assert str(folder) in said.out
    if code is not ExitCode.REJECTED:
        assert len(list(folder.glob("bundle-*/*.resvit"))) == 1
