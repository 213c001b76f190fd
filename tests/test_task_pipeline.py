"""Networks that do not classify, through a whole build: their metric in the gate, their outputs in the bundle."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

pytestmark = pytest.mark.whole

ASSETS = Path(__file__).parent / "assets"
"""Trained by examples/segmentation/train.py and examples/detection/train.py with their defaults; stored in FP16."""
EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = ["--calibration-images", "64", "--validation-images", "150", "--no-search", "--quiet"]


def verdict_of(folder: Path) -> dict:
    (file,) = folder.glob("validate-*/verdict.json")
    return json.loads(file.read_bytes())


@pytest.mark.slow
def test_a_segmenter_is_judged_by_its_masks(workspace: Path) -> None:
    model = ["--model", "resvit:fpn-nano-seg", "--checkpoint", str(ASSETS / "fpn-nano-seg.pt")]
    data = ["--data", "resvit_calibrate.readers.scenes:segmentation"]
    limit = ["--max-drop", "0.5"]
    assert run(["build", *model, *data, *limit, "--target", "jetson-orin", "--run", "runs/seg", *FEW]) == 0
    verdict = verdict_of(Path("runs/seg"))
    assert verdict["verdict"] == "accepted"
    assert (verdict["metric"], verdict["unit"]) == ("mIoU", "points")
    assert "the mIoU drop is" in verdict["reason"]
    (bundle,) = Path("runs/seg").glob("bundle-*/*.resvit")
    with zipfile.ZipFile(bundle) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert [output["name"] for output in manifest["outputs"]] == ["output"]
    report = Path("runs/seg/report.html").read_text()
    assert report.count('<figure class="drawn">') == min(len(verdict["changed"]), 8) > 0
    assert "differ: " in report


@pytest.mark.slow
def test_a_detector_that_knows_nothing_is_undecided_and_both_outputs_keep_their_names(workspace: Path) -> None:
    model = ["--model", "resvit:fpn-nano-det", "--data", "resvit_calibrate.readers.scenes:detection"]
    code = run(["validate", *model, "--target", "jetson-orin", "--run", "runs/det", *FEW])
    assert code == ExitCode.UNDECIDED
    verdict = verdict_of(Path("runs/det"))
    assert (verdict["metric"], verdict["chance_level"]) == ("mAP 50:95", True)
    (exported,) = Path("runs/det").glob("export-*/export.json")
    assert [output["name"] for output in json.loads(exported.read_bytes())["outputs"]] == ["boxes", "scores"]
    (scored,) = Path("runs/det").glob("score-*")
    assert (scored / "golden_output_1.npy").exists()


@pytest.mark.slow
def test_a_detector_is_judged_by_its_boxes_and_goes_to_two_targets(workspace: Path) -> None:
    model = ["--model", "resvit:fpn-nano-det", "--checkpoint", str(ASSETS / "fpn-nano-det.pt")]
    data = ["--data", "resvit_calibrate.readers.scenes:detection"]
    targets = ["--target", "rtx-4090", "--target", "jetson-orin", "--run", "runs/det"]
    assert run(["build", *model, *data, *targets, "--max-drop", "1.0", *FEW]) == 0
    verdicts = [json.loads(path.read_bytes()) for path in Path("runs/det").glob("validate-*/verdict.json")]
    assert {(verdict["verdict"], verdict["metric"]) for verdict in verdicts} == {("accepted", "mAP 50:95")}
    assert all(verdict["stages"][0]["value"] > 0.4 for verdict in verdicts)
    assert len(list(Path("runs/det").glob("compile-*/engine.plan"))) == 1
    assert len(list(Path("runs/det").glob("bundle-*/*.resvit"))) == 2
    reasons = {
        node["reason"]
        for path in Path("runs/det").glob("quantize-*/quantize.json")
        for node in json.loads(path.read_bytes())["nodes"]
    }
    assert {"its output is the detector's boxes", "its output is the detector's scores"} <= reasons


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [("detection", "det"), ("segmentation", "seg")])
def test_the_examples_from_training_to_a_pruned_engine(task: str, kind: str, workspace: Path) -> None:
    checkpoint = f"runs/{kind}.pt"
    few = ["--scenes", "64", "--epochs", "1", "--test-scenes", "20", "--quiet"]
    train = [sys.executable, str(EXAMPLES / task / "train.py"), "--out", checkpoint, *few]
    subprocess.run(train, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    model = ["--model", f"resvit:fpn-nano-{kind}", "--checkpoint", checkpoint]
    data = [
        "--data",
        f"resvit_calibrate.readers.scenes:{task}",
        "--train-data",
        f"resvit_calibrate.readers.scenes:{task}_training",
    ]
    prune = ["--prune-macs", "0.8", "--prune-epochs", "1", "--train-images", "256", "--recover", "never"]
    # So few scenes teach nothing, and what knows nothing cannot be accepted.
    code = run(
        ["build", *model, *data, *prune, "--target", "rtx-4090", "--run", "runs/small", *FEW, "--allow-rejected"]
    )
    assert code in (0, ExitCode.REJECTED, ExitCode.UNDECIDED)
    (network,) = Path("runs/small").glob("prune-*/prune.json")
    report = json.loads(network.read_bytes())
    assert report["after"]["macs"] <= 0.81 * report["before"]["macs"]
    (trained,) = Path("runs/small").glob("retrain-*/retrain.json")
    objective = json.loads(trained.read_bytes())["objective"]
    assert objective.startswith("the teacher's boxes and labelled" if task == "detection" else "the teacher's map")
    assert "labelled" in objective
    assert objective in html.unescape(Path("runs/small/report.html").read_text(encoding="utf-8"))
    assert len(list(Path("runs/small").glob("compile-*/engine.plan"))) == 1
    assert len(list(Path("runs/small").glob("bundle-*/*.resvit"))) == 1


READER = """
import torch
from torch import nn

