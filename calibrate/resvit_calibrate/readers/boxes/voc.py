"""PASCAL VOC's boxes: an XML file for each picture (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from resvit_calibrate.readers.boxes.table import Box, BoxPixels, table_of
from resvit_calibrate.readers.boxes.xml_files import read_xml
from resvit_calibrate.readers.folders import files_below, is_image, split_folders
from resvit_calibrate.readers.paired import Part, pairs_in, read_class_names, shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import open_outside

SUFFIXES = (".xml",)
_FIX = (
    "VOC's XML has `size` (width, height) and for each `object` `name` and `bndbox` (xmin, ymin, xmax, ymax, pixels)."
)
_OBJECTS_MOST = 100_000
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
BESIDE = "XML files beside its pictures"
_LISTED_MOST, _PROBED = 5000, 20
_HEAD_BYTES = 4096


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


class _Parsed(NamedTuple):
    """(height, width), 0 where nothing is said, and the objects of one file."""

    size: tuple[int, int]
    objects: list[_Object]


def voc_parts(root: Path) -> tuple[Part, ...]:
    """A folder, or its two parts, whose pictures have annotations beside them; none where it is not so.

    LabelImg and Roboflow write them in this way, also in sub-folders, which are no classes.
    """
    halves = split_folders(root)
    if halves is not None and all(_has_beside(half) for half in halves):
        return tuple(Part(half, ".", ".") for half in halves)
    return (Part(root, ".", "."),) if _has_beside(root) else ()


def _has_beside(root: Path) -> bool:
    beside = list(itertools.islice(_beside(root), _PROBED))
    return bool(beside) and all(_root_of(root / name) == "annotation" for name in beside)


def _beside(root: Path) -> Iterator[str]:
    """The XML files that lie beside a picture of the same name."""
    listed = list(
        itertools.islice(files_below(root, ".", lambda name: is_image(name) or name.endswith(SUFFIXES)), _LISTED_MOST)
    )
    stems = {str(Path(name).with_suffix("")) for name in listed if is_image(Path(name).name)}
    yield from (name for name in sorted(listed) if name.endswith(SUFFIXES) and str(Path(name).with_suffix("")) in stems)


def _root_of(path: Path) -> str:
    """What the outermost element of an XML file is called; "" where there is none."""
    found: list[str] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda tag, _: found.append(tag)
    try:
        with open_outside(path) as stream:
            parser.Parse(stream.read(_HEAD_BYTES), False)
    except (expat.ExpatError, ResvitError, OSError):
        return found[0] if found else ""
    return found[0] if found else ""


def pixels_from_voc(part: Part) -> BoxPixels:
    """Pair pictures with their XML files; raises ``ResvitError`` where nothing matches, and for files that are none.

    Classes are those of ``classes.txt``, else the names that occur, in their order as texts, as VOC's own twenty are.
    Pixels are counted from 1, and a box has both of its edges: ``xmin`` 1 is the picture's edge; where any box starts
    at 0, they are counted from 0. Objects that are ``difficult`` count for nothing, as in VOC's own evaluation.
    """
    pairs = pairs_in(part, SUFFIXES)
    parsed = [_file(pairs.root / other) for other in pairs.others]
    own = read_class_names(part.root)
    occurring = sorted({item.name for file in parsed for item in file.objects})
    names = own or tuple(occurring)
    unknown = [name for name in occurring if name not in names]
    if unknown:
        raise ResvitError(
            f"{part.root} has objects of classes that its classes.txt does not have: {shortened(unknown)}.",
            "Add them, one a line, in the order of the network's classes.",
        )
    if not names:
        raise ResvitError(f"None of the {len(parsed)} XML files of {part.root / part.others} has an object.", _FIX)
    first = min((value for file in parsed for item in file.objects for value in item.corners[:2]), default=1)
    back = 1.0 if first >= 1 else 0.0
    numbers = {name: number for number, name in enumerate(names)}
    rows, dropped, difficult = [], Counter[str](), 0
    for name, file in zip(pairs.images, parsed, strict=True):
        boxes = []
        for item in file.objects:
            left, top, right, bottom = item.corners
            height, width = file.size
            held = (left - back, top - back, min(right, width or right), min(bottom, height or bottom))
            if held[2] <= held[0] or held[3] <= held[1]:
                dropped[name] += 1
                continue
            difficult += item.difficult
            boxes.append(Box(numbers[item.name], held, item.difficult))
        rows.append((name, file.size, boxes))
    notes = list(pairs.notes)
    if dropped:
        notes.append(
            f"{sum(dropped.values())} boxes of {part.root} have no area and are left out (in {shortened([*dropped])})"
        )
    if difficult:
        notes.append(f"{difficult} objects of {part.root} are marked as difficult and count for nothing")
    if not back:
        notes.append(
            f"boxes of {part.root} start at pixel 0, so that pixels are counted from 0 and not from 1 as VOC does"
        )
    return BoxPixels(table_of(part.root / part.others, rows, names, notes), pairs.root)


def _file(path: Path) -> _Parsed:
    """One annotation. Raises ``ResvitError`` for what is no XML, declares entities, or lacks what a box needs."""
    fields: list[dict[str, str]] = []
    size: dict[str, str] = {}

    def started(stack: tuple[str, ...], attributes: dict[str, str]) -> None:
        del attributes
        if stack[1:] == ("object",):
            fields.append({})
        if len(fields) > _OBJECTS_MOST:
            raise ResvitError(f"{path} is longer than any annotation.", _FIX)

    def ended(stack: tuple[str, ...], text: str) -> None:
        *above, tag = stack[1:] or ("",)
        if tag in {("object",): ("name", "difficult"), ("object", "bndbox"): _CORNERS}.get(tuple(above), ()):
            fields[-1][tag] = text
        elif above == ["size"] and tag in ("width", "height"):
            size[tag] = text

    read_xml(path, started, ended, _FIX)
    height, width = (int(_number(size.get(side, "0"), f"{path}: {side}")) for side in ("height", "width"))
    return _Parsed((height, width) if height > 0 and width > 0 else (0, 0), [_object(item, path) for item in fields])


def _object(fields: dict[str, str], path: Path) -> _Object:
    lacking = [name for name in ("name", *_CORNERS) if not fields.get(name)]
    if lacking:
        raise ResvitError(f"{path} has an object without {', '.join(lacking)}.", _FIX)
    left, top, right, bottom = (_number(fields[name], f"{path}: {name}") for name in _CORNERS)
    return _Object(fields["name"], (left, top, right, bottom), fields.get("difficult") == "1")


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ResvitError(f"{where} is {text[:40]!r}.", _FIX) from error
    if not 0 <= value < 2**31:
        raise ResvitError(f"{where} is {text[:40]!r}.", _FIX)
    return value
