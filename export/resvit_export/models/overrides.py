"""Plain values, as a recipe or a command line gives them, into a checked config. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_export.models.config import LIMITS, ONLY, HybridConfig, require, show


def with_overrides(config: HybridConfig, overrides: Mapping[str, Any]) -> HybridConfig:
    """Replace fields by plain values (numbers, strings, lists), as a recipe or a command line gives them.

    A string of numbers with commas is a list; one number for ``image_size`` means a square. A new
    ``in_channels`` without ``mean`` and ``std`` gets the average of the preset's on every channel. Raises
    ``ResvitError`` for an unknown name, a value of the wrong type, a field that the join does not use, or values
    that do not fit together.
    """
    known = [field.name for field in dataclasses.fields(config) if field.name not in ("name", "join")]
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise ResvitError(f"{config.name} has no setting named {name!r}.", f"Did you mean {_listed(near)}?")
        if ONLY.get(name, config.join) is not config.join:
            raise ResvitError(
                f"{config.name}: {name} belongs to the {ONLY[name].value} hybrids and would change nothing here.",
                f"Leave it out, or choose a model named {ONLY[name].value}-….",
            )
        changes[name] = _coerced(config, name, value)
    if "in_channels" in changes and changes["in_channels"] != config.in_channels:
        channels = max(0, min(changes["in_channels"], int(LIMITS["in_channels"][1])))
        for name in ("mean", "std"):
            values = getattr(config, name)
            changes.setdefault(name, (round(sum(values) / len(values), 4),) * channels)
    return dataclasses.replace(config, **changes)


def config_from_json(value: Mapping[str, Any], preset: HybridConfig) -> HybridConfig:
    """Rebuild a config from ``HybridConfig.to_json``, over the ``preset`` of the same name.

    Raises ``ResvitError`` as ``with_overrides`` does.
    """
    unused = [name for name, join in ONLY.items() if join is not preset.join]
    return with_overrides(preset, {k: v for k, v in value.items() if k not in ("name", "join", *unused)})


def _coerced(config: HybridConfig, name: str, value: Any) -> Any:
    """Turn a plain value into the type that the field holds now."""
    current = getattr(config, name)
    if isinstance(current, enum.Enum):
        choices = [member.value for member in type(current)]
        if value not in choices:
            raise ResvitError(f"{config.name}: {name} = {value!r} does not exist.", f"Choose {_listed(choices)}.")
        return type(current)(value)
    if isinstance(current, tuple):
        kind: type[int] | type[float] = float if name in ("mean", "std") else int
        if isinstance(value, str):
            value = [_parsed(part) for part in value.split(",")]
        items = value if isinstance(value, Sequence) else (value,)
        numbers = tuple(_number(config, name, item, kind) for item in items)
        if name == "image_size":
            numbers = numbers * 2 if len(numbers) == 1 else numbers
            require(
                len(numbers) == 2,
                f"{config.name}: image_size = {show(numbers)} has {len(numbers)} values.",
                "Give height and width in pixels, or one number for a square.",
            )
        return numbers
    return _number(config, name, value, type(current))


def _parsed(text: str) -> int | float | str:
    """One value of a comma-separated list, which is how a command line writes a tuple."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _number(config: HybridConfig, name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    accepted = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        what = "a number" if kind is float else "a whole number"
        raise ResvitError(f"{config.name}: {name} = {value!r} is not {what}.", f"Give {name} as {what}.")
    return kind(value)


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
