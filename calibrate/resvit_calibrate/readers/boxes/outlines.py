"""Masks that are drawn from outlines as COCO has them: polygons, and run lengths, compressed and not.

A polygon covers the pixels that COCO's own tool gives it (``pycocotools.mask.frPyObjects``). Where outlines of two
classes overlap, nothing says which is seen: those pixels are unlabelled, as in torchvision's references.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.targets import IGNORED, TargetOptions
from resvit_calibrate.readers.boxes.coco_file import FIX, shown
from resvit_calibrate.readers.masks import MaskPixels, number_of_classes, renumbered
from resvit_calibrate.readers.paired import Pairs
from resvit_engines.errors import ResvitError

BACKGROUND = ("background", "__background__", "_background_")
_MOST_PIXELS = 1 << 28
_BEYOND = 4
"""By how many sides of its image an outline may lie beside it: COCO's tool takes memory by an outline's length."""


class DrawnMasks(MaskPixels):
    """Images with a mask each, drawn from outlines when it is asked for."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        sizes: npt.NDArray[np.int64],
        outlines: Sequence[Sequence[tuple[int, Any]]],
        class_names: tuple[str, ...],
        options: TargetOptions,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(Pairs(root, tuple(names), tuple(names), notes), "segmentation", options, class_names)
        self.num_classes = number_of_classes(root, options, class_names)
        self._sizes, self._outlines = sizes, outlines

    def _read(self, index: int) -> tuple[bytes, npt.NDArray[np.generic]]:
        height, width = self._sizes[index].tolist()
        told = json.dumps([height, width, self._outlines[index]]).encode()
        drawn = drawn_classes(self._outlines[index], height, width, 0)
        return told, drawn if self.moved is None else renumbered(drawn, self.moved)


def drawn_classes(
    outlines: Sequence[tuple[int, Any]], height: int, width: int, background: int
) -> npt.NDArray[np.int16]:
    """The class of each pixel: int16 [H, W], -1 where outlines of two classes overlap."""
    drawn = np.full((height, width), background, np.int16)
    taken = np.zeros((height, width), np.bool_)
    for number, outline in outlines:
        covered = covered_by(outline, height, width)
        drawn[covered & taken & (drawn != number)] = IGNORED
        drawn[covered & ~taken] = number
        taken |= covered
    return drawn


def require_drawable(size: tuple[int, int], where: str) -> None:
    """Refuse a picture of which no (height, width) is said, or one beyond all bounds. Raises ``ResvitError``."""
    height, width = size
    if min(size) <= 0 or height * width > _MOST_PIXELS:
        raise ResvitError(
            f"{where} is said to be {height}x{width} pixels, and outlines need its size.",
            "Write the height and width of every image.",
        )


def usable_outline(outline: Any, height: int, width: int, where: str) -> Any:
    """Polygons as lists of numbers, or the lengths of runs; raises ``ResvitError`` for anything else."""
    if isinstance(outline, dict):
        lengths = outline.get("counts")
        lengths = _lengths(lengths) if isinstance(lengths, str) else lengths
        if outline.get("size") != [height, width]:
            raise ResvitError(
                f"{where}: its runs are of {shown(outline.get('size'))}, its image {height}x{width}.", FIX
            )
        if not isinstance(lengths, list) or not all(type(one) is int and one >= 0 for one in lengths):
            raise ResvitError(f"{where}: its runs are {shown(outline.get('counts'))}.", FIX)
        if sum(lengths) != height * width:
            raise ResvitError(f"{where}: its runs cover {sum(lengths)} pixels of {height * width}.", FIX)
        return {"counts": lengths}
    if isinstance(outline, list) and outline and not isinstance(outline[0], list):
        outline = [outline]  # one polygon without the list around it
    polygons = []
    for polygon in outline if isinstance(outline, list) else [None]:
        most = _BEYOND * max(height, width)
        numbers = polygon if isinstance(polygon, list) else []
        fits = all(type(one) in (int, float) and abs(one) <= most for one in numbers)
        if not fits or len(numbers) % 2 or len(numbers) < 6:
            raise ResvitError(f"{where}: a polygon is {shown(polygon)}, not three points or more near its image.", FIX)
        polygons.append([float(one) for one in numbers])
    return polygons


def _lengths(text: str) -> list[int] | None:
    """COCO's compressed runs: five bits a letter, and from the third run on what is more than two runs before."""
    found: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            if place >= len(text) or shift > 60 or not 0 <= (letter := ord(text[place]) - 48) < 64:
                return None
            value |= (letter & 0x1F) << shift
            more, place, shift = bool(letter & 0x20), place + 1, shift + 5
            if not more and letter & 0x10:
                value -= 1 << shift
        found.append(value + found[-2] if len(found) > 2 else value)
    return found


def covered_by(outline: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The pixels of a usable outline: bool [H, W]."""
    if isinstance(outline, dict):
        lengths = np.array(outline["counts"], np.int64)
        runs = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return np.asarray(runs.reshape(width, height).T)  # runs go down the columns
    from pycocotools import mask

    drawn = mask.decode(mask.frPyObjects(outline, height, width))
    return np.asarray(drawn.any(axis=2))
