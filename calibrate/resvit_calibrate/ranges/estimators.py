"""From what was seen of a tensor to its amax: the largest magnitude that the quantised grid reaches."""

from __future__ import annotations

import enum
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resvit_calibrate.observe.histogram import BINS, TensorStatistics
from resvit_engines.errors import ResvitError

Floats = NDArray[np.float64]

PRECISIONS = ("int8", "fp8")
DEAD_AMAX = 2.0**-7
"""Amax of a tensor that was zero throughout: its INT8 scale, amax/127, is a normal number even in FP16."""
SMALLEST_AMAX = 2.0**-100
"""Magnitudes below this cannot be told from zero: their scale would leave FP32."""
_PERCENTILE = 99.99
_ENTROPY_START = 128
_CANDIDATES = 512


class Estimator(str, enum.Enum):
    """How amax is chosen; each is capped by the exact maximum over all calibration images."""

    MAX = "max"
    """The exact maximum: nothing is clipped."""
    PERCENTILE = "percentile"
    """99.99% of the values are inside: H. Wu et al., Integer quantization for deep learning inference, 2020."""
    MSE = "mse"
    """The least mean squared error of quantising, on the precision's own grid (Wu et al., 2020, section 4)."""
    ENTROPY = "entropy"
    """The least Kullback-Leibler divergence: S. Migacz, 8-bit inference with TensorRT, GTC 2017."""


def amax_from(statistics: TensorStatistics, estimator: Estimator, precision: str, bits: int = 8) -> float:
    """Choose amax for ``precision`` ("int8" or "fp8", E4M3): finite, positive, at most the exact maximum.

    ``bits`` other than 8 simulate a smaller integer grid, of 2^(bits-1) - 1 positive levels. A tensor that was
    zero throughout gets DEAD_AMAX. Raises ResvitError for an unknown precision and, except for MAX, for a tensor
    of which no histogram was kept.
    """
    if precision not in PRECISIONS:
        raise ResvitError(f"There is no grid for precision {precision!r}.", f"Use one of {', '.join(PRECISIONS)}.")
    largest = statistics.absmax
    if not np.isfinite(largest):
        raise ResvitError(
            "A tensor's largest magnitude is not finite, so it has no range.",
            "Calibrate with a model and images that compute finite numbers.",
        )
    if largest < SMALLEST_AMAX:
        return DEAD_AMAX
    if estimator is Estimator.MAX:
        return largest
    if statistics.histogram is None:
        raise ResvitError(
            f"The {estimator.value} estimator needs a histogram, and none was kept for this tensor.",
            "Use the max estimator for it, or calibrate again with this tensor among the quantised ones.",
        )
    if not statistics.histogram.any():
        return largest  # every sampled value was zero: nothing but the maximum is known
    if estimator is Estimator.PERCENTILE:
        estimate = _percentile(statistics)
    elif estimator is Estimator.MSE:
        estimate = _least_squares(statistics, precision, bits)
    else:
        estimate = _least_divergence(statistics, precision, bits)
    return float(min(max(estimate, SMALLEST_AMAX), largest))


