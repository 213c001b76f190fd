"""An export of Label Studio as JSON (https://labelstud.io/guide/export), in its whole and in its short form.

Coordinates are percent of the picture's sides. Of a task that several people annotated, the first result that was not
cancelled counts, and the others are counted. Brushes and key points are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from resvit_calibrate.readers.labelled.places import located
from resvit_calibrate.readers.labelled.recognise import BEGINS_A_LIST, format_of
from resvit_calibrate.readers.labelled.regions import Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import (
    ellipse,
    is_area,
    name_from,
    number_from,
    points_from,
    polygon,
    size_from,
    turned_box,
)
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside

FORMAT = format_of(
    ".json",
    (
        BEGINS_A_LIST,
        rb'"from_name"\s*:|"original_width"\s*:',
        rb'"to_name"\s*:|"(rectangle|polygon|ellipse)labels"\s*:\s*\[',
    ),
    "an export of Label Studio",
)
_FIX = "Export it from Label Studio again, as JSON or as JSON-MIN, with the pictures' names in `data`."
_MOST_BYTES = 1 << 30
_KINDS = ("rectanglelabels", "polygonlabels", "ellipselabels")
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(.+)$")
"""Label Studio puts eight digits before the name of a file that was uploaded."""


def label_studio_from(path: Path) -> Labelled:
    """The pictures that a file names. Raises ``ResvitError`` for another file, and where no picture is there."""
    tasks = json_from_outside(read_outside(path, _MOST_BYTES), str(path), _FIX)
    if not isinstance(tasks, list):
        raise ResvitError(f"{path} is no list.", _FIX)
    rows: list[tuple[str, tuple[int, int], list[Region]]] = []
    bare = more = 0
    for number, task in enumerate(tasks):
        where = f"[{number}] of {path}"
        said = task if isinstance(task, dict) else {}
        results, others = _results(said, where)
        more += others
        size, regions = (0, 0), []
        for at, (kind, value, sizes) in enumerate(results):
            there = f"result {at} of {where}"
            region, size = _region(kind, value, sizes, there)
            bare += region is None
            regions += [region] if region is not None else []
        rows.append((_picture(said, where), size, regions))
    names = [name for name, _, _ in rows]
    found = located(path, names, _FIX, [_UPLOADED.sub(r"\1", name) for name in names])
    notes = list(found.notes)
    if more:
        notes.append(f"{more} results of {path} are further ones of a task: the first that was not cancelled counts")
    if bare:
        notes.append(f"{bare} results of {path} are neither boxes nor polygons, and are left out")
    kept = tuple(
        Picture(found.files[name], size, tuple(regions)) for name, size, regions in rows if name in found.files
    )
    return Labelled(path, found.root, kept, notes=tuple(notes))


def _picture(task: dict[str, Any], where: str) -> str:
    """The name of a task's picture, as its file was called."""
    data = task["data"] if isinstance(task.get("data"), dict) else task
    names = [data.get(key) for key in ("image", "img", "picture", "photo")]
    names += [value for value in data.values() if isinstance(value, str) and "/" in value]
    name = next((name for name in names if isinstance(name, str) and name.strip()), None)
    if name is None:
        raise ResvitError(f"{where} names no picture.", _FIX)
    return PurePosixPath(unquote(name.partition("?")[0] if "://" in name else name.rpartition("?d=")[2])).name


def _results(task: dict[str, Any], where: str) -> tuple[list[tuple[str, dict[str, Any], dict[str, Any]]], int]:
    """Kind, value and what holds the sizes of each result that counts, and how many annotations there are besides."""
    if "annotations" not in task and "completions" not in task:
        return list(_short(task)), 0
    listed = task.get("annotations", task.get("completions"))
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ResvitError(f"{where} has no list of `annotations`.", _FIX)
    counting = [one for one in listed if not one.get("was_cancelled")]
    results = counting[0].get("result") if counting else []
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise ResvitError(f"{where} has no list `result`.", _FIX)
    drawn = [one for one in results if isinstance(one.get("value"), dict)]
    return [(str(one.get("type")), one["value"], one) for one in drawn], max(len(counting) - 1, 0)


def _short(task: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for listed in task.values():
        for one in listed if isinstance(listed, list) else []:
            if isinstance(one, dict) and "original_width" in one:
                yield next((kind for kind in _KINDS if kind in one), "another"), one, one


def _region(
    kind: str, value: dict[str, Any], sizes: dict[str, Any], where: str
) -> tuple[Region | None, tuple[int, int]]:
    """One result, in pixels, and (height, width) of its picture; None of what is neither box nor polygon."""
    size = size_from(sizes.get("original_height"), sizes.get("original_width"), where, _FIX)
    if kind not in _KINDS:
        return None, size
    if not all(size):
        raise ResvitError(f"{where} does not say how large its picture is.", _FIX)
    labels = value.get(kind)
    if not isinstance(labels, list) or len(labels) != 1:
        raise ResvitError(f"{where} has {len(labels) if isinstance(labels, list) else 'no'} labels, not one.", _FIX)
    name = name_from(labels[0], f"{where}: {kind}", _FIX)
    down, across = size[0] / 100, size[1] / 100

    def told(*keys: str) -> list[float]:
        return [number_from(value.get(key), f"{where}: {key}", _FIX) for key in keys]

    if kind == "polygonlabels":
        points = [(x * across, y * down) for x, y in points_from(value.get("points"), where, _FIX)]
        return (polygon(name, points) if is_area(points) else None), size
    turned = number_from(value.get("rotation", 0), f"{where}: rotation", _FIX)
    if kind == "ellipselabels":
        x, y, wide, high = told("x", "y", "radiusX", "radiusY")
        return ellipse(name, x * across, y * down, (wide * across, high * down), turned), size
    x, y, width, height = told("x", "y", "width", "height")
    left, top = x * across, y * down
    # Label Studio turns a box around its first corner.
    return turned_box(name, (left, top, left + width * across, top + height * down), turned, (left, top)), size
