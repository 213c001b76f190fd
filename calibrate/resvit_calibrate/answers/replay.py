"""Outputs that were computed elsewhere, as a network that gives them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.classes import INPUT
from resvit_calibrate.images.image_set import Batch, ImageSet


@dataclass
class Replay:
    """A ``Runner`` of stored outputs [N, …]: called with batch after batch, it gives the next of them."""

    outputs: dict[str, npt.NDArray[Any]]
    _at: int = field(default=0, init=False)

    def __call__(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The outputs of the next images, as many as there are in the batch."""
        start, self._at = self._at, self._at + len(arrays[INPUT])
        return {name: value[start : self._at] for name, value in self.outputs.items()}


class FirstImages(ImageSet):
    """The first ``count`` images of a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.images, self.count = images, min(count, len(images))
        self.description = images.description
        self.num_classes, self.class_names, self.class_ids = images.num_classes, images.class_names, images.class_ids
        self.task, self.preprocess, self.doubt = images.task, images.preprocess, images.doubt
        self.contents, self.digest = images.contents[: self.count], f"{images.digest}/{count}"

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Stream them in order."""
        return self.images.first(self.count, batch_size)

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Labels int64 [count], or None."""
        return None if self.images.labels is None else self.images.labels[: self.count]

    def without(self, contents: frozenset[bytes]) -> ImageSet:
        """Not of a part: take it of the whole set."""
        return FirstImages(self.images.without(contents), self.count)
