"""What both networks answered for one image, drawn over it: boxes, masks, depths, and where they differ."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.boxes import overlaps
from resvit_export.report.layout.pictures import data_uri_from_pixels

Array = npt.NDArray[Any]
_SAME = 0.5
"""IoU from which two boxes of a class are one, as agreement counts."""
_OPAQUE = 0.6
_DIFFERENT = np.array([230, 60, 40], np.float64)
_RAMP = np.array([[23, 25, 60], [60, 60, 145], [60, 125, 165], [95, 185, 130], [250, 230, 90]], np.float64)
"""From near to far, dark to light: readable without colours."""


@dataclass(frozen=True)
class Outline:
    """One box in the panel's pixels: ``kind`` is both, lost, new or known."""

    x: float
    y: float
    width: float
    height: float
    text: str
    kind: str


@dataclass(frozen=True)
class Panel:
    """One picture of the row: what it shows, its pixels, and the boxes over them."""

    caption: str
    uri: str
    alt: str
    width: int
    height: int
    boxes: tuple[Outline, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A row of panels, and what its colours mean: (colour or class of the page's style, meaning)."""

    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...] = ()


def drawing_of(
    pixels: npt.NDArray[np.uint8], before: Mapping[str, Array], after: Mapping[str, Array], names: Sequence[str] | None
) -> Drawing | None:
    """Draw what ``Task.drawing`` gave of the float and of the quantised network; None where it gave nothing.

    ``pixels`` uint8 [H, W, 1 or 3] are on the grid of the network's input, which boxes are in pixels of.
    """
    if "boxes" in before and "boxes" in after:
        return _boxes(pixels, before, after, names)
    if "mask" in before and "mask" in after:
        return _masks(pixels, before["mask"], after["mask"], names)
    if "depth" in before and "depth" in after:
        return _depths(before["depth"], after["depth"])
    return None


def _boxes(
    pixels: Array, before: Mapping[str, Array], after: Mapping[str, Array], names: Sequence[str] | None
) -> Drawing:
    shared = _shared(before, after)
    known = [_outline(box, _called(names, number), "known") for box, number in zip(
        before.get("known_boxes", np.zeros((0, 4))), before.get("known_classes", np.zeros(0, np.int64)), strict=True
    )]  # fmt: skip
    panels = []
    for caption, side, own, kind in (("float", before, shared[0], "lost"), ("quantised", after, shared[1], "new")):
        found = [
            _outline(box, f"{_called(names, number)} {score:.2f}", "both" if same else kind)
            for box, number, score, same in zip(side["boxes"], side["classes"], side["scores"], own, strict=True)
        ]
        count = f"{len(found)} {'box' if len(found) == 1 else 'boxes'}"
        panels.append(_panel(caption, pixels, f"Boxes of the {caption} network: {count}", (*known, *found)))
    legend = [("both", "both networks"), ("lost", "float only"), ("new", "quantised only")]
    return Drawing(tuple(panels), tuple(legend + ([("known", "the truth")] if known else [])))


def _shared(before: Mapping[str, Array], after: Mapping[str, Array]) -> tuple[Array, Array]:
    """Which boxes of each network the other has as well, each taken once, the best first."""
    near = overlaps(before["boxes"], after["boxes"])
    near[before["classes"][:, None] != after["classes"][None]] = 0.0
    first, second = np.zeros(len(before["boxes"]), bool), np.zeros(len(after["boxes"]), bool)
    for row in range(len(near)):
        if near[row].size and near[row].max() >= _SAME:
            column = int(near[row].argmax())
            first[row] = second[column] = True
            near[:, column] = 0.0
    return first, second


def _outline(box: Array, text: str, kind: str) -> Outline:
    left, top, right, bottom = (round(float(value), 1) for value in box)
    return Outline(left, top, round(max(right - left, 0.0), 1), round(max(bottom - top, 0.0), 1), text, kind)


def _masks(pixels: Array, before: Array, after: Array, names: Sequence[str] | None) -> Drawing:
    grey = _grey(pixels, before.shape)
    panels = []
    for caption, mask in (("float", before), ("quantised", after)):
        panels.append(_panel(caption, _blended(grey, _colours(mask)), f"Classes that the {caption} network gives"))
    differ = before != after
    shown = np.where(differ[..., None], _DIFFERENT, grey)
    share = f"{differ.mean():.1%}"
    panels.append(_panel(f"differ: {share}", shown, f"Pixels with another class: {share}"))
    present = np.unique(np.concatenate([before.ravel(), after.ravel()]))
    legend = tuple((_css(int(number)), _called(names, number)) for number in present)
    return Drawing(tuple(panels), legend)


def _depths(before: Array, after: Array) -> Drawing:
    first, second = before.astype(np.float64), after.astype(np.float64)
    finite = np.concatenate([first[np.isfinite(first)], second[np.isfinite(second)]])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    error = np.abs(first - second)
    most = float(np.nanmax(error, initial=0.0))
    scale = f"{low:.2f} to {high:.2f} m"
    return Drawing(
        (
            _panel(f"float, {scale}", _ramped(first, low, high), f"Depths of the float network, {scale}"),
            _panel(f"quantised, {scale}", _ramped(second, low, high), f"Depths of the quantised network, {scale}"),
            _panel(
                f"difference, 0 to {most:.2f} m", _ramped(error, 0.0, most), f"Difference of depths, up to {most:.2f} m"
            ),
        )
    )


def _panel(caption: str, pixels: Array, alt: str, boxes: tuple[Outline, ...] = ()) -> Panel:
    height, width = pixels.shape[:2]
    whole = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return Panel(caption, data_uri_from_pixels(whole), alt, width, height, boxes)


def _grey(pixels: Array, shape: tuple[int, ...]) -> Array:
    """The image in grey on the grid of a mask [h, w]: float [h, w, 3]."""
    flat = pixels.astype(np.float64).reshape(*pixels.shape[:2], -1).mean(axis=2)
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * flat.shape[axis] / n, flat.shape[axis] - 1).astype(np.int64)
        for axis, n in enumerate(shape[:2])
    )
    return np.repeat(flat[rows][:, columns][..., None], 3, axis=2)


