"""What a kernel's configuration and shapes come to, as one text: the key of the table of measured results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def case_of(config: Any, shapes: Sequence[Sequence[int]]) -> str:
    """``heads=6 head_size=64 dtype=int8 … @ 8x197x1152``, for a kernel's configuration and its input shapes.

    Numbers that do not change the work are left out: scales, the epsilon, and the batch that tiles were chosen for,
    which stands in the shapes.
    """
    said = [
        f"{field.name}={_text(getattr(config, field.name))}"
        for field in dataclasses.fields(config)
        if field.name != "batch" and not isinstance(getattr(config, field.name), float)
    ]
    return f"{' '.join(said)} @ {' '.join(_text(tuple(shape)) for shape in shapes)}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    return str(int(value)) if isinstance(value, bool) else str(value)
