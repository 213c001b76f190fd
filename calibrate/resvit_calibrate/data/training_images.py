"""Images to train on: any set of images, read in an order of the trainer's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.targets import DepthTarget, MaskTarget
from resvit_calibrate.readers.user.batch import Item
from resvit_calibrate.readers.user.loader import StreamImageSet, batch_of, items_in

_WINDOW_BYTES = 256 << 20


class TrainingImages:
    """Images that are read in any order, as far as their source allows.

    Files and arrays come in exactly the order asked for. What a factory streams is mixed within a window of
    256 MiB, since it can only be read from its beginning. ``task`` says what is known of them, and ``class_ids`` which
    numbers the data gives to classes, as of an ``ImageSet``.
    """

    def __init__(self, images: IndexedImageSet | StreamImageSet) -> None:
        self._images = images
        self.digest = images.digest
        self.description = images.description
        self.task = images.task
        self.class_ids = images.class_ids

    def __len__(self) -> int:
        return len(self._images)

    def batches_at(self, positions: npt.NDArray[np.int64], batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """Stream the images at ``positions``, less the first ``skip`` batches; the same call gives the same."""
        if isinstance(self._images, IndexedImageSet):
            return self._images.at(positions[skip * batch_size :]).batches(batch_size)
        return itertools.islice(_mixed(self._images.at(positions), positions, batch_size), skip, None)


def _mixed(images: StreamImageSet, positions: npt.NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
    """Batches of a stream, each image drawn from a window that is filled up behind it."""
    random = np.random.default_rng(positions[:8])
    window: list[Item] = []
    batch: list[Item] = []
    for part in images.batches(batch_size):
        room = max(batch_size, _WINDOW_BYTES // _bytes_of_one(part))
        for item in items_in(part):
            window.append(item)
            if len(window) <= room:
                continue
            batch.append(_drawn(window, random))
            if len(batch) == batch_size:
                yield batch_of(batch)
                batch = []
    while window:
        batch.append(_drawn(window, random))
        if len(batch) == batch_size or not window:
            yield batch_of(batch)
            batch = []


def _bytes_of_one(batch: Batch) -> int:
    """An image's bytes and those of its mask or depths, which may be half as much."""
    target = None if batch.targets is None else batch.targets[0]
    extra = 0
    if isinstance(target, MaskTarget):
        extra = target.classes.nbytes
    elif isinstance(target, DepthTarget):
        extra = target.depth.nbytes
    return int(batch.images[0].nbytes) + extra


def _drawn(window: list[Item], random: np.random.Generator) -> Item:
    """Take one out, at random."""
    index = int(random.integers(len(window)))
    window[index], window[-1] = window[-1], window[index]
    return window.pop()
