"""Masks, boxes and depths out of arrays and out of a user's own loader, and what training makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resvit_calibrate.data import training_images as training_module
from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.images.image_set import DataSpec, digest_of
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import BoxTarget, DepthTarget, MaskTarget, TargetOptions
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent

INPUT = Preprocess((8, 8), 1, "letterbox", mean=(0.0,), std=(1.0,))
COUNT = 12


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def pictures(count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Images uint8 [N, 4, 8]: as wide as the input, and half as high."""
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 8), np.uint8)


def boxes(count: int = COUNT) -> dict[str, np.ndarray]:
    """Image number i has i % 3 boxes, of classes 0, 1."""
    numbers = np.array([n % 3 for n in range(count)])
    corners = [[n % 4, k, n % 4 + 3, k + 2] for n in range(count) for k in range(n % 3)]
    classes = [k for n in range(count) for k in range(n % 3)]
    return {
        "boxes": np.array(corners, np.float32),
        "box_classes": np.array(classes),
        "box_offsets": np.concatenate([[0], np.cumsum(numbers)]),
    }


def saved(path: Path, save=np.savez, **arrays: np.ndarray) -> str:
    save(path, **arrays)
    return str(path)


def opened(data: str, heard: Silent | None = None, reading: TargetOptions | None = None, **more):
    spec = DataSpec(data, calibration_images=4, **({} if reading is None else {"reading": reading}), **more)
    return open_image_sets(spec, INPUT, heard or Silent())


def shown(images) -> dict[bytes, object]:
    """Every target by the picture that it belongs to."""
    return {
        image[:, :4].tobytes(): target
        for batch in images.batches(5)
        for image, target in zip(batch.images, batch.targets, strict=True)
    }


def key(picture: np.ndarray) -> bytes:
    return (picture[None].astype(np.float32) / np.float32(255)).tobytes()


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_masks_in_an_npz(tmp_path, save):
    images = pictures()
    masks = np.random.default_rng(1).integers(0, 5, (COUNT, 4, 8)).astype(np.uint8)
    masks[:, 0, 0] = 255
    names = np.array(["a", "b", "c", "d", "e"])
    sets = opened(saved(tmp_path / "d.npz", save, images=images, masks=masks, class_names=names))
    for side in sets:
        assert (side.task, side.num_classes, side.class_names) == ("segmentation", 5, ("a", "b", "c", "d", "e"))
        found = shown(side)
        for image, mask in zip(images, masks, strict=True):
            if key(image) in found:
                got = found.pop(key(image)).classes
                np.testing.assert_array_equal(np.where(got[:4] < 0, 255, got[:4]), mask)
                assert (got[4:] == -1).all()
        assert not found
    with pytest.raises(ResvitError, match="unknown labels: 4"):
        opened(saved(tmp_path / "e.npz", images=images, masks=masks), reading=TargetOptions(classes=4))


def test_boxes_in_an_npz_with_a_validation_part(tmp_path):
    images, more = pictures(), pictures(6, seed=1)
    ragged = boxes()
    validation = {f"val_{name}": value for name, value in boxes(6).items()}
    validation["val_box_crowd"] = np.arange(len(validation["val_boxes"])) % 2
    path = saved(tmp_path / "d.npz", images=images, val_images=more, **ragged, **validation)
    calibration, second = opened(path)
    assert (len(calibration), len(second)) == (4, 6)
    assert (second.task, second.num_classes, second.class_ids) == ("detection", 2, ())
    targets = [target for batch in second.batches(4) for target in batch.targets]
    assert [len(target.boxes) for target in targets] == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(np.concatenate([target.boxes for target in targets]), validation["val_boxes"])
    assert np.concatenate([target.crowd for target in targets]).tolist() == [False, True] * 3
    assert np.concatenate([target.classes for target in targets]).tolist() == [0, 0, 1, 0, 0, 1]


