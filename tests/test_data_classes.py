"""Which output of the network a class of the data is: class lists, numbers that differ, numberings that disagree."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.images.class_list import class_list_from_file, class_list_from_names
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.tasks.class_count import require_outputs_for
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent

INPUT = Preprocess((8, 8), 3)
NETWORK = tuple("abcdefghij")


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def folder(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (9, 10, 3), np.uint8)).save(root / name / f"{index:03}.png")
    return root


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def labels_by_folder(root: Path, images: ImageSet) -> dict[str, set[int]]:
    known: dict[bytes, str] = {}
    for file in root.rglob("*.png"):
        known[np.asarray(Image.open(file)).tobytes()] = file.parent.name
    found: dict[str, set[int]] = {}
    for place in range(len(images)):
        found.setdefault(known[images.image(place).tobytes()], set()).add(int(images.labels[place]))
    return found


# --- class lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffa\nb\nc\nd\ne\nf\ng\nh\ni\nj\n",
        list(NETWORK),
        {name: number for number, name in enumerate(NETWORK)},
        {str(number): name for number, name in enumerate(NETWORK)},
        {str(number): [f"n0{number}", name] for number, name in enumerate(NETWORK)},
        {"id2label": {str(number): name for number, name in enumerate(NETWORK)}, "model_type": "vit"},
        {"class_to_idx": {name: number for number, name in enumerate(NETWORK)}},
        {"b": 1, "F": 5, "j": 9},
    ],
    ids=["lines", "list", "class_to_idx", "id2label", "several", "config", "inside", "some"],
)
def test_folders_get_the_networks_numbers(tmp_path: Path, content: object) -> None:
    root = folder(tmp_path / "data", {"b": 6, "f": 6, "j": 6})
    classes = class_list_from_file(written(tmp_path / "classes.txt", content))
    for images in open_image_sets(DataSpec(str(root), calibration_images=6, classes=classes), INPUT):
        assert labels_by_folder(root, images) == {"b": {1}, "f": {5}, "j": {9}}
        require_outputs_for(images, "classification", {}, [{"name": "logits", "shape": ["batch", 10]}])
    training = open_training_images(
        str(folder(tmp_path / "train", {"j": 2}, seed=1)), images, 9, 0, INPUT, classes=classes
    )
    assert training._images.labels.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("a\n\nb\n", "line 2"),
        ("{", "not usable JSON"),
        ({}, "names no classes"),
        ("[]", "names no classes"),
        ({"a": -1}, "a'"),
        ({"a": 1.5}, "a'"),
        ({"a": True}, "a'"),
        ({"0": "a", "00": "b"}, "twice"),
        ({"0": ["a", 3]}, "where a name"),
        ([""], "where a name"),
        ('{"a": 0, "a": 1}', "same key twice"),
        ({"a": 10**9}, "a'"),
        ("[" * 100_000, "not usable JSON"),
    ],
)
def test_a_list_that_says_nothing_or_two_things_is_refused(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(ResvitError, match=said) as caught:
        class_list_from_file(written(tmp_path / "classes.txt", content))
    assert caught.value.fix


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.whole
@settings(deadline=None)
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_list_holds_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(data)
    with contextlib.suppress(ResvitError):
        classes = class_list_from_file(path)
        assert all(classes.names[number] is not None for number in classes.numbers.values())


def test_names_that_the_list_lacks_or_has_twice_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"b": 4, "zz_unknown": 4, "crane": 4})
    classes = class_list_from_file(written(tmp_path / "c.txt", "b\ncrane\nx\ncrane\n"))
    with pytest.raises(ResvitError, match="several classes: crane"):
        open_image_sets(DataSpec(str(root), classes=classes), INPUT)
    classes = class_list_from_file(written(tmp_path / "c.txt", "b\ncrane\nx\n"))
    with pytest.raises(ResvitError, match="does not have: zz_unknown"):
        open_image_sets(DataSpec(str(root), classes=classes), INPUT)


def test_the_models_own_names_number_folders_where_they_have_all_of_them(tmp_path: Path) -> None:
    known = class_list_from_names("the model", {0: "tench, Tinca tinca", 1: "goldfish", 2: "Great White", 3: "LABEL_3"})
    root = folder(tmp_path / "data", {"great_white": 4, "Tinca tinca": 4})
    _, validation = open_image_sets(DataSpec(str(root), calibration_images=4, known_classes=known), INPUT)
    assert labels_by_folder(root, validation) == {"great_white": {2}, "Tinca tinca": {0}}
    other = folder(tmp_path / "other", {"cod": 4, "goldfish": 4})
    _, validation = open_image_sets(DataSpec(str(other), calibration_images=4, known_classes=known), INPUT)
    assert validation.class_names == ("cod", "goldfish")
    assert class_list_from_names("the model", {0: "LABEL_0", 1: "LABEL_1"}) is None


def test_boxes_and_masks_get_the_networks_numbers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), np.uint8)
    masks = np.zeros((8, 6, 6), np.int64)
    masks[:, 0], masks[:, 1], masks[:, 2] = 1, 2, 255
    np.savez(tmp_path / "masks.npz", images=images, masks=masks)
    classes = class_list_from_file(written(tmp_path / "c.json", {"1": 0, "2": 1}))
    spec = DataSpec(str(tmp_path / "masks.npz"), calibration_images=4, classes=classes)
    target = open_image_sets(spec, Preprocess((6, 6), 3))[1].target(0)
    assert target.classes[:4, 0].tolist() == [0, 1, -1, -1]
    boxes = np.tile(np.array([[0, 0, 3, 3]], np.float32), (8, 1))
    np.savez(
        tmp_path / "boxes.npz",
        images=images,
        boxes=boxes,
        box_classes=np.arange(8) % 2,
        box_offsets=np.arange(9),
        class_names=np.array(["b", "j"]),
    )
    classes = class_list_from_file(written(tmp_path / "c.json", list(NETWORK)))
    spec = DataSpec(str(tmp_path / "boxes.npz"), calibration_images=4, classes=classes)
    _, validation = open_image_sets(spec, Preprocess((6, 6), 3))
    assert {int(validation.target(place).classes[0]) for place in range(4)} <= {1, 9}
    assert validation.class_names == NETWORK


# --- numbers that differ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("b", "f", "j"), (*NETWORK, "k")])
def test_another_number_of_classes_than_outputs_is_refused_with_the_remedy(tmp_path: Path, names: tuple) -> None:
    root = folder(tmp_path / "data", dict.fromkeys(names, 2))
    _, validation = open_image_sets(DataSpec(str(root), calibration_images=4), INPUT)
    with pytest.raises(ResvitError, match=rf"{len(names)} classes .* network 10 outputs") as caught:
        require_outputs_for(validation, "classification", {}, [{"name": "logits", "shape": ["batch", 10]}])
    assert "--classes" in caught.value.fix
    require_outputs_for(validation, "classification", {}, [{"name": "x", "shape": [1, len(names)]}])


def test_folders_that_differ_are_numbered_alike_or_refused(tmp_path: Path) -> None:
    whole = folder(tmp_path / "whole", dict.fromkeys("abcd", 3))
    fewer = folder(tmp_path / "fewer", dict.fromkeys("bd", 3), seed=1)
    other = folder(tmp_path / "other", dict.fromkeys("bcde", 3), seed=2)
    heard = Heard()
    _, validation = open_image_sets(DataSpec(str(whole), str(fewer)), INPUT, heard)
    assert labels_by_folder(fewer, validation) == {"b": {1}, "d": {3}}
    assert any("labels follow whole" in text for text in heard.warnings)
    _, validation = open_image_sets(DataSpec(str(fewer), str(whole)), INPUT)
    assert validation.num_classes == 4
    with pytest.raises(ResvitError, match="do not have the same classes: a and e are in one only") as caught:
        open_image_sets(DataSpec(str(whole), str(other)), INPUT)
    assert "--classes" in caught.value.fix
    classes = class_list_from_file(written(tmp_path / "c.txt", "a\nb\nc\nd\ne\n"))
    _, validation = open_image_sets(DataSpec(str(whole), str(other), classes=classes), INPUT)
    assert labels_by_folder(other, validation) == {"b": {1}, "c": {2}, "d": {3}, "e": {4}}


def test_numbers_in_names_out_of_order_are_told_with_the_first_of_them(tmp_path: Path) -> None:
    for names, first in (([str(n) for n in range(12)], "'10' is number 2"), (["c2", "c10"], "'c10' is number 0")):
        heard = Heard()
        root = folder(tmp_path / names[-1], dict.fromkeys(names, 2))
        open_image_sets(DataSpec(str(root), calibration_images=4), INPUT, heard)
        assert any(first in text and "--classes" in text for text in heard.warnings)
    heard = Heard()
    root = folder(tmp_path / "padded", dict.fromkeys([f"{n:02}" for n in range(12)], 2))
    open_image_sets(DataSpec(str(root), calibration_images=4), INPUT, heard)
    assert heard.warnings == []
