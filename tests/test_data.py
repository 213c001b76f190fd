from __future__ import annotations

import gzip
import itertools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.pixels import BrokenImage, FilePixels, decode
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.sampling import divide, stratified
from resvit_calibrate.readers import fashion_mnist
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent

SMALL = Preprocess((8, 8), 3)


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def folder(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder of PNG files, all different."""
    numbers = itertools.count(seed * 10_000)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(noise(9, 10, 3, seed=next(numbers))).save(root / name / f"{index:03}.png")
    return root


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def everything(images) -> np.ndarray:
    return np.concatenate([batch.images for batch in images.batches(7)])


# --- folders ------------------------------------------------------------------------------------------------------


def test_folder_is_divided_stratified_and_disjoint(tmp_path):
    root = folder(tmp_path / "with space", {"b": 40, "a": 20})
    spec = DataSpec(str(root), calibration_images=12)
    calibration, validation = open_image_sets(spec, SMALL)
    assert (len(calibration), len(validation)) == (12, 48)
    assert np.bincount(calibration.labels).tolist() == [4, 8]
    assert calibration.class_names == ("a", "b")
    assert calibration.num_classes == 2
    assert not set(calibration.contents) & set(validation.contents)
    batches = list(calibration.batches(5))
    assert [batch.images.shape for batch in batches] == [(5, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 8)]
    assert np.concatenate([batch.labels for batch in batches]).tolist() == calibration.labels.tolist()
    assert batches[0].images.dtype == np.float32
    assert batches[0].images.flags.c_contiguous
    assert calibration.image(0).shape == (9, 10, 3)
    np.testing.assert_array_equal(SMALL.apply(calibration.image(3)), batches[0].images[3])
    assert validation.labels.tolist() == sorted(validation.labels.tolist())


def test_digest_is_of_content_and_seed_decides(tmp_path):
    root = folder(tmp_path / "one", {"a": 15, "b": 15})
    again = tmp_path / "two"
    # Written in the opposite order: the file system lists it differently.
    for file in sorted(root.rglob("*.png"), reverse=True):
        copy = again / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    first, second = (open_image_sets(DataSpec(str(path), calibration_images=8), SMALL) for path in (root, again))
    assert [images.digest for images in first] == [images.digest for images in second]
    other = open_image_sets(DataSpec(str(root), calibration_images=8, seed=1), SMALL)
    assert other[0].digest != first[0].digest
    wider = open_image_sets(DataSpec(str(root), calibration_images=8), Preprocess((16, 16), 1))
    assert wider[0].digest == first[0].digest
    (again / "a" / "000.png").write_bytes((again / "b" / "000.png").read_bytes() + b"tail")
    changed = open_image_sets(DataSpec(str(again), calibration_images=8), SMALL)
    assert [images.digest for images in changed] != [images.digest for images in first]


def test_train_and_val_inside_and_labels_follow_train(tmp_path):
    folder(tmp_path / "train", {"a": 9, "b": 9, "c": 9})
    folder(tmp_path / "val", {"b": 3, "c": 4}, seed=1)
    calibration, validation = open_image_sets(DataSpec(str(tmp_path), calibration_images=6), SMALL)
    assert np.bincount(calibration.labels).tolist() == [2, 2, 2]
    assert np.bincount(validation.labels).tolist() == [0, 3, 4]
    assert validation.num_classes == 3


@pytest.mark.parametrize("kind", ["folder", "masks", "listed", "coco"])
def test_a_part_that_is_not_used_is_named(tmp_path, kind):
    heard, parts = Heard(), ("train", "val", "test")
    for number, part in enumerate(parts):
        if kind == "folder":
            folder(tmp_path / part, {"a": 4, "b": 4}, seed=number)
        elif kind == "coco":
            names = [f"{part}{index}.png" for index in range(4)]
            folder(tmp_path / part, {"a": 4}, seed=number)
            for index, name in enumerate(names):
                (tmp_path / part / "a" / f"{index:03}.png").rename(tmp_path / part / name)
            boxes = [{"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [1, 1, 4, 4]} for i in range(4)]
            images = [{"id": index, "file_name": name} for index, name in enumerate(names)]
            document = {
                "images": images,
                "annotations": boxes,
                "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
            }
            (tmp_path / part / "annotations.json").write_text(json.dumps(document))
        else:
            root = tmp_path / "VOC" if kind == "listed" else tmp_path
            below = "" if kind == "listed" else part
            pictures = root / ("JPEGImages" if kind == "listed" else "images") / below
            masks = root / ("SegmentationClass" if kind == "listed" else "masks") / below
            for place in (pictures, masks):
                place.mkdir(parents=True, exist_ok=True)
            for index in range(4):
                Image.new("RGB", (8, 8), (number * 9, index * 9, 3)).save(pictures / f"{part}{index}.png")
                Image.fromarray(np.full((8, 8), index % 2, np.uint8)).save(masks / f"{part}{index}.png")
            if kind == "listed":
                lists = root / "ImageSets" / "Segmentation"
                lists.mkdir(parents=True, exist_ok=True)
                (lists / f"{part}.txt").write_text("".join(f"{part}{index}\n" for index in range(4)))
    place = tmp_path / "VOC" if kind == "listed" else tmp_path
    calibration, validation = open_image_sets(DataSpec(str(place), calibration_images=4), SMALL, heard)
    assert (len(calibration), len(validation)) == ((4, 8) if kind == "folder" else (4, 4))
    assert [text for text in heard.warnings if "test" in text and "not" in text and "are used" in text], heard.warnings


def test_separate_validation_folder_and_shared_images(tmp_path):
    one = folder(tmp_path / "one", {"a": 10, "b": 10})
    two = folder(tmp_path / "two", {"b": 10}, seed=1)
    (two / "a").mkdir()
    for index in range(4):
        shutil.copyfile(one / "a" / f"{index:03}.png", two / "a" / f"copy{index}.png")
    heard = Heard()
    spec = DataSpec(str(one), str(two), calibration_images=20)
    calibration, validation = open_image_sets(spec, SMALL, heard)
    assert (len(calibration), len(validation)) == (16, 14)
    assert not set(calibration.contents) & set(validation.contents)
    assert any("4 of 20 calibration images" in text for text in heard.warnings)
    assert any("20 calibration images were asked for, 16 are used" in text for text in heard.warnings)


def test_the_same_folder_twice_is_divided(tmp_path):
    root = folder(tmp_path / "one", {"a": 10, "b": 10})
    calibration, validation = open_image_sets(DataSpec(str(root), f"{root}/", calibration_images=4), SMALL)
    assert (len(calibration), len(validation)) == (4, 16)


def test_wholly_shared_images_are_refused(tmp_path):
    one = folder(tmp_path / "one", {"a": 3, "b": 3})
    shutil.copytree(one, tmp_path / "two")
    with pytest.raises(ResvitError, match="Every calibration image"):
        open_image_sets(DataSpec(str(one), str(tmp_path / "two")), SMALL)


def test_unlabelled_images_do_for_calibration_only(tmp_path):
    flat = tmp_path / "flat"
    folder(tmp_path, {"flat": 5})
    labelled = folder(tmp_path / "labelled", {"x": 2, "y": 2}, seed=1)
    calibration, validation = open_image_sets(DataSpec(str(flat), str(labelled)), SMALL)
    assert calibration.labels is None
    assert next(calibration.batches(2)).labels is None
    assert validation.class_names == ("x", "y")
    with pytest.raises(ResvitError, match="no labels"):
        open_image_sets(DataSpec(str(flat)), SMALL)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ResvitError, match="does not exist"):
        open_image_sets(DataSpec(str(tmp_path / "missing")), SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResvitError, match="no images"):
        open_image_sets(DataSpec(str(tmp_path / "empty")), SMALL)
    (tmp_path / "bare" / "a").mkdir(parents=True)
    (tmp_path / "bare" / "a" / "note.txt").write_text("nothing")
    with pytest.raises(ResvitError, match="no images"):
        open_image_sets(DataSpec(str(tmp_path / "bare")), SMALL)
    with pytest.raises(ResvitError, match="one class"):
        open_image_sets(DataSpec(str(folder(tmp_path / "single", {"a": 6}))), SMALL)
    with pytest.raises(ResvitError, match="no image for calibration"):
        open_image_sets(DataSpec(str(folder(tmp_path / "alone", {"a": 1, "b": 0}))), SMALL)


def test_odd_folders_are_explained(tmp_path):
    root = folder(tmp_path / "odd", {"1": 4, "2": 4, "10": 4, "empty": 0, ".hidden": 3})
    (root / "1" / "deep").mkdir()
    shutil.move(root / "1" / "000.png", root / "1" / "deep" / "x.PNG")
    (root / "1" / "loop").symlink_to(root / "1")
    Image.fromarray(noise(4, 4, 3)).save(root / "loose.png")
    heard = Heard()
    calibration, validation = open_image_sets(DataSpec(str(root), calibration_images=3), SMALL, heard)
    assert len(calibration) + len(validation) == 12
    assert calibration.class_names == ("1", "10", "2", "empty")
    assert any("without images" in text for text in heard.warnings)
    assert any("outside of its class folders" in text for text in heard.warnings)


def test_numbered_classes_out_of_order_are_told(tmp_path):
    heard = Heard()
    open_image_sets(DataSpec(str(folder(tmp_path / "n", {"1": 2, "2": 2, "10": 2}))), SMALL, heard)
    assert any("'10' is number 1" in text for text in heard.warnings)


# --- broken and unusual images ------------------------------------------------------------------------------------


def test_a_broken_image_is_named_and_skipped(tmp_path):
    root = folder(tmp_path / "r", {"a": 110, "b": 110})
    (root / "a" / "text.png").write_text("not an image")
    data = (root / "b" / "005.png").read_bytes()
    (root / "b" / "005.png").write_bytes(data[: len(data) // 2])
    spec = DataSpec(str(root), str(folder(tmp_path / "v", {"a": 2, "b": 2}, seed=1)), calibration_images=500)
    heard = Heard()
    calibration, _ = open_image_sets(spec, SMALL, heard)
    assert len(calibration) == 220
    assert calibration.skipped == ("a/text.png: not an image that can be recognised",)
    assert any("a/text.png" in text for text in heard.warnings)
    total = 0
    for batch in calibration.batches(50):
        total += len(batch.images)
    assert total == len(calibration) == len(calibration.labels) == 219
    assert any(name.startswith("b/005.png: ") for name in calibration.skipped)
    labels = np.concatenate([batch.labels for batch in calibration.batches(50)])
    np.testing.assert_array_equal(labels, calibration.labels)


@pytest.mark.parametrize("cut", [0, 10, 60])
def test_many_broken_images_stop(tmp_path, cut):
    root = folder(tmp_path / "r", {"a": 20, "b": 20})
    data = (root / "a" / "000.png").read_bytes()
    (root / "a" / "000.png").write_bytes(data[:cut])

    def stream():
        for images in open_image_sets(DataSpec(str(root)), SMALL):
            list(images.batches(8))

    with pytest.raises(ResvitError, match=r"More than 1%.*a/000\.png"):
        stream()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    import io

    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_deep_palette_alpha_and_grey_images():
    deep = np.array([[0, 255, 256], [0x1234, 0xFFFF, 0x8000]], np.uint16)
    assert decode(encoded(Image.fromarray(deep)))[:, :, 0].tolist() == [[0, 0, 1], [0x12, 255, 0x80]]
    colour = np.array([[(255, 0, 0), (0, 0, 255)]], np.uint8)
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode(encoded(palette)).tolist() == colour.tolist()
    assert decode(encoded(palette, transparency=b"\x00\x80")).tolist() == colour.tolist()
    alpha = np.dstack([colour, np.zeros((1, 2), np.uint8)])
    assert decode(encoded(Image.fromarray(alpha))).tolist() == colour.tolist()
    assert decode(encoded(Image.new("1", (3, 2), 1))).tolist() == np.full((2, 3, 1), 255).tolist()
    assert decode(encoded(Image.new("LA", (3, 2), (7, 9)))).shape == (2, 3, 1)
    assert decode(encoded(Image.new("CMYK", (3, 2)), "JPEG")).tolist() == np.full((2, 3, 3), 255).tolist()
    with pytest.raises(ValueError, match="floating-point"):
        decode(encoded(Image.new("F", (3, 2)), "TIFF"))


def test_exif_orientation_is_respected(tmp_path):
    image = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode(encoded(Image.fromarray(image), "PNG", exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(image, -1))


def test_a_file_that_vanished_is_broken(tmp_path):
    pixels = FilePixels("x", tmp_path, ["gone.png"], None)
    with pytest.raises(BrokenImage, match="No such file"):
        pixels.read(0)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *((kind, "the image") for kind in ("folder", "masks", "npz", "npz masks")),
        *((kind, "what is known of it") for kind in ("masks", "depth", "npz masks", "npz depth")),
    ],
)
def test_what_changes_after_it_was_opened_is_refused(tmp_path, kind, what):
    """The digest in every key is that of the images that were there at first; no others are ever read under it."""
    images, known = noise(20, 8, 8, 3), np.tile(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3, (20, 1, 1))
    metres = known.astype(np.float32) + 1
    root = tmp_path / "r"
    if kind.startswith("npz"):
        root = tmp_path / "r.npz"
        others = {"npz": {"labels": np.arange(20) % 2}, "npz masks": {"masks": known}, "npz depth": {"depth": metres}}
        np.savez(root, images=images, **others[kind])
        changed = root
        old = images[-1] if what == "the image" else (known if kind == "npz masks" else metres)[-1]
    elif kind == "folder":
        folder(root, {"a": 10, "b": 10})
        changed = root / "b" / "000.png"
    else:
        for name, values in (("images", images), (kind, known if kind == "masks" else metres)):
            (root / name).mkdir(parents=True)
            for number, value in enumerate(values):
                if value.dtype == np.float32:
                    np.save(root / name / f"{number}.npy", value)
                else:
                    Image.fromarray(value).save(root / name / f"{number}.png")
        changed = root / ("images" if what == "the image" else kind)
        changed /= "0.npy" if changed.name == "depth" else "0.png"
    sets = open_image_sets(DataSpec(str(root), calibration_images=10, validation_images=10), Preprocess((8, 8), 3))
    data = changed.read_bytes()
    if kind.startswith("npz"):
        place = data.rindex(old.tobytes())
        with changed.open("r+b") as stream:
            stream.seek(place)
            stream.write(old[::-1].tobytes())
    elif changed.suffix == ".npy":
        np.save(changed, metres[0][::-1])
    else:
        picture = Image.open(changed)
        picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(changed)
    with pytest.raises(ResvitError, match="was changed after the images were opened"):
        [everything(images) for images in sets]


@pytest.mark.parametrize(("channels", "found"), [(3, "grey images|grey and are converted to colour"), (1, "colour")])
def test_converted_colours_are_told_once(tmp_path, channels, found):
    root = folder(tmp_path / "r", {"a": 4, "b": 4})
    Image.fromarray(noise(9, 9)).save(root / "a" / "grey.png")
    heard = Heard()
    open_image_sets(DataSpec(str(root), calibration_images=4), Preprocess((8, 8), channels), heard)
    texts = [text for text in heard.warnings if "converted" in text]
    assert len(texts) == 1
    assert texts[0].startswith("1 of 9 images are grey" if channels == 3 else "8 of 9 images are colour")


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(30, 8, 8), (30, 8, 8, 1), (30, 8, 8, 3)])
def test_npz_of_native_size_is_exact(tmp_path, save, shape):
    images, labels = noise(*shape), np.arange(30) % 3
    path = tmp_path / "some data.npz"
    save(path, images=images, labels=labels)
    channels = shape[3] if len(shape) == 4 else 1
    crop = Preprocess((8, 8), channels, "crop", 0.5)
    calibration, validation = open_image_sets(DataSpec(str(path), calibration_images=9), crop)
    assert np.bincount(calibration.labels).tolist() == [3, 3, 3]
    assert len(validation) == 21
    assert validation.preprocess.resize == "none"
    by_bytes = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for side in (calibration, validation):
        pixels = np.rint(everything(side) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        assert [by_bytes[image.tobytes()] for image in pixels] == side.labels.tolist()


def test_npz_with_its_own_validation_and_fortran_order(tmp_path):
    images = np.asfortranarray(noise(20, 8, 8, 3))
    more = noise(10, 8, 8, 3, seed=1)
    more[:2] = images[:2]
    path = npz(
        tmp_path / "d.npz", images=images, labels=np.arange(20) % 2, val_images=more, val_labels=np.arange(10)[:, None]
    )
    heard = Heard()
    calibration, validation = open_image_sets(DataSpec(path, calibration_images=20), SMALL, heard)
    assert (len(calibration), len(validation)) == (18, 10)
    np.testing.assert_array_equal(np.rint(everything(validation) * 255), more.transpose(0, 3, 1, 2))
    kept = {image.tobytes() for image in images[2:].transpose(0, 3, 1, 2)}
    assert {image.tobytes() for image in np.rint(everything(calibration) * 255).astype(np.uint8)} == kept


def test_what_an_npz_holds_besides_is_named(tmp_path):
    images, labels = noise(20, 8, 8, 3), np.arange(20) % 2
    for kept, unread in (
        ({}, {"test_images": images[:4], "test_labels": labels[:4]}),
        ({"val_images": noise(4, 8, 8, 3, seed=1), "val_labels": labels[:4]}, {"x_test": images[:4]}),
        ({}, {"val_labels": labels[:4]}),
        ({}, {"valid_images": images[:4]}),
    ):
        heard = Heard()
        path = npz(tmp_path / "d.npz", images=images, labels=labels, **kept, **unread)
        open_image_sets(DataSpec(path, calibration_images=8), SMALL, heard)
        assert [text for text in heard.warnings if all(name in text for name in unread) and "not" in text]
    heard = Heard()
    path = npz(tmp_path / "d.npz", images=images, labels=labels, class_names=np.array(["a", "b"]))
    open_image_sets(DataSpec(path, calibration_images=8), SMALL, heard)
    assert heard.warnings == []


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": noise(4, 8, 8)}, "no entry `images`; it has x"),
        ({"images": noise(4, 8, 8)}, "no labels"),
        ({"images": noise(4, 8, 8).astype(np.float32), "labels": np.arange(4)}, "float32, not uint8"),
        ({"images": noise(4, 3, 8, 8), "labels": np.arange(4)}, "shape"),
        ({"images": noise(4, 8), "labels": np.arange(4)}, "shape"),
        ({"images": noise(0, 8, 8), "labels": np.arange(0)}, "shape"),
        ({"images": noise(4, 8, 8), "labels": np.arange(5)}, "4 integers"),
        ({"images": noise(4, 8, 8), "labels": np.arange(4.0)}, "4 integers"),
        ({"images": noise(4, 8, 8), "labels": np.array([0, 1, -1, 2])}, "label -1"),
        ({"images": noise(4, 8, 8), "labels": np.array([0, 1, 2**63, 2], np.uint64)}, "label 9223372036854775808"),
        ({"images": noise(4, 8, 8), "labels": np.array([1, "a", None, 2], object)}, "Python objects"),
        ({"images": np.array([1, None], object), "labels": np.arange(2)}, "Python objects"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, said):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ResvitError, match=said):
        open_image_sets(DataSpec(str(tmp_path / "d.npz")), SMALL)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    path = tmp_path / "d.npz"
    save(path, images=noise(40, 8, 8), labels=np.arange(40) % 4)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ResvitError):
            open_image_sets(DataSpec(str(path)), SMALL)
    path.write_bytes(whole.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x09"))
    if save is np.savez:
        with pytest.raises(ResvitError, match="not a usable"):
            open_image_sets(DataSpec(str(path)), SMALL)


# --- factories ----------------------------------------------------------------------------------------------------

FACTORY = """
import numpy as np

def data(count, seed):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 3, 8, 8)).astype(np.float32), np.arange(count) % 4

