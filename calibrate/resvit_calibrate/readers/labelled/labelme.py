"""labelme's annotations: a JSON file for each picture (https://github.com/wkentaro/labelme).

Shapes of one label with the same ``group_id`` are one object. A picture that is not there may lie in the JSON itself
(``imageData``): that is read then. Lines and points cover nothing, and are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from resvit_calibrate.images.pixels import BrokenImage, picture_in_json
from resvit_calibrate.readers.boxes.outlines import require_drawable
from resvit_calibrate.readers.folders import files_below, is_image
from resvit_calibrate.readers.labelled.recognise import format_of
from resvit_calibrate.readers.labelled.regions import OF_NO_CLASS, Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import (
    box_between,
    ellipse,
    is_area,
    name_from,
    number_from,
    patch,
    patch_from_png,
    points_from,
    polygon,
    size_from,
)
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside

FORMAT = format_of(
    ".json",
    (rb'"shapes"\s*:\s*\[|"imageData"\s*:\s*"', rb'"(imagePath|shape_type|imageData)"'),
    "labelme's annotations",
)
_FIX = (
    "labelme's files hold `shapes` (label, shape_type, points), `imagePath`, `imageHeight` and `imageWidth`; save them "
    "again with labelme."
)
_IGNORED = ("__ignore__", "_ignore_")
_FILE_MOST = 512 << 20
"""Bytes of a file, which may hold its picture."""


def labelme_in(root: Path) -> Labelled:
    """The pictures of a folder and those below that have a file of labelme's.

    Raises ``ResvitError`` for files that are damaged, and where no picture is there.
    """
    left_out = Counter[str]()
    names = sorted(files_below(root, ".", lambda name: name.lower().endswith(".json") or is_image(name), left_out))
    pictures = [name for name in names if not name.lower().endswith(".json")]
    by_name: dict[str, list[str]] = {}
    for name in pictures:
        by_name.setdefault(PurePosixPath(name).name, []).append(name)
    by_stem: dict[str, list[str]] = {}
    for name in pictures:
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    known, found, others, missing, bare = set(pictures), [], [], [], 0
    for name in names:
        if not name.lower().endswith(".json"):
            continue
        entry = json_from_outside(read_outside(root / name, _FILE_MOST), str(root / name), _FIX)
        if not isinstance(entry, dict) or not isinstance(entry.get("shapes"), list):
            others.append(name)
            continue
        file = _picture_of(name, entry, known, by_name, by_stem)
        if file is None and _holds_picture(root, name):
            file = name
        if file is None:
            missing.append(name)
            continue
        size = size_from(entry.get("imageHeight"), entry.get("imageWidth"), str(root / name), _FIX)
        regions, left = _regions(entry["shapes"], size, root / name)
        bare += left
        found.append(Picture(file, size, regions))
    if not found:
        raise ResvitError(
            f"None of the {len(missing)} files of labelme's in {root} has its picture there, or in itself: "
            f"{shortened(missing)}." if missing else f"{root} has no file of labelme's.",
            "Put the pictures beside the files, under the names that `imagePath` says.",
        )  # fmt: skip
    alone = sorted(known - {picture.file for picture in found})
    inside = [picture.file for picture in found if picture.file not in known]
    notes = [
        f"{len(files)} {what}: {shortened(files)}"
        for files, what in (
            (missing, f"files of labelme's in {root} have no picture there or in themselves, and are left out"),
            (others, f"JSON files of {root} are not labelme's, and are left out"),
            (alone, f"pictures of {root} have no file of labelme's, and are left out"),
            (inside, f"pictures of {root} are read out of labelme's files themselves (`imageData`)"),
        )
        if files
    ]
    if bare:
        notes.append(f"{bare} lines and points of {root} cover nothing, and are left out")
    return Labelled(root, root, tuple(found), notes=tuple(notes))


def _picture_of(
    name: str, entry: dict[str, Any], known: set[str], by_name: dict[str, list[str]], by_stem: dict[str, list[str]]
) -> str | None:
    """The picture that a file is about: by its path, by the name in it, or by the file's own name; None of neither."""
    above = PurePosixPath(name).parent
    said = entry.get("imagePath")
    called = PurePosixPath(said.replace("\\", "/")).name if isinstance(said, str) else ""
    for near in (str(above / called), _inside(above, said) if isinstance(said, str) else ""):
        if near in known:
            return near
    for several in (by_name.get(called, []), by_stem.get(PurePosixPath(name).stem, [])):
        beside = [file for file in several if PurePosixPath(file).parent == above]
        if len(beside or several) == 1:
            return (beside or several)[0]
    return None


