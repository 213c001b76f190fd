"""Images to train on: any set of images, read in an order of the trainer's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from resvit_calibrate.factories import StreamImageSet
from resvit_calibrate.image_set import Batch
from resvit_calibrate.indexed import IndexedImageSet

_WINDOW_BYTES = 256 << 20


class TrainingImages:
    """Images that are read in any order, as far as their source allows.

    Files and arrays come in exactly the order asked for. What a factory streams is mixed within a window of
    256 MiB, since it can only be read from its beginning.
    """

    def __init__(self, images: IndexedImageSet | StreamImageSet) -> None:
        self._images = images
        self.digest = images.digest
        self.description = images.description

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
    labelled = images.labels is not None
    window: list[tuple[npt.NDArray[np.float32], int]] = []
    batch: list[tuple[npt.NDArray[np.float32], int]] = []

    def made() -> Batch:
        labels = np.array([label for _, label in batch], np.int64) if labelled else None
        return Batch(np.stack([image for image, _ in batch]), labels)

    for part in images.batches(batch_size):
        numbers = [-1] * len(part.images) if part.labels is None else part.labels.tolist()
        room = max(batch_size, _WINDOW_BYTES // part.images[0].nbytes)
        for image, label in zip(part.images, numbers, strict=True):
            window.append((image, label))
            if len(window) <= room:
                continue
            batch.append(_drawn(window, random))
            if len(batch) == batch_size:
                yield made()
                batch = []
    while window:
        batch.append(_drawn(window, random))
        if len(batch) == batch_size or not window:
            yield made()
            batch = []


def _drawn(
    window: list[tuple[npt.NDArray[np.float32], int]], random: np.random.Generator
) -> tuple[npt.NDArray[np.float32], int]:
    """Take one out, at random."""
    index = int(random.integers(len(window)))
    window[index], window[-1] = window[-1], window[index]
    return window.pop()
