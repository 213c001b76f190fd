"""A tensor's sampled values by channel, spread over the bins that counted them, and what a grid makes of each bin."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from resvit_calibrate.observe.histogram import LOG_BINS, ChannelStatistics
from resvit_calibrate.ranges.estimators import grid_levels, rounded, squared_error_integral

Floats = NDArray[np.float64]
Narrow = NDArray[np.float32]

PARTS = 8
"""Pieces that a bin is cut into."""
_STEEPEST = 50.0


def mean_errors(edges: Floats, amax: Floats, precision: str, bits: int) -> Floats:
    """Mean squared error over each interval of ``edges`` [B + 1] for each of ``amax`` [N] → [N, B]."""
    step = amax[:, None] / grid_levels(precision, bits)[-1]
    integral = squared_error_integral(edges / step, precision, bits)
    errors: Floats = np.diff(integral, axis=1) / np.diff(edges / step, axis=1) * step**2
    return np.maximum(errors, 0.0)


def largest_errors(channels: ChannelStatistics, amax: Floats, precision: str, bits: int) -> Floats:
    """Squared error [N, C] of the largest value of each channel for each of ``amax`` [N, C]: one that is known."""
    step = amax / grid_levels(precision, bits)[-1]
    steps = channels.absmax.astype(np.float64) / step
    errors: Floats = np.square((steps - rounded(steps, precision, bits)) * step)
    return errors


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """The values of all channels but the largest of each, spread over eighths of bins."""

    edges: Floats
    """[384 + 1] the same for all channels."""
    masses: Floats
    """[C, 384] how many values lie in each."""


@functools.lru_cache(maxsize=24)
def spread_of(channels: ChannelStatistics, parts: int = PARTS) -> Spread:
    """Spread each bin over ``parts`` pieces, by the densities of the bins beside it."""
    edges = channels.edges
    ratio = (edges[2:] / edges[1:-1])[:, None] ** (np.arange(parts) / parts)
    fine = np.concatenate(
        [np.arange(parts) / parts * edges[1], (edges[1:-1, None] * ratio).ravel(), edges[-1:]]
    )  # [8·48 + 1]
    # In units of the range, where single precision is enough for densities, and quicker.
    unit = np.ldexp(1.0, -channels.anchor)
    inside = (edges * unit).astype(np.float32)
    absmax = (channels.absmax.astype(np.float64)[:, None] * unit).astype(np.float32)
    counts = channels.log_histogram.astype(np.float32)
    upper = np.minimum(inside[1:], absmax)  # [C, 48]: the last bin ends at the largest value
    widths = np.maximum(upper - inside[:-1], inside[1:] * np.float32(1e-6))
    centers = inside[:-1] + widths / 2
    # Without the largest value, which is at the very end of its bin, the density there is not too high.
    rows = np.arange(counts.shape[0])
    top = LOG_BINS - 1 - (counts > 0)[:, ::-1].argmax(axis=1)
    counts[rows, top] = np.maximum(counts[rows, top] - 1.0, 0.0)
    filled = counts > 0
    slope = _slopes(np.log(np.where(filled, counts, np.float32(1.0)) / widths), centers, filled)
    # Eighths [C, 48, 8] of each bin, cut at the largest value.
    pieces = (fine * unit).astype(np.float32)
    cut = np.minimum(pieces, absmax)  # [C, 8·48 + 1]
    sizes = np.diff(cut).reshape(-1, LOG_BINS, parts)
    middles = ((cut[:, 1:] + cut[:, :-1]) / 2).reshape(-1, LOG_BINS, parts)
    steep = np.clip(slope * widths, -_STEEPEST, _STEEPEST)[..., None]
    weights = steep * ((middles - centers[..., None]) / widths[..., None])
    np.exp(np.clip(weights, -_STEEPEST, _STEEPEST, out=weights), out=weights)
    weights *= sizes
    total = weights.sum(axis=2, keepdims=True)
    lowest = np.arange(parts) == 0
    weights = np.where(total > 0, weights / np.where(total > 0, total, np.float32(1.0)), lowest)
    return Spread(fine, np.asarray(counts[..., None] * weights, np.float64).reshape(-1, LOG_BINS * parts))


def _slopes(logs: Narrow, centers: Narrow, filled: NDArray[np.bool_]) -> Narrow:
    """The slope [C, 48] of the logarithm of the density between the bins below and above that hold anything."""
    below, above = np.zeros_like(filled), np.zeros_like(filled)
    below[:, 1:], above[:, :-1] = filled[:, :-1], filled[:, 1:]
    index = np.arange(LOG_BINS)
    first = index - below  # [C, 48]
    last = index + above
    rise = np.take_along_axis(logs, last, 1) - np.take_along_axis(logs, first, 1)
    run = np.take_along_axis(centers, last, 1) - np.take_along_axis(centers, first, 1)
    slopes: Narrow = np.divide(rise, run, out=np.zeros_like(rise), where=run > 0)
    return slopes
