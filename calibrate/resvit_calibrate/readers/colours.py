"""Which class a colour of a mask is, by a table beside the data.

Read are CamVid's ``class_dict.csv`` (name, r, g, b) and ``label_colors.txt`` (r g b, name), CVAT's ``labelmap.txt``
(name:r,g,b:parts:actions), and the same lines in ``classes.txt`` or ``colors.txt``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import BrokenImage
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file, read_outside, text_from_outside

_FILES = ("class_dict.csv", "class_dict_seg.csv", "labelmap.txt", "label_colors.txt", "colors.txt", "classes.txt")
_NUMBERS = r"([0-9]{1,3})[ ,;\t]+([0-9]{1,3})[ ,;\t]+([0-9]{1,3})"
_BEHIND = re.compile(rf"(\S.*?)[ ,;:\t]+{_NUMBERS}(?:\s*|:.*)")
_BEFORE = re.compile(rf"{_NUMBERS}[ ,;\t]+(\S.*?)\s*")
_FIX = "Write one class a line: its name and its red, green and blue from 0 to 255, `road,128,64,128`."


@dataclass(frozen=True, eq=False)
class ColourTable:
    """K classes, ``names``, and the colour of each: ``codes`` int64 [K] are red, green and blue as one number."""

    path: Path
    names: tuple[str, ...]
    codes: npt.NDArray[np.int64]

    def classes_of(self, colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """The class of each pixel, [H, W] from [H, W, 3]. Raises ``BrokenImage`` for a colour that no class has."""
        packed = colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1], np.int64)
        order = np.argsort(self.codes)
        places = np.minimum(np.searchsorted(self.codes, packed, sorter=order), len(order) - 1)
        found = order[places]
        unknown = packed[self.codes[found] != packed]
        if unknown.size:
            red, green, blue = (int(unknown[0]) >> shift & 255 for shift in (16, 8, 0))
            raise BrokenImage(f"it holds the colour {red},{green},{blue}, which {self.path} gives no class")
        return np.asarray(found)


def colour_table(*folders: Path) -> ColourTable | None:
    """The first table in one of the folders; None without.

    Raises ``ResvitError`` for a line that is none, and for two classes of one colour.
    """
    for path in (folder / name for folder in folders for name in _FILES):
        if leads_to_file(path) and (found := _table(path)) is not None:
            return found
    return None


def _table(path: Path) -> ColourTable | None:
    """A file's table; None where its first lines are names alone, as those of ``classes.txt`` mostly are."""
    lines = text_from_outside(read_outside(path), str(path), _FIX).splitlines()
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    if rows and not _row(rows[0][1]):
        rows = rows[1:]  # the names of columns
        if not rows or not _row(rows[0][1]):
            return None
    names: list[str] = []
    codes: dict[int, int] = {}
    for number, line in rows:
        found = _row(line)
        if found is None:
            raise ResvitError(f"Line {number} of {path} is no class and colour: {line[:60]!r}.", _FIX)
        if codes.setdefault(found[1], number) != number:
            raise ResvitError(f"Lines {codes[found[1]]} and {number} of {path} give two classes one colour.", _FIX)
        names.append(found[0])
    return ColourTable(path, tuple(names), np.array(list(codes), np.int64)) if names else None


def _row(line: str) -> tuple[str, int] | None:
    behind, before = _BEHIND.fullmatch(line), _BEFORE.fullmatch(line)
    found = (before.group(4), *before.group(1, 2, 3)) if before else behind.groups() if behind else None
    if found is None or any(int(value) > 255 for value in found[1:]):
        return None
    red, green, blue = (int(value) for value in found[1:])
    return found[0], red << 16 | green << 8 | blue
