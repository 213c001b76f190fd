from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.readers.fashion_mnist import CLASS_NAMES, read_split
from resvit_calibrate.readers.scenes import MASK_CLASSES, Scenes, batches, detection, normalised, segmentation
from resvit_engines.errors import ResvitError
from resvit_export.models.reference import resvit_config

SCRIPT = Path(__file__).parent.parent / "examples" / "scenes.py"
GREY = Preprocess(size=(96, 96), channels=1, mean=(0.2860,), std=(0.3530,))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("write_scenes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def some():
    return list(Scenes("train", 3, (96, 160), (96, 160)).scenes(0, 60))


def digest(scene) -> str:
    return hashlib.sha256(scene.pixels.tobytes() + scene.instances.tobytes() + scene.classes.tobytes()).hexdigest()


@pytest.mark.whole
def test_boxes_are_the_extent_of_what_is_seen(some):
    for scene in some:
        boxes = scene.boxes()
        assert boxes.boxes.dtype == np.float32
        assert len(boxes.boxes) == len(boxes.classes) == len(boxes.crowd) >= 1
        for item, (x1, y1, x2, y2) in enumerate(boxes.boxes.astype(int)):
            seen = scene.instances == item
            assert seen[y1:y2, x1:x2].sum() == seen.sum() > 0
            for edge in (seen[y1, :], seen[y2 - 1, :], seen[:, x1], seen[:, x2 - 1]):
                assert edge.any()


def test_masks_hold_the_classes_of_the_items(some):
    for scene in some:
        mask = scene.mask().classes
        assert mask.dtype == np.int16
        assert mask.shape == scene.pixels.shape
        assert np.array_equal(mask == 0, scene.instances < 0)
        for item, number in enumerate(scene.classes):
            assert (mask[scene.instances == item] == number + 1).all()


def test_scenes_are_of_all_sizes_and_items_of_all_classes_overlap(some):
    heights, widths = zip(*(scene.pixels.shape for scene in some), strict=True)
    assert 96 <= min(heights + widths) < 110
    assert 145 < max(heights + widths) <= 160
    assert set(np.concatenate([scene.classes for scene in some])) == set(range(10))
    edges = np.concatenate([scene.boxes().boxes for scene in some])
    longest = (edges[:, 2:] - edges[:, :2]).max(axis=1)
    assert longest.min() < 20 < 50 < longest.max() <= 57
    overlapping = 0
    for scene in some:
        for a, b in itertools.combinations(scene.boxes().boxes, 2):
            overlapping += bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())
    assert overlapping > 20


def test_enough_is_seen_of_every_item(some):
    """At least half of 0.7 of the smallest item: nothing unseen is asked for."""
    for scene in some:
        assert np.bincount(scene.instances[scene.instances >= 0]).min() > 20


def test_a_scene_follows_from_split_seed_and_number():
    source = Scenes("train", 5)
    later = source.scene(7)
    assert digest(later) == digest(list(source.scenes(0, 8))[7]) == digest(Scenes("train", 5).scene(7))
    others = [source.scene(8), Scenes("train", 6).scene(7), Scenes("test", 5).scene(7)]
    assert len({digest(scene) for scene in (later, *others)}) == 4


def test_scenes_show_items_of_their_own_split(monkeypatch, tmp_path):
    """Items of one brightness per split: no pixel of the other's can be in a scene."""
    from resvit_calibrate.readers import scenes

    def constant(split):
        return np.full((10, 28, 28), {"train": 255, "test": 254}[split], np.uint8), np.arange(10)

    monkeypatch.setattr(scenes, "_items", constant)
    for split, value in (("train", 255), ("test", 254)):
        scene = Scenes(split).scene(0)
        inside = scene.pixels[scene.instances >= 0]
        assert inside.max() == value


class Chosen:
    """Draws what puts an item at its own size in column 10 and row 10."""

    def __init__(self, mirrored: bool) -> None:
        self.mirrored = mirrored

    def uniform(self, low: float, high: float) -> float:
        return 28.0 if (low, high) == (24, 56) else 10.0

    def random(self) -> float:
        return 0.0 if self.mirrored else 0.9


