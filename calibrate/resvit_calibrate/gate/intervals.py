"""Confidence intervals for shares and for the difference of two shares on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from resvit_engines.errors import ResvitError

_STEPS = 200
MOST_IMAGES = 10_000_000
"""More than anybody has to validate on."""


def normal_quantile(confidence: float) -> float:
    """z with P(|Z| < z) = ``confidence``; raises ``ResvitError`` outside of 0.5 … 1 (exclusive)."""
    if not 0.5 <= confidence < 1.0 or 1.0 - confidence < 1e-9:
        raise ResvitError(
            f"A confidence of {confidence} cannot be used.", "Choose one from 0.5 up to below 1, such as 0.95."
        )
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def share(successes: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share, 0 to 1 (JASA 1927)."""
    z2 = normal_quantile(confidence) ** 2
    middle = (successes + z2 / 2.0) / (count + z2)
    spread = math.sqrt(z2 * (successes * (count - successes) / count + z2 / 4.0)) / (count + z2)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def paired_difference(lost: float, gained: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval for the difference of two accuracies measured on the same images, -1 to 1.

    ``lost`` of ``count`` images are right only in the first network, ``gained`` only in the second; the
    difference is first less second. Whole numbers are not required, so that larger experiments can be
    imagined. Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998.
    """
    if not (lost >= 0 and gained >= 0 and count > 0 and lost + gained <= count * (1 + 1e-12)):
        raise ValueError(f"{lost} lost and {gained} gained of {count} images")
    z = normal_quantile(confidence)
    observed = (lost - gained) / count
    lower = _edge(observed, -1.0, lambda d: score(d, lost, gained, count) <= z)
    upper = _edge(observed, 1.0, lambda d: score(d, lost, gained, count) >= -z)
    return lower, upper


def score(difference: float, lost: float, gained: float, count: float) -> float:
    """Tango's statistic: how many standard errors the observed difference lies above ``difference``.

    The standard error is that of the most likely network pair whose true difference is ``difference``.
    """
    if difference < 0.0:
        # Mirrored, so that the quadratic below only ever sees roots of opposite sign.
        return -score(-difference, gained, lost, count)
    excess = lost - gained - count * difference
    # Most likely share q of images that only the second gets right: the root ≥ 0 of a q² + b q + c = 0.
    a = 2.0 * count
    b = difference * (2.0 * count - lost + gained) - lost - gained
    c = -gained * difference * (1.0 - difference)
    root = math.sqrt(max(b * b - 4.0 * a * c, 0.0))
    # Two forms of the same root; each is taken where it subtracts no nearly equal numbers.
    q = -2.0 * c / (b + root) if b > 0.0 else (root - b) / (2.0 * a)
    variance = count * (2.0 * q + difference * (1.0 - difference))
    if variance <= 0.0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def images_to_decide(lost: float, gained: float, count: int, limit: float, confidence: float) -> int | None:
    """How many images would put the whole of Tango's interval on one side of ``limit`` (a share).

    With the shares of lost and gained images going on as in these ``count``; two digits, rounded up. None where
    the observed difference is too near to the limit for any realistic number (10 million).
    """
    z = normal_quantile(confidence)
    lost, gained = lost / count, gained / count

    def decides(images: int) -> bool:
        # The interval's end passes the limit exactly where the score there passes z.
        return abs(score(limit, lost * images, gained * images, images)) >= z

    if not decides(MOST_IMAGES):
        return None
    few, enough = 0, count
    while not decides(enough):
        few, enough = enough, min(2 * enough, MOST_IMAGES)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if decides(middle) else (middle, enough)
    return two_digits_up(enough)


def two_digits_up(count: int) -> int:
    """Round up to two digits: an estimate should not look more exact than it is."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def _edge(inside: float, outside: float, holds: Callable[[float], bool]) -> float:
    """The end of the interval between the observed difference, where ``holds``, and the farthest possible."""
    if holds(outside):
        return outside
    for _ in range(_STEPS):
        middle = (inside + outside) / 2.0
        if middle in (inside, outside):
            break
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    # The outer neighbour: an interval may be a hair too wide, never too narrow.
    return outside
