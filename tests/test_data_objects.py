"""Data sets and loaders of torch's, as people have them in Python: read as what they are, or refused in a sentence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from resvit_calibrate.data.image_sets import open_image_sets, open_training_images
from resvit_calibrate.data.naming import require_source
from resvit_calibrate.data.sources import Pools, gives_prepared, open_source
from resvit_calibrate.images.class_list import class_list_from_names
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_calibrate.readers.user.loader import Factory, StreamImageSet
from resvit_calibrate.readers.user.objects import peeked
from resvit_engines.errors import ResvitError

COUNT = 20
INPUT = Preprocess((8, 8), 3, mean=(0.5,), std=(0.25,))
PICTURES = [np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8) for number in range(COUNT)]
READY = torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = [number % 4 for number in range(COUNT)]


class Items(Dataset[Any]):
    """A data set of whatever items."""

    def __init__(self, items: list[Any], **more: Any) -> None:
        self.items = items
        vars(self).update(more)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return item() if callable(item) else item


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)

    def track(self, items: Any, *_: Any) -> Any:
        return items


def opened(made: Any, notes: Notes | None = None, **more: Any) -> tuple[ImageSet, ImageSet]:
    spec = DataSpec("object:x", calibration_images=8, objects={"object:x": made}, **more)
    return open_image_sets(spec, INPUT, notes or Notes())  # type: ignore[arg-type]


FORMS: dict[str, Any] = {
    "PIL": [Image.fromarray(image) for image in PICTURES],
    "array": PICTURES,
    "tensor": [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in PICTURES],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("item", ["pair", "list", "dictionary"])
def test_pictures_are_prepared_here_as_files_are(form: str, item: str) -> None:
    makers = {
        "pair": lambda *two: two,
        "list": lambda *two: list(two),
        "dictionary": lambda i, n: {"img": i, "label": n},
    }
    items = [makers[item](image, label) for image, label in zip(FORMS[form], LABELS, strict=True)]
    notes = Notes()
    calibration, validation = opened(Items(items, classes=["a", "b", "c", "d"]), notes)
    assert isinstance(calibration, IndexedImageSet)
    assert (len(calibration), len(validation)) == (8, 12)
    assert not validation.prepared
    assert validation.class_names == ("a", "b", "c", "d")
    expected = {INPUT.apply(image).tobytes(): label for image, label in zip(PICTURES, LABELS, strict=True)}
    for images in (calibration, validation):
        for batch in images.batches(5):
            assert [expected[image.tobytes()] for image in batch.images] == batch.labels.tolist()  # type: ignore[union-attr]
    assert sorted(calibration.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # type: ignore[union-attr]
    assert any("they are prepared here" in note for note in notes.said)


def test_other_modes_of_pictures() -> None:
    grey = [Image.fromarray(image[..., 0]) for image in PICTURES]
    palette = [Image.fromarray(image).quantize(16) for image in PICTURES]
    deep = [Image.fromarray(image[..., 0].astype(np.uint16) * 256) for image in PICTURES]
    for images in (grey, palette, deep, [image[..., 0] for image in PICTURES]):
        calibration, _ = opened(Items(list(zip(images, LABELS, strict=True))))
        assert next(calibration.batches(4)).images.shape == (4, 3, 8, 8)


def test_labels_that_a_data_set_keeps_spare_reading_it() -> None:
    read: list[int] = []

    def item(number: int) -> Any:
        return lambda: (read.append(number), (PICTURES[number % COUNT], LABELS[number % COUNT]))[1]

    many = Items([item(number) for number in range(400)], targets=[LABELS[number % COUNT] for number in range(400)])
    calibration, _ = opened(many, validation_images=6)
    assert len(set(read)) < 30
    assert {int(label) for label in calibration.labels} <= set(LABELS)  # type: ignore[union-attr]
    wrong = Items(list(zip(PICTURES, LABELS, strict=True)), targets=[3 - label for label in LABELS])
    pools = open_source("object:x", AS_USUAL, {"object:x": wrong})
    assert isinstance(pools, Pools)
    assert pools.calibration.labels.tolist() == LABELS  # type: ignore[union-attr]
    part = Subset(
        Items(list(zip(PICTURES, LABELS, strict=True)), targets=LABELS, classes=list("abcd")), [5, 6, 7, 8, 9]
    )
    pools = open_source("object:x", AS_USUAL, {"object:x": part})
    assert isinstance(pools, Pools)
    assert pools.calibration.labels.tolist() == [1, 2, 3, 0, 1]  # type: ignore[union-attr]
    assert pools.calibration.class_names == ("a", "b", "c", "d")


READY_FORMS: dict[str, Any] = {
    "DataLoader": lambda: DataLoader(TensorDataset(READY, torch.tensor(LABELS)), batch_size=6),
    "Dataset": lambda: TensorDataset(READY, torch.tensor(LABELS)),
    "dictionaries": lambda: Items([{"pixel_values": i, "labels": n} for i, n in zip(READY, LABELS, strict=True)]),
    "DataLoader of dictionaries": lambda: DataLoader(
        Items([{"pixel_values": i, "labels": n} for i, n in zip(READY, LABELS, strict=True)]), batch_size=3
    ),
    "IterableDataset": lambda: Stream(list(zip(READY, LABELS, strict=True))),
    "a DataLoader of one": lambda: DataLoader(Stream(list(zip(READY, LABELS, strict=True))), batch_size=4),
}


@pytest.mark.parametrize("form", READY_FORMS)
def test_ready_arrays_are_the_networks_input(form: str) -> None:
    notes = Notes()
    calibration, validation = opened(READY_FORMS[form](), notes)
    assert isinstance(calibration, StreamImageSet)
    assert calibration.prepared
    assert (len(calibration), len(validation)) == (8, 12)
    expected = {image.numpy().tobytes(): label for image, label in zip(READY, LABELS, strict=True)}
    seen = 0
    for images in (calibration, validation):
        for batch in images.batches(5):
            assert [expected[image.tobytes()] for image in batch.images] == batch.labels.tolist()  # type: ignore[union-attr]
            seen += len(batch.images)
    assert seen == COUNT
    assert sum("nothing is resized or normalised here" in note for note in notes.said) == 1
    assert not any("below 0" in note for note in notes.said)


def test_items_by_number_come_mixed_and_the_same_each_time() -> None:
    in_order = TensorDataset(READY, torch.tensor(sorted(LABELS)))
    calibration, _ = opened(in_order)
    assert len(set(calibration.labels.tolist())) > 2  # type: ignore[union-attr]
    assert calibration.digest == opened(in_order)[0].digest


def test_images_that_nobody_normalised_are_told() -> None:
    notes = Notes()
    opened(DataLoader(TensorDataset(READY.sigmoid(), torch.tensor(LABELS)), batch_size=5), notes)
    said = next(note for note in notes.said if "none is below 0" in note)
    assert "mean (0.5) and std (0.25)" in said
    assert "from -2 on" in said


def test_training_takes_both() -> None:
    pictures, ready = Items(list(zip(PICTURES, LABELS, strict=True))), TensorDataset(READY, torch.tensor(LABELS))
    for made in (pictures, ready):
        _, validation = opened(made)
        images = open_training_images("object:t", validation, 99, 0, INPUT, objects={"object:t": made})
        assert len(images) == COUNT - len(validation)
        positions = np.arange(len(images), dtype=np.int64)
        assert sum(len(batch.images) for batch in images.batches_at(positions, 3)) == len(images)


class Endless(IterableDataset[Any]):
    """A stream that goes on, and says how often it gave something."""

    given = 0

    def __iter__(self) -> Any:
        for number in itertools.count():
            self.given += 1
            yield {"image": Image.fromarray(PICTURES[number % COUNT] ^ (number // COUNT)), "label": number % 4}


def test_of_a_stream_of_pictures_the_first_are_taken_once() -> None:
    notes, stream = Notes(), Endless()
    calibration, validation = opened(stream, notes, validation_images=30)
    assert (len(calibration), len(validation), calibration.prepared) == (8, 30, False)
    assert stream.given <= 40  # the first to tell what it is, then each once
    for images in (calibration, validation):
        for batch in images.batches(7):
            assert batch.images.shape[1:] == (3, 8, 8)
    assert stream.given <= 40
    assert sorted(calibration.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # type: ignore[union-attr]
    assert any("the first 38 pictures, for more are not asked, of a stream (Endless)" in note for note in notes.said)
    again, _ = opened(Endless(), validation_images=30)
    assert again.digest == calibration.digest
    before = stream.given
    assert not gives_prepared("object:x", {"object:x": stream})
    assert stream.given == before + 1


@pytest.mark.parametrize("kind", ["masks", "boxes", "depths"])
def test_what_a_stream_knows_of_pictures(kind: str) -> None:
    depths = [(image, np.full(image.shape[:2], n + 1, np.float32)) for n, image in enumerate(PICTURES)]
    items = {"masks": masks(), "boxes": boxes(), "depths": depths}[kind]
    streamed, kept = (opened(made(items)) for made in (Stream, Items))
    assert [images.digest for images in streamed] == [images.digest for images in kept]


def boxes() -> list[Any]:
    """As torchvision's detectors have them: corners in the picture's pixels."""
    return [(image, {"boxes": [[n % 4, 1, 8, 9]], "labels": [n % 2]}) for n, image in enumerate(PICTURES)]


def masks() -> list[Any]:
    sizes = [image.shape[:2] for image in PICTURES]
    classes = [np.random.default_rng(n).integers(0, 3, size).astype(np.uint8) for n, size in enumerate(sizes)]
    return list(zip(PICTURES, classes, strict=True))


def test_boxes_in_a_pictures_own_pixels() -> None:
    tensors = [(i, {"boxes": torch.tensor(t["boxes"]), "labels": torch.tensor(t["labels"])}) for i, t in boxes()]
    for items in (boxes(), tensors, [(Image.fromarray(i), t) for i, t in boxes()]):
        _, validation = opened(Items(items, classes=["cat", "dog"]))
        assert (validation.task, validation.class_names) == ("detection", ("cat", "dog"))
        expected = {INPUT.apply(image).tobytes(): target for image, target in boxes()}
        for batch in validation.batches(5):
            assert batch.targets is not None
            for image, target in zip(batch.images, batch.targets, strict=True):
                found = expected[image.tobytes()]
                scaled = np.array(found["boxes"]) * [8 / 12, 8 / 10, 8 / 12, 8 / 10]
                np.testing.assert_allclose(target.boxes, scaled, rtol=1e-5)
                assert target.classes.tolist() == found["labels"]
    known = class_list_from_names("the model", {0: "dog", 1: "cow", 2: "cat"})
    _, validation = opened(Items(boxes(), classes=["cat", "dog"]), known_classes=known)
    numbers = {int(n) for batch in validation.batches(5) for one in batch.targets for n in one.classes}  # type: ignore[union-attr]
    assert numbers == {0, 2}


def test_masks_beside_pictures() -> None:
    pictured = [(Image.fromarray(image), Image.fromarray(mask)) for image, mask in masks()]
    tensors = [(image, torch.from_numpy(mask)[None].long()) for image, mask in masks()]
    plain = Preprocess((10, 12), 3)
    for items in (masks(), pictured, tensors):
        spec = DataSpec("object:x", calibration_images=8, objects={"object:x": Items(items)})
        _, validation = open_image_sets(spec, plain)
        assert (validation.task, validation.num_classes) == ("segmentation", 3)
        expected = {plain.apply(image).tobytes(): mask for image, mask in masks()}
        for batch in validation.batches(5):
            for image, target in zip(batch.images, batch.targets, strict=True):  # type: ignore[arg-type]
                assert (target.classes == expected[image.tobytes()]).all()
    texts = [(image, {"text": f"word {number}"}) for number, image in enumerate(PICTURES)]
    assert opened(Items(texts))[1].task == "text"
    depths = [(image, np.full(image.shape[:2], 2.5, np.float32)) for image in PICTURES]
    assert opened(Items(depths))[1].task == "depth"


WRONG: dict[str, tuple[Any, str]] = {
    "a shuffling DataLoader": (
        lambda: DataLoader(TensorDataset(READY, torch.tensor(LABELS)), shuffle=True),
        "gave a DataLoader that shuffles",
    ),
    "a DataLoader of pictures": (
        lambda: DataLoader(Items(list(zip(FORMS["PIL"], LABELS, strict=True)))),
        "Give the Dataset itself instead of a DataLoader",
    ),
    "a DataLoader of varied sizes": (
        lambda: DataLoader(Items([(READY[0, :, :n], 0) for n in (4, 5, 6)]), batch_size=3),
        "object:x failed: RuntimeError: stack expects",
    ),
    "a Dataset of varied sizes": (lambda: Items([(READY[0, :, :n], 0) for n in (4, 5, 6)]), r"images of shape \[1, 3"),
    "raw batches": (
        lambda: DataLoader(TensorDataset((READY * 40).to(torch.uint8), torch.tensor(LABELS))),
        "uint8, not preprocessed floats",
    ),
    "unknown keys": (lambda: Items([{"x": 1, "y": 2}] * 4), "a dictionary with x, y, and no image"),
    "paths": (lambda: Items(["a.png", "b.png"]), "Item 0 of object:x is a str, and no image"),
    "pairs of paths": (lambda: Items([("a.png", 1)] * 4), "is of type <U5 and shape"),
    "texts as labels": (lambda: Items([(image, "cat") for image in PICTURES]), "gives its class as a text, 'cat'"),
    "shares as labels": (
        lambda: Items([(image, np.eye(4)[0]) for image in PICTURES]),
        r"a label of 4 numbers, one of which is 1 \(one-hot\)",
    ),
    "floats as labels": (lambda: Items([(image, 1.0) for image in PICTURES]), "as a number with a point, 1"),
    "boxes without classes": (
        lambda: Items([(image, {"boxes": [[0, 0, 4, 4]]}) for image in PICTURES]),
        "Item 0 of object:x gave boxes without their `classes`",
    ),
    "boxes of classes without names": (lambda: Items(boxes(), classes=["a"]), "has the class 1, and 1 have names"),
    "targets of some": (
        lambda: Items([(image, {"boxes": [], "labels": []} if n else None) for n, image in enumerate(PICTURES)][::-1]),
        "Item 19 of object:x has no target, and others have one",
    ),
    "targets of two kinds": (lambda: Items([*boxes()[:9], *masks()[9:]]), "gives targets of several kinds"),
    "a mask of another size": (
        lambda: Items([(image, np.zeros((4, 4), np.uint8)) for image in PICTURES]),
        r"a mask of type uint8 and shape \[4, 4\]; the input is 10x12",
    ),
    "labels of some": (
        lambda: Items([(image, None if n else 1) for n, image in enumerate(PICTURES)]),
        "gives a class for 1 of 20 items",
    ),
    "negative": (lambda: Items([(image, -1) for image in PICTURES]), "gives the class -1"),
    "more than named": (lambda: Items(list(zip(PICTURES, LABELS, strict=True)), classes=["a"]), "but names 1 classes"),
    "three parts": (lambda: Items([(image, 1, 2) for image in PICTURES]), "has 3 parts"),
    "pictures then floats": (lambda: Items([(PICTURES[0], 0), (READY[0], 1)]), "is of type float32, where others are"),
    "floats then pictures": (lambda: Items([(READY[0], 0), (PICTURES[0], 1)]), "is a picture, and not the network"),
    "channels in the middle": (lambda: Items([(np.zeros((8, 3, 8), np.uint8), 0)] * 4), r"the shape \[8, 3, 8\]"),
    "an empty stream": (lambda: Stream([]), "a stream that ends before its first item"),
    "a stream of pictures, then floats": (lambda: Stream([(PICTURES[0], 0), (READY[0], 1)]), "is of type float32, whe"),
    "a stream of floats, then pictures": (lambda: Stream([(READY[0], 0), (PICTURES[0], 1)]), "is a picture, and not"),
    "a stream that fails": (lambda: Stream(Items([PICTURES[0], lambda: 1 / 0])), "object:x failed: ZeroDivisionError"),
    "nothing in it": (lambda: Items([]), "a Dataset without any item"),
    "a failing item": (lambda: Items([lambda: 1 / 0]), "Item 0 of object:x failed: ZeroDivisionError"),
    "a text": (lambda: "photos", "gave a str, which is no images"),
    "a dictionary": (lambda: {"train": 1}, "gave a dict, which is no images"),
    "a class": (object, "gave an object, which is no images"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_used_ends_in_a_sentence(what: str) -> None:
    make, said = WRONG[what]
    with pytest.raises(ResvitError, match=said):
        opened(make(), unjudged=True)


def test_pictures_that_change_are_found_out() -> None:
    random = np.random.default_rng(0)
    changing = Items([lambda: (random.integers(0, 256, (8, 8, 3), np.uint8), 1)] * 20, targets=[1] * 20)
    with pytest.raises(ResvitError, match="does not give the same picture each time"):
        list(opened(changing, unjudged=True)[0].batches(4))


FACTORY = """
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

