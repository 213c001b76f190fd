"""What the stages, the device and the report make of a task that is not classification."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from resvit_calibrate.answers.replay import FirstImages, Replay
from resvit_calibrate.gate.gate import judge
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ResvitError
from resvit_engines.run.golden import check_runner
from resvit_engines.run.golden_files import golden_arrays, other_golden_outputs
from resvit_export.cli.options import resolve_recipe
from resvit_export.cli.output import accuracy_table
from resvit_export.recipe.file import recipe_from_toml, recipe_to_toml
from resvit_export.recipe.pairs import task_values
from resvit_export.recipe.recipe import Recipe
from resvit_export.records.verdict import ScoreRow, VerdictRecord
from resvit_export.report.layout.data import ReportData
from resvit_export.report.page import html_from_run
from resvit_export.report.sections.accuracy import accuracy_from_verdict, changed_from_run
from resvit_export.settle import hopeless
from resvit_export.stages.device import outputs_of
from resvit_export.stages.score import write_golden
from task_images import Images, network
from test_task_segmentation import TASK, masks, scores


def verdict() -> VerdictRecord:
    random = np.random.default_rng(0)
    known = masks(random, 30)
    clean = scores(random, known, 0.35)
    noisy = clean + 0.1 * random.normal(size=clean.shape).astype(np.float32)
    first, second = (TASK.answers(network(masks=found), Images(known), 8) for found in (clean, noisy))
    comparison = TASK.compare(first, second)
    document = {
        **judge(comparison, 5.0).to_json(),
        "task": TASK.name,
        "data": "scenes",
        "data_digest": "0" * 64,
        "runtime_note": "",
        "remarks": [],
        "golden": GoldenFiles().to_json(),
        "stages": [
            ScoreRow.of("onnx float", TASK.compare(first, first)).to_json(),
            ScoreRow.of("onnx int8", comparison).to_json(),
        ],
        "changed_total": 30,
        "changed": TASK.changed(first, second),
        "class_names": [],
    }
    return VerdictRecord.from_json(json.loads(json.dumps(document, allow_nan=False)))


def test_the_tables_and_the_report_name_the_metric() -> None:
    found = verdict()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(accuracy_table(found))
    text = console.export_text()
    assert "mIoU" in text
    assert "Dice" in text
    assert "drops in points" in text
    assert "top-1" not in text
    # Records hold no infinity: outputs without noise and outputs that are no numbers must not look alike.
    for agreement, shown in ((1.0, "∞"), (0.5, "none")):
        row = dataclasses.replace(found.rows[1], sqnr_db=None, agreement=agreement)
        console.print(accuracy_table(dataclasses.replace(found, rows=(found.rows[0], row))))
        assert shown in console.export_text()
    laid_out = accuracy_from_verdict(found)
    assert (laid_out.metric, laid_out.unit) == ("mIoU", "points")
    page = html_from_run(ReportData(name="run", verdict=found))
    assert "Drop of mIoU in points" in page
    assert "Agreement: pixels with the same class" in page
    assert "op-1" not in page
    assert changed_from_run(ReportData(name="run", verdict=found))[0].outcome in (
        "lost",
        "gained",
        "no better, no worse",
    )
    assert hopeless(found.verdict, Recipe(max_drop=0.1)) == ""


def test_golden_outputs_of_one_and_of_several(tmp_path) -> None:
    images = np.zeros((2, 1, 4, 4), np.float32)
    boxes, likely = np.ones((2, 5, 4), np.float32), np.full((2, 5, 3), 0.5, np.float16)
    assert write_golden(tmp_path, {"input": images}, {"x": likely}).to_json() == {
        "input": "golden_input.npy",
        "output": "golden_output.npy",
    }
    files = write_golden(tmp_path, {"input": images}, {"boxes": boxes, "scores": likely})
    manifest = Manifest(golden=files)
    assert files.outputs == {"boxes": "golden_output.npy", "scores": "golden_output_1.npy"}
    np.testing.assert_array_equal(golden_arrays(tmp_path, files)[1], boxes)
    others = other_golden_outputs(tmp_path, files, 2)
    assert list(others) == ["scores"]
    assert others["scores"].dtype == np.float32

    class Spec:
        name = "input"

    class Runner:
        inputs = (Spec(),)
        label, why = "a runner", ""

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, arrays):
            return {"boxes": boxes * 1.001, "scores": likely.astype(np.float32) * self.factor}

    report = check_runner(Runner(1.01), images, boxes, manifest, others)
    assert report.sqnr_db == pytest.approx(40, abs=0.1)  # the worst output's
    with pytest.raises(ResvitError, match="of scores: SQNR 6"):
        check_runner(Runner(0.5), images, boxes, manifest, others)
    with pytest.raises(ResvitError, match="no output depth"):
        check_runner(Runner(1.0), images, boxes, manifest, {"depth": boxes})
    with pytest.raises(ResvitError, match="hold 3 images and 2"):
        other_golden_outputs(tmp_path, files, 3)


def test_what_a_device_answered_is_scored_like_what_ran_here(tmp_path) -> None:
    random = np.random.default_rng(1)
    known = masks(random, 10)
    found = scores(random, known, 0.3)
    for start, name in ((0, "images-0000-a"), (6, "images-0001-b")):
        np.save(tmp_path / f"{name}.npy", np.zeros((6, 2))[: 7 - start])
        np.save(tmp_path / f"{name}-out1.npy", found[start : start + 6][: 7 - start])
    outputs = outputs_of(sorted(tmp_path.glob("*.npy")), ["other", "masks"])
    assert outputs["masks"].shape[0] == 7
    images = Images(known)
    images.class_names, images.task, images.preprocess, images.contents, images.digest = (
        (),
        None,
        Preprocess((4, 4)),
        (),
        "",
    )
    there = TASK.answers(Replay({"masks": outputs["masks"]}), FirstImages(images, 7), 4)
    here = TASK.answers(network(masks=found), Images(known), 4).first(7)
    assert TASK.compare(here, there).drop == 0.0


def test_the_recipe_knows_tasks(tmp_path) -> None:
    recipe = Recipe(task="segmentation", task_options={"ignore": [255], "output": "masks"})
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(tmp_path / "r.toml") == recipe
    flags = {"run_folder": None, "recipe_file": None, "model": "a:b", "task": "depth"}
    got, _ = resolve_recipe({**flags, "task_options": ("align=median", "max_depth=80")})
    assert got.task_options == {"align": "median", "max_depth": 80}
    assert task_values("ignore", "0, 255") == [0, 255]
    with pytest.raises(ResvitError, match="whole numbers"):
        task_values("ignore", "sky")
    with pytest.raises(ResvitError, match="does not exist"):
        Recipe(task="segmentatoin")
    with pytest.raises(ResvitError, match="its own metric"):
        Recipe(task="depth", metric="m:f")
