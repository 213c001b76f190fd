"""Folders of images beside masks or depth maps."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import is_factory, require_source
from resvit_calibrate.data.sources import open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import TargetOptions
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent

INPUT = Preprocess((12, 12), 3, "letterbox")


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def picture(path: Path, seed: int, height: int = 10, width: int = 14) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def mask_of(number: int, height: int = 10, width: int = 14, classes: int = 4) -> np.ndarray:
    mask = np.random.default_rng(1000 + number).integers(0, classes, (height, width)).astype(np.uint8)
    mask[0, 0] = 255
    return mask


def masks(root: Path, count: int = 10, seed: int = 0, **options) -> Path:
    """Images and grey masks whose numbers count from ``seed``."""
    (root / "masks").mkdir(parents=True)
    for number in range(seed, seed + count):
        picture(root / "images" / f"{number:03}.jpg", number)
        Image.fromarray(mask_of(number, **options)).save(root / "masks" / f"{number:03}.png")
    return root


def depths(root: Path, count: int = 6, suffix: str = "png", folder: str = "depth") -> Path:
    (root / folder).mkdir(parents=True)
    for number in range(count):
        picture(root / "images" / f"{number}.png", number)
        steps = np.arange(140, dtype=np.uint16).reshape(10, 14) * 100 + number
        if suffix == "npy":
            np.save(root / folder / f"{number}.npy", steps.astype(np.float64) / 1000)
        else:
            Image.fromarray(steps).save(root / folder / f"{number}.png")
    return root


def opened(root: Path | str, heard: Silent | None = None, reading: TargetOptions | None = None, **more):
    spec = DataSpec(str(root), calibration_images=4, **({} if reading is None else {"reading": reading}), **more)
    return open_image_sets(spec, INPUT, heard or Silent())


def stream(root: Path | str, **more) -> None:
    for images in opened(root, **more):
        list(images.batches(3))


# --- masks --------------------------------------------------------------------------------------------------------


def test_masks_follow_their_images(tmp_path):
    calibration, validation = opened(masks(tmp_path))
    assert (len(calibration), len(validation)) == (4, 6)
    assert {images.task for images in (calibration, validation)} == {"segmentation"}
    assert validation.num_classes == 4
    assert validation.labels is None
    wanted = {mask_of(number).tobytes() for number in range(10)}
    found = set()
    for images in (calibration, validation):
        for batch in images.batches(4):
            for target, geometry in zip(batch.targets, batch.geometry, strict=True):
                assert target.classes.dtype == np.int16
                assert target.classes.shape == (12, 12)
                assert (target.classes[9:] == -1).all()
                assert geometry.height == 10
        for index in range(len(images)):
            own = images.target(index).classes
            assert own[0, 0] == -1
            found.add(np.where(own < 0, 255, own).astype(np.uint8).tobytes())
    assert found == wanted


def test_palette_bilevel_and_deep_masks_hold_class_numbers(tmp_path):
    masks(tmp_path, 4)
    palette = Image.fromarray(mask_of(0)).copy()
    palette = palette.convert("P")
    palette.putdata(mask_of(0).ravel().tolist())
    palette.putpalette([200, 3, 9] * 256)
    palette.save(tmp_path / "masks" / "000.png")
    Image.new("1", (14, 10), 1).save(tmp_path / "masks" / "001.png")
    Image.fromarray(np.full((10, 14), 700, np.uint16)).save(tmp_path / "masks" / "002.png")
    shutil.move(tmp_path / "masks" / "003.png", tmp_path / "masks" / "003.PNG")
    sets = opened(tmp_path)
    seen = {}
    for images in sets:
        for index in range(len(images)):
            target = images.target(index).classes
            seen[images._pixels.title(images._alive()[index])] = target
    np.testing.assert_array_equal(np.where(seen["images/000.jpg"] < 0, 255, seen["images/000.jpg"]), mask_of(0))
    assert (seen["images/001.jpg"] == 1).all()
    assert (seen["images/002.jpg"] == 700).all()
    assert sets[0].num_classes == sets[1].num_classes == 701


def test_train_and_val_above_and_names_of_classes(tmp_path):
    masks(tmp_path / "train", 6)
    masks(tmp_path / "val", 4, seed=50, classes=2)
    calibration, validation = opened(tmp_path)
    assert (len(calibration), len(validation)) == (4, 4)
    assert validation.num_classes == 4
    (tmp_path / "classes.txt").write_text("sky\nroad\ntree\nperson\nbike\n\n", encoding="utf-8")
    _, validation = opened(tmp_path)
    assert validation.class_names == ("sky", "road", "tree", "person", "bike")
    assert validation.num_classes == 5
    with pytest.raises(ResvitError, match="names 5 classes, but 4"):
        opened(tmp_path, reading=TargetOptions(classes=4))
    (tmp_path / "classes.txt").write_text("a\n\nb\n")
    with pytest.raises(ResvitError, match=r"ine 2 of .* is empty"):
        opened(tmp_path)
    (tmp_path / "classes.txt").write_text("")
    with pytest.raises(ResvitError, match="is empty"):
        opened(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ResvitError, match="UTF-16"):
        opened(tmp_path)


def test_unknown_labels_are_refused_with_the_values_found(tmp_path):
    masks(tmp_path, 8)
    mask = mask_of(3)
    mask[2, 2:4] = (19, 254)
    Image.fromarray(mask).save(tmp_path / "masks" / "003.png")
    with pytest.raises(ResvitError, match=r"1 of . masks .* unknown labels: 19, 254 \(first in images/003\.jpg\)"):
        opened(tmp_path, reading=TargetOptions(classes=4))
    ignoring = TargetOptions(classes=4, ignore=(255, 19, 254))
    for images in opened(tmp_path, reading=ignoring):
        assert images.num_classes == 4
    masks(tmp_path / "again", 6)
    with pytest.raises(ResvitError, match="unknown labels: 255"):
        opened(tmp_path / "again", reading=TargetOptions(classes=4, ignore=()))


def test_masks_of_black_and_white_are_two_classes(tmp_path):
    masks(tmp_path, 6)
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray((mask_of(1) > 1).astype(np.uint8) * 255).save(file)
    heard = Heard()
    calibration, validation = opened(tmp_path, heard)
    assert calibration.num_classes == validation.num_classes == 2
    assert (validation.target(0).classes == (mask_of(1) > 1)).all()
    assert any("0 is read as the background, 255 as the object" in warning for warning in heard.warnings)


def test_masks_of_black_alone_are_explained(tmp_path):
    masks(tmp_path, 6)
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray(np.zeros((10, 14), np.uint8)).save(file)
    with pytest.raises(ResvitError, match="one class") as caught:
        opened(tmp_path)
    assert "write 0 and 1" in str(caught.value)


def test_deeper_folders_pair_by_path(tmp_path):
    masks(tmp_path, 6)
    for name in ("images", "masks"):
        (tmp_path / name / "berlin").mkdir()
        for file in sorted((tmp_path / name).glob("00[0-2].*")):
            shutil.move(file, tmp_path / name / "berlin" / file.name)
    calibration, validation = opened(tmp_path)
    assert len(calibration) + len(validation) == 6


def test_files_without_a_counterpart_are_told(tmp_path):
    masks(tmp_path, 8)
    (tmp_path / "masks" / "001.png").unlink()
    (tmp_path / "images" / "002.jpg").unlink()
    heard = Heard()
    calibration, validation = opened(tmp_path, heard)
    assert len(calibration) + len(validation) == 6
    assert any("1 files" in text and "none of that name in masks" in text and "001" in text for text in heard.warnings)
    assert any("none of that name in images" in text and "002" in text for text in heard.warnings)


def test_pairs_that_cannot_be_made(tmp_path):
    masks(tmp_path, 4)
    picture(tmp_path / "images" / "000.png", 7)
    with pytest.raises(ResvitError, match=r"images/000\.jpg and images/000\.png"):
        opened(tmp_path)
    for file in (tmp_path / "masks").iterdir():
        file.rename(file.with_name(f"mask_{file.name}"))
    (tmp_path / "images" / "000.png").unlink()
    with pytest.raises(ResvitError, match=r"No image of .* has a file of the same name"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: Image.new("RGB", (14, 10)).save(path), "mode RGB"),
        (lambda path: Image.new("L", (14, 11)).save(path), r"masks/000\.png is 11x14 pixels, its image 10x14"),
        (lambda path: Image.new("F", (14, 10)).save(path, "TIFF"), "mode F"),
        (lambda path: Image.new("L", (14, 10)).save(path, "JPEG"), "JPEG changes the numbers"),
        (lambda path: Image.fromarray(np.full((10, 14), 40_000, np.uint16)).save(path), "the class 40000"),
        (lambda path: path.write_bytes(b""), r"masks/000\.png: the file is empty"),
        (lambda path: path.write_text("no image"), "not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "masks/000"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path, make, said):
    masks(tmp_path, 6)
    make(tmp_path / "masks" / "000.png")
    with pytest.raises(ResvitError, match=f"(?s)More than 1%.*{said}"):
        stream(tmp_path)


@pytest.mark.whole
def test_one_broken_mask_of_many_is_skipped_with_its_image(tmp_path):
    masks(tmp_path, 210)
    (tmp_path / "masks" / "007.png").write_bytes(b"")
    heard = Heard()
    spec = DataSpec(str(tmp_path), calibration_images=105)
    sets = open_image_sets(spec, INPUT, heard)
    assert sum(map(len, sets)) == 209
    assert any("masks/007.png: the file is empty" in text for text in heard.warnings)


def test_digests_follow_the_masks(tmp_path):
    masks(tmp_path, 6)
    before = opened(tmp_path)
    assert opened(tmp_path)[1].digest == before[1].digest
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray(np.ones((10, 14), np.uint8)).save(file)
    after = opened(tmp_path)
    assert all(one.digest != other.digest for one, other in zip(before, after, strict=True))
    assert before[0].contents == after[0].contents


# --- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "folder"), [("png", "depth"), ("npy", "depths")])
def test_depth_is_in_metres(tmp_path, suffix, folder):
    calibration, validation = opened(depths(tmp_path, suffix=suffix, folder=folder))
    assert validation.task == "depth"
    assert validation.num_classes is None
    wanted = np.arange(140).reshape(10, 14) / 10
    assert len(calibration) == 3
    for index in range(len(validation)):
        depth = validation.target(index).depth
        np.testing.assert_allclose(depth - wanted, depth[0, 1] - wanted[0, 1], atol=1e-5)
        assert (depth[0, 0] == 0) == (abs(depth[0, 1] - 0.1) < 1e-6)
    batch = next(validation.batches(2))
    assert batch.targets[0].depth.dtype == np.float32
    assert batch.targets[0].depth.shape == (12, 12)
    assert (batch.targets[0].depth[9:] == 0).all()


def test_another_scale_of_depth(tmp_path):
    for images in opened(depths(tmp_path), reading=TargetOptions(depth_scale=1 / 256)):
        np.testing.assert_allclose(images.target(0).depth[9, 13] * 256, 13_900, atol=10)


def test_what_a_sensor_says_for_unknown_becomes_zero(tmp_path):
    depths(tmp_path, suffix="npy")
    for file in (tmp_path / "depth").iterdir():
        np.save(file, np.array([[np.nan, np.inf], [-1.0, 2.0]], np.float16)[None].repeat(5, 1).repeat(7, 2))
    for images in opened(tmp_path):
        assert images.target(0).depth.shape == (10, 14)
        assert set(np.unique(images.target(0).depth)) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("0.png", lambda path: Image.new("L", (14, 10)).save(path), "mode L"),
        ("0.png", lambda path: Image.fromarray(np.ones((9, 14), np.uint16)).save(path), "9x14 pixels"),
        ("0.npy", lambda path: np.save(path, np.ones((10, 14), np.int32)), "holds int32"),
        ("0.npy", lambda path: np.save(path, np.ones((2, 10, 14))), "shape"),
        ("0.npy", lambda path: np.save(path, np.array([{}], object), allow_pickle=True), "allow_pickle=False"),
        ("0.npy", lambda path: path.write_bytes(b"nothing"), r"0\.npy"),
    ],
)
def test_depths_that_cannot_be_used(tmp_path, name, make, said):
    depths(tmp_path)
    (tmp_path / "depth" / "0.png").unlink()
    make(tmp_path / "depth" / name)
    with pytest.raises(ResvitError, match=f"(?s)More than 1%.*{said}"):
        stream(tmp_path)


# --- which kind a folder is ---------------------------------------------------------------------------------------


def test_a_folder_that_could_be_two_things_must_be_named(tmp_path):
    masks(tmp_path, 6)
    depths(tmp_path / "other")
    shutil.move(tmp_path / "other" / "depth", tmp_path / "depth")
    for number in range(6):
        shutil.move(tmp_path / "other" / "images" / f"{number}.png", tmp_path / "images" / f"{number}.png")
    with pytest.raises(ResvitError, match="images and masks, images and depth") as caught:
        opened(tmp_path)
    assert f"`masks:{tmp_path}` or `depth:{tmp_path}`" in caught.value.fix
    assert opened(f"masks:{tmp_path}")[1].task == "segmentation"
    assert opened(f"depth:{tmp_path}")[1].task == "depth"
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.raises(ResvitError, match=r"annotations\.json, images and masks"):
        opened(tmp_path)
    with pytest.raises(ResvitError, match="no list `images`"):
        opened(f"coco:{tmp_path}")


def test_class_folders_can_be_called_images_and_masks(tmp_path):
    for number in range(8):
        picture(tmp_path / ("images", "masks")[number % 2] / f"{number}.png", number)
    calibration, validation = opened(f"folder:{tmp_path}")
    assert calibration.task == validation.task == "classification"
    assert validation.class_names == ("images", "masks")
    assert next(validation.batches(2)).targets is None


def test_a_named_kind_that_is_not_there(tmp_path):
    masks(tmp_path, 4)
    with pytest.raises(ResvitError, match="has no folder depth"):
        opened(f"depth:{tmp_path}")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ResvitError, match="has no folder images"):
        opened(f"masks:{tmp_path}/bare")
    for text in (f"masks:{tmp_path}/absent", "coco:absent.json"):
        with pytest.raises(ResvitError, match="does not exist"):
            opened(text)
        with pytest.raises(ResvitError, match="does not exist"):
            require_source(text)
    with pytest.raises(ResvitError, match="is a file, not a folder"):
        opened(f"masks:{tmp_path}/images/000.jpg")


def test_prefixes_are_no_factories(tmp_path):
    assert [is_factory(text) for text in ("coco:x", "masks:data", "depth:a.b", "folder:x", "fashion-mnist", "x")] == [
        False
    ] * 6
    assert is_factory("package.module:function")
    assert is_factory("./coco.py:function")
    assert not is_factory(f"C:{tmp_path}/x.npz")
    require_source("package.module:function")
    require_source(f"masks:{tmp_path}")


def test_the_same_folder_in_other_words_is_divided(tmp_path):
    masks(tmp_path, 6)
    spec = DataSpec(f"masks:{tmp_path}", f"masks:{tmp_path}/", calibration_images=2)
    assert [len(images) for images in open_image_sets(spec, INPUT)] == [2, 4]
    (tmp_path / "depth").mkdir()
    for file in (tmp_path / "masks").iterdir():
        Image.fromarray(np.ones((10, 14), np.uint16)).save(tmp_path / "depth" / file.name)
    other = DataSpec(f"masks:{tmp_path}", f"depth:{tmp_path}", calibration_images=2)
    with pytest.raises(ResvitError, match="Every calibration image"):
        open_image_sets(other, INPUT)


def test_images_alone_do_for_calibration_and_where_no_accuracy_is_asked_for(tmp_path):
    masks(tmp_path, 6)
    flat = tmp_path / "images"
    spec = DataSpec(str(flat), calibration_images=2, unlabelled=True)
    heard = Heard()
    calibration, validation = open_image_sets(spec, INPUT, heard)
    assert (calibration.task, validation.task, validation.target(0)) == (None, None, None)
    assert [text for text in heard.warnings if text.startswith("nothing is known of the validation images")]
    with pytest.raises(ResvitError, match="no labels"):
        opened(flat)
    mixed = DataSpec(str(flat), f"masks:{tmp_path}")
    with pytest.raises(ResvitError, match="Every calibration image"):
        open_image_sets(mixed, INPUT)


COLOURS = {"sky": (10, 20, 30), "road": (128, 64, 128), "car": (64, 0, 128), "void": (0, 0, 0)}
TABLES = {
    "class_dict.csv": "name,r,g,b\n" + "".join(f"{n},{r},{g},{b}\n" for n, (r, g, b) in COLOURS.items()),
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    + "".join(f"{n}:{r},{g},{b}::\n" for n, (r, g, b) in COLOURS.items()),
    "label_colors.txt": "".join(f"{r} {g} {b}\t\t{n}\n" for n, (r, g, b) in COLOURS.items()),
    "classes.txt": "".join(f"{n} {r} {g} {b}\n" for n, (r, g, b) in COLOURS.items()),
}


def numbers_of(number: int) -> np.ndarray:
    return np.where(mask_of(number) == 255, 3, mask_of(number)).astype(np.uint8)


def coloured(root: Path, number: int) -> None:
    colours = np.array(list(COLOURS.values()), np.uint8)[numbers_of(number)]
    Image.fromarray(colours).save(root / "masks" / f"{number:03}.png")


@pytest.mark.parametrize("table", TABLES)
def test_colours_are_classes_by_a_table(tmp_path, table):
    root = masks(tmp_path, 6)
    for number in range(6):
        coloured(root, number)
    with pytest.raises(ResvitError, match="table of colours"):
        opened(root)
    (root / table).write_text(TABLES[table])
    pixels = open_source(str(root), TargetOptions()).calibration
    assert pixels.class_names == tuple(COLOURS)
    for number in range(6):
        np.testing.assert_array_equal(pixels.target(number, 10, 14).classes, numbers_of(number))
    bad = TABLES[table].replace("128", "129", 1)
    (root / table).write_text(bad)
    with pytest.raises(ResvitError, match=r"holds the colour 128,64,128, which .* gives no class"):
        opened(root)
    (root / table).write_text(TABLES[table] + TABLES[table].splitlines()[-1] + "\n")
    with pytest.raises(ResvitError, match=r"Lines \d and \d of .* give two classes one colour"):
        opened(root)


def test_grey_and_palette_masks_beside_a_table_hold_numbers_or_its_colours(tmp_path):
    root = masks(tmp_path, 4)
    (root / "class_dict.csv").write_text(TABLES["class_dict.csv"])
    image = Image.fromarray(np.zeros((10, 14), np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 1, 1, 1] + [0] * 9 + [128, 64, 128])
    image.putdata((numbers_of(1) % 2 * 5).ravel().tolist())
    image.save(root / "masks" / "001.png")
    pixels = open_source(str(root), TargetOptions()).calibration
    np.testing.assert_array_equal(pixels.target(0, 10, 14).classes, mask_of(0).astype(np.int8))
    found = pixels.target(1, 10, 14).classes
    np.testing.assert_array_equal(found, numbers_of(1) % 2)
