"""Masks, boxes and depths from the entries of an ``.npz`` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import UNSEEN, ArrayPixels, Look, changed_since_opened
from resvit_calibrate.images.targets import (
    BoxTarget,
    DepthTarget,
    MaskTarget,
    Target,
    TargetOptions,
    digest_of_target,
    in_view,
)
from resvit_calibrate.readers.depth import metres
from resvit_calibrate.readers.masks import classes_of, number_of_classes, renumbered, seen_in
from resvit_engines.errors import ResvitError

KINDS = ("masks", "boxes", "depth")
ENTRIES = ("masks", "boxes", "box_classes", "box_crowd", "box_offsets", "depth")
_TASKS = {"masks": "segmentation", "boxes": "detection", "depth": "depth"}
_FIX = (
    "Masks are integers [N, H, W]; depth is metres as floating-point numbers [N, H, W]; boxes [A, 4] are x1, y1, x2, "
    "y2 in pixels, with box_classes [A] from 0, box_offsets [N + 1] (image i has the boxes from box_offsets[i] to "
    "box_offsets[i + 1]), and box_crowd [A] if there are crowds."
)


class TargetArrays(ArrayPixels):
    """Images of an array with masks, boxes or depths in further arrays; they may be memory maps."""

    def __init__(
        self,
        name: str,
        images: npt.NDArray[Any],
        kind: str,
        arrays: Mapping[str, npt.NDArray[Any]],
        options: TargetOptions,
        class_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, images, None, class_names)
        self.task = _TASKS[kind]
        self._kind = kind
        self._arrays = arrays
        self._options = options
        self._moved: dict[int, int] | None = None

    def move(self, numbers: Mapping[int, int]) -> None:
        """Put every class under another number; pixels of those that ``numbers`` lacks are unlabelled."""
        if self._kind == "masks":
            self._moved = dict(numbers)
        elif self._kind == "boxes":
            classes = self._arrays["box_classes"]
            lost = sorted(set(np.unique(classes).tolist()) - numbers.keys())
            if lost:
                raise ResvitError(f"{self.name} has boxes of the class {lost[0]}, which the class list lacks.", _FIX)
            moved = np.array([numbers[number] for number in classes.tolist()], np.int64)
            self._arrays = {**self._arrays, "box_classes": moved}

    def look(self, index: int) -> Look:
        """Digest one image's pixels and its target."""
        target = self._target(index)
        classes = seen_in(target.classes) if isinstance(target, MaskTarget) else ()
        return super().look(index)._replace(target=digest_of_target(target), classes=classes)

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> Target:
        """One image's target, in its pixels."""
        target = self._target(index)
        if seen.target and digest_of_target(target) != seen.target:
            raise changed_since_opened(self.title(index))
        return in_view(target, height, width) if isinstance(target, BoxTarget) else target

    def _target(self, index: int) -> Target:
        if self._kind == "masks":
            classes = classes_of(self._arrays["masks"][index], self._options)
            return MaskTarget(classes if self._moved is None else renumbered(classes, self._moved))
        if self._kind == "depth":
            return DepthTarget(metres(self._arrays["depth"][index]))
        offsets = self._arrays["box_offsets"]
        part = slice(int(offsets[index]), int(offsets[index + 1]))
        return BoxTarget(*(self._arrays[name][part] for name in ("boxes", "box_classes", "box_crowd")))


def pixels_from_arrays(
    name: str,
    images: npt.NDArray[Any],
    kind: str,
    arrays: Mapping[str, npt.NDArray[Any]],
    options: TargetOptions,
    class_names: tuple[str, ...],
) -> TargetArrays:
    """Check the arrays of one ``kind`` against the images. Raises ``ResvitError`` for what does not fit."""
    main = arrays[kind]
    if kind == "boxes":
        arrays, notes = _boxes(name, len(images), arrays, class_names)
    else:
        types = "iub" if kind == "masks" else "f"
        if main.dtype.kind not in types or main.shape != images.shape[:3]:
            raise ResvitError(
                f"{kind} of {name} has type {main.dtype} and shape {list(main.shape)}; images have the shape "
                f"{list(images.shape)}.",
                _FIX,
            )
        notes = ()
    pixels = TargetArrays(name, images, kind, arrays, options, class_names)
    pixels.notes = notes
    if kind == "masks":
        pixels.num_classes = number_of_classes(Path(name), options, class_names)
    elif kind == "boxes" and pixels.num_classes is None and len(arrays["box_classes"]):
        pixels.num_classes = int(arrays["box_classes"].max()) + 1
    return pixels


def class_names(values: npt.NDArray[Any], path: Path) -> tuple[str, ...]:
    """The entry ``class_names``: texts [K]. Raises ``ResvitError`` for anything else."""
    if values.dtype.kind != "U" or values.ndim != 1 or not len(values):
        raise ResvitError(
            f"class_names of {path} has type {values.dtype} and shape {list(values.shape)}, not texts [K].",
            'Write numpy.array(["cat", "dog"]).',
        )
    return tuple(map(str, values))


def _boxes(
    name: str, images: int, arrays: Mapping[str, npt.NDArray[Any]], names: tuple[str, ...]
) -> tuple[dict[str, npt.NDArray[Any]], tuple[str, ...]]:
    """The four arrays of boxes in their own types, those without an area left out, and what was left out."""
    missing = [entry for entry in ("box_classes", "box_offsets") if entry not in arrays]
    if missing:
        raise ResvitError(f"{name} has boxes but no {' and no '.join(missing)}.", _FIX)
    boxes, classes, offsets = (np.asarray(arrays[entry]) for entry in ("boxes", "box_classes", "box_offsets"))
    crowd = np.asarray(arrays.get("box_crowd", np.zeros(len(boxes), np.bool_)))
    count = len(boxes)
    if boxes.dtype.kind not in "fiu" or boxes.shape != (count, 4):
        raise ResvitError(f"boxes of {name} has type {boxes.dtype} and shape {list(boxes.shape)}.", _FIX)
    if classes.dtype.kind not in "iu" or classes.shape != (count,) or (count and int(classes.min()) < 0):
        raise ResvitError(f"box_classes of {name} is not {count} class numbers from 0.", _FIX)
    if names and count and int(classes.max()) >= len(names):
        raise ResvitError(f"box_classes of {name} holds {classes.max()}, but {len(names)} classes have names.", _FIX)
    if crowd.dtype.kind not in "biu" or crowd.shape != (count,):
        raise ResvitError(f"box_crowd of {name} is not {count} times 0 or 1.", _FIX)
    if offsets.dtype.kind not in "iu" or offsets.shape != (images + 1,):
        raise ResvitError(f"box_offsets of {name} is not {images + 1} whole numbers.", _FIX)
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ResvitError(f"box_offsets of {name} does not rise from 0 to {count}.", _FIX)
    small = boxes.astype(np.float32)
    kept = np.isfinite(small).all(axis=1) & (small[:, 2] > small[:, 0]) & (small[:, 3] > small[:, 1])
    notes = () if kept.all() else (f"{name} has {int((~kept).sum())} boxes without any area, which are left out",)
    return {
        "boxes": small[kept],
        "box_classes": classes[kept].astype(np.int64),
        "box_crowd": crowd[kept].astype(np.bool_),
        "box_offsets": np.concatenate([[0], np.cumsum(kept)])[offsets],
    }, notes
