"""Regions of pictures as tools for labelling draw them, and what becomes of them: boxes, or masks for segmentation.

Classes are numbered as ``classes.txt`` beside the pictures says, else as the format itself lists them, else in the
order of their names as texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from resvit_calibrate.images.pixels import BrokenImage, FilePixels
from resvit_calibrate.images.targets import IGNORED, MOST_CLASSES, TargetOptions
from resvit_calibrate.readers.boxes.outlines import BACKGROUND, DrawnMasks, require_drawable, usable_outline
from resvit_calibrate.readers.boxes.table import Box, BoxPixels, table_of
from resvit_calibrate.readers.paired import read_class_names, shortened
from resvit_engines.errors import ResvitError

Corners: TypeAlias = tuple[float, float, float, float]

OF_NO_CLASS = ""
"""Called so is what counts for nothing: KITTI's `DontCare`, labelme's `__ignore__`."""
_BEYOND = 0.5
"""By more than so many pixels a box reaches beyond its picture; less is rounding."""
_MOST = 100_000
"""Regions of one picture."""


class Region(NamedTuple):
    """One object: its class, x1, y1, x2, y2 of the box around it, and polygons or run lengths as COCO has them.

    ``outline`` is None of what was drawn as an upright box. ``crowd`` is one around many objects.
    """

    name: str
    corners: Corners
    outline: Any = None
    crowd: bool = False


class Picture(NamedTuple):
    """A file relative to the folder of pictures, (height, width), 0 where nothing says, and what is known of it."""

    file: str
    size: tuple[int, int]
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Labelled:
    """The pictures of one part: ``path`` says where their regions were read, ``root`` is the folder of pictures.

    ``classes`` are those that the format lists, in its order. Where they are ``relative``, regions are in shares of the
    picture's width and height.
    """

    path: Path
    root: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    relative: bool = False


def pixels_of(parts: Sequence[Labelled], options: TargetOptions) -> list[FilePixels]:
    """Pictures with boxes, or with masks where outlines are asked for; the classes of all parts are numbered alike.

    Raises:
        ResvitError: for no region at all, classes that ``classes.txt`` lacks, a picture that is described twice and
            differently, and masks where only boxes were drawn.
    """
    whole = [_once(part) for part in parts]
    names = _class_names(whole)
    if options.outlines and not any(one.outline for part in whole for item in part.pictures for one in item.regions):
        raise ResvitError(
            f"{whole[0].path} has upright boxes alone, and masks are drawn from outlines.",
            "Give polygons, or --task detection for the boxes.",
        )
    return [_masks(part, names, options) if options.outlines else _boxes(part, names) for part in whole]


def _once(part: Labelled) -> Labelled:
    """Each picture once. Raises ``ResvitError`` where two entries say different things of one, and for too many."""
    found: dict[str, Picture] = {}
    again = 0
    differing: list[str] = []
    for picture in part.pictures:
        if len(picture.regions) > _MOST:
            raise ResvitError(
                f"{part.path} has {len(picture.regions)} regions of {picture.file}.", f"{_MOST} of one can be read."
            )
        before = found.setdefault(picture.file, picture)
        again += before is not picture
        if before is not picture and sorted(map(repr, before.regions)) != sorted(map(repr, picture.regions)):
            differing.append(picture.file)
    if differing:
        raise ResvitError(
            f"{part.path} describes {len(differing)} pictures more than once, and differently: {shortened(differing)}.",
            "Keep one description of each.",
        )
    notes = (f"{again} entries of {part.path} say again what others say",) if again else ()
    return Labelled(
        part.path, part.root, tuple(found.values()), part.classes, (*part.notes, *notes, *_doubts(part)), part.relative
    )


def _doubts(part: Labelled) -> tuple[str, ...]:
    """That the same region of a picture has two classes."""
    several: list[str] = []
    for picture in part.pictures:
        held: dict[Corners, set[str]] = {}
        for region in picture.regions:
            held.setdefault(region.corners, set()).add(region.name)
        several += [picture.file for names in held.values() if len(names - {OF_NO_CLASS}) > 1]
    if not several:
        return ()
    files = list(dict.fromkeys(several))
    return (f"{part.path} has {len(several)} boxes that stand twice under different classes (in {shortened(files)})",)


def _class_names(parts: Sequence[Labelled]) -> tuple[str, ...]:
    occurring = sorted({one.name for part in parts for item in part.pictures for one in item.regions} - {OF_NO_CLASS})
    if not occurring:
        raise ResvitError(
            f"{shortened([str(part.path) for part in parts])} has no region with a class.", "Label some pictures."
        )
    listed = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    where, order = "list of classes", listed
    for folder in dict.fromkeys(folder for part in parts for folder in (part.path.parent, part.root, part.root.parent)):
        if own := read_class_names(folder):
            where, order = f"{folder / 'classes.txt'}", own
            break
    unknown = [name for name in occurring if name not in order]
    if order and unknown:
        raise ResvitError(
            f"{parts[0].path} has regions of {len(unknown)} classes that the {where} lacks: {shortened(unknown)}.",
            "Add them, in the order of the network's classes.",
        )
    return order or tuple(occurring)


def _boxes(part: Labelled, names: tuple[str, ...]) -> BoxPixels:
    numbers: dict[str, tuple[int, ...]] = {name: (number,) for number, name in enumerate(names)}
    numbers[OF_NO_CLASS] = tuple(range(len(names)))  # of every class there is something that is not to be counted
    rows, cut, ignored = [], 0, 0
    dropped = Counter[str]()
    for picture in part.pictures:
        height, width = (1, 1) if part.relative else picture.size
        boxes = []
        for region in picture.regions:
            left, top, right, bottom = region.corners
            held = (max(left, 0.0), max(top, 0.0), min(right, width or right), min(bottom, height or bottom))
            small = np.array(held, np.float32)  # as it is stored: a sliver can lose its area to rounding
            if small[2] <= small[0] or small[3] <= small[1]:
                dropped[picture.file] += 1
                continue
            slack = _BEYOND / 1000 if part.relative else _BEYOND
            cut += max(abs(one - other) for one, other in zip(held, region.corners, strict=True)) > slack
            ignored += region.name == OF_NO_CLASS
            crowd = region.crowd or region.name == OF_NO_CLASS
            boxes += [Box(number, held, crowd) for number in numbers[region.name]]
        rows.append((picture.file, picture.size, boxes))
    notes = list(part.notes)
    if cut:
        notes.append(f"{part.path} has {cut} boxes that reach beyond their picture; they are cut at its edges")
    if dropped:
        notes.append(
            f"{sum(dropped.values())} boxes of {part.path} have no area inside their picture and are left out "
            f"(in {shortened([*dropped])})"
        )
    if ignored:
        notes.append(f"{ignored} regions of {part.path} are of no class: whatever is found there counts for nothing")
    return BoxPixels(table_of(part.path, rows, names, notes, relative=part.relative), part.root)


def _masks(part: Labelled, names: tuple[str, ...], options: TargetOptions) -> DrawnMasks:
    """Masks by outlines; what none covers is the background, and an upright box covers all of itself."""
    named = next((name for name in names if name.lower() in BACKGROUND), None)
    classes = (named or BACKGROUND[0], *(name for name in names if name != named))
    if len(classes) >= MOST_CLASSES:
        raise ResvitError(f"{part.path} has {len(classes)} classes.", f"Fewer than {MOST_CLASSES} can be read.")
    numbers = {**{name: number for number, name in enumerate(classes)}, OF_NO_CLASS: IGNORED}
    found, sizes, upright = [], [], 0
    for picture in part.pictures:
        size = picture.size if picture.size != (0, 0) else _size_of(part, picture)
        if size is None:
            continue
        where = f"{picture.file} of {part.path}"
        require_drawable(size, where)
        drawn = []
        for region in picture.regions:
            left, top, right, bottom = region.corners
            outline = region.outline or [[left, top, right, top, right, bottom, left, bottom]]
            drawn.append((numbers[region.name], usable_outline(outline, *size, where)))
            upright += not region.outline
        found.append(drawn)
        sizes.append((picture.file, size))
    notes = [
        *part.notes,
        f"masks are drawn from the outlines of {part.path}; what none covers is class 0, {classes[0]}",
    ]
    if upright:
        notes.append(f"{upright} regions of {part.path} are upright boxes, and all that they cover is of their class")
    if lost := len(part.pictures) - len(sizes):
        notes.append(f"{lost} pictures of {part.path} cannot be read for their size, and are left out")
    if not sizes:
        raise ResvitError(f"No picture of {part.path} can be read for its size.", "Replace the damaged files.")
    shape = np.array([size for _, size in sizes], np.int64)
    return DrawnMasks(part.root, [file for file, _ in sizes], shape, found, classes, options, tuple(notes))


def _size_of(part: Labelled, picture: Picture) -> tuple[int, int] | None:
    """(height, width) of a picture as it is shown, by its own header; None where it is damaged."""
    try:
        look = FilePixels("", part.root, [picture.file], None).look(0)
    except BrokenImage:
        return None
    height, width = look.stored
    return (width, height) if look.orientation >= 5 else (height, width)