def whole():
    images, labels = data(50, 0)
    for start in range(0, 50, 16):
        yield images[start : start + 16], labels[start : start + 16]

def parted(split):
    images, labels = data(*{"calibration": (20, 0), "validation": (30, 1)}[split])
    return [(images, list(labels) if split == "validation" else None)]

def bare():
    return [data(8, 0)[0]]

def shuffled():
    yield data(16, None)

def failing():
    yield data(4, 0)
    raise RuntimeError("the disk went away")

def integers():
    return [(np.zeros((4, 3, 8, 8), np.uint8), np.arange(4))]

def large():
    return [(np.zeros((4, 3, 9, 9), np.float32), np.arange(4))]

def undefined():
    return [(np.full((4, 3, 8, 8), np.nan, np.float32), np.arange(4))]

def onehot():
    return [(data(4, 0)[0], np.eye(4))]

def some():
    return [data(4, 0), data(4, 1)[0]]

def none():
    return []

def nothing():
    return None

constant = 3
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "my data.py"
    path.write_text(FACTORY)
    return lambda name: f"{path}:{name}"


def test_factory_without_split_is_divided(factory):
    calibration, validation = open_image_sets(DataSpec(factory("whole"), calibration_images=10), SMALL)
    assert (len(calibration), len(validation)) == (10, 40)
    assert [len(batch.images) for batch in validation.batches(16)] == [16, 16, 8]
    expected = np.random.default_rng(0).normal(size=(50, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(everything(calibration), expected[:10])
    np.testing.assert_array_equal(everything(validation), expected[10:])
    assert validation.labels.tolist() == [n % 4 for n in range(10, 50)]
    assert validation.image(0) is None


def test_factory_with_split(factory):
    calibration, validation = open_image_sets(DataSpec(factory("parted"), validation_images=25), SMALL)
    assert (len(calibration), len(validation)) == (20, 25)
    assert calibration.labels is None
    assert next(calibration.batches(3)).labels is None
    assert next(validation.batches(3)).labels.tolist() == [0, 1, 2]
    assert len(validation.digest) == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare", "no labels"),
        ("failing", "RuntimeError: the disk went away"),
        ("integers", "uint8"),
        ("large", r"\[4, 3, 9, 9\]"),
        ("undefined", "NaN"),
        ("onehot", "class numbers"),
        ("some", "some images only"),
        ("none", "no image"),
        ("nothing", "gave None, which is no images"),
        ("constant", "not a function"),
        ("absent", "nothing of that name"),
    ],
)
def test_factories_that_cannot_be_used(factory, name, said):
    with pytest.raises(ResvitError, match=said):
        open_image_sets(DataSpec(factory(name)), SMALL)


