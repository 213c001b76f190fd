"""Semantic segmentation from COCO's panoptic format: PNGs whose colours number segments, and a file with their classes.

A segment's number is R + 256 G + 65536 B, and 0 is unlabelled (https://cocodataset.org/#format-data). Things and stuff
are classes alike, in the order of the categories' ids; which of two persons a pixel belongs to is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import BrokenImage
from resvit_calibrate.images.targets import IGNORED, MOST_CLASSES, TargetOptions
from resvit_calibrate.readers.boxes.coco_file import (
    FIX,
    MOST_BYTES,
    categories_of,
    id_of,
    images_of,
    parsed,
    shown,
    whole_number,
)
from resvit_calibrate.readers.folders import name_inside
from resvit_calibrate.readers.masks import MaskPixels, number_of_classes, renumbered
from resvit_calibrate.readers.paired import Pairs
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside
from resvit_engines.pictures.decode import opened

PREFIX = "panoptic_"
_MOST_SEGMENTS = 1 << 24


class _Segment(NamedTuple):
    """What is kept of a segment."""

    number: Any
    category: Any


class _Segments(NamedTuple):
    """What is kept of an annotation: one image's."""

    image: Any
    file: Any
    segments: Any


class PanopticMasks(MaskPixels):
    """Images with a PNG of segments each; ``segments`` by the PNG's path are the classes of its segments' numbers."""

    def __init__(
        self,
        pairs: Pairs,
        segments: Mapping[str, Mapping[int, int]],
        class_names: tuple[str, ...],
        options: TargetOptions,
    ) -> None:
        super().__init__(pairs, "segmentation", options, class_names)
        self.num_classes = number_of_classes(pairs.root, options, class_names)
        self._segments = segments

    def values(self, data: bytes, path: Path) -> npt.NDArray[np.generic]:
        """Decode a PNG and number its classes: int16 [H, W]."""
        with opened(data) as image:
            if image.format != "PNG" or image.mode not in ("RGB", "RGBA"):
                raise ValueError(f"it is {image.format} of mode {image.mode}, where segments are colours of a PNG")
            colours = np.array(image.convert("RGB")).astype(np.int32)
        numbers = colours @ np.array([1, 1 << 8, 1 << 16], np.int32)
        known = self._segments[str(path)]
        places, stored = np.unique(numbers, return_inverse=True)
        strange = [number for number in places.tolist() if number and number not in known]
        if strange:
            raise BrokenImage(f"it holds the segment {strange[0]}, which its annotation does not list")
        table = np.array([known.get(number, IGNORED) for number in places.tolist()], np.int16)
        found: npt.NDArray[np.int16] = table[stored.reshape(numbers.shape)]
        return found if self.moved is None else renumbered(found, self.moved)

    def _read(self, index: int) -> tuple[bytes, npt.NDArray[np.generic]]:
        data, values = super()._read(index)
        # The PNG alone does not tell the classes.
        return data + repr(sorted(self._segments[self.others[index]].items())).encode(), values


def panoptic_from(path: Path, folder: Path, options: TargetOptions) -> PanopticMasks:
    """The images of an annotation file in ``folder``, with the PNGs that lie in a folder called like the file.

    Raises ``ResvitError`` for what is no such file, segments of categories that do not exist, and no folder of PNGs.
    """
    found = parsed(path, _kept)
    ids, names, _ = images_of(path, found["images"])
    entries = [entry for entry in found["annotations"] if isinstance(entry, _Segments)]
    if not entries:
        raise ResvitError(
            f"{path} lists no segments (`segments_info`), as a panoptic file does.",
            "Name the file of boxes or outlines, `coco:FILE.json`, or the panoptic one.",
        )
    masks = path.with_suffix("")
    if not masks.is_dir():
        raise ResvitError(
            f"The PNGs of {path} are not in {masks}.", f"Put them, or a link to their folder, there: {masks.name}."
        )
    used = {whole_number(one.category) for entry in entries for one in _listed(entry) if isinstance(one, _Segment)}
    class_ids, titles, _ = categories_of(path, found["categories"], used)
    if len(titles) >= MOST_CLASSES:
        raise ResvitError(f"{path} has {len(titles)} categories.", f"Fewer than {MOST_CLASSES} can be read.")
    classes = {identity: place for place, identity in enumerate(class_ids)}
    others: dict[int, str] = {}
    segments: dict[str, dict[int, int]] = {}
    strays = 0
    for number, entry in enumerate(entries):
        where = f"annotations[{number}] of {path}"
        place = ids.get(id_of(entry.image, f"{where}: image_id"))
        if place is None:
            strays += 1
            continue
        file = str(masks / name_inside(entry.file, f"{where}: file_name", FIX))
        others[place], segments[file] = file, _classes_of(entry, classes, where)
    notes = [f"masks are the segments of {path}, things and stuff alike; what no segment covers is unlabelled"]
    if strays:
        notes.append(f"{path} has {strays} annotations of images that it does not list; they are left out")
    if bare := len(names) - len(others):
        notes.append(f"{path} lists {bare} images without segments, which are left out")
    kept = sorted(others)
    pairs = Pairs(folder, tuple(names[place] for place in kept), tuple(others[place] for place in kept), tuple(notes))
    return PanopticMasks(pairs, segments, titles, options)


def _kept(entry: dict[str, Any]) -> _Segment | _Segments | dict[str, Any]:
    if "segments_info" in entry and "image_id" in entry:
        return _Segments(entry["image_id"], entry.get("file_name"), entry["segments_info"])
    if "id" in entry and "category_id" in entry:
        return _Segment(entry["id"], entry["category_id"])
    return entry


def _listed(entry: _Segments) -> list[Any]:
    return entry.segments if isinstance(entry.segments, list) else []


def _classes_of(entry: _Segments, classes: Mapping[int, int], where: str) -> dict[int, int]:
    """The class of each segment's number of one image."""
    if not isinstance(entry.segments, list):
        raise ResvitError(f"{where}: segments_info is {shown(entry.segments)}, not a list.", FIX)
    found: dict[int, int] = {}
    for one in entry.segments:
        number = whole_number(one.number) if isinstance(one, _Segment) else None
        if number is None or not 0 < number < _MOST_SEGMENTS:
            raise ResvitError(f"{where} has a segment without a whole number from 1 as its id.", FIX)
        category = whole_number(one.category)
        if category is None or category not in classes:
            raise ResvitError(f"{where} is of the category {shown(one.category)}, which does not exist.", FIX)
        found[number] = classes[category]
    return found


def panoptic_file(path: Path) -> bool:
    """Whether an annotation file is of this format: by its name, or where a folder is called like it, by its content.

    Raises ``ResvitError`` where it cannot be read.
    """
    if path.name.startswith(PREFIX):
        return True
    return path.with_suffix("").is_dir() and b'"segments_info"' in read_outside(path, MOST_BYTES)
