"""Boxes of two networks, or of one and what is known, held against each other; and how they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from resvit_calibrate.gate.numbering import Pairs
from resvit_calibrate.images.targets import BoxTarget
from resvit_engines.answers.boxes import NO_BOXES, Boxes, overlaps


def agreeing(reference: Boxes, candidate: Boxes, shown: float) -> tuple[int, int, int]:
    """How many of both networks' boxes with a score from ``shown`` on are the same, and how many each has.

    Same: of one class, IoU 0.5 or more, each taken once, the reference's best first. Boxes without an area are none.
    """
    first, second = (
        np.flatnonzero((item.scores >= shown) & (item.boxes[:, 2:] > item.boxes[:, :2]).all(axis=1))
        for item in (reference, candidate)
    )
    near = overlaps(reference.boxes[first], candidate.boxes[second])
    near[reference.classes[first][:, None] != candidate.classes[second][None]] = 0.0
    matched = 0
    for row in near:
        if row.size and row.max() >= 0.5:
            near[:, int(row.argmax())] = 0.0
            matched += 1
    return matched, len(first), len(second)


def pairs_of(found: Sequence[Boxes], known: Sequence[BoxTarget]) -> Pairs:
    """The class that each known box was found with, whatever it is: by the best box of IoU 0.5 or more, each once."""
    rows: list[tuple[int, int, int, int]] = []
    for image, (item, target) in enumerate(zip(found, known, strict=True)):
        asked = np.flatnonzero(~target.crowd)
        near = overlaps(item.boxes, target.boxes[asked])
        for which, row in enumerate(near):
            if row.size and row.max() >= 0.5:
                place = int(row.argmax())
                near[:, place] = 0.0
                rows.append((image, int(target.classes[asked[place]]), int(item.classes[which]), 1))
    return Pairs(*np.array(rows, np.int64).reshape(-1, 4).T)


def stored_boxes(found: list[Boxes]) -> dict[str, Any]:
    """Boxes of N images as flat arrays: image i has those from ``offsets`` i to i + 1."""
    some = found or [NO_BOXES]
    return {
        "boxes": np.concatenate([item.boxes for item in some]),
        "scores": np.concatenate([item.scores for item in some]),
        "classes": np.concatenate([item.classes for item in some]).astype(np.int32),
        "offsets": np.cumsum([0, *(len(item.scores) for item in found)]).astype(np.int64),
    }
