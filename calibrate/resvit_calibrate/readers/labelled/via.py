"""Annotations of the VGG Image Annotator (https://www.robots.ox.ac.uk/~vgg/software/via): one JSON or CSV file.

Read are projects and exports of VIA 1 and 2. The class of a region is its attribute, or the one of several that is
called like a class; where no region has any attribute, as in data of one class, all are of the class `object`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from resvit_calibrate.readers.boxes.coco_file import shown
from resvit_calibrate.readers.labelled.places import located
from resvit_calibrate.readers.labelled.recognise import format_of
from resvit_calibrate.readers.labelled.regions import OF_NO_CLASS, Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import (
    box_between,
    ellipse,
    is_area,
    name_from,
    number_from,
    polygon,
)
from resvit_calibrate.readers.lists.rows import rows_of
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside

FORMAT = format_of(
    ".json", (rb'"(shape_attributes|_via_[a-z_]+)"\s*:',), "annotations of the VGG Image Annotator (VIA)"
)
CSV_FORMAT = format_of(
    ".csv", (rb"\A\W*#?filename\"?,.*\bregion_shape_attributes",), "annotations of the VGG Image Annotator (VIA)"
)
_FIX = (
    "VIA's files hold `filename` and `regions` with `shape_attributes` and `region_attributes`; export them again "
    "(Annotation, Export Annotations as json)."
)
_MOST_BYTES = 1 << 30
_CLASSES = ("class", "label", "category", "name", "type", "object")
"""Attributes that hold a class, in lower case, where there are several."""
_ONLY = "object"
_POINTS = ("point", "polyline", "line")
_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")


class _Region(NamedTuple):
    """The picture's name, and two objects that are not looked at yet: None of a picture without regions."""

    picture: str
    shape: Mapping[str, Any] | None
    attributes: Mapping[str, Any]
    where: str


def via_from(path: Path) -> Labelled:
    """The pictures that a file names. Raises ``ResvitError`` for another file, and where no picture is there."""
    entries = list(_of_csv(path) if path.suffix.lower() == ".csv" else _of_json(path))
    called = _attribute(path, [entry for entry in entries if entry.shape is not None])
    pictures: dict[str, list[Region]] = {}
    bare = unsaid = 0
    for entry in entries:
        regions = pictures.setdefault(entry.picture, [])
        if entry.shape is None:
            continue
        name = _class_of(entry, called)
        region = _region(name, entry.shape, entry.where)
        bare += region is None
        unsaid += region is not None and name == OF_NO_CLASS
        regions += [region] if region is not None else []
    found = located(path, list(pictures), _FIX)
    notes = list(found.notes)
    if called is None:
        notes.append(f"no region of {path} has an attribute: all are of one class, `{_ONLY}`")
    if unsaid:
        notes.append(f"{unsaid} regions of {path} have no `{called}`")
    if bare:
        notes.append(f"{bare} lines and points of {path} cover nothing, and are left out")
    kept = tuple(Picture(file, (0, 0), tuple(pictures[name])) for name, file in found.files.items())
    return Labelled(path, found.root, kept, notes=tuple(notes))


def _of_json(path: Path) -> Iterator[_Region]:
    held = json_from_outside(read_outside(path, _MOST_BYTES), str(path), _FIX)
    held = held.get("_via_img_metadata", held) if isinstance(held, dict) else held
    if not isinstance(held, dict):
        raise ResvitError(f"{path} is not an object of pictures.", _FIX)
    for key, entry in held.items():
        where = f"{key[:60]!r} of {path}"
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise ResvitError(f"{where} has no `filename`.", _FIX)
        regions = entry.get("regions", [])
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(regions, list):
            raise ResvitError(f"{where}: regions is {shown(regions)}.", _FIX)
        yield _Region(entry["filename"], None, {}, where)
        for number, region in enumerate(regions):
            if not isinstance(region, dict) or not isinstance(region.get("shape_attributes"), dict):
                raise ResvitError(f"regions[{number}] of {where} has no `shape_attributes`.", _FIX)
            attributes = region.get("region_attributes") or {}
            if not isinstance(attributes, dict):
                raise ResvitError(f"regions[{number}] of {where}: region_attributes is {shown(attributes)}.", _FIX)
            yield _Region(entry["filename"], region["shape_attributes"], attributes, f"regions[{number}] of {where}")


