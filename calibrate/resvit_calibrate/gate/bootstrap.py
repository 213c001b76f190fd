"""Intervals for any metric of a set of images: the images are drawn again, the same for both networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from resvit_calibrate.gate.intervals import normal_quantile

DRAWS = 2000
_WEIGHTS = 1 << 22  # float64 held at once: 32 MiB
_TAIL = 10  # draws that must lie beyond a quantile before it is read off them

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights [R, N] (how often each image was drawn) turned into the metrics of each drawing, [R, S]."""


def resampled(statistic: Statistic, count: int, draws: int = DRAWS, seed: int = 0) -> Floats:
    """The metrics [draws, S] of ``draws`` sets of ``count`` images, drawn with replacement from ``count``.

    A statistic that looks at two networks sees the same images for both, so that what makes an image hard for
    both cancels in their difference. Efron, "Bootstrap methods: another look at the jackknife", Annals of
    Statistics 7, 1979. The seed makes it repeatable.
    """
    random = np.random.default_rng(seed)
    parts, left = [], draws
    while left:
        now = max(1, min(left, _WEIGHTS // count))
        chosen = random.integers(0, count, (now, count))
        chosen += (np.arange(now) * count)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=now * count).reshape(now, count)
        parts.append(statistic(weights.astype(np.float64)))
        left -= now
    return np.concatenate(parts)


def percentile_interval(point: float, draws: Floats, count: int, confidence: float) -> tuple[float, float]:
    """The two-sided interval around ``point``, read off what the metric was on the drawn sets [R].

    Percentiles of the drawings, widened for few images as Student's t is wider than the normal: Hesterberg,
    "What teachers should know about the bootstrap", The American Statistician 69, 2015, section 3.3. Not BCa:
    its bias and skewness corrections need one more evaluation for each image, and in a difference of two networks
    on the same images there is next to no bias and skewness left to correct (see the coverage in the tests). Too
    far out for the number of drawings, the normal distribution of the same spread goes on; the point is inside.
    """
    z = normal_quantile(confidence)
    known = draws[np.isfinite(draws)]
    if count < 2 or len(known) < 2:
        return point, point
    wide = math.sqrt(count / (count - 1)) * _student(z, count - 1)
    tail = NormalDist().cdf(-wide)
    low, high = (float(edge) for edge in np.quantile(known, [tail, 1.0 - tail]))
    if tail * len(known) < _TAIL:
        spread = wide * float(known.std())
        low, high = min(low, point - spread), max(high, point + spread)
    return min(low, point), max(high, point)


def _student(z: float, freedom: int) -> float:
    """Student's quantile from the normal one: Abramowitz and Stegun, 26.7.5; within 1% from 4 degrees on."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