class Reader(nn.Module):
    # Every 8 pixels of a line are one level of grey: the scores are largest for the level's own class.
    def __init__(self, levels=10):
        super().__init__()
        self.mean = nn.Conv2d(1, 16, 8, 8)
        self.scores = nn.Conv2d(16, levels + 1, 1)
        level = torch.arange(levels) / levels
        with torch.no_grad():
            self.mean.weight.fill_(1 / 64)
            self.mean.bias.zero_()
            self.scores.weight[1:] = 2 * level[:, None, None, None] / 16
            self.scores.bias[1:] = -level ** 2
            self.scores.weight[0] = 0
            self.scores.bias[0] = -1

    def forward(self, image):
        return self.scores(self.mean(image)).squeeze(2).permute(0, 2, 1)

def make():
    return Reader()
"""


@pytest.mark.slow
def test_a_reader_is_judged_by_its_lines_and_drawn_with_them(workspace: Path) -> None:
    Path("reader.py").write_text(READER)
    random = np.random.default_rng(0)
    Path("lines").mkdir()
    texts = []
    for number in range(400):
        digits = random.permutation(10)[:6]
        pixels = np.repeat(np.repeat(np.round(digits * 25.5).astype(np.uint8)[None], 8, 0), 8, 1)
        Image.fromarray(pixels).save(f"lines/{number}.png")
        texts.append(f"{number}.png\t{''.join(map(str, digits))}\n")
    Path("lines/rec_gt.txt").write_text("".join(texts))
    model = ["--model", "reader.py:make", "--input-shape", "1x8x48", "--preprocess", "mean=0", "--preprocess", "std=1"]
    options = ["--task-option", "characters=0123456789", "--max-drop", "2", "--data", "lines"]
    few = ["--calibration-images", "64", "--no-search", "--quiet"]
    assert run(["build", *model, *options, *few, "--target", "jetson-orin", "--run", "runs/text"]) == 0
    verdict = verdict_of(Path("runs/text"))
    assert (verdict["task"], verdict["metric"], verdict["verdict"]) == ("text", "lines right", "accepted")
    assert "read with decoder=ctc blank=0" in verdict["reason"]
    assert verdict["stages"][-1]["values"] == {"lines right": 1.0, "CER": 0.0}
    assert "lines right" in Path("runs/text/report.html").read_text()
    # Another alphabet is another question, and reads nothing right.
    options[1] = "characters=abcdefghij"
    assert run(["validate", *model, *options, *few, "--target", "jetson-orin", "--run", "runs/text"]) == 5
    options[1] = "characters=012"
    assert run(["validate", *model, *options, *few, "--target", "jetson-orin", "--run", "runs/text"]) == ExitCode.INPUT


@pytest.mark.slow
def test_vectors_are_judged_by_what_they_find(workspace: Path) -> None:
    model = ["--model", "resvit:embed-nano", "--checkpoint", str(ASSETS / "embed-nano.pt"), "--data", "fashion-mnist"]
    task = ["--task", "embedding", "--max-drop", "3", "--target", "jetson-orin", "--run", "runs/vectors"]
    assert run(["validate", *model, *task, *FEW[:2], "--validation-images", "600", *FEW[4:]]) == 0
    verdict = verdict_of(Path("runs/vectors"))
    assert (verdict["task"], verdict["metric"]) == ("embedding", "recall@1")
