"""What is known to be in an image: boxes, classes or depths of its pixels, a text; and how it becomes the network's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError

IGNORED = -1
"""The class of a pixel that has no label: it counts for nothing."""
UNKNOWN_DEPTH = 0.0
MOST_CLASSES = 32768
"""Class numbers of masks are kept as int16."""


@dataclass(frozen=True, eq=False)
class BoxTarget:
    """The M objects of one image, in pixels of the network's input.

    ``boxes`` float32 [M, 4] are x1, y1, x2, y2: edges, so that a box over the whole input is 0, 0, width,
    height. ``classes`` int64 [M] count from 0. ``crowd`` bool [M] marks boxes around many objects, which a
    metric neither asks for nor holds against a detector.
    """

    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MaskTarget:
    """``classes`` int16 [h, w]: the class of every pixel of the network's input, -1 where it is unlabelled."""

    classes: npt.NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class DepthTarget:
    """``depth`` float32 [h, w]: metres at every pixel of the network's input, 0 where it is unknown."""

    depth: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextTarget:
    """``text``: what is written in the image."""

    text: str


Target: TypeAlias = BoxTarget | MaskTarget | DepthTarget | TextTarget


@dataclass(frozen=True)
class Geometry:
    """How one image became the network's input: network = image * scale + shift, along x and along y.

    Coordinates are those of edges: pixel number i covers i to i + 1. ``height`` and ``width`` are the image's,
    ``size`` is (height, width) of the network's input.
    """

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float
    height: int
    width: int
    size: tuple[int, int]

    def boxes_to_network(self, boxes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Carry boxes [..., 4] of the image over to the network's input; they may reach beyond its edges."""
        scale, shift = self._box_map()
        return (np.asarray(boxes, np.float64) * scale + shift).astype(np.float32)

    def boxes_to_image(self, boxes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Carry boxes [..., 4] of the network's input back to the image, clipped to it."""
        scale, shift = self._box_map()
        back = (np.asarray(boxes, np.float64) - shift) / scale
        return clipped(back, self.height, self.width).astype(np.float32)

    def mask_to_network(self, mask: npt.NDArray[Any], fill: float = IGNORED) -> npt.NDArray[Any]:
        """Carry values [H, W] of the image's pixels over: [h, w], the nearest pixel's, ``fill`` beside the image.

        No values are mixed. Where the input has at most the image's resolution, ``mask_to_image`` and this
        give back every pixel; where it has at least that, this and ``mask_to_image`` do, for what was not cut off.
        """
        rows = _nearest(self.size[0], 1 / self.scale_y, -self.shift_y / self.scale_y)
        columns = _nearest(self.size[1], 1 / self.scale_x, -self.shift_x / self.scale_x)
        return _taken(mask, rows, columns, fill)

    def mask_to_image(self, mask: npt.NDArray[Any], fill: float = IGNORED) -> npt.NDArray[Any]:
        """Carry values [h, w] of the input's pixels back: [H, W], the nearest pixel's, ``fill`` where cut off."""
        rows = _nearest(self.height, self.scale_y, self.shift_y)
        columns = _nearest(self.width, self.scale_x, self.shift_x)
        return _taken(mask, rows, columns, fill)

    def _box_map(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        return (
            np.array([self.scale_x, self.scale_y] * 2, np.float64),
            np.array([self.shift_x, self.shift_y] * 2, np.float64),
        )


@dataclass(frozen=True)
class TargetOptions:
    """How masks and depths are stored.

    ``classes``: how many classes there are, None where the data says or shows it. ``ignore``: the values of a
    mask that mean "unlabelled". ``depth_scale``: metres in one step of a 16-bit depth image. ``outlines``: what COCO
    draws around objects is read as masks, since the task is segmentation.

    Raises ``ResvitError`` for values that nothing could be read with.
    """

    classes: int | None = None
    ignore: tuple[int, ...] = (255,)
    depth_scale: float = 0.001
    outlines: bool = False

    def __post_init__(self) -> None:
        if self.classes is not None and not 1 <= self.classes <= MOST_CLASSES:
            raise ResvitError(
                f"{self.classes} classes of masks were asked for.", f"Choose a number from 1 to {MOST_CLASSES}."
            )
        if not (math.isfinite(self.depth_scale) and self.depth_scale > 0):
            raise ResvitError(
                f"A depth scale of {self.depth_scale} cannot be used.",
                "Give the metres in one step: 0.001 for millimetres, 0.00390625 for KITTI's 256 steps a metre.",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any], task: str = "") -> TargetOptions:
        """Pick ``classes``, ``ignore`` and ``depth_scale`` out of a task's options; the others are left alone.

        ``task`` is what the user says the network is for. ``ignore`` is one number or a list of them, which may be
        empty. Raises ``ResvitError`` for values of another type.
        """
        ignore = options.get("ignore", AS_USUAL.ignore)
        listed = list(ignore) if isinstance(ignore, (list, tuple)) else [ignore]
        classes, scale = options.get("classes"), options.get("depth_scale", AS_USUAL.depth_scale)
        if not all(map(_whole, listed)) or not (classes is None or _whole(classes)):
            raise ResvitError(
                f"The task's options classes = {classes!r}, ignore = {ignore!r} are not whole numbers.",
                "Write for example classes = 21 and ignore = [255].",
            )
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise ResvitError(
                f"The task's option depth_scale = {scale!r} is not a number.", "Give the metres in one step: 0.001."
            )
        return cls(classes, tuple(listed), float(scale), task == "segmentation")


AS_USUAL = TargetOptions()


def identity(height: int, width: int) -> Geometry:
    """The geometry of an image that is the network's input as it is."""
    return Geometry(1.0, 1.0, 0.0, 0.0, height, width, (height, width))


def carried(target: Target, geometry: Geometry) -> Target:
    """Carry a target in the image's own pixels over to the network's input.

    Boxes are cut at the input's edges, and those of which nothing remains are left out. Masks and depths take
    the nearest pixel; beside the image they are unlabelled. A text stays what it is.
    """
    if isinstance(target, TextTarget):
        return target
    if isinstance(target, BoxTarget):
        return in_view(replace(target, boxes=geometry.boxes_to_network(target.boxes)), *geometry.size)
    if isinstance(target, MaskTarget):
        return MaskTarget(geometry.mask_to_network(target.classes))
    return DepthTarget(geometry.mask_to_network(target.depth, UNKNOWN_DEPTH))


def in_view(target: BoxTarget, height: int, width: int) -> BoxTarget:
    """Cut boxes at the edges of what is ``height`` by ``width`` pixels, and drop those of which nothing remains."""
    boxes = clipped(target.boxes, height, width).astype(np.float32)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return BoxTarget(boxes[kept], target.classes[kept], target.crowd[kept])


def clipped(boxes: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """Boxes [..., 4] held to 0…width and 0…height."""
    held: npt.NDArray[Any] = np.clip(boxes, 0.0, np.array([width, height] * 2, boxes.dtype))
    return held


def digest_of_target(target: Target) -> bytes:
    """SHA-256 of one target: its kind, its shape and its values."""
    if isinstance(target, TextTarget):
        return hashlib.sha256(f"TextTarget {target.text}".encode("utf-8", "surrogatepass")).digest()
    if isinstance(target, BoxTarget):
        arrays: tuple[npt.NDArray[Any], ...] = (target.boxes, target.classes, target.crowd)
    elif isinstance(target, MaskTarget):
        arrays = (target.classes,)
    else:
        arrays = (target.depth,)
    digest = hashlib.sha256(type(target).__name__.encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _nearest(count: int, scale: float, shift: float) -> npt.NDArray[np.int64]:
    """In which pixel of the other side the centre of each of ``count`` pixels lies; it may lie beside it."""
    centres: npt.NDArray[Any] = (np.arange(count) + 0.5) * scale + shift
    pixels: npt.NDArray[np.int64] = np.floor(centres).astype(np.int64)
    return pixels


def _taken(
    values: npt.NDArray[Any], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], fill: float
) -> npt.NDArray[Any]:
    height, width = values.shape
    inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    taken: npt.NDArray[Any] = values[np.ix_(np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1))]
    if not inside_rows.all() or not inside_columns.all():
        taken[~(inside_rows[:, None] & inside_columns)] = fill
    return taken


_SHOWN = 10


def require_known_classes(found: Mapping[str, tuple[int, ...]], classes: int | None, name: str) -> int | None:
    """How many classes masks have: ``classes``, or by the largest number in ``found``, which has each mask's.

    Raises ``ResvitError`` where masks hold numbers from ``classes`` on, with the numbers and the first mask.
    """
    everything = sorted({number for numbers in found.values() for number in numbers})
    if classes is None:
        return everything[-1] + 1 if everything else None
    unknown = [number for number in everything if number >= classes]
    if unknown:
        holders = [title for title, numbers in found.items() if numbers and numbers[-1] >= classes]
        shown = ", ".join(map(str, unknown[:_SHOWN])) + (", …" if len(unknown) > _SHOWN else "")
        raise ResvitError(
            f"{len(holders)} of {len(found)} masks of {name} hold unknown labels: {shown} (first in {holders[0]}), "
            f"but there are {classes} classes, 0 to {classes - 1}.",
            "Correct the number of classes (classes.txt, or the task's option `classes`), or list values that mean "
            "`unlabelled` with the task's option `ignore`.",
        )
    return classes
