"""Networks that do not classify, through a whole build: their metric in the gate, their outputs in the bundle."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from resvit_engines.errors import ExitCode
from resvit_export.cli import run

ASSET = Path(__file__).parent / "assets" / "fpn-nano-seg.pt"
"""Trained by examples/segmentation/train.py with its defaults; stored in FP16."""
FEW = ["--calibration-images", "64", "--validation-images", "150", "--no-search", "--quiet"]


def verdict_of(folder: Path) -> dict:
    (file,) = folder.glob("validate-*/verdict.json")
    return json.loads(file.read_bytes())


def test_a_segmenter_is_judged_by_its_masks(workspace: Path) -> None:
    model = ["--model", "resvit:fpn-nano-seg", "--checkpoint", str(ASSET)]
    data = ["--data", "resvit_calibrate.scenes:segmentation"]
    assert run(["build", *model, *data, "--target", "jetson-orin", "--run", "runs/seg", *FEW]) == 0
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


def test_a_detector_that_knows_nothing_is_undecided_and_both_outputs_keep_their_names(workspace: Path) -> None:
    model = ["--model", "resvit:fpn-nano-det", "--data", "resvit_calibrate.scenes:detection"]
    code = run(["validate", *model, "--target", "jetson-orin", "--run", "runs/det", *FEW])
    assert code == ExitCode.UNDECIDED
    verdict = verdict_of(Path("runs/det"))
    assert (verdict["metric"], verdict["chance_level"]) == ("mAP 50:95", True)
    (exported,) = Path("runs/det").glob("export-*/export.json")
    assert [output["name"] for output in json.loads(exported.read_bytes())["outputs"]] == ["boxes", "scores"]
    (validated,) = Path("runs/det").glob("validate-*")
    assert (validated / "golden_output_1.npy").exists()
