"""Semantic segmentation: a folder `masks` beside the images, or masks in an array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import BrokenImage
from resvit_calibrate.images.targets import IGNORED, MOST_CLASSES, MaskTarget, TargetOptions
from resvit_calibrate.readers.colours import ColourTable, colour_table
from resvit_calibrate.readers.paired import PairedPixels, Part, grey_values, pairs_in, read_class_names
from resvit_calibrate.readers.pairs.names import SUFFIXES
from resvit_calibrate.readers.pairs.values import OBJECT, are_binary
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import opened

_WRITTEN = "class numbers, as a palette or grey image, or put a table of colours beside (class_dict.csv: name,r,g,b)"
_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N"})


class MaskPixels(PairedPixels):
    """Images with a mask each: palette or grey images whose value is the class, whatever colour it shows.

    ``moved`` gives the class of each value where the two differ; values that it lacks are unlabelled.
    """

    moved: Mapping[int, int] | None = None
    colours: ColourTable | None = None
    """Which class a colour is; grey masks hold class numbers in any case."""
    binary: bool = False
    """Whether 0 is the background and 255 the object, and no other value occurs."""

    def values(self, data: bytes, path: Path) -> npt.NDArray[np.generic]:
        """Decode a mask and number its classes: int16 [H, W]."""
        del path
        stored: npt.NDArray[np.generic] | None = None if self.colours is None else _classes_by(self.colours, data)
        if stored is None:
            stored = grey_values(data, _MODES, _WRITTEN)
        if self.binary:
            return _of_two_classes(stored)
        found = classes_of(stored, self.options)
        return found if self.moved is None else renumbered(found, self.moved)

    def made(self, values: npt.NDArray[np.generic]) -> MaskTarget:
        """Classes [H, W] as a target."""
        return MaskTarget(values.astype(np.int16, copy=False))

    def seen(self, values: npt.NDArray[np.generic]) -> tuple[int, ...]:
        """The classes in one mask."""
        return seen_in(values)


def pixels_from_masks(part: Part, options: TargetOptions, root: Path) -> MaskPixels:
    """Pair images with masks; raises ``ResvitError`` where nothing matches.

    What classes and colours are called is in a file of ``part``'s folder or of ``root``, the folder of all parts.
    """
    colours = colour_table(part.root, root)
    named = colours.names if colours is not None else read_class_names(part.root) or read_class_names(root)
    pixels = MaskPixels(pairs_in(part, SUFFIXES), "segmentation", options, named)
    pixels.colours = colours
    pixels.num_classes = number_of_classes(part.root, options, named)
    if colours is None and OBJECT in options.ignore and pixels.num_classes in (None, 2):
        pixels.binary = are_binary([pixels.root / name for name in pixels.others])
    if pixels.binary:
        pixels.num_classes = 2
        told = (
            f"masks of {part.root / part.others} hold 0 and 255 alone: 0 is read as the background, 255 as the object"
        )
        pixels.notes = (*pixels.notes, told)
    return pixels


def _of_two_classes(values: npt.NDArray[np.generic]) -> npt.NDArray[np.int16]:
    """0 and 1 [H, W] from 0 and 255. Raises ``BrokenImage`` for any other value."""
    if not np.isin(values, (0, OBJECT)).all():
        other = int(values[~np.isin(values, (0, OBJECT))].ravel()[0])
        raise BrokenImage(f"it holds the value {other}, and the other masks 0 and 255 alone")
    return np.asarray(values == OBJECT, np.int16)


def _classes_by(table: ColourTable, data: bytes) -> npt.NDArray[np.int64] | None:
    """The classes [H, W] of a mask's colours, upright; None of one that holds numbers."""
    from PIL import ImageOps

    with opened(data) as image:
        if image.format == "JPEG" or image.mode not in ("RGB", "RGBA", "P"):
            return None
        palette = image.mode == "P"
        colours = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    try:
        return table.classes_of(colours)
    except BrokenImage:
        if palette:  # of other colours than the table's, such as VOC's for unlabelled: its numbers are the classes
            return None
        raise


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