@pytest.mark.whole
@pytest.mark.parametrize("mirrored", [False, True])
def test_an_item_at_its_own_size_is_the_original(mirrored):
    from resvit_calibrate.readers.scenes import _filled, _placed

    item = read_split("train")[0][0]
    drawn, covered, whole = _placed(item, Chosen(mirrored), 96, 100)
    shown = item[:, ::-1] if mirrored else item
    assert np.array_equal(drawn[10:38, 10:38], shown)
    assert drawn.sum() == item.sum()
    assert np.array_equal(covered[10:38, 10:38], _filled(shown > 12))
    assert covered.sum() == whole


def test_holes_of_an_item_belong_to_it():
    from resvit_calibrate.readers.scenes import _filled

    ring = np.ones((5, 5), bool)
    ring[1:4, 1:4] = False
    assert _filled(ring).all()
    ring[4] = False  # open below, like trousers
    assert not _filled(ring)[1:4, 1:4].any()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Scenes("train", heights=(64, 96)), "64 to 96 pixels"),
        (lambda: Scenes("train", widths=(128, 96)), "128 to 96 pixels"),
        (lambda: Scenes("train", seed=-1), "negative"),
    ],
)
def test_scenes_that_cannot_be_made_are_refused(make, problem):
    with pytest.raises(ResvitError) as caught:
        make()
    assert problem in caught.value.problem


def test_networks_get_what_they_were_trained_with():
    config = resvit_config("fpn-nano-det")
    images = normalised(np.array([[[0, 255]]], np.uint8))
    expected = ((np.array([0.0, 1.0]) - config.mean[0]) / config.std[0]).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(images, expected, rtol=1e-6)
    assert images.dtype == np.float32
    assert len(MASK_CLASSES) == resvit_config("fpn-nano-seg").num_classes == config.num_classes + 1


@pytest.mark.whole
def test_factories_give_boxes_and_masks_of_the_same_scenes():
    (images, boxes), (same, masks) = next(iter(detection("calibration"))), next(iter(segmentation("calibration")))
    assert np.array_equal(images, same)
    assert images.shape == (32, 1, 96, 96)
    for target, mask in zip(boxes, masks, strict=True):
        assert set(target.classes + 1) | {0} == set(np.unique(mask.classes))
    other = next(iter(detection("validation")))[0]
    assert not np.array_equal(images, other)
    assert [len(batch) for batch, _ in batches(Scenes("test"), 70, "detection")] == [32, 32, 6]


@pytest.mark.whole
def test_written_scenes_are_read_back_exactly(script, tmp_path):
    done = CliRunner().invoke(
        script.main, ["--out", str(tmp_path / "a"), "--train", "6", "--val", "5", "--edges", "96", "120", "--quiet"]
    )
    assert done.exit_code == 0, done.output
    scenes = list(Scenes("test", 0, (96, 120), (96, 120)).scenes(0, 5))
    _, validation = open_image_sets(DataSpec(str(tmp_path / "a" / "detection"), calibration_images=4), GREY)
    assert (validation.task, validation.class_names, len(validation)) == ("detection", CLASS_NAMES, 5)
    for index, scene in enumerate(scenes):
        assert np.array_equal(validation.image(index)[..., 0], scene.pixels)
        target = validation.target(index)
        assert np.array_equal(target.boxes, scene.boxes().boxes)
        assert np.array_equal(target.classes, scene.classes)
    _, validation = open_image_sets(DataSpec(str(tmp_path / "a" / "segmentation"), calibration_images=4), GREY)
    assert (validation.task, validation.class_names) == ("segmentation", MASK_CLASSES)
    for index, scene in enumerate(scenes):
        assert np.array_equal(validation.target(index).classes, scene.mask().classes)

    coco = json.loads((tmp_path / "a" / "detection" / "val" / "annotations.json").read_text())
    assert [item["area"] for item in coco["annotations"]] == [
        int((scene.instances == item).sum()) for scene in scenes for item in range(len(scene.classes))
    ]
    assert len({item["id"] for item in coco["annotations"]}) == len(coco["annotations"])
    again = CliRunner().invoke(
        script.main, ["--out", str(tmp_path / "b"), "--train", "6", "--val", "5", "--edges", "96", "120", "--quiet"]
    )
    assert again.exit_code == 0
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 2 + 1 + 3 * 11
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_script_refuses_what_cannot_be_made(script, tmp_path):
    done = CliRunner().invoke(script.main, ["--out", str(tmp_path), "--edges", "64", "96", "--quiet"])
    assert done.exit_code == 3
    assert "64 to 96" in done.output