def test_boxes_in_an_npz_without_an_area_are_dropped(tmp_path):
    ragged = boxes()
    ragged["boxes"][1] = (3, 3, 3, 9)
    ragged["boxes"][2] = np.nan
    heard = Heard()
    sets = opened(saved(tmp_path / "d.npz", images=pictures(), **ragged), heard)
    assert any("2 boxes without any area" in text for text in heard.warnings)
    lengths = {key: len(target.boxes) for side in sets for key, target in shown(side).items()}
    assert [lengths[key(image)] for image in pictures()] == [0, 1, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_depth_in_an_npz(tmp_path):
    images = pictures()
    depth = np.random.default_rng(2).random((COUNT, 4, 8)) * 9
    depth[:, 0, 0] = (np.nan, -1.0, np.inf) * 4
    for side in opened(saved(tmp_path / "d.npz", images=images, depth=depth)):
        assert side.task == "depth"
        found = shown(side)
        for image, metres in zip(images, depth, strict=True):
            if key(image) in found:
                got = found[key(image)].depth
                np.testing.assert_allclose(got[:4].ravel()[1:], metres.ravel()[1:], rtol=1e-6)
                assert (got[0, 0], got[5, 5]) == (0, 0)


def test_digests_follow_the_targets_of_an_npz(tmp_path):
    one = opened(saved(tmp_path / "a.npz", images=pictures(), masks=np.ones((COUNT, 4, 8), np.int32)))
    same = opened(saved(tmp_path / "b.npz", images=pictures(), masks=np.ones((COUNT, 4, 8), np.uint8)))
    other = opened(saved(tmp_path / "c.npz", images=pictures(), masks=np.full((COUNT, 4, 8), 2, np.uint8)))
    assert one[1].digest == same[1].digest != other[1].digest
    assert digest_of((b"a",), None) == digest_of((b"a",), None, ())


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"masks": np.zeros((COUNT, 4, 9), np.uint8)}, r"masks of d\.npz .* shape \[12, 4, 9\]"),
        ({"masks": np.zeros((COUNT, 4, 8), np.float32)}, "float32"),
        ({"depth": np.zeros((COUNT, 4, 8), np.uint16)}, "uint16"),
        ({"masks": np.zeros((COUNT, 4, 8), np.uint8), "labels": np.arange(COUNT)}, "labels and masks"),
        ({"masks": np.zeros((COUNT, 4, 8), np.uint8), "depth": np.zeros((COUNT, 4, 8))}, "masks and depth"),
        ({"masks": np.array([None] * COUNT, object)}, "Python objects"),
        ({"boxes": np.zeros((0, 4))}, "no box_classes and no box_offsets"),
        ({**boxes(), "boxes": np.zeros((12, 5))}, r"shape \[12, 5\]"),
        ({**boxes(), "boxes": np.zeros((12, 4), "U1")}, "boxes of"),
        ({**boxes(), "box_classes": np.arange(12) - 1}, "class numbers from 0"),
        ({**boxes(), "box_classes": np.arange(11)}, "12 class numbers"),
        ({**boxes(), "box_crowd": np.arange(12.0)}, "box_crowd"),
        ({**boxes(), "box_offsets": np.arange(12)}, "13 whole numbers"),
        ({**boxes(), "box_offsets": np.arange(13)[::-1].copy()}, "does not rise from 0 to 12"),
        ({**boxes(), "box_offsets": boxes()["box_offsets"] + 1}, "does not rise"),
        ({**boxes(), "box_offsets": np.array([0, 9, 3] + [12] * 10)}, "does not rise"),
        ({**boxes(), "class_names": np.array(["one"])}, "1 classes have names"),
        ({"labels": np.arange(COUNT), "class_names": np.array(["one"])}, "1 classes have names"),
        ({**boxes(), "class_names": np.arange(3)}, "not texts"),
    ],
)
def test_npz_targets_that_cannot_be_used(tmp_path, arrays, said):
    with pytest.raises(ResvitError, match=said):
        opened(saved(tmp_path / "d.npz", images=pictures(), **arrays))


