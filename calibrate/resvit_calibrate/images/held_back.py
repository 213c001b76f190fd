"""Calibration images that no range is taken from: what is chosen by the others is judged on them."""

from __future__ import annotations

from dataclasses import dataclass

from resvit_calibrate.images.image_set import ImageSet

HELD_BACK = 16
"""Images that are held back, at most."""
_EVERY = 8
"""One image of so many is held back."""
FEWEST = 64
"""With fewer calibration images all are needed for the ranges, and none is held back."""


@dataclass(frozen=True, eq=False)
class Apart:
    """Calibration images in two parts that share no image."""

    ranges: ImageSet
    """What ranges are measured on, and what is learned from."""
    held: ImageSet | None
    """What choices are judged on; None where there are too few images."""


def held_apart(images: ImageSet) -> Apart:
    """Hold the first images back: one of eight, 16 at most, and none where there are fewer than 64 or too few differ.

    The order of a set is drawn already, so that the first are as good as any. Equal images stay together: none is on
    both sides.
    """
    count = min(HELD_BACK, len(images) // _EVERY) if len(images) >= FEWEST else 0
    first = frozenset(images.contents[:count])
    others = frozenset(content for content in images.contents if content not in first)
    if not first or len(others) < FEWEST // 2:
        return Apart(images, None)
    return Apart(images.without(first), images.without(others))
