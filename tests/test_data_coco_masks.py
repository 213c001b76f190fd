"""Masks for segmentation out of COCO's outlines: polygons and run lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_tool

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import IGNORED, TargetOptions
from resvit_calibrate.readers.boxes.outlines import DrawnMasks
from resvit_engines.errors import ExitCode, ResvitError

OUTLINES = TargetOptions(outlines=True)
HEIGHT, WIDTH = 12, 16


def written(root: Path, outlines: list[tuple[int, int, Any]], names: tuple[str, ...] = ("a", "b"), **more: Any) -> Path:
    """Four images with annotations (image, category, outline)."""
    (root / "images").mkdir(exist_ok=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    size = {"height": HEIGHT, "width": WIDTH}
    document = {
        "images": [{"id": number, "file_name": f"{number}.png", **size} for number in range(4)],
        "categories": [{"id": 3 + 2 * place, "name": name} for place, name in enumerate(names)],
        "annotations": [
            {"id": at, "image_id": image, "category_id": category, "bbox": [0, 0, 1, 1], "segmentation": outline}
            for at, (image, category, outline) in enumerate(outlines)
        ],
    }
    (root / "annotations.json").write_text(json.dumps({**document, **more}))
    return root


def runs_of(covered: np.ndarray) -> dict[str, Any]:
    flat = covered.T.ravel().astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def packed(covered: np.ndarray) -> dict[str, Any]:
    found = coco_tool.encode(np.asfortranarray(covered.astype(np.uint8)))
    return {"size": [HEIGHT, WIDTH], "counts": found["counts"].decode()}


def masks_in(root: Path) -> DrawnMasks:
    pools = open_source(str(root), OUTLINES)
    assert isinstance(pools, Pools)
    assert isinstance(pools.calibration, DrawnMasks)
    return pools.calibration


def target(pixels: DrawnMasks, index: int) -> np.ndarray:
    found = pixels.target(index, HEIGHT, WIDTH)
    return found.classes  # type: ignore[union-attr]


@given(st.integers(0, 1 << 30), st.floats(0.05, 0.95))
@settings(max_examples=25)
def test_run_lengths_are_those_of_cocos_own_tool(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float
) -> None:
    covered = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < share
    covered[0, 0] = True
    pixels = masks_in(written(tmp_path_factory.mktemp("runs"), [(0, 3, runs_of(covered)), (1, 5, packed(covered))]))
    np.testing.assert_array_equal(target(pixels, 0), covered * 1)
    np.testing.assert_array_equal(target(pixels, 1), covered * 2)
    assert not target(pixels, 2).any()


def test_polygons_cover_what_cocos_tool_says_and_overlaps_are_unlabelled(tmp_path: Path) -> None:
    first, second = [1.0, 1.0, 9.0, 1.0, 9.0, 8.0, 1.0, 8.0], [5, 4, 14.5, 4, 30, 11]
    pixels = masks_in(written(tmp_path, [(0, 3, [first]), (0, 5, [second]), (1, 3, [first, second]), (2, 3, None)]))
    a, b = (coco_tool.decode(coco_tool.frPyObjects([one], HEIGHT, WIDTH))[..., 0] > 0 for one in (first, second))
    assert (a & b).any()
    np.testing.assert_array_equal(target(pixels, 0), np.where(a & b, IGNORED, a * 1 + b * 2))
    np.testing.assert_array_equal(target(pixels, 1), (a | b) * 1)
    assert pixels.class_names == ("background", "a", "b")
    assert any("1 annotations without an outline" in note for note in pixels.notes)
    calibration, validation = open_image_sets(
        DataSpec(str(tmp_path), calibration_images=2, reading=OUTLINES), Preprocess((HEIGHT, WIDTH), 3)
    )
    assert calibration.task == validation.task == "segmentation"
    assert validation.num_classes == 3
    assert open_source(str(tmp_path), TargetOptions()).calibration.task == "detection"  # type: ignore[union-attr]
    named = open_source(f"masks:{tmp_path}/annotations.json", TargetOptions())
    assert named.calibration.task == "segmentation"  # type: ignore[union-attr]


def test_a_category_called_background_is_the_background(tmp_path: Path) -> None:
    pixels = masks_in(written(tmp_path, [(0, 5, [[0, 0, 8, 0, 8, 8]])], ("background", "b")))
    assert pixels.class_names == ("background", "b")
    assert set(np.unique(target(pixels, 0))) == {0, 1}


@pytest.mark.parametrize(
    ("outline", "said"),
    [
        ([[1, 1, 2, 2]], "not three points or more"),
        ([[1, 1, 2, 2, 3]], "not three points or more"),
        ([[1, 1, 2, 2, 1e9, 3]], "not three points or more near its image"),
        ([[1, 1, 2, 2, "x", 3]], "not three points or more"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "cover 10 pixels of 192"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 197]}, "its runs are"),
        ({"size": [WIDTH, HEIGHT], "counts": [192]}, "its runs are of"),
        ({"size": [HEIGHT, WIDTH], "counts": "oooo"}, "its runs are"),
        ({"size": [HEIGHT, WIDTH], "counts": "\u20ac"}, "its runs are"),
        ("x", "not three points or more"),
    ],
)
def test_outlines_that_are_none(tmp_path: Path, outline: Any, said: str) -> None:
    with pytest.raises(ResvitError, match=said) as caught:
        masks_in(written(tmp_path, [(0, 3, outline)]))
    assert caught.value.code is ExitCode.INPUT
    with pytest.raises(ResvitError, match="no outlines"):
        masks_in(written(tmp_path, [(0, 3, [])]))
