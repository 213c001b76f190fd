"""Whether two forms of one network compute the same: to rounding, and no further."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from resvit_calibrate.runtime.runner import Runner
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.rows import paired_rows

PARITY_TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output. Two float32 runtimes differ by some 1e-6."""
_ROUNDINGS, _MOST_MOVED = 4.0, 0.01
"""A network that rounding moves by more than this share cannot be told from a wrong translation."""
_NEAR_NOTHING = 1e-6
"""Sigmoids of fast libraries are some units in the last place of 1 off, wherever they are near 0: of random images a
trained detector's whole map is."""
_FLAT_UNITS = (1.0, 64.0)
"""Units in the last place by which flat images are shaken: a hundred layers round about 64 times as far as one."""
_SAME_RUN = 1e-6
"""Of the largest output: two runs on the same feeds are further apart only where the network is random."""


@dataclass(frozen=True)
class Difference:
    """One output in both forms: ``shapes``, its largest absolute value, the largest difference, and what may be."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    largest: float
    error: float
    allowed: float
    moved: float = 0.0
    """By how much rounding alone moves the reference, where that was asked."""

    @property
    def chaotic(self) -> bool:
        """Whether rounding alone moves the reference so far that nothing can be told of the candidate."""
        return self.finite and not self.same and self.error <= _ROUNDINGS * self.moved

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
            allowed = max(allowed, min(_ROUNDINGS * moved[name], max(_MOST_MOVED * largest, _NEAR_NOTHING)))
        result[names[name]] = Difference(shapes, largest, error, allowed, moved[name] if moved else 0.0)
    return result


def moved_between_runs(run: Runner, feeds: Arrays) -> float:
    """How far the outputs of the same feeds are apart, of three runs; 0 where only by rounding."""
    first, apart = run(feeds), 0.0
    for _ in range(2):
        again = run(feeds)
        for name, one in first.items():
            with np.errstate(invalid="ignore", over="ignore"):
                error = np.abs(one.astype(np.float64) - again[name]) if one.shape == again[name].shape else np.inf
                largest = float(np.nanmax(np.abs(one), initial=0.0))
            worst = float(np.nanmax(error, initial=0.0))
            apart = max(apart, worst if worst > _SAME_RUN * max(largest, 1e-6) else 0.0)
    return apart


@dataclass(frozen=True)
class FlatImages:
    """What came of images without content: by image, what is wrong with the candidate; and where the reference is."""

    wrong: Mapping[int, str]
    broken: frozenset[int]
    """Images for which the reference itself is not finite, which says nothing of the candidate."""


def flat_differences(reference: Runner, candidate: Runner, feeds: Arrays, *, sets: bool = False) -> FlatImages:
    """What is grossly wrong on images without content.

    Of a black image, all tokens are the same: norms divide by what is left of rounding, scores tie, and a selection is
    anyone's guess. So such images are held to the share ``_MOST_MOVED`` of the largest output of any of them, and to
    what rounding moves, in the image itself and as it adds up over many layers; answers that are ``sets`` to being
    finite.
    """
    expected, actual = reference(feeds), candidate(feeds)
    count = len(next(iter(feeds.values())))
    wrong: dict[int, str] = {}
    broken: set[int] = set()
    moved: list[Arrays] | None = None
    for (name, ones), others in zip(expected.items(), actual.values(), strict=True):
        # A norm answers a flat image with what is left of rounding: what is gross shows beside the images with an edge.
        usual = float(np.abs(ones[np.isfinite(ones)]).max(initial=0.0))
        for image in range(count if ones.shape == others.shape else 0):
            one, other = ones[image].astype(np.float64), others[image].astype(np.float64)
            fine = np.isfinite(one)
            if not fine.all():
                broken.add(image)
            if not np.isfinite(other[fine]).all():
                wrong.setdefault(image, f"output {name} is NaN or infinite, and finite in the original")
                continue
            error, largest = (float(np.abs(part[fine]).max(initial=0.0)) for part in (one - other, one))
            if sets or error <= _MOST_MOVED * max(usual, 1e-3):
                continue
            moved = moved or [reference(shaken) for units in _FLAT_UNITS for shaken in _shaken(feeds, units)]
            with np.errstate(invalid="ignore"):
                own = max(float(np.nanmax(np.abs(part[name][image] - one), initial=0.0)) for part in moved)
            if not error <= _ROUNDINGS * own:
                told = f"output {name} differs by {error:.3g} from the original, whose largest value is {largest:.3g}"
                wrong.setdefault(image, told)
    return FlatImages(wrong, frozenset(broken))


def _moved_by_rounding(reference: Runner, feeds: Arrays, expected: Arrays, sets: bool) -> dict[str, float]:
    """How far each output moves when every pixel is rounded otherwise, by a unit in its last place or less."""
    moved = dict.fromkeys(expected, 0.0)
    for shaken in _shaken(feeds):
        answers = reference(shaken)
        answers = paired_rows(expected, answers) if sets else answers
        for name, value in expected.items():
            moved[name] = max(moved[name], float(np.abs(answers[name].astype(np.float64) - value).max()))
    return moved


def _shaken(feeds: Arrays, units: float = 1.0) -> Iterator[Arrays]:
    """The same feeds, every number rounded otherwise, three times; zeros move by 1e-7. All of it ``units`` times."""
    random = np.random.default_rng(1)
    for _ in range(3):
        shaken = {}
        for name, value in feeds.items():
            signs = random.choice([-1.0, 1.0], value.shape)
            moved = value * (1.0 + units * 6e-8 * signs) + units * 1e-7 * signs * (value == 0)
            shaken[name] = moved.astype(value.dtype) if value.dtype.kind == "f" else value
        yield shaken
