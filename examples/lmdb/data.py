"""Pictures in an LMDB as data: `--data examples/lmdb/data.py:pictures`; the variable PICTURES_LMDB names the database.

The layout is the usual one of recognisers: `num-samples`, and from 1 on `image-%09d` (a picture file's bytes) with
`label-%09d` (here a class number). For keys of your own, edit `Pictures`. Values that were pickled are not read:
whoever wrote the database could run code here.
"""

from __future__ import annotations

import io
import os

import lmdb
from PIL import Image
from torch.utils.data import Dataset


class Pictures(Dataset[tuple[Image.Image, int]]):
    """PIL pictures of any size with their class numbers: the tool resizes and normalises them."""

    def __init__(self, path: str) -> None:
        # Nothing is written, so that a read-only disk and several readers will do; random reads need no reading ahead.
        self.database = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False)
        self.count = int(self._value("num-samples"))
        # Read once, so that images can be chosen by class without decoding any of them.
        self.targets = [int(self._value(f"label-{number:09}")) for number in range(1, self.count + 1)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        picture = Image.open(io.BytesIO(self._value(f"image-{index + 1:09}")))
        return picture, self.targets[index]

    def _value(self, key: str) -> bytes:
        with self.database.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise KeyError(f"the database has no key {key}")
        return bytes(value)


def pictures() -> Pictures:
    """One pool, which is divided into calibration and validation images. Take an argument `split` for two databases."""
    return Pictures(os.environ["PICTURES_LMDB"])
