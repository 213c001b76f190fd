"""Boxes as YOLO and PASCAL VOC lay them out: every layout gives the same boxes, and what is none is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.data.image_sets import DataSpec, open_image_sets
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL, BoxTarget
from resvit_calibrate.readers.boxes.table import BoxPixels
from resvit_engines.errors import ResvitError

Boxes = list[tuple[int, float, float, float, float]]
"""Class, x1, y1, x2, y2 in pixels."""
SIZE = (60, 40)
NAMES = ("cat", "dog", "emu")
TRAIN: dict[str, Boxes] = {"a": [(0, 6, 4, 30, 20), (2, 0, 0, 60, 40)], "b": [(1, 12, 10, 18, 12)], "empty": []}
VALIDATION: dict[str, Boxes] = {"c": [(2, 30, 20, 60, 40)], "d": [(0, 3, 2, 9, 38)]}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(list(path.stem.encode())).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def yolo_lines(boxes: Boxes) -> str:
    width, height = SIZE
    shares = (
        (kind, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        for kind, x1, y1, x2, y2 in boxes
    )
    return "".join(f"{kind} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for kind, x, y, w, h in shares)


def outlines(boxes: Boxes) -> str:
    width, height = SIZE
    return "".join(
        f"{kind} "
        + " ".join(f"{x / width:.6f} {y / height:.6f}" for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)))
        + "\n"
        for kind, x1, y1, x2, y2 in boxes
    )


def side(images: Path, labels: Path, rows: dict[str, Boxes], lines: Callable[[Boxes], str] = yolo_lines) -> None:
    labels.mkdir(parents=True, exist_ok=True)
    for name, boxes in rows.items():
        picture(images / f"{name}.jpg")
        if boxes:
            (labels / f"{name}.txt").write_text(lines(boxes))


def by_kind(root: Path) -> str:
    for part, rows in (("train", TRAIN), ("val", VALIDATION)):
        side(root / "images" / part, root / "labels" / part, rows)
    (root / "data.yaml").write_text(
        "path: /gone\ntrain: images/train\nval: images/val\nnc: 3\nnames: [cat, dog, emu]\n"
    )
    return str(root)


def by_part(root: Path) -> str:
    for part, rows in (("train", TRAIN), ("valid", VALIDATION)):
        side(root / part / "images", root / part / "labels", rows)
    names = "names:\n  0: cat\n  1: dog\n  2: emu\n"
    (root / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\n{names}")
    return str(root / "data.yaml")


def by_part_without_a_file(root: Path) -> str:
    by_part(root)
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("cat\ndog\nemu\n")
    return f"yolo:{root}"


def by_lists(root: Path) -> str:
    for part, rows in (("train", TRAIN), ("val", VALIDATION)):
        side(root / "images", root / "labels", rows)
        (root / f"{part}.txt").write_text("".join(f"./images/{name}.jpg\n" for name in rows))
    (root / "data.yaml").write_text(f"train: train.txt\nval: [val.txt]\nnames: {list(NAMES)}\n")
    return str(root)


def as_outlines(root: Path) -> str:
    for part, rows in (("train", TRAIN), ("val", VALIDATION)):
        side(root / "images" / part, root / "labels" / part, rows, outlines)
    (root / "classes.txt").write_text("cat\ndog\nemu\n")
    return str(root)


def as_voc(root: Path) -> str:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for part, rows in (("train", TRAIN), ("val", VALIDATION)):
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in rows))
        for name, boxes in rows.items():
            picture(root / "JPEGImages" / f"{name}.jpg")
            objects = "".join(
                f"<object><name>{NAMES[kind]}</name><part><name>head</name></part><difficult>0</difficult><bndbox>"
                f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for kind, x1, y1, x2, y2 in boxes
            )
            size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return str(root)


def boxes_of(pixels: object) -> dict[str, Boxes]:
    assert isinstance(pixels, BoxPixels)
    found = {}
    for index, name in enumerate(pixels.files):
        target = pixels.target(index, SIZE[1], SIZE[0])
        assert isinstance(target, BoxTarget)
        rows = zip(target.classes.tolist(), target.boxes.tolist(), strict=True)
        found[Path(name).stem] = sorted((kind, *(round(value, 2) for value in corners)) for kind, corners in rows)
    return found


LAYOUTS = (by_kind, by_part, by_part_without_a_file, by_lists, as_outlines, as_voc)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_boxes(layout: Callable[[Path], str], tmp_path: Path) -> None:
    pools = open_source(layout(tmp_path), AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.calibration.class_names == NAMES
    assert boxes_of(pools.calibration) == {name: sorted(boxes) for name, boxes in TRAIN.items()}
    assert boxes_of(pools.validation) == {name: sorted(boxes) for name, boxes in VALIDATION.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_go_with_their_pictures_into_the_network(layout: Callable[[Path], str], tmp_path: Path) -> None:
    sets = open_image_sets(DataSpec(layout(tmp_path), calibration_images=3), Preprocess((80, 60)))
    assert [images.task for images in sets] == ["detection", "detection"]
    targets = [target for images in sets for batch in images.batches(2) for target in batch.targets or ()]
    assert all(isinstance(target, BoxTarget) for target in targets)
    widest = max((box for target in targets for box in target.boxes.tolist()), key=lambda box: box[2] - box[0])
    assert widest == pytest.approx([0, 0, 60, 80])


def test_pictures_beside_their_text_files_and_one_folder_for_both(tmp_path: Path) -> None:
    side(tmp_path, tmp_path, {**TRAIN, **VALIDATION})
    pools = open_source(str(tmp_path), AS_USUAL)
    assert isinstance(pools, Pools)
    assert pools.validation is None
    assert boxes_of(pools.calibration) == {name: sorted(boxes) for name, boxes in {**TRAIN, **VALIDATION}.items()}
    (tmp_path / "data.yaml").write_text("train: .\nval: .\nnames: [cat, dog, emu]\n")
    same = open_source(str(tmp_path), AS_USUAL)
    assert isinstance(same, Pools)
    assert same.validation is None
    assert "1 pictures" in " ".join(same.calibration.notes)


def test_key_points_are_dropped_and_boxes_beyond_the_edge_cut(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 1.01 0.5 0.1 0.1 2 0.2 0.2 1\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [person]\nkpt_shape: [2, 3]\n")
    pools = open_source(str(tmp_path), AS_USUAL)
    assert isinstance(pools, Pools)
    assert boxes_of(pools.calibration) == {"a": [(0, 0.0, 10.0, 60.0, 30.0)]}
    assert "1 boxes of" in " ".join(pools.calibration.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 0.5 0.5 0.2", "3 numbers behind its class"),
        ("0 0.5 0.5 0.2 0.2 0.9", "confidence, as predictions have"),
        ("0 30 20 12 8", "no shares of a picture"),
        ("0 0.5 0.5 -0.2 0.2", "negative size"),
        ("cat 0.5 0.5 0.2 0.2", "is no box"),
        ("-1 0.5 0.5 0.2 0.2", "is no box"),
        ("7 0.5 0.5 0.2 0.2", "has class 7, and there are 3 classes"),
        ("0 0.5 0.5 0.2 1e999", "without bounds"),
        ("0 0.5 0..5 0.2 0.2", "is no box"),
    ],
)
def test_lines_that_are_no_boxes(line: str, said: str, tmp_path: Path) -> None:
    root = by_kind(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(ResvitError, match=rf"line 3 of .*a\.txt.*{said}"):
        open_source(root, AS_USUAL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: images/train\nnames: [cat, dog]\nnc: 3\n", "`nc` is 3, and there are 2"),
        ("train: images/none\nnames: [cat]\n", "are not there"),
        ("names: [cat, dog, emu]\n", "names neither"),
        ("train: [images/train, 3]\n", "`train` is 3"),
        ("train: images/train\nnames: {0: cat, 2: dog}\n", "does not number its classes from 0"),
        ("train: &a images/train\nval: *a\n", "refers to parts of itself"),
        ("- a\n- b\n", "holds no names"),
        ("train: [\n", "is no YAML"),
        ("train: !!python/object/apply:os.system ['touch pwned']\n", "is no YAML"),
    ],
)
def test_files_that_describe_nothing(text: str, said: str, tmp_path: Path) -> None:
    root = by_kind(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ResvitError, match=said):
        open_source(root, AS_USUAL)
    assert not Path("pwned").exists()


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation><object><name>cat</name></object></annotation>", "an object without xmin"),
        (f"<annotation><object>{BOX}</object></annotation>", "an object without name"),
        (f"<annotation><object><name>yak</name>{BOX}</object></annotation>", "classes.txt does not have: yak"),
        ("<annotation><object>", "is no XML"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "declares entities"),
        ("<a>" * 99 + "</a>" * 99, "deeper than any"),
        (f"<annotation><object><name>cat</name>{BOX.replace('9', 'nan')}</object></annotation>", "xmax is 'nan'"),
    ],
)
def test_xml_that_is_no_annotation(text: str, said: str, tmp_path: Path) -> None:
    root = as_voc(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(ResvitError, match=said):
        open_source(root, AS_USUAL)


def test_difficult_objects_count_for_nothing_and_pixels_from_0_are_told(tmp_path: Path) -> None:
    root = as_voc(tmp_path)
    box = BOX.replace("<xmin>1", "<xmin>0")
    (tmp_path / "Annotations" / "a.xml").write_text(
        f"<annotation><object><name>dog</name><difficult>1</difficult>{box}</object></annotation>"
    )
    pools = open_source(root, AS_USUAL)
    assert isinstance(pools, Pools)
    target = pools.calibration.target(0, SIZE[1], SIZE[0])
    assert isinstance(target, BoxTarget)
    assert target.boxes.tolist() == [[0, 1, 9, 9]]
    assert target.crowd.tolist() == [True]
    said = " ".join(pools.calibration.notes)
    assert "1 objects of" in said
    assert "counted from 0" in said


def test_a_third_part_is_said_to_be_unused(tmp_path: Path) -> None:
    root = as_voc(tmp_path)
    before = open_source(root, AS_USUAL)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("zebra\n")
    after = open_source(root, AS_USUAL)
    assert isinstance(before, Pools)
    assert isinstance(after, Pools)
    assert not [note for note in before.calibration.notes if "is divided" in note]
    assert [note for note in after.calibration.notes if "train.txt and val.txt are used, test.txt not" in note]


def test_boxes_and_masks_in_one_folder_are_asked_about(tmp_path: Path) -> None:
    root = as_voc(tmp_path)
    (tmp_path / "SegmentationClass").mkdir()
    for name in (*TRAIN, *VALIDATION):
        Image.fromarray(np.zeros((SIZE[1], SIZE[0]), np.uint8)).save(tmp_path / "SegmentationClass" / f"{name}.png")
    with pytest.raises(ResvitError, match="could be several kinds of data"):
        open_source(root, AS_USUAL)
    assert isinstance(open_source(f"voc:{root}", AS_USUAL), Pools)
    assert open_source(f"masks:{root}", AS_USUAL).calibration.task == "segmentation"  # type: ignore[union-attr]
