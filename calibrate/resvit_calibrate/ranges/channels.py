"""What quantising a tensor costs each of its channels, and the range that costs the reader's output least."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from resvit_calibrate.observe.histogram import LOG_BINS, ChannelStatistics
from resvit_calibrate.ranges.estimators import DEAD_AMAX, SMALLEST_AMAX, grid_levels, rounded, squared_error_integral

__all__ = ["BEYOND", "ChannelStatistics", "amax_for_output", "channel_error", "shifted"]

Floats = NDArray[np.float64]

_PARTS = 8
"""Pieces that a bin is cut into."""
_STEEPEST = 50.0
_COARSE, _FINE = 64, 17
_CUT = 2.0
"""How much more the error of a value that is cut counts than that of one that is rounded. Rounding errors are as often
above as below and fall away where positions are averaged, as in the pool in front of a head; what is cut off is
missing everywhere, at the same few channels that all else depends on."""
BEYOND = 2.0
"""How far a range may reach beyond what calibration saw."""
_RANGES_AT_ONCE = 1 << 22


def channel_error(
    channels: ChannelStatistics,
    amax: float | Floats,
    precision: str,
    scale: Floats | None = None,
    bits: int = 8,
    parts: int = _PARTS,
    cut: float = 1.0,
) -> Floats:
    """Expected squared error per value of each channel, when the tensor is quantised with each of ``amax`` [N].

    Channel c is divided by ``scale[c]`` before quantising and multiplied by it afterwards, so that the error [N, C]
    is in the units of the channel as it is. ``precision`` is "int8", of 2^(bits-1) - 1 positive levels, or "fp8"
    (E4M3). Exact zeros have no error.

    Within a bin of the channel's histogram the density is taken as exponential, its slope that of the neighbouring
    bins' densities, and the largest value of the sample as where it was seen; the error is integrated exactly over
    eighths of a bin, each of even density. Against drawn values this is within some per cent in the bulk, and as
    good as the sample's few largest values where clipping dominates. Raises ValueError for shapes and scales that
    mean nothing. Fewer ``parts`` of a bin are quicker and coarser. Errors of values beyond ``amax`` count ``cut``
    times.
    """
    clips = np.atleast_1d(np.asarray(amax, np.float64))
    count = channels.count.size
    if clips.ndim != 1 or not (np.isfinite(clips).all() and (clips > 0.0).all()):
        raise ValueError("amax must be finite and positive, a number or [N]")
    if scale is None:
        scales = np.ones(count)
    else:
        scales = np.asarray(scale, np.float64)
        if scales.shape != (count,) or not (np.isfinite(scales).all() and (scales > 0.0).all()):
            raise ValueError(f"scale must be finite and positive, [{count}]")
    spread = _spread(channels, parts)
    reaches = clips[:, None] * scales
    errors = _seen_errors(channels, reaches, precision, bits)  # [N, C]
    errors *= np.where(channels.absmax > reaches, cut, 1.0)
    if scale is None:
        judged = _mean_errors(spread.edges, clips, precision, bits)
        judged *= np.where(spread.edges[:-1] >= clips[:, None], cut, 1.0)
        errors += judged @ spread.masses.T
    else:
        rows = max(1, _RANGES_AT_ONCE // (spread.edges.size * max(count, 1)))
        for start in range(0, clips.size, rows):
            own = reaches[start : start + rows]  # [n, C]
            judged = _mean_errors(spread.edges, own.ravel(), precision, bits).reshape(*own.shape, -1)
            judged *= np.where(spread.edges[:-1] >= own[..., None], cut, 1.0)
            errors[start : start + rows] += np.einsum("ncb,cb->nc", judged, spread.masses)
    shares: Floats = errors / np.maximum(channels.count, 1)
    return shares


def amax_for_output(
    channels: ChannelStatistics, weight_energy: Floats, precision: str, absmax: float, bits: int = 8
) -> float:
    """The amax with the least error of the reader's output: the minimum of Σ_c weight_energy[c] · error_c.

    ``weight_energy`` [C] is the sum of squares of all weights that channel c is multiplied by; ``absmax`` the
    tensor's exact maximum. The result is finite and positive. Errors of channels are taken as independent, and those of
    values beyond the range count ``_CUT`` times. Where the halves of the images are known, a range is a share of the
    largest value of one half and judged by the values of the other, so that it reaches as far as images that were not
    seen want it to: beyond ``absmax``, up to ``BEYOND`` times, where halves differ much. After M. Nagel et al., "A
    white paper on neural network quantization", 2021 (section 3.1: ranges for the least squared error), weighed by what
    the layer makes of it, with the candidates of H. Wu et al., 2020.
    """
    energy = np.asarray(weight_energy, np.float64)
    if energy.shape != channels.count.shape:
        raise ValueError(f"weight_energy must be [{channels.count.size}]")
    if not absmax >= SMALLEST_AMAX:
        return DEAD_AMAX
    largest = min(float(absmax), float(np.finfo(np.float32).max))
    if not (np.isfinite(energy).all() and (energy >= 0.0).all() and energy.any()):
        energy = np.ones_like(energy)
    energy = energy / energy.max()
    if not (energy * channels.absmax).any():
        return largest  # every sampled value that counts was zero: nothing but the maximum is known
    reaches = [float(half.extent.max()) for half in channels.halves]
    pairs, most = [(channels, largest)], 1.0
    if reaches and min(reaches) > 0.0:
        pairs, most = list(zip(channels.halves, reversed(reaches), strict=True)), BEYOND

    def damage(shares: Floats) -> Floats:
        found = [channel_error(each, shares * reach, precision, bits=bits, cut=_CUT) @ energy for each, reach in pairs]
        return np.asarray(np.sum(found, axis=0))

    coarse = np.geomspace(1.0 / 128.0, most, _COARSE)
    best = int(damage(coarse).argmin())
    fine = np.linspace(coarse[max(best - 1, 0)], coarse[min(best + 1, _COARSE - 1)], _FINE)
    candidates = np.append(fine, 1.0)
    return float(np.clip(candidates[damage(candidates).argmin()] * largest, SMALLEST_AMAX, most * largest))


def shifted(channels: ChannelStatistics, centre: Floats, small: float, sign: float = 1.0) -> ChannelStatistics:
    """The statistics of a tensor after ``centre`` [C] has been taken from its channels.

    Of values of magnitude up to ``small`` either sign is as likely; all others have the sign of ``sign``.
    """
    spread = _spread(channels, 2)
    count = channels.count.size
    middles = np.broadcast_to((spread.edges[:-1] + spread.edges[1:]) / 2.0, spread.masses.shape)
    middles = np.minimum(middles, channels.absmax[:, None])
    both = middles <= small
    zeros = np.maximum(channels.count - channels.log_histogram.sum(axis=1), 0.0)
    # [C, 2·96 + 2]: towards ``sign``, against it, exact zeros, and the largest value of each channel.
    largest = sign * channels.absmax.astype(np.float64)[:, None]
    values = np.concatenate([sign * middles, -sign * middles, np.zeros((count, 1)), largest], axis=1)
    half = np.where(both, 0.5, 0.0) * spread.masses
    masses = np.concatenate([spread.masses - half, half, zeros[:, None], np.ones((count, 1))], axis=1)
    moved = np.abs(values - centre[:, None])
    reach = np.where(masses > 0, moved, 0.0).max(axis=1)
    anchor = max(int(np.frexp(reach.max())[1]), channels.anchor - LOG_BINS // 2)
    emptied = dataclasses.replace(channels, anchor=anchor)
    bins = np.clip(np.searchsorted(emptied.edges, moved, "right") - 1, 0, LOG_BINS - 1)
    flat = np.arange(count)[:, None] * LOG_BINS + bins
    counted = np.bincount(flat.ravel(), masses.ravel(), count * LOG_BINS).reshape(count, LOG_BINS)
    return dataclasses.replace(
        emptied,
        halves=tuple(shifted(half, centre, small, sign) for half in channels.halves),
        mean=channels.mean - centre,
        mean_square=np.maximum(channels.mean_square - 2.0 * centre * channels.mean + centre**2, 0.0),
        absmax=reach.astype(np.float32),
        reach=None if channels.reach is None else _moved(channels.reach, sign, centre, reach),
        log_histogram=np.rint(counted).astype(np.int32),
    )


def _moved(reach: NDArray[np.float32], sign: float, centre: Floats, least: Floats) -> NDArray[np.float32]:
    """How far channels that reached so far towards ``sign`` reach from their ``centre``."""
    return np.maximum(np.abs(sign * reach.astype(np.float64) - centre), least).astype(np.float32)


def _mean_errors(edges: Floats, amax: Floats, precision: str, bits: int) -> Floats:
    """Mean squared error over each interval of ``edges`` [B + 1] for each of ``amax`` [N] → [N, B]."""
    step = amax[:, None] / grid_levels(precision, bits)[-1]
    integral = squared_error_integral(edges / step, precision, bits)
    errors: Floats = np.diff(integral, axis=1) / np.diff(edges / step, axis=1) * step**2
    return np.maximum(errors, 0.0)


def _seen_errors(channels: ChannelStatistics, amax: Floats, precision: str, bits: int) -> Floats:
    """Squared error [N, C] of the largest value of each channel for each of ``amax`` [N, C]: one that is known."""
    step = amax / grid_levels(precision, bits)[-1]
    steps = channels.absmax.astype(np.float64) / step
    errors: Floats = np.square((steps - rounded(steps, precision, bits)) * step)
    return errors


@dataclasses.dataclass(frozen=True, eq=False)
class _Spread:
    """The values of all channels but the largest of each, spread over eighths of bins."""

    edges: Floats
    """[384 + 1] the same for all channels."""
    masses: Floats
    """[C, 384] how many values lie in each."""


@functools.lru_cache(maxsize=24)
def _spread(channels: ChannelStatistics, parts: int = _PARTS) -> _Spread:
    edges = channels.edges
    ratio = (edges[2:] / edges[1:-1])[:, None] ** (np.arange(parts) / parts)
    fine = np.concatenate(
        [np.arange(parts) / parts * edges[1], (edges[1:-1, None] * ratio).ravel(), edges[-1:]]
    )  # [8·48 + 1]
    counts = channels.log_histogram.astype(np.float64)
    absmax = channels.absmax.astype(np.float64)[:, None]
    upper = np.minimum(edges[1:], absmax)  # [C, 48]: the last bin ends at the largest value
    widths = np.maximum(upper - edges[:-1], edges[1:] * 1e-6)
    centers = edges[:-1] + widths / 2
    # Without the largest value, which is at the very end of its bin, the density there is not too high.
    rows = np.arange(counts.shape[0])
    top = LOG_BINS - 1 - (counts > 0)[:, ::-1].argmax(axis=1)
    counts[rows, top] = np.maximum(counts[rows, top] - 1.0, 0.0)
    filled = counts > 0
    slope = _slopes(np.log(np.where(filled, counts, 1.0) / widths), centers, filled)
    # Eighths [C, 48, 8] of each bin, cut at the largest value.
    lower_part = np.minimum(fine[:-1], absmax).reshape(-1, LOG_BINS, parts)
    upper_part = np.minimum(fine[1:], absmax).reshape(-1, LOG_BINS, parts)
    steep = np.clip(slope * widths, -_STEEPEST, _STEEPEST)[..., None]
    position = ((lower_part + upper_part) / 2 - centers[..., None]) / widths[..., None]
    weights = np.exp(np.clip(steep * position, -_STEEPEST, _STEEPEST)) * (upper_part - lower_part)
    total = weights.sum(axis=2, keepdims=True)
    lowest = np.arange(parts) == 0
    weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), lowest)
    return _Spread(fine, (counts[..., None] * weights).reshape(-1, LOG_BINS * parts))


def _slopes(logs: Floats, centers: Floats, filled: NDArray[np.bool_]) -> Floats:
    """The slope [C, 48] of the logarithm of the density between the bins below and above that hold anything."""
    below, above = np.zeros_like(filled), np.zeros_like(filled)
    below[:, 1:], above[:, :-1] = filled[:, :-1], filled[:, 1:]
    index = np.arange(LOG_BINS)
    first = index - below  # [C, 48]
    last = index + above
    rise = np.take_along_axis(logs, last, 1) - np.take_along_axis(logs, first, 1)
    run = np.take_along_axis(centers, last, 1) - np.take_along_axis(centers, first, 1)
    slopes: Floats = np.divide(rise, run, out=np.zeros_like(rise), where=run > 0)
    return slopes
