"""Whether two forms of one network compute the same: to rounding, and no further."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.rows import paired_rows

PARITY_TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output. Two float32 runtimes differ by some 1e-6."""
_ROUNDINGS, _MOST_MOVED = 4.0, 0.01
"""A network that rounding moves by more than this share cannot be told from a wrong translation."""


@dataclass(frozen=True)
class Difference:
    """One output in both forms: ``shapes``, its largest absolute value, the largest difference, and what may be."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    largest: float
    error: float
    allowed: float

    @property
    def finite(self) -> bool:
        """Whether the shapes are the same and the reference's values are finite."""
        return self.shapes[0] == self.shapes[1] and bool(np.isfinite(self.largest))

    @property
    def same(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.finite and self.error <= self.allowed


def differences(reference: Runner, candidate: Runner, feeds: Arrays, *, sets: bool = False) -> dict[str, Difference]:
    """Compare on one batch, by the candidate's output names in the reference's order.

    Where ``sets`` says so, the outputs' rows are paired first (``resvit_engines.rows``). Above
    ``PARITY_TOLERANCE``, what rounding the images to float32 once more moves in the reference itself is allowed for,
    fourfold: an attention that is sharp enough turns 1e-7 into 1e-4 on either side.
    """
    expected, actual = reference(feeds), candidate(feeds)
    names = dict(zip(expected, actual, strict=True))
    found = dict(zip(expected, actual.values(), strict=True))
    if sets:
        found = paired_rows(expected, found)
    moved: dict[str, float] | None = None
    result: dict[str, Difference] = {}
    for name, one in expected.items():
        other, largest = found[name], float(np.abs(one).max())
        shapes = (one.shape, other.shape)
        if one.shape != other.shape or not np.isfinite(largest):
            result[names[name]] = Difference(shapes, largest, np.inf, 0.0)
            continue
        error = float(np.abs(one.astype(np.float64) - other).max())
        allowed = PARITY_TOLERANCE * max(largest, 1e-6)
        if not error <= allowed:
            moved = moved or _moved_by_rounding(reference, feeds, expected, sets)
            allowed = max(allowed, min(_ROUNDINGS * moved[name], _MOST_MOVED * largest))
        result[names[name]] = Difference(shapes, largest, error, allowed)
    return result


def _moved_by_rounding(reference: Runner, feeds: Arrays, expected: Arrays, sets: bool) -> dict[str, float]:
    """How far each output moves when every pixel is rounded otherwise, by a unit in its last place or less."""
    random = np.random.default_rng(1)
    moved = dict.fromkeys(expected, 0.0)
    for _ in range(3):
        shaken = {
            name: (value * (1.0 + 6e-8 * random.choice([-1.0, 1.0], value.shape))).astype(value.dtype)
            for name, value in feeds.items()
        }
        answers = reference(shaken)
        answers = paired_rows(expected, answers) if sets else answers
        for name, value in expected.items():
            moved[name] = max(moved[name], float(np.abs(answers[name].astype(np.float64) - value).max()))
    return moved
