from __future__ import annotations

import gzip
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from resvit_calibrate.readers.scenes import _items

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path(__file__).parent / "assets" / "embed-nano.pt"
"""Trained by examples/fashion_mnist/train.py with its default seed."""

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Each parallel worker keeps to a core of its own: thread pools that share cores spend their time waiting.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(worker.removeprefix("gw")) % len(_cores)]})


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images uint8 [N, 28, 28] and labels [N] in the format that Fashion-MNIST comes in."""
    prefix = {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">IIII", 2051, len(images), 28, 28) + images.tobytes())
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">II", 2049, len(labels)) + labels.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def fashion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the real Fashion-MNIST: 1,000 training and 2,500 test images."""
    from resvit_calibrate.readers.fashion_mnist import read_split

    folder = tmp_path_factory.mktemp("fashion")
    for split, count in (("train", 1000), ("test", 2500)):
        images, labels = read_split(split)
        write_idx(folder, split, images[:count], labels[:count])
    return folder


@pytest.fixture
def workspace(tmp_path: Path, fashion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder as ``make demo`` leaves it: a trained checkpoint, and Fashion-MNIST (a part of it)."""
    folder = tmp_path / "work space"
    (folder / "runs" / "demo").mkdir(parents=True)
    shutil.copy(CHECKPOINT, folder / "runs" / "demo" / "embed-nano.pt")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(fashion_folder))
    # Scenes keep the items that they have read: those of the part are for these tests only, whatever ran before.
    _items.cache_clear()
    yield folder
    _items.cache_clear()
