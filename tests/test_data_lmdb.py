"""The example of an LMDB: read through a function, with the tool's own preprocessing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.readers.fashion_mnist import read_split
from resvit_engines.errors import ResvitError

lmdb = pytest.importorskip("lmdb")
DATA = f"{ROOT}/examples/lmdb/data.py:pictures"


def database(path: Path, count: int = 40, broken: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Real pictures with their classes, under the keys of the example."""
    images, labels = (np.asarray(part[:count]) for part in read_split("test"))
    with lmdb.open(str(path), map_size=1 << 22) as written, written.begin(write=True) as transaction:
        transaction.put(b"num-samples", str(count).encode())
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
            buffer = io.BytesIO()
            Image.fromarray(image.reshape(28, 28)).save(buffer, "PNG")
            transaction.put(f"image-{number:09}".encode(), buffer.getvalue())
            transaction.put(f"label-{number:09}".encode(), str(label).encode())
        if broken:
            transaction.delete(broken.encode())
    return images.reshape(count, 28, 28), labels


def test_pictures_and_classes_come_out_as_they_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = database(tmp_path / "db")
    monkeypatch.setenv("PICTURES_LMDB", str(tmp_path / "db"))
    preprocess = Preprocess((28, 28), 1, mean=(0.286,), std=(0.353,))
    calibration, validation = open_image_sets(DataSpec(DATA, calibration_images=10), preprocess)
    assert isinstance(calibration, IndexedImageSet)
    assert (len(calibration), len(validation)) == (10, 30)
    expected = {preprocess.apply(i[..., None]).tobytes(): n for i, n in zip(images, labels.tolist(), strict=True)}
    for part in (calibration, validation):
        for batch in part.batches(7):
            assert [expected[image.tobytes()] for image in batch.images] == batch.labels.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("num-samples", "KeyError: 'the database has no key num-samples'"),
        ("image-000000003", "Item 2 of .* failed: KeyError: 'the database has no key image-000000003'"),
    ],
)
def test_a_key_that_is_missing_is_named(
    broken: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database(tmp_path / "db", broken=broken)
    monkeypatch.setenv("PICTURES_LMDB", str(tmp_path / "db"))
    with pytest.raises(ResvitError, match=said):
        open_image_sets(DataSpec(DATA), Preprocess((28, 28), 1))


def test_no_database_and_no_variable_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PICTURES_LMDB", raising=False)
    with pytest.raises(ResvitError, match="KeyError: 'PICTURES_LMDB'"):
        open_image_sets(DataSpec(DATA), Preprocess((28, 28), 1))
    monkeypatch.setenv("PICTURES_LMDB", str(tmp_path / "absent"))
    with pytest.raises(ResvitError, match="No such file or directory"):
        open_image_sets(DataSpec(DATA), Preprocess((28, 28), 1))
    assert not (tmp_path / "absent").exists()
