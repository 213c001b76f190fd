"""Supervisely's format: ``img`` beside ``ann``, a JSON file for each picture, and ``meta.json`` above.

Described at https://docs.supervisely.com/data-organization/00_ann_format_navi. Classes are those of ``meta.json``, in
its order. Lines, points and graphs cover nothing, and are left out and counted.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from resvit_calibrate.readers.boxes.coco_file import shown
from resvit_calibrate.readers.boxes.outlines import require_drawable
from resvit_calibrate.readers.folders import files_below
from resvit_calibrate.readers.labelled.recognise import format_of
from resvit_calibrate.readers.labelled.regions import Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import (
    box_between,
    is_area,
    name_from,
    numbers_from,
    patch,
    patch_from_png,
    points_from,
    polygon,
    size_from,
    without_holes,
)
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, leads_to_file, read_outside

FORMAT = format_of(".json", (rb'"classTitle"\s*:',), "Supervisely's annotations")
_FIX = (
    "Supervisely's files are `ann/NAME.jpg.json` for `img/NAME.jpg`, with `size` and `objects` (classTitle, "
    "geometryType, points or bitmap); download them again in its own format."
)
_FILE_MOST = 512 << 20
_META = "meta.json"
_LEFT_OUT = ("point", "line", "graph", "cuboid", "polyline")


def supervisely_in(root: Path) -> Labelled:
    """The pictures of all data sets of a folder. Raises ``ResvitError`` for damaged files, and without pictures."""
    found, missing, bare = [], [], 0
    for name in sorted(files_below(root, ".", lambda name: name.lower().endswith(".json"))):
        path = PurePosixPath(name)
        if path.parent.name != "ann":
            continue
        picture = path.parent.with_name("img") / path.name.removesuffix(path.suffix)
        if not leads_to_file(root / picture):
            missing.append(name)
            continue
        entry = json_from_outside(read_outside(root / name, _FILE_MOST), str(root / name), _FIX)
        size = entry.get("size") if isinstance(entry, dict) else None
        objects = entry.get("objects") if isinstance(entry, dict) else None
        if not isinstance(size, dict) or not isinstance(objects, list):
            raise ResvitError(f"{root / name} has no `size`, or no list of `objects`.", _FIX)
        sides = size_from(size.get("height"), size.get("width"), str(root / name), _FIX)
        regions = [_region(one, sides, f"objects[{at}] of {root / name}") for at, one in enumerate(objects)]
        bare += regions.count(None)
        found.append(Picture(str(picture), sides, tuple(one for one in regions if one is not None)))
    if not found:
        raise ResvitError(f"{root} has no pictures in `img` beside `ann` ({len(missing)} files).", _FIX)
    notes = []
    if missing:
        notes.append(f"{len(missing)} files of {root} have no picture in `img`, and are left out: {shortened(missing)}")
    if bare:
        notes.append(f"{bare} lines, points and the like of {root} cover nothing, and are left out")
    return Labelled(root, root, tuple(found), _classes(root), tuple(notes))


def _classes(root: Path) -> tuple[str, ...]:
    """The classes by ``meta.json`` in the folder or the one above; none without."""
    path = next((folder / _META for folder in (root, root.parent) if leads_to_file(folder / _META)), None)
    if path is None:
        return ()
    held = json_from_outside(read_outside(path), str(path), _FIX)
    listed = held.get("classes") if isinstance(held, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ResvitError(f"{path} has no list `classes`.", _FIX)
    return tuple(dict.fromkeys(name_from(one.get("title"), f"a title of {path}", _FIX) for one in listed))


def _region(entry: Any, size: tuple[int, int], where: str) -> Region | None:
    """One object; None of one that covers nothing."""
    said = entry if isinstance(entry, dict) else {}
    kind = said.get("geometryType")
    name = name_from(said.get("classTitle"), f"{where}: classTitle", _FIX)
    if kind == "bitmap":
        bitmap = said["bitmap"] if isinstance(said.get("bitmap"), dict) else {}
        left, top = (round(value) for value in numbers_from(bitmap.get("origin"), 2, f"{where}: origin", _FIX))
        require_drawable(size, where)
        covered = patch_from_png(bitmap.get("data"), f"{where}: bitmap", _FIX, packed=True)
        return patch(name, covered, left, top, size)
    if kind in _LEFT_OUT:
        return None
    points = said["points"] if isinstance(said.get("points"), dict) else {}
    outer = points_from(points.get("exterior"), f"{where}: exterior", _FIX)
    if kind == "rectangle":
        if len(outer) != 2:
            raise ResvitError(f"{where} is a rectangle of {len(outer)} points, where it has two.", _FIX)
        return box_between(name, *outer)
    if kind != "polygon":
        raise ResvitError(f"{where} is of the type {shown(kind)}, which is not known.", _FIX)
    holes = points.get("interior") or []
    if not isinstance(holes, list):
        raise ResvitError(f"{where}: interior is {shown(holes)}.", _FIX)
    if not is_area(outer):
        return None
    inner = [points_from(hole, f"{where}: interior", _FIX) for hole in holes]
    region = polygon(name, outer)
    return without_holes(region, [hole for hole in inner if is_area(hole)], size, where) if inner else region
