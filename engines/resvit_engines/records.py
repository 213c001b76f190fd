"""Reading a JSON object that was written elsewhere or long ago: every field against what it may be.

A dataclass that is written to a file reads itself back with these (``from_json``), and nobody else reads its keys.
Keys that a newer version added are not looked at. Imports the standard library, ``errors``, ``names`` and ``outside``
only, and reads on Python 3.8 too, as ``machine`` does.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from resvit_engines.errors import ResvitError
from resvit_engines.names import is_file_name, is_name
from resvit_engines.outside import MAKE_AGAIN, json_from_outside, read_outside

LARGEST = (1 << 53) - 1
"""The largest whole number that every reader of JSON takes for what it is."""
_SHOWN = 80
_DIGEST = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)


class Record:
    """A JSON object whose fields are read by kind; ``where`` names it in errors, ``at`` the way to it within.

    Every method raises ``ResvitError`` INPUT, naming the key, where the field is missing or not what may stand there.
    """

    def __init__(self, fields: object, where: str, at: str = "") -> None:
        if not isinstance(fields, Mapping):
            what = f"{at} of {where}" if at else where
            raise _malformed(f"{what} is {shown(fields)}, and not an object of names and values.")
        self._fields = fields
        self._where = where
        self._at = at

    def text(self, key: str, choices: Collection[str] | None = None) -> str:
        """A text, one of ``choices`` where they are given."""
        value = self._value(key)
        if not isinstance(value, str):
            raise self.refusal(key, "a text")
        if choices is not None and value not in choices:
            raise self.refusal(key, f"one of {', '.join(sorted(choices))}")
        return value

    def line(self, key: str, pattern: str = "", most: int = 4000) -> str:
        """A text of one line that can be printed as it is, which ``pattern`` fits as a whole where it is given."""
        value = self.text(key)
        if len(value) > most or not value.isprintable() or (pattern and not re.fullmatch(pattern, value)):
            raise self.refusal(key, f"a text like {pattern}" if pattern else "a line of text")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._value(key)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def whole(self, key: str, least: int = 0, most: int = LARGEST) -> int:
        """A whole number within bounds."""
        value = self._value(key)
        if not _is_whole(value, least, most):
            raise self.refusal(key, f"a whole number from {least} to {most}")
        return int(value)

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number within bounds; a whole one stays whole, so that it is written as it was."""
        value = self._value(key)
        if not _is_number(value) or not least <= value <= most:
            raise self.refusal(key, f"a number from {least:g} to {most:g}" if least > -math.inf else "a number")
        return value  # type: ignore[no-any-return]

    def choice(self, key: str, kind: type[E]) -> E:
        """A member of an enumeration, by its value."""
        known = {member.value: member for member in kind}
        return known[self.text(key, known)]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self.refusal(key, "a list of texts")
        return tuple(values)

    def wholes(self, key: str, least: int = 0, most: int = LARGEST) -> tuple[int, ...]:
        """A list of whole numbers within bounds."""
        values = self._list(key)
        if not all(_is_whole(value, least, most) for value in values):
            raise self.refusal(key, f"a list of whole numbers from {least}")
        return tuple(values)

    def numbers(self, key: str, least: float) -> tuple[float, ...]:
        """A list of finite numbers from ``least``."""
        values = self._list(key)
        plain = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if not plain or not all(least <= value < math.inf for value in values):
            raise self.refusal(key, f"a list of numbers from {least:g}")
        return tuple(float(value) for value in values)

    def wholes_or_none(self, key: str, length: int) -> tuple[int | None, ...]:
        """A list of so many whole numbers, any of which may be null."""
        values = self._list(key)
        if len(values) != length or not all(value is None or _is_whole(value) for value in values):
            raise self.refusal(key, f"a list of {length} whole numbers")
        return tuple(values)

    def file_name(self, key: str) -> str:
        """The name of a file, without any folder."""
        name = self.text(key)
        if not is_file_name(name):
            raise self.refusal(key, "a file name")
        return name

    def name(self, key: str) -> str:
        """A name that folders and files are called by, as of a target."""
        name = self.text(key)
        if not is_name(name):
            raise self.refusal(key, "a name of letters, digits, dots, dashes and underscores")
        return name

    def sha256(self, key: str) -> str:
        """A SHA-256 as 64 hexadecimal digits."""
        digest = self.text(key)
        if not _DIGEST.fullmatch(digest):
            raise self.refusal(key, "a SHA-256")
        return digest

    def shape(self, key: str) -> tuple[int | str, ...]:
        """A shape; a dynamic dimension is -1 or a name."""
        sizes = self._list(key)
        if not all(_is_whole(size, -1) or isinstance(size, str) for size in sizes):
            raise self.refusal(key, "a shape")
        return tuple(sizes)

    def shapes(self, key: str) -> tuple[tuple[int, ...], ...]:
        """A list of shapes; -1 is a dynamic dimension."""
        values = self._list(key)
        if not all(isinstance(shape, list) and all(_is_whole(size, -1) for size in shape) for shape in values):
            raise self.refusal(key, "a list of shapes")
        return tuple(tuple(shape) for shape in values)

    def texts_by_name(self, key: str) -> dict[str, str]:
        """An object that holds texts."""
        record = self.record(key)
        return {name: record.text(name) for name in record.names}

    def numbers_by_name(self, key: str) -> dict[str, float]:
        """An object that holds numbers."""
        record = self.record(key)
        return {name: record.number(name) for name in record.names}

    def record(self, key: str) -> Record:
        """An object, to be read in turn."""
        return Record(self._value(key), self._where, self._path(key))

    def records(self, key: str) -> tuple[Record, ...]:
        """A list of objects, each to be read in turn."""
        return tuple(
            Record(value, self._where, f"{self._path(key)}[{index}]") for index, value in enumerate(self._list(key))
        )

    def plain(self, key: str) -> dict[str, Any]:
        """An object that is passed on as it is."""
        return dict(self.record(key)._fields)

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """What ``read`` makes of the key, such as ``record.text``; None where it is absent or null."""
        return None if self._fields.get(key) is None else read(key)

    @property
    def names(self) -> tuple[str, ...]:
        """Its keys, as they were written."""
        return tuple(self._fields)

    def other_than(self, known: Collection[str]) -> dict[str, Any]:
        """The fields with keys that are not ``known``."""
        return {key: value for key, value in self._fields.items() if key not in known}

    def refusal(self, key: str, belongs: str) -> ResvitError:
        """The error for a field that is not what ``belongs`` there, to be raised."""
        if key not in self._fields:
            return _malformed(f"{self._where} does not say {self._path(key)}.")
        found = shown(self._fields[key])
        return _malformed(f"{self._path(key)} of {self._where} is {found}, where {belongs} belongs.")

    def _value(self, key: str) -> Any:
        if key not in self._fields:
            raise self.refusal(key, "")
        return self._fields[key]

    def _list(self, key: str) -> list[Any]:
        value = self._value(key)
        if not isinstance(value, (list, tuple)):
            raise self.refusal(key, "a list")
        return list(value)

    def _path(self, key: str) -> str:
        return f"{self._at}.{key}" if self._at else key


def record_from_bytes(data: bytes, where: str) -> Record:
    """Parse a JSON object.

    Raises:
        ResvitError: INPUT where it is none.
    """
    return Record(json_from_outside(data, where), where)


def record_from_file(path: Path) -> Record:
    """Read a file that holds a JSON object.

    Raises:
        ResvitError: INPUT where there is none, SYSTEM where it may not be read.
    """
    return record_from_bytes(read_outside(path), str(path))


def _is_whole(value: object, least: int = 0, most: int = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: object) -> str:
    """A value for a sentence: as Python writes it, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _malformed(problem: str) -> ResvitError:
    return ResvitError(problem, MAKE_AGAIN)
