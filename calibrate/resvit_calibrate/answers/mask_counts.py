"""Scores of segmentations from how many pixels of each class are known, answered, and both."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.gate.bootstrap import Floats
from resvit_calibrate.images.targets import IGNORED

Array = npt.NDArray[Any]


def mean_iou(shared: Floats, answered: Floats, known: Floats) -> Floats:
    """The mean over classes of shared / (answered + known - shared), counts [..., K]; absent classes left out."""
    union = answered + known - shared
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(union > 0, shared / union, 0.0)
        return np.asarray(ratio.sum(axis=-1) / (union > 0).sum(axis=-1), np.float64)


def counts(found: Array, known: Array, classes: int) -> tuple[Array, Array, Array]:
    """Pixels of each class [K] that are in both maps, in the found one and in the known one; labelled ones only."""
    labelled = known != IGNORED
    found, known = found[labelled], known[labelled]
    answered = np.bincount(found[found >= 0], minlength=classes)
    return np.bincount(known[found == known], minlength=classes), answered, np.bincount(known, minlength=classes)


def pairs_in_map(image: int, found: Array, known: Array) -> npt.NDArray[np.int64]:
    """Rows [M, 4] for ``gate.numbering.Pairs``: how many labelled pixels of each known class got which answer."""
    labelled = (known != IGNORED) & (found >= 0)
    base = int(found.max(initial=0)) + 1
    both, count = np.unique(known[labelled].astype(np.int64) * base + found[labelled], return_counts=True)
    return np.stack([np.full(len(both), image, np.int64), both // base, both % base, count.astype(np.int64)], axis=1)


def _split(stats: Floats) -> tuple[Floats, Floats, Floats]:
    classes = stats.shape[1] // 3
    return stats[:, :classes], stats[:, classes : 2 * classes], stats[:, 2 * classes :]


def commonest(stats: Floats) -> Floats:
    """The counts of a network that answers the commonest class everywhere."""
    _, _, known = _split(stats)
    common = int(known.sum(axis=0).argmax())
    shared, answered = np.zeros_like(known), np.zeros_like(known)
    shared[:, common], answered[:, common] = known[:, common], known.sum(axis=1)
    return np.concatenate([shared, answered, known], axis=1)


def ious(stats: Floats) -> Floats:
    """MIoU [N] of each image from its counts [N, 3 K]."""
    return mean_iou(*_split(stats))


def dice(stats: Floats) -> float:
    """The mean over classes of 2 shared / (answered + known), over all images together."""
    shared, answered, known = (part.sum(axis=0) for part in _split(stats))
    there = answered + known > 0
    return float((2 * shared[there] / (answered + known)[there]).mean()) if there.any() else float("nan")