def quantization_error(
    statistics: TensorStatistics, amax: Floats | float, precision: str, *, merged: int = 1, bits: int = 8
) -> Floats:
    """Mean squared error of quantising the sampled values with each of ``amax`` [N] → [N].

    Values are taken as spread evenly over their bin, and the error is integrated exactly over it, so that a
    step finer than the bins is judged as fairly as a coarse one. Exact zeros have no error. ``merged`` bins
    (a divisor of 2048) are taken together, for a quicker and coarser answer.
    """
    if statistics.histogram is None:
        raise ValueError("no histogram")
    clips = np.atleast_1d(np.asarray(amax, np.float64))
    used = -(-_used_bins(statistics) // merged)
    counts = statistics.histogram.reshape(-1, merged).sum(axis=1)[:used].astype(np.float64)
    edges = np.minimum(np.arange(used + 1) * (statistics.bin_width * merged), statistics.absmax)
    widths = np.diff(edges)
    density = np.divide(counts, widths, out=np.zeros_like(counts), where=widths > 0)
    scale = clips[:, None] / grid_levels(precision, bits)[-1]  # [N, 1]
    integral = squared_error_integral(edges / scale, precision, bits)  # [N, E]
    total: Floats = (np.diff(integral, axis=1) @ density) * scale[:, 0] ** 3
    return total / max(statistics.count, 1)


def squared_error_integral(steps: Floats, precision: str, bits: int = 8) -> Floats:
    """The integral of (t - Q(t))² from 0 to each of ``steps`` ≥ 0, of any shape: whole cells, then part of one.

    ``Q`` rounds to the grid of ``grid_levels`` and clips at its end.
    """
    levels, midpoints, integrals = _grid(precision, bits)
    if precision == "int8":
        nearest: Floats = np.minimum(np.rint(steps), levels[-1])
        whole: Floats = nearest / 12.0
    else:
        index = np.searchsorted(midpoints, steps)
        nearest, whole = levels[index], integrals[index]
    rest = steps - nearest
    integral: Floats = whole + rest * rest * rest / 3.0
    return integral


def rounded(steps: Floats, precision: str, bits: int = 8) -> Floats:
    """The level nearest to each of ``steps`` ≥ 0, of any shape."""
    levels, midpoints, _ = _grid(precision, bits)
    nearest: Floats
    if precision == "int8":
        nearest = np.minimum(np.rint(steps), levels[-1])
    else:
        nearest = levels[np.searchsorted(midpoints, steps)]
    return nearest


def grid_levels(precision: str, bits: int = 8) -> Floats:
    """The levels ≥ 0 of a grid: 0 … 2^(bits-1) - 1 for "int8", those of E4M3 for "fp8"."""
    return _grid(precision, bits)[0]


@functools.cache
def _grid(precision: str, bits: int) -> tuple[Floats, Floats, Floats]:
    """Levels [L] ≥ 0 of the grid, midpoints [L-1], and the integral of the squared error from 0 to each level."""
    if precision == "int8":
        if not 2 <= bits <= 16:
            raise ValueError(f"{bits} bits")
        levels: Floats = np.arange(2 ** (bits - 1), dtype=np.float64)
    else:
        import ml_dtypes

        if bits != 8:
            raise ValueError(f"E4M3 has 8 bits, not {bits}")
        e4m3: Any = ml_dtypes.float8_e4m3fn
        levels = np.arange(127, dtype=np.uint8).view(e4m3).astype(np.float64)  # 0 … 448; code 127 is NaN
    gaps = np.diff(levels)
    return levels, levels[:-1] + gaps / 2, np.concatenate([[0.0], np.cumsum(gaps**3 / 12.0)])


def _used_bins(statistics: TensorStatistics) -> int:
    return int(np.clip(np.ceil(statistics.absmax / statistics.bin_width), 1, BINS))


def _percentile(statistics: TensorStatistics) -> float:
    assert statistics.histogram is not None
    cumulative = np.cumsum(statistics.histogram)
    nonzero = int(cumulative[-1])
    wanted = statistics.count * _PERCENTILE / 100.0 - (statistics.count - nonzero)
    if wanted <= 0:  # almost everything is zero: the percentile of what is not
        wanted = nonzero * _PERCENTILE / 100.0
    last = min(int(np.searchsorted(cumulative, wanted)), BINS - 1)
    inside = max(int(statistics.histogram[last]), 1)
    return statistics.bin_width * (last + 1 - (float(cumulative[last]) - wanted) / inside)


def _least_squares(statistics: TensorStatistics, precision: str, bits: int) -> float:
    largest = statistics.absmax
    coarse = np.geomspace(largest / 128.0, largest, 48)
    best = int(quantization_error(statistics, coarse, precision, merged=4, bits=bits).argmin())
    fine = np.linspace(coarse[max(best - 1, 0)], coarse[min(best + 1, 47)], 17)
    candidates = np.append(fine, largest)
    return float(candidates[quantization_error(statistics, candidates, precision, bits=bits).argmin()])


def _least_divergence(statistics: TensorStatistics, precision: str, bits: int) -> float:
    """Migacz's search, over cells of the precision's own grid and in closed form.

    For each candidate, the first i bins: P is the histogram with everything beyond added to bin i; Q is the
    histogram without it, averaged over the non-empty bins of each cell of the grid. With the sums of counts S
    and of non-empty bins N per cell, the divergence needs cells only, never the expanded Q.
    """
    assert statistics.histogram is not None
    used = _used_bins(statistics)
    counts = statistics.histogram[:used].astype(np.float64)
    total = counts.sum()
    if used <= _ENTROPY_START or total == 0:
        return statistics.absmax
    logs = counts * np.log(np.maximum(counts, 1.0))
    sums, filled, entropies = (
        np.concatenate([[0.0], np.cumsum(values)]) for values in (counts, (counts > 0).astype(np.float64), logs)
    )
    ends = np.unique(np.linspace(_ENTROPY_START, used, _CANDIDATES).astype(np.intp))
    # An empty last bin with something beyond it is an infinite divergence: P has mass where Q has none.
    ends = ends[(counts[ends - 1] > 0) | (sums[ends] == total)]
    levels, midpoints, _ = _grid(precision, bits)
    bounds = np.rint(midpoints * (ends[:, None] / levels[-1])).astype(np.intp)  # [C, L-1]
    bounds = np.concatenate([np.zeros_like(ends)[:, None], bounds, ends[:, None]], axis=1)
    mass, bins = np.diff(sums[bounds], axis=1), np.diff(filled[bounds], axis=1)
    log_q = np.log(np.maximum(mass, 1.0)) - np.log(np.maximum(bins, 1.0))  # [C, L], empty cells weigh nothing
    beyond = total - sums[ends]
    last = counts[ends - 1]
    heaped = last + beyond
    # The cell that holds the last bin is the last one that is not empty.
    cell = (bounds < ends[:, None]).sum(axis=1) - 1
    p_log_p = entropies[ends - 1] + heaped * np.log(np.maximum(heaped, 1.0))
    p_log_q = (mass * log_q).sum(axis=1) + beyond * log_q[np.arange(len(ends)), cell]
    divergence = (p_log_p - p_log_q) / total - np.log(total) + np.log(sums[ends])
    return float(ends[divergence.argmin()] * statistics.bin_width)