CALLS = []

class Pictures(Dataset):
    targets = [n % 4 for n in range(20)]
    def __init__(self, first): self.first = first
    def __len__(self): return 20
    def __getitem__(self, n):
        return np.random.default_rng(self.first + n).integers(0, 256, (9, 9, 3), np.uint8), n % 4

def one(): return Pictures(0)
def parted(split): return Pictures(0 if split == "calibration" else 100)
def mixed(split): return Pictures(0) if split == "calibration" else ready()
def ready(): return DataLoader(TensorDataset(torch.randn(20, 3, 8, 8), torch.arange(20) % 4), 5)
def seeded():
    CALLS.append(1)
    return TensorDataset(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 4)
"""


def test_a_function_gives_them_too(tmp_path: Path) -> None:
    file = tmp_path / "data.py"
    file.write_text(FACTORY)
    require_source(f"{file}:one")
    calibration, validation = open_image_sets(DataSpec(f"{file}:one", calibration_images=8), INPUT)
    assert (len(calibration), len(validation)) == (8, 12)
    calibration, validation = open_image_sets(DataSpec(f"{file}:parted", calibration_images=8), INPUT)
    assert (len(calibration), len(validation)) == (8, 20)
    assert not gives_prepared(f"{file}:one")
    assert gives_prepared(f"{file}:seeded")
    with pytest.raises(ResvitError, match="pictures for one split"):
        open_image_sets(DataSpec(f"{file}:mixed"), INPUT)
    source = open_source(f"{file}:seeded", AS_USUAL)
    assert isinstance(source, Factory)
    assert len(list(source.images("calibration", INPUT))) == len(list(source.images("calibration", INPUT))) == 20


def test_an_object_that_is_gone_is_told() -> None:
    with pytest.raises(ResvitError, match="were an object in Python, which is not there any more"):
        require_source("object:MyDataset")


def test_a_data_set_of_hugging_faces_in_memory() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    made = datasets.Dataset.from_dict({"image": FORMS["PIL"], "label": LABELS}, features=features)
    calibration, validation = opened(made)
    assert validation.class_names == ("a", "b", "c", "d")
    assert sorted(calibration.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["PIL", "array"])
def test_a_list_and_a_generator_of_pictures_are_pictures(form: str) -> None:
    rows = list(zip(FORMS[form], LABELS, strict=True))
    notes = Notes()
    wanted = opened(Items(rows))
    for made in (rows, tuple(rows), (row for row in rows), iter(rows)):
        for images, same in zip(opened(made, notes), wanted, strict=True):
            assert len(images) == len(same)
            assert images.labels is not None
            assert same.labels is not None
            assert images.labels.tolist() == same.labels.tolist()
            for batch, other in zip(images.batches(4), same.batches(4), strict=True):
                np.testing.assert_array_equal(batch.images, other.images)


def test_a_generator_gives_the_same_pictures_to_every_stage() -> None:
    made = peeked(row for row in zip(PICTURES, LABELS, strict=True))
    first, second = opened(made), opened(made)
    assert [images.contents for images in first] == [images.contents for images in second]


def test_a_list_of_batches_stays_the_networks_input() -> None:
    batches = [(READY[at : at + 4].numpy(), np.array(LABELS[at : at + 4])) for at in range(0, COUNT, 4)]
    calibration, _ = opened(batches)
    np.testing.assert_array_equal(next(iter(calibration.batches(4))).images, READY[:4].numpy())
