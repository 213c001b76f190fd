"""From what a network says on a coarse grid to every pixel of its input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def classes_at(scores: Array, size: tuple[int, int]) -> npt.NDArray[np.int16]:
    """The class of the largest of the scores [K, h, w] at every pixel of ``size`` (height, width): int16.

    Scores of another size are interpolated bilinearly between the centres of cells, as PyTorch does with
    ``align_corners=False``, before the largest is taken: what segmentation networks that answer on a coarser
    grid are scored with. One class is held at full size at a time.
    """
    if scores.shape[1:] == size:
        return np.asarray(scores.argmax(axis=0), np.int16)
    best = np.full(size, -np.inf, np.float32)
    found = np.zeros(size, np.int16)
    for number, plane in enumerate(scores):
        large = map_at(plane, size)
        better = large > best
        found[better] = number
        np.maximum(best, large, out=best)
    return found


def map_at(values: Array, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """One map [h, w], interpolated in the same way to ``size`` (height, width)."""
    if values.shape == size:
        return values.astype(np.float32)
    down, across = _weights(values.shape[0], size[0]), _weights(values.shape[1], size[1])
    return np.asarray(down @ values.astype(np.float32) @ across.T)


def _weights(small: int, large: int) -> npt.NDArray[np.float32]:
    """Row i holds what each of ``small`` cells gives to pixel i of ``large``: [large, small]."""
    place = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    lower = np.minimum(np.floor(place).astype(np.int64), max(small - 2, 0))
    upper = np.minimum(lower + 1, small - 1)
    share = (place - lower).astype(np.float32)
    weights = np.zeros((large, small), np.float32)
    rows = np.arange(large)
    np.add.at(weights, (rows, lower), 1 - share)
    np.add.at(weights, (rows, upper), share)
    return weights
