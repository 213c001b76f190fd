"""Answers that are sets: a detector's queries, in whatever order its network selected them.

A network that picks its queries by score (TopK) gives them in the order of the scores. Two of nearly the same score
change places by rounding alone, and at the end of the selection one takes the other's place. Which row a box is in
means nothing to its users; so rows are paired before they are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

EDGE = 0.02
"""The share of the rows that may be others: those whose scores were at the end of the selection."""
_MOST = 4096


def paired_rows(expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, Array]:
    """``found`` with the rows of its sets in the order in which ``expected`` has them.

    Sets are all outputs [B, Q, …] with the most frequent Q; their rows are paired jointly, the nearest first, each
    output scaled by its own root mean square. Up to ``EDGE`` of the rows of an image, those that fit worst, are taken
    to be of the edge, and given as expected. Other outputs, and those of another shape, come back as they are.
    """
    names = _sets(expected, found)
    result = dict(found)
    if not names:
        return result
    scaled = {name: max(float(np.sqrt(np.mean(np.square(expected[name], dtype=np.float64)))), 1e-12) for name in names}
    for name in names:
        result[name] = np.array(found[name])
    for image in range(len(expected[names[0]])):
        true, own = (
            np.concatenate(
                [np.asarray(side[n][image], np.float64).reshape(len(side[n][image]), -1) / scaled[n] for n in names], 1
            )
            for side in (expected, found)
        )
        order, distance = _pairs(true, own)
        for name in names:
            result[name][image] = found[name][image][order]
        edge = np.argsort(-distance, kind="stable")[: int(EDGE * len(true))]
        for name in names:
            result[name][image][edge] = expected[name][image][edge]
    return result


def _sets(expected: Mapping[str, Array], found: Mapping[str, Array]) -> list[str]:
    counts: dict[int, list[str]] = {}
    for name, value in expected.items():
        fits = name in found and found[name].shape == value.shape and value.ndim >= 2
        if fits and 1 < value.shape[1] <= _MOST and np.isfinite(value).all() and np.isfinite(found[name]).all():
            counts.setdefault(value.shape[1], []).append(name)
    return max(counts.values(), key=len, default=[])


def _pairs(true: npt.NDArray[np.float64], own: npt.NDArray[np.float64]) -> tuple[Array, npt.NDArray[np.float64]]:
    """For each row of ``true`` the index of its partner in ``own``, and the distance to it."""
    squares = (true**2).sum(1)[:, None] + (own**2).sum(1)[None] - 2.0 * true @ own.T
    count = len(true)
    order, distance = np.full(count, -1, np.int64), np.zeros(count)
    taken = np.zeros(count, np.bool_)
    left = count
    for flat in np.argsort(squares, axis=None, kind="stable"):
        row, column = divmod(int(flat), count)
        if order[row] < 0 and not taken[column]:
            order[row], taken[column] = column, True
            distance[row] = max(float(squares[row, column]), 0.0)
            left -= 1
            if not left:
                break
    return order, distance
