"""Fashion-MNIST from the idx files that Debian and Ubuntu package: 70 000 small pictures of clothes, offline.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
2017. The idx format: http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError
from resvit_engines.outside import expanded, leads_to_file

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_VARIABLE = "RESVIT_FASHION_MNIST"
_PREFIX: dict[Split, str] = {"train": "train", "test": "t10k"}
_FIX = f"Run `apt-get install dataset-fashion-mnist`, or set {_VARIABLE} to the folder of the idx files."
_UINT8 = 8


def read_split(split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one split: images uint8 [N, 28, 28], labels int64 [N]; 60 000 for train, 10 000 for test.

    Raises ``ResvitError`` where the files are missing or damaged.
    """
    images_path, labels_path = find_files(split)
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ResvitError(f"{images_path} has {len(images)} images, {labels_path} {len(labels)} labels.", _FIX)
    if labels.size and int(labels.max()) >= len(CLASS_NAMES):
        raise ResvitError(f"{labels_path} has a label {labels.max()}; Fashion-MNIST ends at 9.", _FIX)
    return images, labels.astype(np.int64)


def find_files(split: Split) -> tuple[Path, Path]:
    """Find the image and the label file of a split, or raise ``ResvitError`` with the places searched."""
    folders = _folders()
    for folder in folders:
        found = []
        for kind in ("images-idx3", "labels-idx1"):
            plain = folder / f"{_PREFIX[split]}-{kind}-ubyte"
            found += [path for path in (plain.with_name(f"{plain.name}.gz"), plain) if leads_to_file(path)][:1]
        if len(found) == 2:
            return found[0], found[1]
    raise ResvitError(
        f"Fashion-MNIST's {split} files are not in {' nor in '.join(str(folder) for folder in folders)}.", _FIX
    )


def _folders() -> tuple[Path, ...]:
    if chosen := os.environ.get(_VARIABLE):
        return (expanded(chosen),)
    return (Path("data/fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))


_MOST = 60_000 * 28 * 28
"""Values of the largest file."""


def _read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes: two zeros, type, rank, big-endian sizes, then the values."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UINT8, dimensions)):
                raise ResvitError(f"{path} is not an idx file of {dimensions}-dimensional bytes.", _FIX)
            shape = tuple(int(side) for side in np.frombuffer(header, dtype=">u4", offset=4))
            size = math.prod(shape)
            if size > _MOST:
                raise ResvitError(f"{path} announces {size:,} values, and Fashion-MNIST has {_MOST:,} at most.", _FIX)
            # One byte more than announced, so that a file that is too long is noticed as well.
            values = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ResvitError(f"{path} cannot be read: {error}.", _FIX) from error
    if len(values) != size:
        raise ResvitError(f"{path} does not hold the {size} values that it announces.", _FIX)
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
