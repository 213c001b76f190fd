"""What ``trtexec`` measured: microseconds by layer (``--exportProfile``), and of whole runs (``--exportTimes``)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside

LAYERS_MOST = 50_000
"""Layers of one engine."""
_RUNS_MOST = 10_000_000
_FIX_PROFILE = "Give the file that trtexec --exportProfile wrote (with --separateProfileRun)."
_FIX_TIMES = "Give the file that trtexec --exportTimes wrote."


def profile_from_file(path: Path) -> tuple[tuple[str, float], ...]:
    """The layers of a run with a profiler in order, each with its mean time in microseconds.

    Raises:
        ResvitError: INPUT for a file that is missing, cut short, no profile, or holds times that are none.
    """
    what = f"The profile {path}"
    return profile_from_json(json_from_outside(read_outside(path, what=what), what, _FIX_PROFILE), what)


def profile_from_json(document: Any, what: str) -> tuple[tuple[str, float], ...]:
    """The same of a parsed document; ``what`` names it in messages."""
    if not is_profile(document):
        raise ResvitError(f"{what} is no profile of layers.", _FIX_PROFILE)
    rows = [row for row in document if not (isinstance(row, dict) and set(row) == {"count"})]
    if len(rows) > LAYERS_MOST:
        raise ResvitError(f"{what} lists {len(rows):,} layers, more than any engine has.", _FIX_PROFILE)
    return tuple((_name(row, what), 1e3 * _milliseconds(row, "averageMs", what, _FIX_PROFILE)) for row in rows)


def is_profile(document: Any) -> bool:
    """Whether a JSON document has the form of a profile: a list in which a layer has a name and an average."""
    return isinstance(document, list) and any(isinstance(row, dict) and "averageMs" in row for row in document)


def latency_from_file(path: Path) -> float:
    """The median time of the GPU for one run, in microseconds.

    Raises:
        ResvitError: INPUT for a file that is missing, cut short, or no such list.
    """
    what = f"The file of times {path}"
    document = json_from_outside(read_outside(path, 1 << 30, what), what, _FIX_TIMES)
    runs = document if isinstance(document, list) else []
    timed = [row for row in runs[:_RUNS_MOST] if isinstance(row, dict) and "computeMs" in row]
    if not timed:
        raise ResvitError(f"{what} holds no run with 'computeMs'.", _FIX_TIMES)
    return 1e3 * statistics.median(_milliseconds(row, "computeMs", what, _FIX_TIMES) for row in timed)


def _name(row: Any, what: str) -> str:
    name = row.get("name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise ResvitError(f"{what} holds a layer without a name.", _FIX_PROFILE)
    return name


def _milliseconds(row: Mapping[str, Any], key: str, what: str, fix: str) -> float:
    value = row.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value < 1e9:  # type: ignore[arg-type,operator]
        raise ResvitError(f"{what} holds {value!r} as '{key}'.", fix)
    return float(value)  # type: ignore[arg-type]


def summed(names: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """The times by name, those of one name in order."""
    times: dict[str, list[float]] = {}
    for name, us in names:
        times.setdefault(name, []).append(us)
    return times
