"""How the KEY=VALUE pairs of ``--model-arg``, ``--preprocess`` and ``--task-option`` are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from resvit_engines.errors import ResvitError

ReadValue: TypeAlias = Callable[[str, str], Any]
"""From a key and the text behind its equals sign to the value."""


def read_pairs(flag: str, pairs: Iterable[str], read: ReadValue) -> dict[str, Any]:
    """Read the pairs that ``flag`` was given; one text may hold several: ``mean=0.5 std=0.5``.

    Raises:
        ResvitError: for a text that is no KEY=VALUE, and whatever ``read`` raises.
    """
    values = {}
    for pair in (each for text in pairs for each in re.split(r"\s+(?=[A-Za-z_]\w*=)", text.strip())):
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ResvitError(f"{flag} {pair} is not KEY=VALUE.", f"Write it as {flag} name=value.")
        values[key.strip()] = read(key.strip(), text.strip())
    return values


def plain_values(key: str, text: str) -> bool | int | float | str:
    """Read a value as bool, integer, number or text, whichever fits first."""
    del key
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def task_values(key: str, text: str) -> Any:
    """Read a value of ``--task-option``: whole numbers for ``ignore``, ``characters`` as they are, else plain."""
    if key == "characters":
        return text
    if key == "ignore":
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all(re.fullmatch(r"-?\d+", part) for part in parts):
            raise ResvitError(
                f"--task-option ignore={text} is not a list of whole numbers.",
                "Write it as ignore=255 or ignore=0,255.",
            )
        return [int(part) for part in parts]
    return plain_values(key, text)


def preprocess_values(key: str, text: str) -> Any:
    """Read a value of ``--preprocess``: numbers for mean and std, height and width for size, else plain."""
    if key in ("mean", "std"):
        try:
            return [float(part) for part in text.split(",")]
        except ValueError as error:
            raise ResvitError(
                f"--preprocess {key}={text} is not a list of numbers.", f"Write it as {key}=0.5,0.5,0.5."
            ) from error
    if key == "size":
        match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text)
        if not match:
            raise ResvitError(f"--preprocess size={text} is not HEIGHTxWIDTH.", "Write it as size=224x224.")
        return [int(match[1]), int(match[2] or match[1])]
    return plain_values(key, text)
