"""Options that say how a network's outputs are read, and which of its outputs that is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy.typing as npt

from resvit_engines.errors import ResvitError

Array = npt.NDArray[Any]
DATA_OPTIONS = ("classes", "ignore", "depth_scale")
"""Options that say how the data is read (see ``targets.TargetOptions``): every task lets them pass."""
_O = TypeVar("_O")


def options_from(kind: type[_O], task: str, options: Mapping[str, Any]) -> _O:
    """The options of a task as its dataclass.

    Raises:
        ResvitError: for an option that the task doesn't have, or a value of another type.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            if key in DATA_OPTIONS:
                continue
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            known = ", ".join(sorted((*fields, *DATA_OPTIONS)))
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ResvitError(f"The task {task} has no option {key}.", f"{hint}It has: {known}.")
        values[key] = _typed(task, key, value, fields[key])
    return kind(**values)


def _typed(task: str, key: str, value: Any, item: dataclasses.Field[Any]) -> Any:
    kinds = [part.strip() for part in str(item.type).split("|")]
    if isinstance(value, str) and value.lower() in ("none", "auto") and "None" in kinds:
        return None
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    accepted: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
    for name in kinds:
        if name in accepted and isinstance(value, accepted[name]) and isinstance(value, bool) == (name == "bool"):
            return value
    raise ResvitError(f"The option {key} = {value!r} of the task {task} is of the wrong type.", f"It is {item.type}.")


def require_choice(task: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ResvitError`` for a value that is none of the choices."""
    if value not in choices:
        raise ResvitError(f"The option {key} = {value!r} of {task} does not exist.", f"Choose {', '.join(choices)}.")


def require_between(task: str, key: str, value: float, low: float, high: float) -> None:
    """Raise ``ResvitError`` for a number that is out of range, or not a number."""
    if not low <= value <= high:
        raise ResvitError(f"The option {key} = {value} of {task} is out of range.", f"Give {low:g} to {high:g}.")


def chosen_output(
    fitting: Collection[str], wanted: str | None, outputs: Mapping[str, Array], needs: str, fix: str = ""
) -> str:
    """The output of a task's option ``output``, ``wanted``, or the only one of those that fit.

    Raises:
        ResvitError: where that is none or several, with what the task ``needs`` and what there is; ``fix`` goes on.
    """
    if wanted is None and len(fitting) == 1:
        return next(iter(fitting))
    if wanted is None or wanted not in fitting:
        raise ResvitError(
            f"{needs}{f' called {wanted}' if wanted else ''}; the network has {shapes_of(outputs)}.",
            f"Name one with --task-option output=NAME{fix}.",
        )
    return wanted


def shapes_of(outputs: Mapping[str, Array]) -> str:
    """Names and shapes of outputs, for messages."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items()) or "none"


def stated(options: Any) -> dict[str, Any]:
    """The options of a dataclass that are not as usual, as ``options_from`` reads them."""
    pairs = ((item, getattr(options, item.name)) for item in dataclasses.fields(options))
    return {item.name: value for item, value in pairs if value != item.default}
