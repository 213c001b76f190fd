"""Semantic segmentation from COCO's outlines: polygons and run lengths, compressed and not.

A polygon covers the pixels that COCO's own tool gives it (``pycocotools.mask.frPyObjects``). Where outlines of two
classes overlap, nothing says which is seen: those pixels are unlabelled, as in torchvision's references. What no
outline covers is the background, class 0, and categories follow in the order of their ids; where the first of them is
called so, there is no other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.targets import IGNORED, MOST_CLASSES, TargetOptions
from resvit_calibrate.readers.boxes.coco_file import FIX, categories_of, id_of, images_of, parsed, shown, whole_number
from resvit_calibrate.readers.masks import MaskPixels, number_of_classes, renumbered
from resvit_calibrate.readers.paired import Pairs
from resvit_engines.errors import ResvitError

_BACKGROUND = ("background", "__background__", "_background_")
_MOST_PIXELS = 1 << 28
_BEYOND = 4
"""By how many sides of its image an outline may lie beside it: COCO's tool takes memory by an outline's length."""


class _Outline(NamedTuple):
    """What is kept of an annotation."""

    image: Any
    category: Any
    segmentation: Any


class CocoMasks(MaskPixels):
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


def coco_masks_from(path: Path, folder: Path, options: TargetOptions) -> CocoMasks:
    """The images of an annotation file with masks by its outlines.

    Raises ``ResvitError`` for what is no such file, no outline at all, one that is none, and images without size.
    """
    found = parsed(path, _kept)
    ids, names, sizes = images_of(path, found["images"])
    used = {whole_number(entry.category) for entry in found["annotations"] if isinstance(entry, _Outline)}
    class_ids, titles, _ = categories_of(path, found["categories"], used)
    named = next((place for place, title in enumerate(titles) if title.lower() in _BACKGROUND), None)
    if named not in (None, 0):
        raise ResvitError(
            f"{path} has a category called {titles[named or 0]}, which is not the first.", "Give it the lowest id."
        )
    shift = 0 if named == 0 else 1
    class_names = titles if named == 0 else ("background", *titles)
    if len(class_names) >= MOST_CLASSES:
        raise ResvitError(f"{path} has {len(class_names)} categories.", f"Fewer than {MOST_CLASSES} can be read.")
    numbers = {identity: place + shift for place, identity in enumerate(class_ids)}
    outlines: list[list[tuple[int, Any]]] = [[] for _ in names]
    strays = bare = 0
    for number, entry in enumerate(found["annotations"]):
        where = f"annotations[{number}] of {path}"
        if not isinstance(entry, _Outline):
            raise ResvitError(f"{where} has no `image_id`.", FIX)
        place = ids.get(id_of(entry.image, f"{where}: image_id"))
        if place is None or not entry.segmentation:
            strays, bare = strays + (place is None), bare + (place is not None)
            continue
        category = whole_number(entry.category)
        if category not in numbers:
            raise ResvitError(f"{where} is of the category {shown(entry.category)}, which does not exist.", FIX)
        height, width = sizes[place].tolist()
        if not 0 < height * width <= _MOST_PIXELS:
            raise ResvitError(
                f"{path} says of {names[place]} that it is {height}x{width} pixels, and outlines need its size.",
                "Write `height` and `width` of every image.",
            )
        outlines[place].append((numbers[category], _usable(entry.segmentation, height, width, where)))
    if not any(outlines):
        raise ResvitError(
            f"{path} has no outlines (`segmentation`), which masks are drawn from.",
            "Give annotations with polygons or run lengths, or --task detection for boxes.",
        )
    notes = [
        f"masks are drawn from the outlines of {path}" + ("; what none covers is class 0, background" if shift else "")
    ]
    if strays:
        notes.append(f"{path} has {strays} annotations of images that it does not list; they are left out")
    if bare:
        notes.append(f"{path} has {bare} annotations without an outline, which are left out of the masks")
    sizeless = [place for place in range(len(names)) if not sizes[place].all()]
    kept = [place for place in range(len(names)) if sizes[place].all()]
    if sizeless:
        notes.append(f"{path} gives no size of {len(sizeless)} images without outlines, which are left out")
    return CocoMasks(
        folder, [names[i] for i in kept], sizes[kept], [outlines[i] for i in kept], class_names, options, tuple(notes)
    )


def drawn_classes(
    outlines: Sequence[tuple[int, Any]], height: int, width: int, background: int
) -> npt.NDArray[np.int16]:
    """The class of each pixel: int16 [H, W], -1 where outlines of two classes overlap."""
    drawn = np.full((height, width), background, np.int16)
    taken = np.zeros((height, width), np.bool_)
    for number, outline in outlines:
        covered = _covered(outline, height, width)
        drawn[covered & taken & (drawn != number)] = IGNORED
        drawn[covered & ~taken] = number
        taken |= covered
    return drawn


def _kept(entry: dict[str, Any]) -> _Outline | dict[str, Any]:
    if "image_id" in entry and "category_id" in entry:
        return _Outline(entry["image_id"], entry["category_id"], entry.get("segmentation"))
    return entry


def _usable(outline: Any, height: int, width: int, where: str) -> Any:
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


def _covered(outline: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    if isinstance(outline, dict):
        lengths = np.array(outline["counts"], np.int64)
        runs = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return np.asarray(runs.reshape(width, height).T)  # runs go down the columns
    from pycocotools import mask

    drawn = mask.decode(mask.frPyObjects(outline, height, width))
    return np.asarray(drawn.any(axis=2))
