"""What kernels of our own took on real GPUs, beside the best that is there without them: a table, and its key."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("measured.json")
"""Written by ``benchmarks/kernels.py --record`` on a machine with a GPU; an empty list until then."""


@dataclass(frozen=True)
class Measured:
    """One case on one GPU: medians in microseconds of our kernel and of the fastest other way, named ``other``.

    ``case`` is what the configuration and the shapes come to, as ``case_of`` writes it.
    """

    sm: int
    device: str
    kind: str
    case: str
    ours_us: float
    other_us: float
    other: str

    @property
    def faster(self) -> bool:
        """Whether ours wins by more than timings vary from run to run."""
        return self.ours_us * _MARGIN < self.other_us


_MARGIN = 1.03


@functools.cache
def measured_results() -> tuple[Measured, ...]:
    """All results that came with this package."""
    return tuple(Measured(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8")))


def measured_result(sm: int, kind: str, case: str, results: tuple[Measured, ...] | None = None) -> Measured | None:
    """The result for a case on a GPU; None where nobody measured it."""
    rows = measured_results() if results is None else results
    return next((row for row in rows if (row.sm, row.kind, row.case) == (sm, kind, case)), None)


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