# --- factories ----------------------------------------------------------------------------------------------------

FACTORY = """
import numpy as np
from resvit_calibrate.images.targets import BoxTarget, DepthTarget, Geometry, MaskTarget

def images():
    return np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)

def parts(more):
    for start in range(0, 20, 6):
        yield images()[start:start + 6], more(slice(start, min(start + 6, 20)))

MASKS = np.arange(20 * 64).reshape(20, 8, 8) % 7
MASKS[:, 0, 0] = 255
DEPTH = np.arange(20 * 64, dtype=np.float64).reshape(20, 8, 8) - 1

def boxes(n):
    return {"boxes": [[n % 3, 0, n % 3 + 4, 20]] * (n % 3), "classes": [n] * (n % 3), "image_id": n}

def masks(): return parts(lambda part: MASKS[part])
def channel_masks(): return parts(lambda part: MASKS[part][:, None])
def depths(): return parts(lambda part: DEPTH[part])
def detections(): return parts(lambda part: [boxes(n) for n in range(part.start, part.stop)])

def torchvision_style():
    def one(n):
        found = boxes(n)
        return {"boxes": found["boxes"], "labels": found["classes"], "iscrowd": [n % 2] * (n % 3)}
    return parts(lambda part: [one(n) for n in range(part.start, part.stop)])

def objects():
    def one(n):
        return BoxTarget(np.ones((1, 4), np.float32) * [[1, 1, 2, 2]], np.array([n]), np.array([False]))
    return parts(lambda part: [one(n) for n in range(part.start, part.stop)])

def mask_objects(): return parts(lambda part: [MaskTarget(mask) for mask in MASKS[part]])
def depth_dicts(): return parts(lambda part: [{"depth": depth} for depth in DEPTH[part]])
def mask_dicts(): return parts(lambda part: [{"mask": mask} for mask in MASKS[part]])

def dictionaries():
    place = Geometry(0.5, 0.5, 0, 0, 16, 16, (8, 8))
    for start in (0, 10):
        yield {"images": images()[start:start + 10], "masks": MASKS[start:start + 10], "geometry": [place] * 10}

def labelled(): return ({"images": image, "labels": [n]} for n, image in enumerate(images()[:, None]))
def unlabelled(): return ({"images": image, "labels": None} for image in images()[:, None])

def changing(state=[0]):
    state[0] += 1
    return parts(lambda part: MASKS[part] + (state[0] > 1))

def mixed():
    yield images()[:5], MASKS[:5]
    yield images()[5:9], np.arange(4)

def some():
    yield images()[:5], MASKS[:5]
    yield images()[5:9], None

def two_kinds(): yield {"images": images(), "masks": MASKS, "depth": DEPTH}
def unknown_key(): yield {"images": images(), "mask": MASKS}
def no_images(): yield {"masks": MASKS}
def bad_geometry(): yield {"images": images(), "masks": MASKS, "geometry": [1] * 20}
def short_targets(): yield images(), [boxes(0)]
def empty_target(): yield images(), [{}] * 20
def both_targets(): yield images(), [{"boxes": [], "classes": [], "mask": MASKS[0]}] * 20
def no_classes(): yield images(), [{"boxes": [[0, 0, 1, 1]]}] * 20
def bad_boxes(): yield images(), [{"boxes": [[0, 0, 1]], "classes": [0]}] * 20
def nan_boxes(): yield images(), [{"boxes": [[0, 0, 1, float("nan")]], "classes": [0]}] * 20
def float_classes(): yield images(), [{"boxes": [[0, 0, 1, 1]], "classes": [0.5]}] * 20
def negative_classes(): yield images(), [{"boxes": [[0, 0, 1, 1]], "classes": [-1]}] * 20
def bad_crowd(): yield images(), [{"boxes": [[0, 0, 1, 1]], "classes": [0], "crowd": [0, 1]}] * 20
def ragged(): yield images(), [{"boxes": [[0, 0, 1, 1], [1]], "classes": [0, 1]}] * 20
def small_masks(): yield images(), MASKS[:, ::2, ::2]
def huge_classes(): yield images(), MASKS + 40000
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "loader.py"
    path.write_text(FACTORY)
    return lambda name: f"{path}:{name}"


def all_targets(images) -> list:
    return [target for batch in images.batches(3) for target in batch.targets]


@pytest.mark.parametrize("name", ["masks", "channel_masks", "mask_objects", "mask_dicts", "dictionaries"])
def test_masks_from_a_factory(factory, name):
    calibration, validation = opened(factory(name))
    assert (len(calibration), len(validation), validation.task, validation.num_classes) == (4, 16, "segmentation", 7)
    wanted = (np.arange(20 * 64).reshape(20, 8, 8) % 7).astype(np.int16)
    wanted[:, 0, 0] = -1
    for side, part in ((calibration, slice(0, 4)), (validation, slice(4, 20))):
        targets = all_targets(side)
        assert all(isinstance(target, MaskTarget) and target.classes.dtype == np.int16 for target in targets)
        np.testing.assert_array_equal([target.classes for target in targets], wanted[part])
    batch = next(validation.batches(3))
    assert batch.labels is None
    assert (batch.geometry is None) == (name != "dictionaries")
    if batch.geometry:
        assert [place.height for place in batch.geometry] == [16] * 3


@pytest.mark.parametrize("name", ["depths", "depth_dicts"])
def test_depths_from_a_factory(factory, name):
    _, validation = opened(factory(name))
    assert (validation.task, validation.num_classes) == ("depth", None)
    targets = all_targets(validation)
    assert all(isinstance(target, DepthTarget) for target in targets)
    np.testing.assert_array_equal([t.depth for t in targets], np.arange(4 * 64, 20 * 64).reshape(16, 8, 8) - 1)


@pytest.mark.parametrize("name", ["detections", "torchvision_style"])
def test_boxes_from_a_factory_are_cut_at_the_input(factory, name):
    calibration, validation = opened(factory(name))
    assert validation.task == "detection"
    targets = all_targets(calibration) + all_targets(validation)
    assert [len(target.boxes) for target in targets] == [n % 3 for n in range(20)]
    assert targets[4].boxes.tolist() == [[1, 0, 5, 8]]
    assert targets[5].classes.tolist() == [5, 5]
    assert targets[5].crowd.tolist() == [name != "detections"] * 2
    assert all(target.boxes.shape[1:] == (4,) and target.classes.dtype == np.int64 for target in targets)


def test_targets_given_as_such(factory):
    _, validation = opened(factory("objects"))
    assert all(isinstance(target, BoxTarget) and len(target.boxes) == 1 for target in all_targets(validation))


def test_dictionaries_with_labels_and_with_nothing(factory):
    _, validation = opened(factory("labelled"))
    assert validation.labels.tolist() == list(range(4, 20))
    assert validation.task == "classification"
    calibration, _ = opened(factory("unlabelled"), unlabelled=True)
    assert (calibration.task, next(calibration.batches(2)).targets) == (None, None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mixed", "targets for classification, segmentation"),
        ("some", "some images only"),
        ("two_kinds", "masks and depth together"),
        ("unknown_key", "dictionary with images, mask"),
        ("no_images", "dictionary with masks"),
        ("bad_geometry", "20 times a Geometry"),
        ("short_targets", "1 targets for 20 images"),
        ("empty_target", "a target with nothing"),
        ("both_targets", "boxes, classes, mask"),
        ("no_classes", "without their `classes`"),
        ("bad_boxes", r"shape \[1, 3\]"),
        ("nan_boxes", "finite"),
        ("float_classes", "classes of type float64"),
        ("negative_classes", "class numbers from 0"),
        ("bad_crowd", "crowd marks"),
        ("ragged", "boxes that are no array"),
        ("small_masks", r"shape \[4, 4\]; the input is 8x8"),
        ("huge_classes", "the class 40255"),
    ],
)
def test_factories_whose_targets_cannot_be_used(factory, name, said):
    with pytest.raises(ResvitError, match=said):
        opened(factory(name))


def test_targets_that_change_from_pass_to_pass_are_found_out(factory):
    _, validation = opened(factory("changing"))
    with pytest.raises(ResvitError, match="same images each time"):
        list(validation.batches(4))


def test_options_reach_a_factory(factory):
    with pytest.raises(ResvitError, match="unknown labels: 5, 6"):
        opened(factory("masks"), reading=TargetOptions(classes=5))
    _, validation = opened(factory("masks"), reading=TargetOptions(classes=300, ignore=(0,)))
    assert validation.num_classes == 300
    assert all_targets(validation)[0].classes[0, 0] == 255


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masks", "detections", "depths"])
def test_a_streams_targets_stay_with_their_images_while_it_is_mixed(factory, name, monkeypatch):
    monkeypatch.setattr(training_module, "_WINDOW_BYTES", 1000)
    _, validation = opened(factory(name), validation_images=2)
    images = open_training_images(factory(name), validation, 20, 0, INPUT)
    assert len(images) == 18
    by_image = {
        image.tobytes(): target
        for batch in open_training_images(factory(name), validation, 20, 0, INPUT)._images.batches(4)
        for image, target in zip(batch.images, batch.targets, strict=True)
    }
    order, pairs = [], 0
    for batch in images.batches_at(np.random.default_rng(0).permutation(18), 5):
        for image, target in zip(batch.images, batch.targets, strict=True):
            wanted = by_image[image.tobytes()]
            for field in vars(wanted):
                np.testing.assert_array_equal(getattr(target, field), getattr(wanted, field))
            order.append(list(by_image).index(image.tobytes()))
            pairs += 1
    assert pairs == 18
    assert order != sorted(order)


def test_training_on_arrays_keeps_targets_and_the_order_asked_for(tmp_path):
    path = saved(
        tmp_path / "d.npz",
        images=pictures(),
        val_images=pictures(4, 1),
        **boxes(),
        **{f"val_{name}": value for name, value in boxes(4).items()},
    )
    _, validation = opened(path)
    images = open_training_images(path, validation, 12, 0, INPUT)
    batch = next(images.batches_at(np.array([7, 2, 9]), 3))
    again = [images._images.target(index) for index in (7, 2, 9)]
    assert [len(target.boxes) for target in batch.targets] == [len(target.boxes) for target in again]


def test_training_with_unknown_classes_is_refused(tmp_path):
    masks = np.zeros((COUNT, 4, 8), np.uint8)
    one = saved(tmp_path / "a.npz", images=pictures(), masks=masks, class_names=np.array(["a", "b"]))
    two = saved(tmp_path / "b.npz", images=pictures(seed=3), masks=masks, class_names=np.array(["a", "c"]))
    _, validation = opened(one)
    with pytest.raises(ResvitError, match="c are unknown there"):
        open_training_images(two, validation, 12, 0, INPUT)
    swapped = saved(tmp_path / "c.npz", images=pictures(seed=3), masks=masks, class_names=np.array(["b", "a"]))
    with pytest.raises(ResvitError, match="order differs"):
        open_training_images(swapped, validation, 12, 0, INPUT)
    labels = np.arange(COUNT) % 2
    one = saved(tmp_path / "d.npz", images=pictures(), labels=labels, class_names=np.array(["a", "b", "c"]))
    two = saved(tmp_path / "e.npz", images=pictures(seed=3), labels=labels, class_names=np.array(["c", "a"]))
    training = open_training_images(two, opened(one)[1], 12, 0, INPUT)
    assert set(next(training.batches_at(np.arange(12), 12)).labels.tolist()) == {0, 2}
