"""The network's classes by name: from a file that the user wrote, or from the model's own configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside

_FIX = (
    "Write one name a line, that of class 0 first; or JSON: a list of names, an object from names to numbers "
    "(torchvision's class_to_idx) or from numbers to names (transformers' id2label)."
)
REMEDY = (
    "Say which output each class is with --classes FILE: all names of the network, that of output 0 first, or JSON "
    'such as {"cat": 0, "dog": 7}.'
)
_INSIDE = ("class_to_idx", "label2id", "id2label", "names")
_MOST = 1_000_000
_SHOWN = 5


@dataclass(frozen=True)
class ClassList:
    """Which number each name has; a name of several numbers is in ``ambiguous`` and in nothing else.

    ``names`` are by number, the number itself where one has no name. ``whole`` says that numbers start at 0 and have no
    gaps, so that the list says how many classes the network has. ``source`` is what messages call it.
    """

    source: str
    numbers: Mapping[str, int]
    names: tuple[str, ...]
    whole: bool
    ambiguous: frozenset[str] = frozenset()

    def number_of(self, name: str) -> int | None:
        """The number of a name as the data writes it: letter for letter, else whatever its case and separators."""
        if name in self.numbers:
            return self.numbers[name]
        plain = _plain(name)
        return None if name in self.ambiguous else self._loose.get(plain)

    @property
    def _loose(self) -> dict[str, int]:
        found: dict[str, set[int]] = {}
        for name, number in self.numbers.items():
            found.setdefault(_plain(name), set()).add(number)
        return {name: next(iter(numbers)) for name, numbers in found.items() if len(numbers) == 1}

    def require(self, names: Sequence[str], where: str) -> dict[int, int]:
        """The network's number for each place in ``names``.

        Raises ``ResvitError`` for names that the list does not have, or has for several classes.
        """
        found = {place: self.number_of(name) for place, name in enumerate(names)}
        missing = [names[place] for place, number in found.items() if number is None]
        if missing:
            several = [name for name in missing if name in self.ambiguous]
            what = f"has for several classes: {_listed(several)}" if several else f"does not have: {_listed(missing)}"
            raise ResvitError(
                f"{where} has classes that {self.source} {what}.",
                f"Add them to it, or take them out of the data. {self.source} has: {_listed(self.names)}.",
            )
        return {place: number for place, number in found.items() if number is not None}


def class_list_from_file(path: Path) -> ClassList:
    """Read ``classes.txt`` or JSON; raises ``ResvitError`` for what is missing, or no list that says one thing."""
    text = text_from_outside(read_outside(path, what=f"The class list {path}"), f"The class list {path}", _FIX)
    if path.suffix.lower() != ".json" and not text.lstrip().startswith(("{", "[")):
        lines = [line.strip() for line in text.rstrip().splitlines()]
        if not lines or not all(lines):
            where = f"line {lines.index('') + 1} of {path} is" if lines else f"{path} is"
            raise ResvitError(f"The class list cannot be used: {where} empty.", _FIX)
        return _from_numbers(str(path), {number: (line,) for number, line in enumerate(lines)})
    try:
        document = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"The class list {path} is not usable JSON: {error}.", _FIX) from error
    return _from_document(str(path), document)


def class_list_from_names(source: str, names: Mapping[int, str]) -> ClassList | None:
    """What a model's configuration calls its classes; ``tench, Tinca tinca`` are two names. None without any.

    Placeholders such as ``LABEL_0`` are none.
    """
    real = {number: name for number, name in names.items() if not name.upper().startswith("LABEL_")}
    if not real:
        return None
    several = {n: (name, *(part.strip() for part in name.split(","))) for n, name in real.items()}
    return _from_numbers(source, {n: tuple(dict.fromkeys(filter(None, parts))) for n, parts in several.items()})


def _from_document(source: str, document: Any) -> ClassList:
    for key in _INSIDE:
        if isinstance(document, dict) and isinstance(document.get(key), (dict, list)):
            document = document[key]
            break
    if isinstance(document, list):
        return _from_numbers(source, {number: _texts(source, item) for number, item in enumerate(document)})
    if not isinstance(document, dict) or not document:
        raise ResvitError(f"The class list {source} names no classes.", _FIX)
    if all(_is_number(value) for value in document.values()):
        by_number: dict[int, tuple[str, ...]] = {}
        for name, number in document.items():
            by_number[number] = (*by_number.get(number, ()), name)
        return _from_numbers(source, by_number)
    found: dict[int, tuple[str, ...]] = {}
    for key, value in document.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 8 and int(key) < _MOST):
            raise ResvitError(f"The class list {source} has {key[:40]!r}: {str(value)[:40]}.", _FIX)
        if int(key) in found:
            raise ResvitError(f"The class list {source} names class {int(key)} twice.", _FIX)
        found[int(key)] = _texts(source, value)
    return _from_numbers(source, found)


def _from_numbers(source: str, by_number: Mapping[int, tuple[str, ...]]) -> ClassList:
    if not by_number or max(by_number) >= _MOST:
        raise ResvitError(f"The class list {source} names no classes, or numbers beyond {_MOST}.", _FIX)
    numbers: dict[str, int] = {}
    ambiguous: set[str] = set()
    for number, names in by_number.items():
        for name in names:
            if numbers.setdefault(name, number) != number:
                ambiguous.add(name)
    count = max(by_number) + 1
    return ClassList(
        source=source,
        numbers={name: number for name, number in numbers.items() if name not in ambiguous},
        names=tuple(by_number[number][0] if number in by_number else str(number) for number in range(count)),
        whole=len(by_number) == count,
        ambiguous=frozenset(ambiguous),
    )


def _texts(source: str, item: Any) -> tuple[str, ...]:
    """One name, or several of one class."""
    names = item if isinstance(item, list) else [item]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ResvitError(f"The class list {source} has {str(item)[:40]!r} where a name should be.", _FIX)
    return tuple(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which each key stands once: JSON would keep the last of them."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
