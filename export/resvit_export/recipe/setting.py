"""One setting of the recipe: what its option, its key in a recipe file, its checks and its messages are made from."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import numbers
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_export.recipe.choices import StageName
from resvit_export.recipe.pairs import ReadValue

_ACCEPTED: dict[type, Any] = {str: str, bool: bool, int: numbers.Integral, float: numbers.Real, dict: Mapping}
_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", dict: "a table"}


class Place(enum.Enum):
    """What a text stands for on this machine; relative ones are made absolute where the text is read."""

    FILE = "file"
    """The path of a file or folder."""
    REFERENCE = "reference"
    """A path, or a name such as ``timm:NAME`` or ``package.module:function``."""


@dataclass(frozen=True)
class Setting:
    """One field of the recipe."""

    name: str
    kind: type
    """Of one value: ``str``, ``int``, ``float``, ``bool``, an enumeration, or ``dict`` for a table."""
    many: bool
    optional: bool
    """Whether ``None`` is a value: not said."""
    default: Any

    toml: str
    """``table.key`` in a recipe file; ``table`` alone where the whole table is the value."""
    description: str
    """The help text, without the default."""
    since: StageName | None
    """The first stage whose command has the option; ``None``: only a recipe file says it."""
    spelling: str = ""
    """The flag without its dashes, where the field's name does not give it."""
    metavar: str | None = None
    default_text: str = ""
    """What the help calls the default, where its value does not say it."""
    choices: tuple[enum.Enum, ...] = ()
    low: float | None = None
    high: float | None = None
    """Bounds, both included; given together."""
    pairs: ReadValue | None = None
    """How the values of a table are read from KEY=VALUE."""
    place: Place | None = None
    alone: enum.Enum | None = None
    """What the flag means without a value."""
    also: type | None = None
    """Another type that is taken: of a single item for a list of one, or of a value to be made a text."""

    @property
    def flag(self) -> str:
        """The option of the command line."""
        return f"--{self.spelling or self.name.replace('_', '-')}"

    @property
    def table(self) -> str:
        """The table of a recipe file that it is in, or is."""
        return self.toml.partition(".")[0]

    @property
    def help(self) -> str:
        """What ``--help`` says, the default at its end."""
        shown = self.default_text
        if not shown and self.kind is bool:
            shown = self.name if self.default else ""
        elif not shown and self.many:
            shown = ", ".join(str(item) for item in self.default)
        elif not shown and self.default is not None and self.kind is not dict:
            shown = str(self.default)
        return f"{self.description}  [default: {shown}]" if shown else self.description

    def checked(self, value: Any, label: str = "") -> Any:
        """The value as the recipe keeps it: members for the texts of choices, texts for paths, tuples for lists.

        Raises:
            ResvitError: for a wrong type, for what is not among the choices, and out of bounds. The message calls the
                setting ``label``, or else by its name.
        """
        label = label or self.name
        if value is None and self.optional:
            return None
        if self.also is not None and type(value) is self.also:
            value = (value,) if self.many else self.kind(value)
        if not self.many:
            return self._one(value, label)
        if not isinstance(value, list | tuple):
            raise self._wrong_type(value, label)
        return tuple(self._one(item, label) for item in value)

    def _one(self, value: Any, label: str) -> Any:
        if self.place is not None and isinstance(value, os.PathLike):
            value = os.fspath(value)
        accepted: Any = str if self.choices else _ACCEPTED[self.kind]
        if not isinstance(value, accepted) or isinstance(value, bool) != (self.kind is bool):
            raise self._wrong_type(value, label)
        if self.choices:
            return self._member(value, label)
        if self.low is not None and self.high is not None and not self.low <= value <= self.high:
            raise ResvitError(f"{label} = {value} is out of range.", f"Give a value from {self.low} to {self.high}.")
        return int(value) if self.kind is int else value

    def _member(self, text: str, label: str) -> enum.Enum:
        texts = {str(choice.value): choice for choice in self.choices}
        if text in texts:
            return texts[text]
        near = difflib.get_close_matches(text, texts, n=1, cutoff=0.3)
        raise ResvitError(
            f"{label} = '{text}' does not exist.",
            f"Choose from {', '.join(texts)}." + (f" Did you mean {near[0]}?" if near else ""),
        )

    def _wrong_type(self, value: Any, label: str) -> ResvitError:
        one = _WORDS.get(self.kind, "a text")
        wanted = f"a list of {one.removeprefix('a ')}s" if self.many else one
        also = f", or {_WORDS[self.also]}" if self.also else ""
        return ResvitError(f"{label} = {value!r} is of the wrong type.", f"It must be {wanted}{also}.")


def setting(since: StageName | None, toml: str, default: Any, description: str, **details: Any) -> Any:
    """Define a field of the recipe. The arguments are those of ``Setting``; ``choices`` only for another order."""
    known = {"since": since, "toml": toml, "description": description, **details}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=known)
    return dataclasses.field(default=default, metadata=known)


def settings_of(recipe: type) -> dict[str, Setting]:
    """The settings of a dataclass whose fields ``setting`` made, by name, in its order."""
    hints = typing.get_type_hints(recipe)
    found = {}
    for item in dataclasses.fields(recipe):
        kind, many, optional = _resolved(hints[item.name])
        known = dict(item.metadata)
        if issubclass(kind, enum.Enum):
            known.setdefault("choices", tuple(kind))
        default = {} if kind is dict else item.default
        found[item.name] = Setting(item.name, kind, many, optional, default, **known)
    return found


def _resolved(hint: Any) -> tuple[type, bool, bool]:
    """From a field's type to that of one value, whether there are several, and whether it may be None."""
    optional = type(None) in typing.get_args(hint)
    if optional:
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return typing.get_args(hint)[0], True, optional
    return (dict if origin is not None and issubclass(origin, Mapping) else hint), False, optional
