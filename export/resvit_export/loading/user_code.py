"""Errors in the code that a user brought: whose line it was, and what to say of it."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from resvit_engines.errors import ResvitError

_HERE = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent


def user_error(error: BaseException, what: str, fix: str) -> ResvitError:
    """An error raised in the user's code, with its own message and the line of theirs that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _is_library(f.filename)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = lines[0].strip()[:300] if lines else ""
    return ResvitError(f"{what}{place}: {type(error).__name__}: {message}", fix)


def _is_library(filename: str) -> bool:
    path = Path(filename)
    return (
        filename.startswith("<")
        or path.is_relative_to(_HERE)
        or path.is_relative_to(_TORCH)
        or ("importlib" in path.parts or "contextlib.py" in path.parts)
    )