def test_a_factory_that_shuffles_is_found_out(factory):
    _, validation = open_image_sets(DataSpec(factory("shuffled")), SMALL)
    with pytest.raises(ResvitError, match="same images each time"):
        everything(validation)


def test_modules_that_cannot_be_imported(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    for text, said in [
        (f"{tmp_path}/bad.py:x", "ModuleNotFoundError"),
        (f"{tmp_path}/absent.py:x", "does not exist"),
        ("no_such_package.module:x", "cannot be imported"),
        (f"{tmp_path}/bad.py", "without a function"),
        ("a:b:c", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("~no_such_user/x", "does not exist"),
        (f"{tmp_path}/bad\0", "does not exist"),
    ]:
        with pytest.raises(ResvitError, match=said):
            open_image_sets(DataSpec(text), SMALL)


# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    where = tmp_path / "fashion mnist"
    where.mkdir()
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(where))
    for seed, (prefix, count) in enumerate({"train": 60, "t10k": 20}.items()):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = gzip.compress(idx(noise(count, 28, 28, seed=seed)))
        (where / f"{prefix}-images-idx3-ubyte.gz").write_bytes(images)
        (where / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return where


def test_fashion_mnist_keeps_its_own_split(fashion):
    images, labels = fashion_mnist.read_split("test")
    assert images.shape == (20, 28, 28)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    spec = DataSpec("fashion-mnist", calibration_images=20)
    calibration, validation = open_image_sets(spec, Preprocess((28, 28), 1, "crop", 0.875))
    np.testing.assert_array_equal(np.rint(everything(validation) * 255)[:, 0], images)
    assert validation.labels.tolist() == labels.tolist()
    assert np.bincount(calibration.labels).tolist() == [2] * 10
    assert calibration.class_names[9] == "Ankle boot"


def test_fashion_mnist_missing_or_damaged(fashion, tmp_path, monkeypatch):
    file = fashion / "t10k-images-idx3-ubyte.gz"
    for content in (
        b"",
        b"nothing",
        file.read_bytes()[:-100],
        gzip.compress(idx(noise(19, 28, 28))),
        gzip.compress(idx(noise(20, 28, 28))[:-1]),
        gzip.compress(idx(noise(20, 28, 28)) + b"x"),
        gzip.compress(b"\x00\x00\x0d\x03" + bytes(12)),
    ):
        file.write_bytes(content)
        with pytest.raises(ResvitError):
            fashion_mnist.read_split("test")
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(tmp_path / "absent"))
    with pytest.raises(ResvitError) as caught:
        fashion_mnist.read_split("train")
    assert "apt-get install dataset-fashion-mnist" in caught.value.fix


# --- choosing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100, 1000])
def test_stratified_takes_shares(count):
    labels = np.repeat([0, 1, 2, 5], [50, 30, 19, 1])
    chosen = stratified(labels, np.arange(100), count, seed=3)
    assert len(set(chosen.tolist())) == len(chosen) == min(count, 100)
    got = np.bincount(labels[chosen], minlength=6)[[0, 1, 2, 5]]
    assert (np.abs(got - np.array([50, 30, 19, 1]) * min(count, 100) / 100) < 1).all()
    np.testing.assert_array_equal(chosen, stratified(labels, np.arange(100), count, seed=3))


def test_stratified_is_the_same_with_every_numpy():
    assert stratified(None, np.arange(10), 10, 0).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((1000, 512, None), (500, 500)),
        ((2000, 512, None), (512, 1488)),
        ((600, 512, None), (300, 300)),
        ((600, 512, 50), (512, 50)),
        ((600, 512, 200), (400, 200)),
        ((600, 512, 900), (300, 300)),
        ((2, 512, None), (1, 1)),
        ((1, 512, None), (0, 1)),
        ((2, 1, 1), (1, 1)),
    ],
)
def test_a_pool_is_divided_fairly(asked, given):
    assert divide(*asked) == given


@pytest.mark.parametrize("wrong", [{"calibration_images": 0}, {"validation_images": 0}, {"seed": -1}, {"data": " "}])
def test_settings_that_cannot_be_used(wrong):
    with pytest.raises(ResvitError):
        DataSpec(**{"data": "x", **wrong})
