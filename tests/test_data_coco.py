"""COCO's detection format, as people write it and as they should not."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import BoxTarget
from resvit_calibrate.readers.boxes.coco_file import read_coco
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent

INPUT = Preprocess((16, 16), 3, "letterbox")
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 90, "name": "bird"}]


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def annotation(image: int, category: int = 1, bbox=(2, 3, 10, 8), **more) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0, "area": 1.0, **more}


def plain(count: int = 20, height: int = 20, width: int = 32) -> dict:
    """Images 100, 101…; number i has i % 3 boxes, of the categories in turn."""
    images = [
        {"id": 100 + n, "file_name": f"{n:04}.png", "height": height, "width": width, "license": 3}
        for n in range(count)
    ]
    annotations = [
        annotation(100 + n, [1, 7, 90][(n + k) % 3], (1 + k, 2, 10, 5 + k), segmentation=[[1.0, 2.0] * 4], id=n * 9 + k)
        for n in range(count)
        for k in range(n % 3)
    ]
    return {"info": {}, "images": images, "annotations": annotations, "categories": copy.deepcopy(CATEGORIES)}


def write(path: Path, content: dict | str, images: Path | None = None, seed: int = 0) -> Path:
    """Write annotations, and a picture for each image, all different, where ``images`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    random = np.random.default_rng(seed)
    for entry in content["images"] if images is not None else ():
        file = images / entry["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (entry.get("height", 20), entry.get("width", 32), 3), np.uint8)
        Image.fromarray(pixels).save(file)
    return path


def refused(tmp_path: Path, content: dict | str) -> str:
    with pytest.raises(ResvitError) as caught:
        read_coco(write(tmp_path / "bad.json", content))
    assert caught.value.fix
    return caught.value.problem


def everything(images) -> dict[bytes, BoxTarget]:
    return {
        picture.tobytes(): target
        for batch in images.batches(7)
        for picture, target in zip(batch.images, batch.targets, strict=True)
    }


# --- what a good file becomes -------------------------------------------------------------------------------------


def test_classes_with_gaps_count_from_zero_in_the_order_of_ids(tmp_path):
    write(tmp_path / "annotations.json", plain(), tmp_path / "images")
    calibration, validation = open_image_sets(DataSpec(str(tmp_path), calibration_images=8), INPUT)
    assert (len(calibration), len(validation)) == (8, 12)
    for images in (calibration, validation):
        assert images.task == "detection"
        assert images.class_names == ("cat", "dog", "bird")
        assert images.class_ids == (1, 7, 90)
        assert images.num_classes == 3
        assert images.labels is None
    batch = next(validation.batches(12))
    assert batch.labels is None
    assert len(batch.targets) == len(batch.geometry) == 12
    assert [len(target.boxes) for target in batch.targets].count(0) >= 3
    for index, target in enumerate(batch.targets):
        own = validation.target(index)
        assert target.classes.tolist() == own.classes.tolist()
        np.testing.assert_allclose(target.boxes, own.boxes / 2, atol=1e-6)
        np.testing.assert_allclose(batch.geometry[index].boxes_to_image(target.boxes), own.boxes, atol=1e-5)
        assert (target.boxes.dtype, target.classes.dtype, target.crowd.dtype) == (np.float32, np.int64, np.bool_)
    first = validation.target(int(np.argmax([len(target.boxes) == 2 for target in batch.targets])))
    assert first.boxes.tolist() == [[1, 2, 11, 7], [2, 2, 12, 8]]


def test_the_same_image_has_the_same_boxes_wherever_it_is_drawn(tmp_path):
    content = plain(30)
    write(tmp_path / "annotations.json", content, tmp_path / "images")
    spec = DataSpec(str(tmp_path), calibration_images=10)
    known = {}
    for number, entry in enumerate(content["images"]):
        picture = np.asarray(Image.open(tmp_path / "images" / entry["file_name"]))
        known[INPUT.apply(picture).tobytes()] = number % 3
    for images in open_image_sets(spec, INPUT):
        assert {key: len(target.boxes) for key, target in everything(images).items()} == {
            key: known[key] for key in everything(images)
        }


def test_crowds_are_kept_as_crowds(tmp_path):
    content = plain(4)
    content["annotations"] = [
        annotation(100, iscrowd=1, segmentation={"counts": [1, 2], "size": [20, 32]}),
        annotation(100, 7),
    ]
    read = read_coco(write(tmp_path / "a.json", content))
    assert read.crowd.tolist() == [True, False]
    assert read.offsets.tolist() == [0, 2, 2, 2, 2]
    assert read.notes == ()


def test_boxes_outside_are_cut_and_boxes_of_nothing_are_dropped_and_counted(tmp_path):
    content = plain(200)
    content["annotations"] = [
        annotation(100, bbox=(-5, -5, 15, 10)),
        annotation(100, bbox=(30, 18, 50, 50)),
        annotation(101, bbox=(40, 2, 5, 5)),
        annotation(101, bbox=(4, 4, 0, 5)),
        annotation(101, bbox=(4, 4, 5, -2)),
        annotation(102, bbox=(4, 4, float("nan"), 2)),
        annotation(102, bbox=(4, 4, float("inf"), 2)),
        annotation(102, bbox=(0.2, 0, 32, 20.3)),
    ]
    write(tmp_path / "annotations.json", content, tmp_path)
    heard = Heard()
    calibration, _ = open_image_sets(DataSpec(str(tmp_path), calibration_images=10), INPUT, heard)
    boxes = calibration._pixels.table.boxes
    np.testing.assert_allclose(boxes, [[0, 0, 10, 5], [30, 18, 32, 20], [0.2, 0, 32, 20]])
    assert any("2 boxes that reach beyond" in text for text in heard.warnings)
    assert any("5 boxes without any area" in text and "0001.png, 0002.png" in text for text in heard.warnings)


def test_boxes_are_cut_by_the_image_itself_where_the_file_does_not_say_its_size(tmp_path):
    content = plain(8)
    for entry in content["images"]:
        del entry["height"]
    content["annotations"] = [annotation(100 + n, bbox=(20, 10, 400, 400)) for n in range(8)]
    content["annotations"] += [annotation(100 + n, bbox=(50, 50, 9, 9)) for n in range(8)]
    write(tmp_path / "annotations.json", content, tmp_path / "images")
    calibration, _ = open_image_sets(DataSpec(str(tmp_path), calibration_images=4), INPUT)
    assert calibration.target(0).boxes.tolist() == [[20, 10, 32, 20]]
    assert next(calibration.batches(4)).targets[3].boxes.tolist() == [[10, 5, 16, 10]]


def test_annotations_of_unknown_images_and_repeated_files_are_told(tmp_path):
    content = plain(4)
    content["annotations"].append(annotation(999))
    content["images"].append({**content["images"][0], "id": 5})
    read = read_coco(write(tmp_path / "a.json", content))
    assert any("1 annotations of images" in note for note in read.notes)
    assert any("1 files more than once" in note for note in read.notes)


def test_ids_may_be_texts_and_whole_floats(tmp_path):
    content = plain(2)
    content["images"] = [{"id": "a", "file_name": "a.png"}, {"id": 2.0, "file_name": "sub\\b.png"}]
    content["annotations"] = [annotation("a", 7.0), annotation(2)]
    read = read_coco(write(tmp_path / "a.json", content))
    assert read.offsets.tolist() == [0, 1, 2]
    assert read.file_names == ("a.png", "sub/b.png")
    assert read.classes.tolist() == [1, 0]


def test_numbers_written_as_texts_and_no_word_on_crowds_are_read_as_what_they_mean(tmp_path):
    content = plain(6)
    expected = read_coco(write(tmp_path / "a.json", content))
    for entry in content["images"]:
        entry |= {"id": str(entry["id"]), "height": str(entry["height"]), "width": f"{entry['width']}.0"}
    for place, entry in enumerate(content["annotations"]):
        entry |= {"category_id": str(entry["category_id"]), "bbox": [str(side) for side in entry["bbox"]]}
        entry["iscrowd"] = (None, "0", False, 0.0)[place % 4]
        if place % 5 == 4:
            del entry["iscrowd"]
    for entry in content["categories"]:
        entry["id"] = str(entry["id"])
    read = read_coco(write(tmp_path / "a.json", content))
    for name in ("file_names", "class_names", "class_ids"):
        assert getattr(read, name) == getattr(expected, name)
    for name in ("sizes", "boxes", "classes", "crowd", "offsets"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    content["images"][1]["id"] = "0101"  # a text, and not the number 101
    assert any("1 annotations of images" in note for note in read_coco(write(tmp_path / "a.json", content)).notes)


def test_a_category_that_only_groups_others_takes_no_number(tmp_path):
    content = plain(6)
    for entry in content["categories"]:
        entry["supercategory"] = "objects"
    plainly = read_coco(write(tmp_path / "a.json", content))
    content["categories"].insert(0, {"id": 0, "name": "objects", "supercategory": "none"})
    read = read_coco(write(tmp_path / "a.json", content))
    assert (read.class_ids, read.class_names) == (plainly.class_ids, plainly.class_names)
    assert read.classes.tolist() == plainly.classes.tolist()
    assert any("no annotation is of" in note and "objects" in note for note in read.notes)
    content["annotations"][0]["category_id"] = 0
    assert read_coco(write(tmp_path / "a.json", content)).class_names[0] == "objects"
    del content["annotations"][0]
    content["categories"][0]["name"] = "another"
    assert read_coco(write(tmp_path / "a.json", content)).class_names[0] == "another"
    content["categories"] = [{"id": 0, "name": "person", "supercategory": "person"}]
    content["annotations"] = []
    assert read_coco(write(tmp_path / "a.json", content)).class_names == ("person",)


def test_digests_follow_the_boxes_and_nothing_else(tmp_path):
    content = plain(12)
    path = write(tmp_path / "annotations.json", content, tmp_path / "images")
    spec = DataSpec(str(path), calibration_images=6)
    first = open_image_sets(spec, INPUT)
    again = open_image_sets(spec, INPUT)
    assert [images.digest for images in first] == [images.digest for images in again]
    content["info"] = {"year": 2026}
    path.write_text(json.dumps(content))
    assert open_image_sets(spec, INPUT)[1].digest == first[1].digest
    for entry in content["annotations"]:
        entry["bbox"][0] += 1
    path.write_text(json.dumps(content))
    moved = open_image_sets(spec, INPUT)
    assert all(one.digest != other.digest for one, other in zip(first, moved, strict=True))
    assert moved[1].contents == first[1].contents


# --- where files lie ----------------------------------------------------------------------------------------------


def test_training_and_validation_as_coco_2017_lays_them_out(tmp_path):
    for name, count, seed in (("train2017", 12, 0), ("val2017", 5, 1)):
        write(tmp_path / "annotations" / f"instances_{name}.json", plain(count), tmp_path / name, seed)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    calibration, validation = open_image_sets(DataSpec(str(tmp_path), calibration_images=9), INPUT)
    assert (len(calibration), len(validation)) == (9, 5)
    assert "instances_val2017.json" in validation.description
    training = open_training_images(str(tmp_path), validation, 99, 0, INPUT)
    assert len(training) == 12
    batch = next(training.batches_at(np.array([5, 0, 3]), 3))
    assert [len(target.boxes) for target in batch.targets] == [
        len(training._images.target(place).boxes) for place in (5, 0, 3)
    ]


@pytest.mark.parametrize("where", ["images", ".", "images/sub", "elsewhere"])
def test_images_are_found_beside_the_annotations(tmp_path, where):
    content = plain(6)
    if where == "images/sub":
        for entry in content["images"]:
            entry["file_name"] = f"sub/{entry['file_name']}"
    folder = tmp_path / "images" if where == "images/sub" else tmp_path / where
    write(tmp_path / "annotations.json", content, folder)
    if where == "elsewhere":
        with pytest.raises(ResvitError, match="None of the images"):
            open_image_sets(DataSpec(str(tmp_path)), INPUT)
    else:
        assert len(open_image_sets(DataSpec(str(tmp_path)), INPUT)[0]) == 3


@pytest.mark.parametrize("name", ["annotations.json", "_annotations.coco.json"])
def test_annotations_inside_of_train_and_val(tmp_path, name):
    for part, seed in (("train", 0), ("valid", 1)):
        write(tmp_path / part / name, plain(6), tmp_path / part, seed)
    calibration, validation = open_image_sets(DataSpec(str(tmp_path)), INPUT)
    assert (len(calibration), len(validation)) == (6, 6)


def test_a_prefix_names_a_file_of_any_name_and_a_folder_with_one(tmp_path):
    write(tmp_path / "labels.txt", plain(6), tmp_path / "images")
    assert len(open_image_sets(DataSpec(f"coco:{tmp_path}/labels.txt"), INPUT)[1]) == 3
    with pytest.raises(ResvitError, match=r"no annotations\.json"):
        open_image_sets(DataSpec(f"coco:{tmp_path}"), INPUT)
    (tmp_path / "labels.txt").rename(tmp_path / "mine.json")
    assert len(open_image_sets(DataSpec(f"coco:{tmp_path}"), INPUT)[1]) == 3
    with pytest.raises(ResvitError, match="does not exist"):
        open_image_sets(DataSpec(f"coco:{tmp_path}/absent.json"), INPUT)


def test_several_annotation_files_must_be_named(tmp_path):
    for name in ("instances_a.json", "instances_b.json"):
        write(tmp_path / name, plain(6), tmp_path / "images")
    with pytest.raises(ResvitError, match=r"2 annotation files: instances_a\.json, instances_b\.json") as caught:
        open_image_sets(DataSpec(str(tmp_path)), INPUT)
    assert "coco:" in caught.value.fix
    spec = DataSpec(str(tmp_path / "instances_a.json"), calibration_images=2)
    assert len(open_image_sets(spec, INPUT)[1]) == 4


def test_validation_elsewhere_is_numbered_alike(tmp_path):
    write(tmp_path / "one" / "annotations.json", plain(6), tmp_path / "one")
    fewer = plain(6)
    fewer["categories"] = [{"id": 90, "name": "bird"}, {"id": 7, "name": "dog"}]
    fewer["annotations"] = [annotation(100, 90), annotation(101, 7)]
    write(tmp_path / "two" / "annotations.json", fewer, tmp_path / "two", seed=1)
    spec = DataSpec(str(tmp_path / "one"), str(tmp_path / "two"))
    _, validation = open_image_sets(spec, INPUT)
    assert [validation.target(n).classes.tolist() for n in (0, 1)] == [[2], [1]]
    assert validation.num_classes == 3
    training = open_training_images(
        str(tmp_path / "two"), open_image_sets(DataSpec(str(tmp_path / "one")), INPUT)[1], 9, 0, INPUT
    )
    assert {int(n) for part in training.batches_at(np.arange(6), 6) for t in part.targets for n in t.classes} == {1, 2}
    fewer["categories"][0]["name"] = "plane"
    write(tmp_path / "two" / "annotations.json", fewer)
    with pytest.raises(ResvitError, match=r"category 90 'plane', which is 'bird'"):
        open_image_sets(spec, INPUT)
    fewer["categories"] = [{"id": 90, "name": "bird"}, {"id": 7, "name": "dog"}, {"id": 8, "name": "new"}]
    write(tmp_path / "two" / "annotations.json", fewer)
    with pytest.raises(ResvitError, match="unknown in the other"):
        open_image_sets(spec, INPUT)


# --- missing and broken images ------------------------------------------------------------------------------------


def test_one_missing_image_of_many_is_skipped_by_name(tmp_path):
    content = plain(220, 4, 4)
    content["annotations"] = [annotation(100 + n, bbox=(0, 0, 2, 2)) for n in range(220)]
    write(tmp_path / "annotations.json", content, tmp_path / "images")
    (tmp_path / "images" / "0003.png").unlink()
    heard = Heard()
    sets = open_image_sets(DataSpec(str(tmp_path), calibration_images=110), INPUT, heard)
    assert sum(map(len, sets)) == 219
    assert any("0003.png: No such file" in text for text in heard.warnings)
    assert sum(len(batch.targets) for images in sets for batch in images.batches(50)) == 219


def test_many_missing_images_stop_with_their_number_and_names(tmp_path):
    content = plain(40)
    write(tmp_path / "annotations.json", content, tmp_path / "images")
    for number in range(0, 40, 4):
        (tmp_path / "images" / f"{number:04}.png").unlink()
    with pytest.raises(ResvitError, match=r"More than 1% of 39 images .* at least 10: 0000\.png: No such file"):
        open_image_sets(DataSpec(str(tmp_path), calibration_images=1, seed=1, validation_images=39), INPUT)


def test_no_image_at_all_says_where_they_were_looked_for(tmp_path):
    write(tmp_path / "annotations.json", plain(4))
    with pytest.raises(ResvitError, match=r"None of the images .* such as 0000\.png, is in .*images"):
        open_image_sets(DataSpec(str(tmp_path)), INPUT)


def test_an_image_of_another_size_than_annotated_is_broken(tmp_path):
    write(tmp_path / "annotations.json", plain(6), tmp_path / "images")
    Image.new("RGB", (20, 32)).save(tmp_path / "images" / "0000.png")
    sets = open_image_sets(DataSpec(str(tmp_path)), INPUT)
    with pytest.raises(ResvitError, match="32x20 pixels, but annotated as 20x32"):
        [list(images.batches(4)) for images in sets]


def test_a_name_may_not_lead_out_of_the_folder(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    for name in ("../secret.png", "a/../../secret.png", str(secret), "..\\secret.png", "C:\\secret.png", "..", "/"):
        content = plain(2)
        content["images"][1]["file_name"] = name
        assert "leads out of" in refused(tmp_path / "inside", content)


def test_names_that_no_file_has(tmp_path):
    content = plain(4)
    content["images"][1]["file_name"] = "a\ud800.png"
    assert "file_name is 'a\\ud800.png'" in refused(tmp_path, content)
    content = plain(300)
    write(tmp_path / "annotations.json", content, tmp_path / "images")
    content["images"][1]["file_name"] = "n" * 5000
    content["categories"][0]["name"] = "dog\ud800"
    write(tmp_path / "annotations.json", content)
    calibration, validation = open_image_sets(DataSpec(str(tmp_path), calibration_images=150), INPUT)
    assert len(calibration) + len(validation) == 299
    assert validation.class_names[1] == "dog?"


# --- files that cannot be used ------------------------------------------------------------------------------------


def test_broken_json_is_shown_with_its_line(tmp_path):
    text = json.dumps(plain(3), indent=1)
    lines = text.splitlines()
    lines[5] = lines[5].replace('"', "", 1)
    assert "line 6, column" in refused(tmp_path, "\n".join(lines))
    assert "not JSON" in refused(tmp_path, text[: len(text) // 2])
    assert "not JSON" in refused(tmp_path, "")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(ResvitError, match="UTF-16"):
        read_coco(tmp_path / "bad.json")
    assert "not usable JSON" in refused(tmp_path, "[" * 100_000)
    assert "not usable JSON" in refused(tmp_path, '{"images": ' + "1" * 5000 + "}")


def test_json_that_is_not_coco(tmp_path):
    assert "as files of results are" in refused(tmp_path, "[]")
    assert "not an object" in refused(tmp_path, "3")
    assert "no list `images`; it has nothing" in refused(tmp_path, "{}")
    assert "no list `annotations`" in refused(tmp_path, {"images": [], "categories": []})
    assert "no categories" in refused(tmp_path, {**plain(1), "categories": []})
    with pytest.raises(ResvitError, match="lists no images"):
        open_image_sets(DataSpec(str(write(tmp_path / "x.json", {**plain(1), "images": [], "annotations": []}))), INPUT)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("images", {"id": 101}, "1 image ids more than once: 101"),
        ("images", {"id": None}, "id is None"),
        ("images", {"id": [1]}, r"id is \[1\]"),
        ("images", {"id": True}, "id is True"),
        ("images", {"file_name": None}, "file_name is None"),
        ("images", {"file_name": "a\0b"}, "file_name is"),
        ("images", {"height": 0}, "height is 0"),
        ("images", {"width": "wide"}, "width is 'wide'"),
        ("categories", {"id": 7}, "category id 7 more than once"),
        ("categories", {"id": "x"}, "no whole number"),
        ("annotations", {"category_id": 2}, "category 2, which does not exist; there are 1, 7, 90"),
        ("annotations", {"category_id": None}, "category None"),
        ("annotations", {"category_id": [1]}, "category"),
        ("annotations", {"bbox": [1, 2, 3]}, "not four numbers"),
        ("annotations", {"bbox": [1, 2, 3, "four"]}, "not four numbers"),
        ("annotations", {"bbox": [1, 2, 3, None]}, "not four numbers"),
        ("annotations", {"iscrowd": 2}, "iscrowd is 2"),
        ("categories", {"id": 10**400}, "no whole number"),
        ("annotations", {"bbox": {"x": 1}}, "not four numbers"),
        ("annotations", {"bbox": [1, 2, 3, 10**400]}, "not four numbers"),
        ("annotations", {"iscrowd": "no"}, "iscrowd is 'no'"),
        ("annotations", {"image_id": {}}, "image_id is"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path, part, change, said):
    content = plain(4)
    content[part][0 if part != "categories" else 1].update(change)
    assert re.search(said, refused(tmp_path, content))


@pytest.mark.parametrize("part", ["images", "categories", "annotations"])
def test_entries_that_are_no_objects(tmp_path, part):
    content = plain(4)
    content[part][1] = 5
    assert f"{part}[1]" in refused(tmp_path, content)


def test_annotations_without_boxes_and_outlines_are_refused(tmp_path):
    content = plain(4)
    del content["annotations"][0]["bbox"], content["annotations"][0]["segmentation"]
    assert "annotations[0]" in refused(tmp_path, content)


def test_a_file_without_a_single_annotation_is_read(tmp_path):
    write(tmp_path / "annotations.json", {**plain(4), "annotations": []}, tmp_path / "images")
    _, validation = open_image_sets(DataSpec(str(tmp_path)), INPUT)
    assert [target.boxes.shape for batch in validation.batches(2) for target in batch.targets] == [(0, 4)] * 2


def test_images_that_both_sides_have_are_left_out_of_calibration(tmp_path):
    write(tmp_path / "one" / "annotations.json", plain(6), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for number in range(3):
        (tmp_path / "two" / f"{number:04}.png").unlink()
    content = plain(6)
    content["images"] = content["images"][3:]
    write(tmp_path / "two" / "annotations.json", content)
    heard = Heard()
    calibration, validation = open_image_sets(DataSpec(str(tmp_path / "one"), str(tmp_path / "two")), INPUT, heard)
    assert (len(calibration), len(validation)) == (3, 3)
    assert any("also among the validation images" in text for text in heard.warnings)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox", "iscrowd"),
    "categories": ("id", "name", "supercategory"),
}
PLACE = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda part: st.tuples(st.just(part), st.integers(0, 2), st.sampled_from((*FIELDS[part], None)))
)
TEXTS = st.sampled_from(["", "0", "1", "-1", "1.0", "nan", "inf", "1e9", "0x1", " 1", "1" * 40, "٣", "²", "1_0"])


@pytest.mark.whole
@settings(deadline=None)
@given(st.lists(st.tuples(PLACE, JSON | TEXTS), min_size=1, max_size=4))
def test_whatever_stands_in_fields_is_read_or_refused(tmp_path_factory, changes):
    content = plain(5)
    for (part, number, field), value in changes:
        if field is None:
            content[part][number] = value
        elif isinstance(content[part][number], dict):
            content[part][number][field] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(content))
    try:
        read = read_coco(path)
    except ResvitError:
        return
    assert len(read.offsets) == len(read.file_names) + 1 == 6
    assert read.offsets[-1] == len(read.boxes) == len(read.classes) == len(read.crowd)
    assert np.isfinite(read.boxes).all()
    assert (read.boxes[:, 2:] > read.boxes[:, :2]).all()
    assert set(read.classes.tolist()) <= set(range(len(read.class_names)))
    assert not any(".." in Path(name).parts or Path(name).is_absolute() for name in read.file_names)


@pytest.mark.whole
@settings(deadline=None)
@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(0, 10**6))
def test_whatever_bytes_stand_in_a_file_they_are_read_or_refused(tmp_path_factory, data, place):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    whole = json.dumps(plain(3)).encode()
    place %= len(whole)
    for content in (data, whole[:place] + data + whole[place + len(data) :]):
        path.write_bytes(content)
        with contextlib.suppress(ResvitError):
            read_coco(path)
