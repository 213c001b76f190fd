"""Lines of a list as rows of fields, whatever separates them, and what its columns hold.

CSV with commas or semicolons, tabs, spaces (Caffe's ``val.txt``), and JSON by line; a line of names may stand above.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from resvit_calibrate.readers.folders import ending_of, is_image
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, open_outside, read_outside, text_from_outside

ENDINGS = (".txt", ".tsv", ".csv", ".jsonl")
FIX = (
    "Write one line for each picture: its file, a comma, and its class, as a number or a name; a first line may call "
    "the columns `file` and `label`. Files are relative to the list's folder, and may lack their endings."
)
_FILES = (
    *("file_name", "filename", "filepath", "file_path", "file", "path", "image_path", "img_path", "image_file"),
    *("image_name", "image", "img", "image_id", "imageid", "img_id", "id", "id_code", "uuid"),
)
_NUMBERS = ("label_id", "class_id", "classid", "class_index", "class_idx", "class_number", "label_idx", "target")
_NAMES = ("class_name", "label_name", "category_name", "species", "breed", "synset", "wnid")
_CLASSES = ("class", "classes", "category", "diagnosis", "dx", "predictionstring")
_LABELS = ("label", "labels", "ground_truth", "groundtruth")
_EITHER = (*_CLASSES, *_LABELS)
CLASS_TITLES = frozenset(_EITHER)
TEXTS = ("text", "words", "transcription", "caption")
_PARTS = ("split", "set", "subset", "partition", "fold_name")
_CORNERS = (("xmin", "x_min", "x1"), ("ymin", "y_min", "y1"), ("xmax", "x_max", "x2"), ("ymax", "y_max", "y2"))
_REGIONS = "region_shape_attributes"
_BOXES = {"xmin", "x_min", "x1", "bbox", "bboxes", "box", "xmax"}
_MOST_BYTES = 1 << 30
_HEAD_BYTES = 1 << 18
_MARKS = ("\t", ";", ",")
_NAMED = re.compile(r"\s*\"?[^\t;,]+?\.[A-Za-z][A-Za-z0-9]{1,4}\"?[ ]*([\t;, ]|(?<=[ ])\S)")
_SPACED = re.compile(r"(\S.*?\.[A-Za-z][A-Za-z0-9]{1,4})\s+(\S.*)|(\S+)\s+(\S.*)")


class Row(NamedTuple):
    """The fields of one line, and which line that is."""

    line: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Where in a row what stands; None where nowhere. ``shares`` are columns of 0 and 1, one for each class.

    ``said``: the first row says so; ``sure``: what ``either`` is called there is said of classes alone.
    """

    file: int
    number: int | None = None
    name: int | None = None
    either: int | None = None
    text: int | None = None
    part: int | None = None
    shares: tuple[int, ...] = ()
    titles: tuple[str, ...] = ()
    said: bool = False
    sure: bool = False


def columns_of(rows: list[Row], where: str) -> Columns:
    """What the columns of a list hold, by its first rows.

    Raises:
        ResvitError: for a list of boxes, and one of which nothing says which column is the class.
    """
    if not rows:
        raise ResvitError(f"{where} lists no picture.", FIX)
    first, others = rows[0].fields, [row.fields for row in rows[1:]]
    plain = _plain(first)
    files = [plain.index(name) for name in _FILES if name in plain]
    # A line with a picture is no line of names, whatever its class is called: `0.png,file`.
    headed = not any(map(_is_picture, first)) and (
        bool(files) or (bool(others) and any(map(_is_picture, others[0])) and len(first) > 1)
    )
    if not headed:
        return _unsaid(first, where)
    if _BOXES & set(plain):
        raise ResvitError(
            f"{where} is a list of boxes (its columns are {_shown(first)}), and none of classes.",
            "Say `boxes:PATH` for a list with the columns file, class, xmin, ymin, xmax and ymax; or write the boxes "
            "as COCO's annotations.json, as YOLO's text files, or as VOC's XML.",
        )
    pictures = [place for place, field in enumerate(others[0] if others else ()) if _is_picture(field)]
    file = next((place for place in files if place in pictures), (pictures or files)[0])

    def place_of(names: tuple[str, ...]) -> int | None:
        return next((plain.index(name) for name in names if name in plain and plain.index(name) != file), None)

    found = Columns(
        file=file,
        number=place_of(_NUMBERS),
        name=place_of(_NAMES),
        either=(either := place_of(_EITHER)),
        text=place_of(TEXTS),
        part=place_of(_PARTS),
        titles=tuple(first),
        said=True,
        sure=either is not None and plain[either] in _CLASSES,
    )
    if (found.number, found.name, found.either, found.text) != (None,) * 4:
        return found
    left = [place for place in range(len(first)) if place not in (file, found.part)]
    if len(left) == 1:
        return _with(found, either=left[0])
    if len(left) > 1 and others and all(_is_share(fields, left) for fields in others):
        return _with(found, shares=tuple(left))
    if not left:
        return found
    raise ResvitError(
        f"Nothing says which column of {where} is the class: {_shown(first)}.",
        "Call that column `label` in the first line, or leave the others out.",
    )


