"""Telling formats of annotations from what all of their files hold near the beginning, without parsing any."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from resvit_calibrate.readers.folders import class_names
from resvit_engines.errors import ResvitError
from resvit_engines.outside import open_outside

NUMBER = rb"-?[0-9]+(?:\.[0-9]+)?"
BEGINS_A_LIST = rb"\A(?:\xef\xbb\xbf)?\s*\["
_HEAD_BYTES = 1 << 16
_MOST_FOLDERS, _MOST_ENTRIES = 64, 2000
_OF_A_KIND = 8
_LEVELS = 3


class Format(NamedTuple):
    """How files of a format end, what all of them hold near their beginning, what they are, and what to do."""

    endings: tuple[str, ...]
    marks: tuple[re.Pattern[bytes], ...]
    what: str
    fix: str


def format_of(endings: str, marks: tuple[bytes, ...], what: str, fix: str = "") -> Format:
    """A format by its endings, separated by spaces, and its marks as regular expressions."""
    return Format(tuple(endings.split()), tuple(re.compile(mark, re.MULTILINE) for mark in marks), what, fix)


def is_of(file: Path, form: Format) -> bool:
    """Whether a file is of a format; one that cannot be read is of none."""
    return _first_of(file, [form]) is not None


def formats_in(root: Path, forms: Sequence[Format], of_a_kind: int = _OF_A_KIND) -> Iterator[tuple[Format, Path]]:
    """Files of the formats with the first that each is of, in a folder and up to three below.

    Of a folder so many are looked at of each ending, the first and the last ones.
    """
    for file in _files(root, {ending for form in forms for ending in form.endings}, of_a_kind):
        found = _first_of(file, forms)
        if found is not None:
            yield found, file


def _files(root: Path, endings: set[str], of_a_kind: int) -> Iterator[Path]:
    for folder in folders_in(root):
        try:
            names = [entry.name for entry in itertools.islice(os.scandir(folder), _MOST_ENTRIES) if entry.is_file()]
        except OSError:
            continue
        for ending in sorted(endings):
            fitting = sorted(name for name in names if name.lower().endswith(ending) and not name.startswith("."))
            half = of_a_kind // 2
            some = fitting if len(fitting) <= of_a_kind else [*fitting[: of_a_kind - half], *fitting[-half:]]
            yield from (folder / name for name in some)


def folders_in(root: Path) -> list[Path]:
    """A folder and those up to three below, the upper ones first, as many as are looked into."""
    found, level = [root], [root]
    for _ in range(_LEVELS):
        level = [folder / name for folder in level for name in _below(folder)][: _MOST_FOLDERS - len(found)]
        found += level
    return found


def _below(folder: Path) -> tuple[str, ...]:
    try:
        return class_names(folder)
    except ResvitError:
        return ()


def _first_of(file: Path, forms: Sequence[Format]) -> Format | None:
    fitting = [form for form in forms if file.suffix.lower() in form.endings]
    if not fitting:
        return None
    try:
        with open_outside(file) as stream:
            head = stream.read(_HEAD_BYTES)
    except (ResvitError, OSError):
        return None
    return next((form for form in fitting if all(mark.search(head) for mark in form.marks)), None)
