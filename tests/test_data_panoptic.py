"""COCO's panoptic format as masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.sources import open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.pixels import BrokenImage
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_engines.errors import ResvitError

CATEGORIES = [{"id": 1, "name": "person", "isthing": 1}, {"id": 7, "name": "sky", "isthing": 0},
              {"id": 200, "name": "rug", "isthing": 0}]  # fmt: skip
SIZE = (20, 30)


def numbers_of(index: int) -> np.ndarray:
    """Segments [H, W]: two persons, a sky, and a stripe without any; their numbers take all three bytes."""
    found = np.zeros(SIZE, np.int64)
    found[:8, 2:] = 300 + index  # the sky
    found[8:, 2:15] = 70_000
    found[8:, 15:] = 5
    return found


def classes_of(index: int) -> np.ndarray:
    """What these are as classes."""
    del index
    found = np.full(SIZE, -1)
    found[:8, 2:] = 1
    found[8:, 2:] = 0
    return found


def coloured(numbers: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], 2).astype(np.uint8))


def part(root: Path, name: str, count: int, first: int = 0, **changes: Any) -> Path:
    """One part as COCO 2017 lays it out: pictures in ``name``, the rest in ``annotations``."""
    below = root / "annotations"
    (root / name).mkdir(parents=True)
    (below / f"panoptic_{name}").mkdir(parents=True)
    images, annotations = [], []
    for index in range(first, first + count):
        random = np.random.default_rng(index)
        Image.fromarray(random.integers(0, 256, (*SIZE, 3), np.uint8)).save(root / name / f"{index:012}.jpg")
        coloured(numbers_of(index)).save(below / f"panoptic_{name}" / f"{index:012}.png")
        images.append({"id": index, "file_name": f"{index:012}.jpg", "height": SIZE[0], "width": SIZE[1]})
        kinds = ((300 + index, 7), (70_000, 1), (5, 1))
        segments = [{"id": n, "category_id": k, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0} for n, k in kinds]
        annotations.append({"image_id": index, "file_name": f"{index:012}.png", "segments_info": segments})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
    file = below / f"panoptic_{name}.json"
    file.write_text(json.dumps(document))
    return file


def test_segments_are_classes_in_both_parts(tmp_path: Path) -> None:
    part(tmp_path, "train2017", 4)
    part(tmp_path, "val2017", 3, first=10)
    pools = open_source(str(tmp_path), AS_USUAL)
    assert [len(pools.calibration), len(pools.validation)] == [4, 3]
    assert pools.validation.class_names == ("person", "sky", "rug")
    for index in range(3):
        found = pools.validation.target(index, *SIZE)
        np.testing.assert_array_equal(found.classes, classes_of(index))
    calibration, validation = open_image_sets(DataSpec(str(tmp_path)), Preprocess((20, 30), 3))
    assert validation.task == "segmentation"
    assert validation.num_classes == 3
    assert len(next(validation.batches(3)).targets) == 3
    assert calibration.digest != validation.digest


def test_one_file_is_named_and_may_be_called_anything(tmp_path: Path) -> None:
    file = part(tmp_path, "val2017", 3)
    other = file.with_name("mine.json")
    file.rename(other)
    file.with_suffix("").rename(other.with_suffix(""))
    (tmp_path / "val2017").rename(tmp_path / "images")
    for data in (f"coco:{other}", f"masks:{other}"):
        pools = open_source(data, AS_USUAL)
        np.testing.assert_array_equal(pools.calibration.target(0, *SIZE).classes, classes_of(0))


def test_boxes_of_the_same_pictures_stay_what_a_folder_means(tmp_path: Path) -> None:
    """COCO itself has both files beside each other: the panoptic one is named by whoever wants it."""
    part(tmp_path, "val2017", 2)
    boxes = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}]
    images = [{"id": 0, "file_name": "000000000000.jpg", "height": SIZE[0], "width": SIZE[1]}]
    document = {"images": images, "annotations": boxes, "categories": CATEGORIES}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    assert open_source(str(tmp_path), AS_USUAL).calibration.task == "detection"


def test_pictures_in_a_folder_called_like_the_file_of_boxes_are_no_segments(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "mine" / "a.png")
    boxes = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}]
    document = {"images": [{"id": 0, "file_name": "a.png"}], "annotations": boxes, "categories": CATEGORIES}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert open_source(str(tmp_path / "mine.json"), AS_USUAL).calibration.task == "detection"


def test_other_classes_of_the_same_segments_are_other_data(tmp_path: Path) -> None:
    file = part(tmp_path, "val2017", 1)
    before = open_source(f"coco:{file}", AS_USUAL).calibration.look(0)
    document = json.loads(file.read_text())
    document["annotations"][0]["segments_info"][0]["category_id"] = 200
    file.write_text(json.dumps(document))
    assert open_source(f"coco:{file}", AS_USUAL).calibration.look(0).target != before.target


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "no segments at all": (lambda d: d.update(annotations=[]), "lists no segments"),
    "a category that is not there": (
        lambda d: d["annotations"][0]["segments_info"][0].update(category_id=9), "category 9, which does not exist"),
    "a number that is none": (lambda d: d["annotations"][0]["segments_info"][0].update(id="x"), "whole number"),
    "a number of four bytes": (lambda d: d["annotations"][0]["segments_info"][0].update(id=1 << 24), "whole number"),
    "segments that are no list": (lambda d: d["annotations"][0].update(segments_info=3), "segments_info is 3"),
    "a file that leads out": (lambda d: d["annotations"][0].update(file_name="../../x.png"), "file_name"),
    "a file without a name": (lambda d: d["annotations"][0].update(file_name=None), "file_name"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_wrong(wrong: str, tmp_path: Path) -> None:
    file = part(tmp_path, "val2017", 2)
    change, said = WRONG[wrong]
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ResvitError, match=said):
        open_source(f"coco:{file}", AS_USUAL)


def test_pngs_that_are_wrong(tmp_path: Path) -> None:
    file = part(tmp_path, "val2017", 4)
    masks = file.with_suffix("")
    numbers = numbers_of(0)
    numbers[0, 5] = 12345
    coloured(numbers).save(masks / f"{0:012}.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(masks / f"{1:012}.png")
    (masks / f"{2:012}.png").write_bytes(b"no picture")
    coloured(numbers_of(3)[:10]).save(masks / f"{3:012}.png")
    pixels = open_source(f"coco:{file}", AS_USUAL).calibration
    for index, said in enumerate(("segment 12345", "mode L", "image", "10x30")):
        with pytest.raises(BrokenImage, match=said):
            pixels.target(index, *SIZE)
    for path in masks.iterdir():
        path.unlink()
    masks.rmdir()
    with pytest.raises(ResvitError, match=r"PNGs of .* are not in"):
        open_source(f"coco:{file}", AS_USUAL)