def text_columns(titles: Sequence[str]) -> tuple[int, int] | None:
    """The columns of pictures and of texts by a list's first line; None where that is no line of their names."""
    plain = _plain(titles)
    file, text = (
        next((plain.index(name) for name in names if name in plain), None) for names in (_FILES, (*TEXTS, *_LABELS))
    )
    return (file, text) if file is not None and text is not None else None


def file_columns(first: Row) -> tuple[int, ...]:
    """The columns that are called as those of pictures are, by a list's first line."""
    plain = _plain(first.fields)
    return tuple(plain.index(name) for name in _FILES if name in plain)


def is_of_boxes(first: Row) -> bool:
    """Whether the names of a list's columns are those of a list of boxes."""
    return bool(_BOXES & set(_plain(first.fields)))


@dataclass(frozen=True)
class BoxColumns:
    """Where in a row of a list of boxes what stands; ``corners`` are left, top, right, bottom, ``size`` height, width.

    ``shares``: the names are Open Images', whose boxes are in shares of the picture.
    """

    file: int
    name: int
    corners: tuple[int, int, int, int]
    size: tuple[int, int] | None
    group: int | None
    shares: bool

    @property
    def last(self) -> int:
        """The highest column that is used."""
        return max(self.file, self.name, *self.corners, *(self.size or ()), self.group or 0)


def box_columns(first: Row) -> BoxColumns | None:
    """The columns of a list of boxes by its first line; None where it is none that can be read."""
    plain = _plain(first.fields)

    def place_of(names: tuple[str, ...]) -> int | None:
        return next((plain.index(name) for name in names if name in plain), None)

    corners = [place_of(names) for names in _CORNERS]
    file, name = place_of(_FILES), place_of(("labelname", *_NAMES, *_EITHER, *_NUMBERS))
    left, top, right, bottom = corners
    if left is None or top is None or right is None or bottom is None or file is None or name is None:
        return None
    height, width = place_of(("height",)), place_of(("width",))
    size = (height, width) if height is not None and width is not None else None
    return BoxColumns(file, name, (left, top, right, bottom), size, place_of(("isgroupof",)), "labelname" in plain)


def is_of_regions(first: Row) -> bool:
    """Whether a list describes regions, as VIA's do, or boxes that can be read: it is none of classes or texts."""
    return box_columns(first) is not None or _REGIONS in _plain(first.fields)


def _plain(titles: Sequence[str]) -> list[str]:
    return [re.sub(r"[^a-z0-9]+", "_", field.strip().lower()).strip("_") for field in titles]


def rows_of(path: Path) -> Iterator[Row]:
    """Every row of a list that is not empty. Raises ``ResvitError`` for what is no text, no CSV and no JSON."""
    text = text_from_outside(read_outside(path, _MOST_BYTES), str(path), "Save it as UTF-8.")
    return _rows(text, path)


