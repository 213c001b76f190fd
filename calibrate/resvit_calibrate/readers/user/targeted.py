"""Pictures of a data set that is a Python object, with boxes, a mask or depths for each in the picture's own pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import UNSEEN, Look
from resvit_calibrate.images.targets import BoxTarget, MaskTarget, Target, TargetOptions, digest_of_target
from resvit_calibrate.readers.masks import renumbered, seen_in
from resvit_calibrate.readers.user.batch import TASKS, target_of
from resvit_calibrate.readers.user.objects import item_of, parts_of
from resvit_calibrate.readers.user.pictures import DatasetPixels, looked_at, values_of
from resvit_engines.errors import ResvitError


class TargetedDataset(DatasetPixels):
    """Items that are pictures with a target each; ``options`` say how targets are read."""

    def __init__(self, text: str, name: str, made: Any, options: TargetOptions) -> None:
        self._options = options
        self._moved: dict[int, int] | None = None
        super().__init__(text, name, made)
        self._kind = type(self._both(0)[1])
        self.task = TASKS[self._kind]
        self.num_classes = len(self.class_names) or options.classes

    def move(self, numbers: Mapping[int, int]) -> None:
        """Put every class under another number; pixels of those that ``numbers`` lacks are unlabelled."""
        self._moved = dict(numbers)

    def look(self, index: int) -> Look:
        """Digest one picture's values and its target."""
        values, target = self._both(index)
        classes = seen_in(target.classes) if isinstance(target, MaskTarget) else ()
        return looked_at(values)._replace(target=digest_of_target(target), classes=classes)

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> Target:
        """One picture's target, in its pixels."""
        del height, width
        target = self._both(index)[1]
        if seen.target and digest_of_target(target) != seen.target:
            raise self._changed(index)
        return target

    def _labels(self) -> npt.NDArray[np.int64] | None:
        return None

    def _both(self, index: int) -> tuple[npt.NDArray[Any], Target]:
        with self._lock:
            parts = parts_of(self._text, item_of(self._text, self._made, index), index)
            values = values_of(self._text, parts.image, index)
            if parts.known is None:
                raise ResvitError(
                    f"Item {index} of {self._text} has no target, and others have one.", "Give one for each, or none."
                )
            known = parts.known if isinstance(parts.known, (Mapping, *TASKS)) else _array_of(parts.known)
            target = target_of(f"Item {index} of {self._text}", known, values.shape[:2], self._options)
        if getattr(self, "_kind", type(target)) is not type(target):
            raise ResvitError(
                f"{self._text} gives targets of several kinds: item {index} has another.", "Give one kind."
            )
        highest = int(target.classes.max()) if isinstance(target, BoxTarget) and target.classes.size else 0
        if self.class_names and self._moved is None and highest >= len(self.class_names):
            raise ResvitError(
                f"Item {index} of {self._text} has the class {highest}, and {len(self.class_names)} have names.",
                "Classes count from 0: a background that takes number 0 has a name too.",
            )
        return values, self._numbered(target)

    def _numbered(self, target: Target) -> Target:
        """The target with its classes under the network's numbers."""
        if self._moved is None or not isinstance(target, (BoxTarget, MaskTarget)):
            return target
        if isinstance(target, MaskTarget):
            return MaskTarget(renumbered(target.classes, self._moved))
        lost = sorted(set(target.classes.tolist()) - self._moved.keys())
        if lost:
            raise ResvitError(f"{self._text} has boxes of the class {lost[0]}, which the class list lacks.", "Add it.")
        moved = np.array([self._moved[number] for number in target.classes.tolist()], np.int64)
        return BoxTarget(target.boxes, moved, target.crowd)


def is_targeted(known: Any) -> bool:
    """Whether what is known of an item is a target: a dictionary, a picture, or an array of two axes."""
    return isinstance(known, (Mapping, *TASKS)) or _array_of(known).ndim >= 2


def _array_of(known: Any) -> npt.NDArray[Any]:
    try:
        values = np.asarray(known)
        return values[0] if values.ndim == 3 and len(values) == 1 else values
    except (TypeError, ValueError, RuntimeError):
        return np.empty(0, object)
