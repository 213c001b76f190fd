"""Which images to take: seeded, and from every class its share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def stratified(
    labels: npt.NDArray[np.int64] | None, candidates: npt.NDArray[np.int64], count: int, seed: int
) -> npt.NDArray[np.int64]:
    """Draw ``count`` of ``candidates`` without replacement, in random order: int64 [min(count, N)].

    ``labels`` covers all images and ``candidates`` indexes it. Each class gets its share by the largest
    remainder, which classes win a remainder being drawn too: with more classes than images, no end of the
    alphabet is preferred.
    """
    # RandomState's stream is frozen (NEP 19), so that a seed means the same images with every NumPy.
    random = np.random.RandomState(seed)
    mixed = candidates[random.permutation(len(candidates))]
    if labels is None or count >= len(candidates):
        return mixed[:count]
    _, classes = np.unique(labels[mixed], return_inverse=True)
    sizes = np.bincount(classes)
    # Whole numbers throughout: shares in floating point could round differently elsewhere.
    quota, remainder = np.divmod(sizes * count, len(candidates))
    ties = random.permutation(len(sizes))
    winners = np.lexsort((ties, -remainder))[: count - int(quota.sum())]
    quota[winners] += 1
    # The place of each image among those of its own class, in the mixed order.
    order = np.argsort(classes, kind="stable")
    place = np.empty(len(mixed), np.int64)
    place[order] = np.arange(len(mixed)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return mixed[place < quota[classes]]


def divide(available: int, calibration: int, validation: int | None) -> tuple[int, int]:
    """How many of ``available`` images each side gets when both come out of one pool.

    Calibration gets what was asked for, but no more than leaves validation its number, or half of the pool
    where validation takes whatever is left.
    """
    spare = available - validation if validation is not None and validation < available else available // 2
    first = min(calibration, max(spare, 0))
    second = available - first
    return first, second if validation is None else min(validation, second)