def _blended(grey: Array, colours: Array) -> Array:
    return np.asarray((1 - _OPAQUE) * grey + _OPAQUE * colours)


def _colours(mask: Array) -> Array:
    numbers, where = np.unique(mask, return_inverse=True)
    table = np.array([_colour(int(number)) for number in numbers], np.float64)
    return np.asarray(table[where.reshape(mask.shape)])


def _colour(number: int) -> tuple[float, float, float]:
    """A colour for each class: black for 0, then hues that lie apart (multiples of the golden ratio)."""
    if number <= 0:
        return (0.0, 0.0, 0.0)
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * number % 1.0, 0.75, 0.95 if number % 2 else 0.7)
    return (round(255 * red), round(255 * green), round(255 * blue))


def _css(number: int) -> str:
    return "rgb({:.0f} {:.0f} {:.0f})".format(*_colour(number))


def _ramped(values: Array, low: float, high: float) -> Array:
    """Values as colours [h, w, 3]; what is not finite in the colour of what differs."""
    share = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
    at = np.nan_to_num(share) * (len(_RAMP) - 1)
    below = np.minimum(at.astype(np.int64), len(_RAMP) - 2)
    part = (at - below)[..., None]
    colours = (1 - part) * _RAMP[below] + part * _RAMP[below + 1]
    return np.asarray(np.where(np.isfinite(values)[..., None], colours, _DIFFERENT))


def _called(names: Sequence[str] | None, number: Any) -> str:
    index = int(number)
    return str(names[index]) if names and 0 <= index < len(names) else f"class {index}"