def first_rows(path: Path, most: int) -> list[Row]:
    """The first rows of a list, without reading all of it; none where it is no list at all."""
    try:
        with open_outside(path) as stream:
            data = stream.read(_HEAD_BYTES)
        if len(data) == _HEAD_BYTES:
            data = data[: data.rfind(b"\n") + 1]
        found: list[Row] = []
        for row in _rows(text_from_outside(data, str(path)), path):
            found.append(row)
            if len(found) == most:
                break
        return found
    except (ResvitError, OSError):
        return []


def undecoded_rows(path: Path, most: int) -> tuple[list[Row], ResvitError] | None:
    """The first rows of a list that is not UTF-8, as probably meant, and what is wrong with it; None of others."""
    try:
        with open_outside(path) as stream:
            data = stream.read(_HEAD_BYTES)
    except (ResvitError, OSError):
        return None
    if len(data) == _HEAD_BYTES:
        data = data[: data.rfind(b"\n") + 1]
    try:
        text_from_outside(data, str(path))
    except ResvitError as error:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if wide else "latin-1", "replace")
        fix = error.fix if wide else f"Save it as UTF-8: in an editor, or with `iconv -f WINDOWS-1252 -t UTF-8 {path}`."
        try:
            return list(itertools.islice(_rows(text, path), most)), ResvitError(error.problem, fix)
        except ResvitError:
            return None
    return None


def _rows(text: str, path: Path) -> Iterator[Row]:
    lines = re.split(r"\r\n|\n|\r", text)
    if ending_of(path.name) == ".jsonl":
        yield from _of_json(lines, path)
        return
    separator = _separator_of([line for line in lines if line.strip()][:2])
    if separator is None:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found = _SPACED.fullmatch(line.strip())
                yield Row(number, tuple(filter(None, found.groups())) if found is not None else (line.strip(),))
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield Row(reader.line_num, tuple(field.strip() for field in fields))
    except csv.Error as error:
        raise ResvitError(f"line {reader.line_num} of {path} is no CSV: {error}.", FIX) from error


def _separator_of(lines: list[str]) -> str | None:
    """What stands behind the first picture's name, else between the names of columns; None for spaces."""
    for line in lines:
        if (named := _NAMED.match(line)) is not None:
            return named.group(1) if named.group(1) in _MARKS else None
    return next((mark for mark in _MARKS if lines and mark in lines[0]), None)


def _of_json(lines: list[str], path: Path) -> Iterator[Row]:
    """Objects as rows under the names of the first one's keys."""
    keys: tuple[str, ...] = ()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        entry = json_from_outside(line.encode("utf-8", "surrogatepass"), where, FIX)
        if not isinstance(entry, dict):
            raise ResvitError(f"{where} is no object.", FIX)
        if not keys:
            keys = tuple(key for key in entry if not isinstance(entry[key], (dict, list)))
            yield Row(number, keys)
        yield Row(number, tuple(_text(entry.get(key)) for key in keys))


def _text(value: object) -> str:
    return "" if value is None or isinstance(value, (dict, list, bool)) else str(value).strip()


def _unsaid(first: tuple[str, ...], where: str) -> Columns:
    """Two columns, one a file: without a line above, nothing more can be told."""
    file = next((place for place, field in enumerate(first) if _is_picture(field)), 0)
    if len(first) > 2:
        raise ResvitError(
            f"The first line of {where} has {len(first)} columns ({_shown(first)}), and nothing says what each is.",
            "Write a first line with their names, `file` and `label` among them.",
        )
    return Columns(file) if len(first) < 2 else Columns(file, either=1 - file)


def _with(columns: Columns, *, either: int | None = None, shares: tuple[int, ...] = ()) -> Columns:
    return Columns(columns.file, either=either, part=columns.part, shares=shares, titles=columns.titles, said=True)


def _is_picture(field: str) -> bool:
    return is_image(PurePosixPath(field.replace("\\", "/")).name)


def _is_share(fields: tuple[str, ...], places: list[int]) -> bool:
    return len(fields) > max(places) and all(re.fullmatch(r"[01](\.0*)?", fields[place]) for place in places)


def _shown(fields: tuple[str, ...]) -> str:
    return ", ".join(field[:30] for field in fields[:8]) + (", …" if len(fields) > 8 else "")
