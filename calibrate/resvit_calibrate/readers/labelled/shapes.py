"""Shapes that tools draw: as the box around them, and as an outline of polygons or run lengths, as COCO has them.

A circle or an ellipse is a polygon of ``_CORNERS`` corners; its box is that around the curve itself.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.readers.boxes.coco_file import shown
from resvit_calibrate.readers.boxes.outlines import covered_by, require_drawable, usable_outline
from resvit_calibrate.readers.labelled.regions import Corners, Region
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import opened

_CORNERS = 72
_LARGEST = 2**31
_LEAST_POINTS = 3
_PATCH_MOST = 1 << 26
"""Pixels and bytes of a mask that is kept among annotations."""
_DECIMAL = re.compile(r"[-+]?[0-9]{1,10}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?")


def number_from(value: Any, where: str, fix: str) -> float:
    """A number, also where it is written as a text. Raises ``ResvitError`` for anything else, and one out of bounds."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise ResvitError(f"{where} is {shown(value)}, and no number of pixels.", fix)
    return float(value)


def numbers_from(values: Any, count: int, where: str, fix: str) -> list[float]:
    """So many numbers. Raises ``ResvitError`` for anything else."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ResvitError(f"{where} is {shown(values)}, where {count} numbers should be.", fix)
    return [number_from(value, where, fix) for value in values]


def points_from(values: Any, where: str, fix: str) -> list[tuple[float, float]]:
    """Points [[x, y], …]. Raises ``ResvitError`` for anything else."""
    if not isinstance(values, list):
        raise ResvitError(f"{where} is {shown(values)}, where points should be.", fix)
    return [(x, y) for x, y in (numbers_from(point, 2, where, fix) for point in values)]


def size_from(height: Any, width: Any, where: str, fix: str) -> tuple[int, int]:
    """(height, width) in whole pixels, both 0 where neither is said. Raises ``ResvitError`` for what is no size."""
    if height is None and width is None:
        return 0, 0
    sides = [number_from(value, f"{where}: a side of the picture", fix) for value in (height, width)]
    if not all(side > 0 and side.is_integer() for side in sides):
        raise ResvitError(f"{where}: the picture's size is {shown(height)} by {shown(width)}.", fix)
    return int(sides[0]), int(sides[1])


def name_from(value: Any, where: str, fix: str) -> str:
    """A class's name: a text that is not empty, or a number as one. Raises ``ResvitError`` for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip() or not value.strip().isprintable():
        raise ResvitError(f"{where} is {shown(value)}, and no class's name.", fix)
    return value.strip()


def box_between(name: str, first: Sequence[float], second: Sequence[float]) -> Region:
    """An upright box by two opposite corners, whichever they are."""
    (left, right), (top, bottom) = sorted((first[0], second[0])), sorted((first[1], second[1]))
    return Region(name, (left, top, right, bottom))


def turned_box(name: str, corners: Corners, degrees: float, centre: tuple[float, float] | None = None) -> Region:
    """A box turned clockwise around its middle, or around a point: an upright one where it is turned by nothing."""
    left, top, right, bottom = corners
    if not degrees % 360:
        return Region(name, corners)
    x, y = centre or ((left + right) / 2, (top + bottom) / 2)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    around = [(left - x, top - y), (right - x, top - y), (right - x, bottom - y), (left - x, bottom - y)]
    return polygon(name, [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in around])


def polygon(name: str, points: Sequence[tuple[float, float]]) -> Region:
    """A polygon of three points or more."""
    return Region(name, _around(points), [[value for point in points for value in point]])


def ellipse(name: str, x: float, y: float, radii: tuple[float, float], degrees: float = 0.0) -> Region:
    """An ellipse, turned clockwise around its middle."""
    turn, (a, b) = math.radians(degrees), (abs(radii[0]), abs(radii[1]))
    wide = math.hypot(a * math.cos(turn), b * math.sin(turn))
    high = math.hypot(a * math.sin(turn), b * math.cos(turn))
    points = []
    for step in range(_CORNERS):
        angle = 2 * math.pi * step / _CORNERS
        along, across = a * math.cos(angle), b * math.sin(angle)
        points += [
            x + along * math.cos(turn) - across * math.sin(turn),
            y + along * math.sin(turn) + across * math.cos(turn),
        ]
    return Region(name, (x - wide, y - high, x + wide, y + high), [points])


def is_area(points: Sequence[tuple[float, float]]) -> bool:
    """Whether points can be a polygon."""
    return len(points) >= _LEAST_POINTS


def patch(name: str, covered: npt.NDArray[np.bool_], left: int, top: int, size: tuple[int, int]) -> Region | None:
    """What a mask [h, w], laid at a place of a picture of (height, width), covers; None where that is nothing."""
    height, width = size
    whole = np.zeros(size, np.bool_)
    first, last = max(top, 0), max(left, 0)
    seen = covered[first - top : max(height - top, 0), last - left : max(width - left, 0)]
    whole[first : first + seen.shape[0], last : last + seen.shape[1]] = seen
    rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    if not len(rows):
        return None
    down = whole.T.ravel()  # runs go down the columns, the first of them of the background
    edges = np.flatnonzero(np.diff(down)) + 1
    ends = np.concatenate([[0] if down[0] else [], [0], edges, [down.size]])
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Region(name, box, {"size": [height, width], "counts": np.diff(ends).astype(np.int64).tolist()})


def patch_from_png(text: Any, where: str, fix: str, *, packed: bool = False) -> npt.NDArray[np.bool_]:
    """A mask [h, w] out of a PNG in base64, ``packed`` with zlib before: what is opaque, or not 0.

    Raises ``ResvitError`` for what is none, and one that is too large.
    """
    try:
        data = base64.b64decode(text if isinstance(text, str) else "", validate=True)
        if packed:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(data, _PATCH_MOST)
        with opened(data) as image:
            if image.format != "PNG" or image.width * image.height > _PATCH_MOST:
                raise ValueError(f"it is {image.format} of {image.height}x{image.width}")
            values = np.array(image.getchannel("A") if "A" in image.getbands() else image)
    except MemoryError:
        raise
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ResvitError(f"{where} is no PNG in base64: {error}.", fix) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ResvitError(f"{where} is no PNG that can be decoded: {error}.", fix) from error
    return np.asarray(values.reshape(*values.shape[:2], -1).any(axis=2))


def without_holes(
    region: Region, holes: Sequence[Sequence[tuple[float, float]]], size: tuple[int, int], where: str
) -> Region:
    """A polygon less others inside of it, as run lengths. Raises ``ResvitError`` for what cannot be drawn."""
    require_drawable(size, where)
    inside = covered_by(usable_outline(region.outline, *size, where), *size)
    for hole in holes:
        flat = [value for point in hole for value in point]
        inside &= ~covered_by(usable_outline([flat], *size, where), *size)
    found = patch(region.name, inside, 0, 0, size)
    return region if found is None else found._replace(corners=region.corners)


def _around(points: Sequence[tuple[float, float]]) -> Corners:
    across, down = [x for x, _ in points], [y for _, y in points]
    return min(across), min(down), max(across), max(down)