def _inside(above: PurePosixPath, said: str) -> str:
    """A path relative to the file's folder, relative to the folder of all; "" of one that leads out of that."""
    parts: list[str] = []
    for part in (above / said.replace("\\", "/")).parts:
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _holds_picture(root: Path, name: str) -> bool:
    try:
        picture_in_json(read_outside(root / name, _FILE_MOST))
    except BrokenImage:
        return False
    return True


def _regions(shapes: list[Any], size: tuple[int, int], path: Path) -> tuple[tuple[Region, ...], int]:
    """The objects of one file, and how many of its shapes cover nothing."""
    found: list[Region] = []
    groups: dict[tuple[str, Any], int] = {}
    bare = 0
    for number, shape in enumerate(shapes):
        where = f"shapes[{number}] of {path}"
        if not isinstance(shape, dict):
            raise ResvitError(f"{where} is no shape.", _FIX)
        region = _region(shape, size, where)
        if region is None:
            bare += 1
            continue
        group = shape.get("group_id")
        place = groups.setdefault((region.name, group), len(found)) if isinstance(group, (int, str)) else len(found)
        if place == len(found):
            found.append(region)
        else:
            found[place] = _joined(found[place], region)
    return tuple(found), bare


def _joined(first: Region, second: Region) -> Region:
    """Two pieces of one object; the outline is that of both where both are polygons."""
    one, other = first.corners, second.corners
    corners = (min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3]))
    outlines = [_polygons(region) for region in (first, second)]
    whole = [*outlines[0], *outlines[1]] if all(outlines) else first.outline or second.outline
    return Region(first.name, corners, whole)


def _polygons(region: Region) -> list[Any]:
    left, top, right, bottom = region.corners
    if region.outline is None:
        return [[left, top, right, top, right, bottom, left, bottom]]
    return region.outline if isinstance(region.outline, list) else []


def _region(shape: dict[str, Any], size: tuple[int, int], where: str) -> Region | None:
    """One shape; None of one that covers nothing."""
    name = name_from(shape.get("label"), f"{where}: label", _FIX)
    name = OF_NO_CLASS if name in _IGNORED else name
    points = points_from(shape.get("points"), f"{where}: points", _FIX)
    kind = shape.get("shape_type") or "polygon"
    if kind in ("line", "linestrip", "point", "points"):
        return None
    if kind in ("polygon", "oriented_rectangle"):
        return polygon(name, points) if is_area(points) else None
    if kind == "rectangle" and len(points) == 4:
        return polygon(name, points)._replace(outline=None)
    if kind in ("rectangle", "circle", "mask") and len(points) != 2:
        raise ResvitError(f"{where} is a {kind} of {len(points)} points, where it has two.", _FIX)
    if kind == "rectangle":
        return box_between(name, *points)
    if kind == "circle":
        (x, y), edge = points
        radius = float(((edge[0] - x) ** 2 + (edge[1] - y) ** 2) ** 0.5)
        return ellipse(name, x, y, (radius, radius))
    if kind == "mask":
        require_drawable(size, where)
        left, top = (round(number_from(value, where, _FIX)) for value in points[0])
        return patch(name, patch_from_png(shape.get("mask"), f"{where}: mask", _FIX), left, top, size)
    raise ResvitError(f"{where} is of the type {str(kind)[:40]!r}, which is not known.", _FIX)
