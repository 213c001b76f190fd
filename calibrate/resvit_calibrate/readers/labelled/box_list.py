"""Boxes by a CSV list, a line each, whose first line names the columns.

Open Images (`ImageID,LabelName,XMin,XMax,YMin,YMax`: shares of the picture, classes as in
``class-descriptions-boxable.csv``), and lists as for TensorFlow's detectors
(`filename,width,height,class,xmin,ymin,xmax,ymax`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from resvit_calibrate.readers.labelled.places import located
from resvit_calibrate.readers.labelled.recognise import format_of
from resvit_calibrate.readers.labelled.regions import Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import name_from, number_from, size_from
from resvit_calibrate.readers.lists.rows import BoxColumns, box_columns, rows_of
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file

FORMAT = format_of(
    ".csv .tsv",
    tuple(rb"(?i)\A(?:.*[,;\t])?\W*%s\W*(?:[,;\t]|\s*$)" % name for name in (rb"x_?(?:min|1)", rb"y_?(?:max|2)")),
    "a list of boxes",
)
_FIX = (
    "Write a first line with the columns file, class, xmin, ymin, xmax, ymax, and below it a line for each box: "
    "pixels, or shares of the picture (0 to 1) in all lines."
)
_DESCRIPTIONS = ("class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv", "class-descriptions.csv")
_SLACK = 1e-3


class _Row(NamedTuple):
    name: str
    size: tuple[int, int]
    region: Region | None
    """None where the line says that its picture shows nothing."""


def boxes_from(path: Path) -> Labelled:
    """The pictures that a list names. Raises ``ResvitError`` for lines that are none, and where no picture is there."""
    lines = rows_of(path)
    first = next(lines, None)
    columns = box_columns(first) if first is not None else None
    if columns is None:
        raise ResvitError(f"{path} does not say which of its columns are file, class and corners.", _FIX)
    rows = []
    for line in lines:
        where = f"line {line.line} of {path}"
        if len(line.fields) <= columns.last:
            raise ResvitError(f"{where} has {len(line.fields)} columns.", _FIX)
        rows.append(_row(line.fields, columns, where))
    if not rows:
        raise ResvitError(f"{path} lists no box.", _FIX)
    relative = columns.shares or all(max(row.region.corners) <= 1 + _SLACK for row in rows if row.region is not None)
    if columns.shares and (beyond := [row.name for row in rows if row.region and max(row.region.corners) > 1 + _SLACK]):
        raise ResvitError(
            f"{path} has {len(beyond)} boxes beyond 1 (in {shortened(beyond)}): these are no shares of a picture.", _FIX
        )
    pictures: dict[str, list[_Row]] = {}
    for row in rows:
        pictures.setdefault(row.name, []).append(row)
    for name, held in pictures.items():
        if len(sizes := {row.size for row in held}) > 1:
            raise ResvitError(f"{path} gives {name} {len(sizes)} different sizes.", "Correct the lines.")
    found = located(path, list(pictures), _FIX)
    called = _names_beside(path) if columns.shares else {}
    kept = tuple(
        Picture(
            file,
            (0, 0) if relative else pictures[name][0].size,
            tuple(
                row.region._replace(name=called.get(row.region.name, row.region.name))
                for row in pictures[name]
                if row.region is not None
            ),
        )
        for name, file in found.files.items()
    )
    notes = found.notes if not relative else (*found.notes, f"boxes of {path} are in shares of their pictures")
    return Labelled(path, found.root, kept, notes=notes, relative=relative)


def _row(fields: tuple[str, ...], columns: BoxColumns, where: str) -> _Row:
    corners = [fields[place] for place in columns.corners]
    size = (0, 0)
    if columns.size is not None and all(sides := [fields[place] for place in columns.size]):
        size = size_from(sides[0], sides[1], where, _FIX)
    name = fields[columns.file]
    if not name:
        raise ResvitError(f"{where} names no picture.", _FIX)
    if not any(corners) and not fields[columns.name]:
        return _Row(name, size, None)
    left, top, right, bottom = (number_from(value, where, _FIX) for value in corners)
    if right < left or bottom < top:
        raise ResvitError(f"{where} has its right before its left, or its bottom above its top.", _FIX)
    crowd = columns.group is not None and fields[columns.group] in ("1", "true", "True")
    called = name_from(fields[columns.name], f"{where}: the class", _FIX)
    return _Row(name, size, Region(called, (left, top, right, bottom), crowd=crowd))


def _names_beside(path: Path) -> dict[str, str]:
    """What Open Images' classes are called, by a file beside the list or above; nothing without."""
    for file in (folder / name for folder in (path.parent, path.parent.parent) for name in _DESCRIPTIONS):
        if leads_to_file(file):
            return {row.fields[0]: row.fields[1] for row in rows_of(file) if len(row.fields) > 1 and row.fields[1]}
    return {}
