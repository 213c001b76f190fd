"""Pictures with a class each by a list: of files and numbers or names, or of ImageNet's synsets in order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from resvit_calibrate.images.pixels import FilePixels
from resvit_calibrate.readers.folders import TRAINING_NAMES, VALIDATION_NAMES, name_inside
from resvit_calibrate.readers.lists.places import named_in, none_is_there, note_of_missing, place_of
from resvit_calibrate.readers.lists.rows import FIX, Columns, Row, columns_of, rows_of
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError

_NUMBER = re.compile(r"[0-9]{1,6}(\.0*)?")
_SYNSETS = re.compile(r"(\S+)(?: -?[0-9]+){4}(?: \S+(?: -?[0-9]+){4})*")
"""ImageNet's `PredictionString`: a synset and its box, or several."""
_ONE_CLASS = "A picture has one class in classification; give what has several with a function and --metric."
_MARKED, _SPACED = re.compile(r"\s*[|,;]\s*"), re.compile(r"[|,;\s]+")
_COMPARED = 50
"""With so many classes at most they are compared by name."""
_TAUGHT, _CHECKED = "training", "validation"


@dataclass
class _Part:
    """What a list says of one part: each file's class as it is written, and the line that says so."""

    classes: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    repeated: int = 0


def pixels_from_class_list(path: Path) -> tuple[FilePixels, FilePixels | None]:
    """Pictures and classes by a list, divided where a column (`split`) says so.

    Classes are all numbers, from 0 as the network has them, or all names, which are numbered in their order as texts.
    Raises ``ResvitError`` for lines that are none, two lines that contradict each other, and pictures that are missing.
    """
    rows = list(rows_of(path))
    columns = columns_of(rows[:2000], str(path))
    rows = rows[1:] if columns.said else rows
    if not rows:
        raise ResvitError(f"{path} lists no picture.", FIX)
    unsaid = (columns.number, columns.name, columns.either) == (None,) * 3 and not columns.shares
    if unsaid and columns.text is not None:
        raise ResvitError(
            f"{path} gives each picture a text, and no class.", f"Say `text:{path}`, or add a column `label`."
        )
    if unsaid:
        raise ResvitError(f"{path} gives pictures alone, and no class of any.", FIX)
    number_of, names = _numbering(rows, columns, path)
    place, _ = place_of(path, [row.fields[columns.file] for row in rows if len(row.fields) > columns.file])
    parts = {_TAUGHT: _Part(), _CHECKED: _Part(), "": _Part()}
    for row in rows:
        part = parts[_part_of(row, columns, path)]
        name = name_inside(named_in(path, _field(row, columns.file, path)), f"line {row.line} of {path}: the file", FIX)
        said = _class_of(row, columns, path)
        if part.classes.get(name, said) != said:
            raise ResvitError(
                f"Lines {part.lines[name]} and {row.line} of {path} contradict each other: {name} is "
                f"{part.classes[name]} and {said}.",
                "Keep one of the two.",
            )
        part.repeated += name in part.classes
        part.classes[name] = said
        part.lines.setdefault(name, row.line)
    pools = []
    for part in parts.values():
        files: dict[str, int] = {}
        for name, said in part.classes.items():
            file = place.file_of(name)
            if file is None:
                part.missing.append(name)
            else:
                files[file] = number_of(said)
        if files:
            pools.append(_pixels(path, place.folder, files, names, part))
    if not pools:
        raise none_is_there(path, place.folder, [name for part in parts.values() for name in part.missing], FIX)
    if len(pools) > 2:
        raise ResvitError(
            f"{path} has pictures to train with, to validate with, and some of neither.",
            "Give every line its part, `train` or `val`, or leave that column out.",
        )
    return pools[0], pools[1] if len(pools) == 2 else None


def pixels_from_names(path: Path) -> FilePixels:
    """Pictures by a list of their names alone; nothing is known of them. Raises as ``pixels_from_class_list``."""
    rows = list(rows_of(path))
    columns = columns_of(rows[:2], str(path))
    rows = rows[1:] if columns.said else rows
    place, _ = place_of(path, [row.fields[columns.file] for row in rows])
    named = [
        name_inside(named_in(path, row.fields[columns.file]), f"line {row.line} of {path}: the file", FIX)
        for row in rows
    ]
    found = {name: place.file_of(name) for name in named}
    missing = [name for name, file in found.items() if file is None]
    files = [file for file in found.values() if file is not None]
    if not files:
        raise none_is_there(path, place.folder, missing, FIX)
    return FilePixels(path.name, place.folder, files, None, notes=note_of_missing(path, missing))


def _pixels(path: Path, folder: Path, files: dict[str, int], names: tuple[str, ...], part: _Part) -> FilePixels:
    notes = list(note_of_missing(path, part.missing))
    if part.repeated:
        notes.append(f"{part.repeated} lines of {path} say again what a line before says")
    lowest = min(files.values())
    if not names and lowest == 1:
        notes.append(
            f"the classes of {path} start at 1, and networks count from 0: they are taken as they are; say --classes "
            'with JSON such as {"1": 0, "2": 1, …} if the list counts from 1'
        )
    notes += _note_of_several(names, path) if len(names) <= _COMPARED else ()
    labels = np.array(list(files.values()), np.int64)
    return FilePixels(path.name, folder, tuple(files), labels, class_names=names, notes=tuple(notes))


