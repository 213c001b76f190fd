"""How many validation images show the same as a calibration image: the drop measured on these says less of new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.readers.video.evenly import DIFFERENT, GRID, SAME, mean_colours
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record

LOOKED_AT = 1024
"""Validation images that are decoded for this: of large pictures each takes a tenth of a second."""
_COARSE = 4
"""Cells along each side of the grid by which most pairs are told apart."""


@dataclass(frozen=True)
class Overlap:
    """What calibration and validation share.

    ``exact`` calibration images were among the validation images to the byte, and were left out of calibration; of
    ``looked`` validation images ``near`` show the same as one of ``calibration`` images that calibrate.
    """

    exact: int
    near: int
    looked: int
    calibration: int

    @property
    def sentence(self) -> str:
        """What is to be said of it; empty where nothing is shared."""
        if not self.near:
            return ""
        return (
            f"{self.near:,} of {self.looked:,} validation images that were looked at show the same as one of "
            f"{self.calibration:,} calibration images ({SAME}): on new images the drop may be larger. Divide the data "
            "by scene, patient or time, and give the parts as --data and --validation-data."
        )

    def to_json(self) -> dict[str, int]:
        """Plain values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Overlap:
        """Read what ``to_json`` wrote; ``ResvitError`` INPUT, naming the key, for anything else."""
        record = Record(document, "the overlap of calibration and validation")
        return cls(*(record.whole(name) for name in ("exact", "near", "looked", "calibration")))


def overlap_of(calibration: ImageSet, validation: ImageSet, reporter: Reporter = SILENT) -> Overlap:
    """Compare pictures as films' frames are compared, by the mean colours of a grid of cells.

    Of many validation images at most ``LOOKED_AT`` are looked at, evenly spread. Of images that are no pictures, ready
    arrays of the user's loader, none is.
    """
    known = _marks(calibration, len(calibration), "compare calibration images", reporter)
    nothing = Overlap(validation.shared, 0, 0, len(known))
    if not len(known):
        return nothing
    seen = _marks(validation, LOOKED_AT, "compare validation images", reporter)
    coarse = _coarse(known)
    near = sum(_alike(mark, known, coarse) for mark in seen)
    return Overlap(validation.shared, near, len(seen), len(known))


def _marks(images: ImageSet, most: int, what: str, reporter: Reporter) -> npt.NDArray[np.int16]:
    """Mean colours int16 [N, GRID, GRID, 3] of at most ``most`` images that are pictures."""
    step = max(-(-len(images) // most), 1)
    places = range(0, len(images), step)
    pictures = reporter.track(images.pictures(places), what, len(places))
    found = [mean_colours(picture) for picture in pictures if picture is not None]
    return np.array(found, np.int16).reshape(len(found), GRID, GRID, 3)


def _coarse(marks: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """Means [N, COARSE * COARSE * 3] over blocks of cells: no further apart than the cells that are furthest apart."""
    side = GRID // _COARSE
    blocks = marks.reshape(len(marks), _COARSE, side, _COARSE, side, 3).mean(axis=(2, 4), dtype=np.float32)
    return np.asarray(blocks.reshape(len(marks), -1))


def _alike(mark: npt.NDArray[np.int16], known: npt.NDArray[np.int16], coarse: npt.NDArray[np.float32]) -> bool:
    own = _coarse(mark[None])
    # A little more than the limit, for the rounding of means.
    candidates = known[np.abs(coarse - own).max(axis=1) <= DIFFERENT + 0.01]
    return bool((np.abs(candidates - mark).max(axis=(1, 2, 3)) <= DIFFERENT).any()) if len(candidates) else False
