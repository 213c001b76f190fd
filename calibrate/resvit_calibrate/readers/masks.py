"""Semantic segmentation: a folder `masks` beside the images, or masks in an array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import BrokenImage
from resvit_calibrate.images.targets import IGNORED, MOST_CLASSES, MaskTarget, TargetOptions
from resvit_calibrate.readers.paired import PairedPixels, Part, grey_values, pairs_in
from resvit_engines.errors import ResvitError

SUFFIXES = (".png", ".bmp", ".gif", ".pgm", ".tif", ".tiff")
_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N"})


class MaskPixels(PairedPixels):
    """Images with a mask each: palette or grey images whose value is the class, whatever colour it shows.

    ``moved`` gives the class of each value where the two differ; values that it lacks are unlabelled.
    """

    moved: Mapping[int, int] | None = None

    def values(self, data: bytes, path: Path) -> npt.NDArray[np.generic]:
        """Decode a mask and number its classes: int16 [H, W]."""
        del path
        found = classes_of(grey_values(data, _MODES, "class numbers, as a palette or grey image"), self.options)
        return found if self.moved is None else renumbered(found, self.moved)

    def made(self, values: npt.NDArray[np.generic]) -> MaskTarget:
        """Classes [H, W] as a target."""
        return MaskTarget(values.astype(np.int16, copy=False))

    def seen(self, values: npt.NDArray[np.generic]) -> tuple[int, ...]:
        """The classes in one mask."""
        return seen_in(values)


def pixels_from_masks(part: Part, options: TargetOptions, class_names: tuple[str, ...]) -> MaskPixels:
    """Pair images with masks; raises ``ResvitError`` where nothing matches."""
    pixels = MaskPixels(pairs_in(part, SUFFIXES), "segmentation", options, class_names)
    pixels.num_classes = number_of_classes(part.root, options, class_names)
    return pixels


def renumbered(classes: npt.NDArray[np.int16], moved: Mapping[int, int]) -> npt.NDArray[np.int16]:
    """Classes [H, W] under other numbers; unlabelled stays so, and becomes what ``moved`` lacks."""
    table = np.full(MOST_CLASSES + 1, IGNORED, np.int16)  # the last is that of IGNORED, -1
    for number, other in moved.items():
        table[number] = other
    return np.asarray(table[classes])


def number_of_classes(root: Path, options: TargetOptions, class_names: tuple[str, ...]) -> int | None:
    """How many classes there are said to be; raises ``ResvitError`` where that is said twice and differently."""
    if class_names and options.classes not in (None, len(class_names)):
        raise ResvitError(
            f"{root} names {len(class_names)} classes, but {options.classes} were asked for.",
            "Leave one of the two out, or make them agree.",
        )
    return len(class_names) or options.classes


def classes_of(values: npt.NDArray[np.generic], options: TargetOptions) -> npt.NDArray[np.int16]:
    """Number the classes of stored values [H, W]: int16, -1 for the values that mean "unlabelled"."""
    numbers = values.astype(np.int64)
    ignored = (numbers < 0) | np.isin(numbers, options.ignore)
    numbers[ignored] = IGNORED
    if numbers.size and int(numbers.max()) >= MOST_CLASSES:
        raise BrokenImage(f"it holds the class {numbers.max()}; classes end at {MOST_CLASSES - 1}")
    return numbers.astype(np.int16)


def seen_in(classes: npt.NDArray[np.generic]) -> tuple[int, ...]:
    """Which classes int16 [H, W] holds, in order."""
    counts = np.bincount(classes.astype(np.int64).ravel() + 1)
    return tuple((np.flatnonzero(counts[1:])).tolist())