def _numbering(rows: list[Row], columns: Columns, path: Path) -> tuple[Callable[[str], int], tuple[str, ...]]:
    """The number of a class as the list writes it, and all names in the order of their numbers; none of numbers."""
    if columns.shares:
        titles = [columns.titles[place] for place in columns.shares]
        return titles.index, tuple(titles)
    if columns.number is not None and columns.name is not None:
        return _by_both(rows, columns.number, columns.name, path)
    said = {row.line: _class_of(row, columns, path) for row in rows}
    numbers = [line for line, text in said.items() if _NUMBER.fullmatch(text)]
    if columns.number is not None or (columns.name is None and numbers):
        wrong = next((line for line, text in said.items() if not _NUMBER.fullmatch(text)), None)
        if wrong is not None:
            other = f", and line {numbers[0]} by number: {said[numbers[0]]}" if numbers else ""
            raise ResvitError(
                f"Line {wrong} of {path} gives the class by another thing than a number: {said[wrong][:40]!r}{other}.",
                "Write all classes as numbers from 0, or all as names; a column of names that look like numbers is "
                "called `class_name`.",
            )
        return _number, ()
    names = sorted(set(said.values()))
    _refuse_several(said, names, path)
    places = {name: number for number, name in enumerate(names)}
    return places.__getitem__, tuple(names)


def _refuse_several(said: dict[int, str], names: list[str], path: Path) -> None:
    """Refuse lines with several classes: names whose parts are classes themselves, or come again in other names."""
    known = set(names)
    often = Counter(piece for name in names for piece in set(_MARKED.split(name)))
    for line, name in said.items():
        apart, marked = _SPACED.split(name), _MARKED.split(name)
        again = [piece in known or often[piece] > 1 for piece in marked]
        # `maillot, tank suit` is a class of ImageNet beside `maillot`: behind a comma all must be classes.
        several = len(marked) > 1 and (all(again) or (any(again) and "," not in name))
        if several or (len(apart) > 1 and known.issuperset(apart)):
            raise ResvitError(f"Line {line} of {path} has several classes: {name[:40]}.", _ONE_CLASS)


def _note_of_several(names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """That the name of a class begins with the name of another, as where a line has several classes."""
    found = next(((one, name) for name in names for one in names if re.match(rf"{re.escape(one)}[, ]+\S", name)), None)
    if found is None:
        return ()
    return (
        f"{path} has the classes {found[0]!r} and {found[1]!r}: they are read as two classes; if the latter stands for "
        "several, give a function and --metric",
    )


def _by_both(rows: list[Row], number: int, name: int, path: Path) -> tuple[Callable[[str], int], tuple[str, ...]]:
    """Classes that the list numbers and names: each number has one name, and each name one number."""
    numbers: dict[str, tuple[int, int]] = {}
    names: dict[int, tuple[str, int]] = {}
    for row in rows:
        text, called = _field(row, number, path), _field(row, name, path)
        if not _NUMBER.fullmatch(text):
            raise ResvitError(f"Line {row.line} of {path} has {text[:40]!r} where a class's number should be.", FIX)
        place = _number(text)
        before, other = numbers.setdefault(called, (place, row.line)), names.setdefault(place, (called, row.line))
        if before[0] != place or other[0] != called:
            line = before[1] if before[0] != place else other[1]
            raise ResvitError(
                f"Lines {line} and {row.line} of {path} contradict each other: class {place} and {called!r} do not "
                "always go together.",
                "Correct one of the two.",
            )
    gapless = sorted(names) == list(range(len(names)))
    return _number, tuple(names[place][0] for place in range(len(names))) if gapless else ()


def _number(text: str) -> int:
    return int(text.partition(".")[0])


def _class_of(row: Row, columns: Columns, path: Path) -> str:
    """The class of one row as it is written. Raises ``ResvitError`` for none, and for several."""
    if columns.shares:
        held = [place for place in columns.shares if re.fullmatch(r"1(\.0*)?", _field(row, place, path))]
        if len(held) != 1:
            raise ResvitError(
                f"Line {row.line} of {path} has {len(held)} classes: {shortened([columns.titles[at] for at in held])}.",
                _ONE_CLASS,
            )
        return columns.titles[held[0]]
    place = next(place for place in (columns.number, columns.name, columns.either) if place is not None)
    text = _field(row, place, path)
    if (synsets := _SYNSETS.fullmatch(text)) is not None:
        several = set(text.split()[::5])
        if len(several) > 1:
            raise ResvitError(f"Line {row.line} of {path} has several classes: {', '.join(sorted(several))}.", FIX)
        return synsets.group(1)
    if not text:
        raise ResvitError(f"Line {row.line} of {path} gives no class.", FIX)
    if re.fullmatch(r"[0-9]+([ ,;|]+[0-9]+)+", text):
        raise ResvitError(f"Line {row.line} of {path} has several classes: {text[:40]}.", _ONE_CLASS)
    return text


def _field(row: Row, place: int, path: Path) -> str:
    if len(row.fields) <= place:
        shown = " ".join(row.fields)[:60]
        raise ResvitError(f"Line {row.line} of {path} has {len(row.fields)} columns: {shown!r}.", FIX)
    return row.fields[place]


def _part_of(row: Row, columns: Columns, path: Path) -> str:
    """``training``, ``validation`` or "" by the column that says so; a test part is validated with."""
    if columns.part is None:
        return ""
    text = _field(row, columns.part, path).lower()
    return _TAUGHT if text in TRAINING_NAMES else _CHECKED if text in VALIDATION_NAMES else ""