def _of_csv(path: Path) -> Iterator[_Region]:
    rows = rows_of(path)
    first = next(rows, None)
    titles = [field.strip().lstrip("#") for field in first.fields] if first is not None else []
    if not all(title in titles for title in _COLUMNS):
        raise ResvitError(f"{path} lacks one of the columns {', '.join(_COLUMNS)}.", _FIX)
    places = [titles.index(title) for title in _COLUMNS]
    for row in rows:
        where = f"line {row.line} of {path}"
        if len(row.fields) <= max(places):
            raise ResvitError(f"{where} has {len(row.fields)} columns.", _FIX)
        name, *texts = (row.fields[place] for place in places)
        shape, attributes = (
            json_from_outside(text.encode("utf-8", "surrogatepass"), where, _FIX) if text else {} for text in texts
        )
        if not isinstance(shape, dict) or not isinstance(attributes, dict):
            raise ResvitError(f"{where} has attributes that are no objects.", _FIX)
        yield _Region(name, shape or None, attributes, where)


def _attribute(path: Path, entries: list[_Region]) -> str | None:
    """The attribute that is the class; None where there are none. Raises ``ResvitError`` where it could be several."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.attributes))
    if not names:
        return None
    fitting = [name for wanted in _CLASSES for name in names if name.lower() == wanted]
    if len(names) > 1 and not fitting:
        raise ResvitError(
            f"Nothing says which attribute of {path} is the class: {shortened(names)}.",
            "Call that attribute `class` in VIA.",
        )
    return fitting[0] if fitting else names[0]


def _class_of(entry: _Region, called: str | None) -> str:
    """The class of a region; of no class where it lacks what others have."""
    if called is None:
        return _ONLY
    value = entry.attributes.get(called)
    if isinstance(value, dict):  # a checkbox: each name, and whether it is chosen
        chosen = [name for name, told in value.items() if told is True]
        if len(chosen) > 1:
            raise ResvitError(f"{entry.where} is of several classes: {shortened(chosen)}.", "Choose one of them.")
        value = chosen[0] if chosen else None
    if value is None or value in ("", "undefined"):
        return OF_NO_CLASS
    return name_from(value, f"{entry.where}: {called}", _FIX)


def _region(name: str, shape: Mapping[str, Any], where: str) -> Region | None:
    """One region; None of one that covers nothing."""

    def told(*keys: str) -> list[float]:
        return [number_from(shape.get(key), f"{where}: {key}", _FIX) for key in keys]

    kind = shape.get("name")
    if kind == "rect":
        x, y, width, height = told("x", "y", "width", "height")
        return box_between(name, (x, y), (x + width, y + height))
    if kind == "circle":
        x, y, radius = told("cx", "cy", "r")
        return ellipse(name, x, y, (radius, radius))
    if kind == "ellipse":
        x, y, wide, high = told("cx", "cy", "rx", "ry")
        turned = number_from(shape.get("theta", 0.0), f"{where}: theta", _FIX)  # in radians
        return ellipse(name, x, y, (wide, high), turned * _DEGREES)
    if kind == "polygon":
        across, down = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(across, list) or not isinstance(down, list) or len(across) != len(down):
            raise ResvitError(f"{where} has not as many `all_points_x` as `all_points_y`.", _FIX)
        points = [(number_from(x, where, _FIX), number_from(y, where, _FIX)) for x, y in zip(across, down, strict=True)]
        return polygon(name, points) if is_area(points) else None
    if kind in _POINTS:
        return None
    raise ResvitError(f"{where} is of the shape {shown(kind)}, which is not known.", _FIX)


_DEGREES = 57.29577951308232
"""In one radian."""
