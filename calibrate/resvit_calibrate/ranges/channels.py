"""What quantising a tensor costs each of its channels, and the range that costs the reader's output least."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from resvit_calibrate.observe.histogram import LOG_BINS, ChannelStatistics
from resvit_calibrate.ranges.estimators import DEAD_AMAX, SMALLEST_AMAX, grid_levels
from resvit_calibrate.ranges.known import digest_of, known
from resvit_calibrate.ranges.spread import PARTS, largest_errors, mean_errors, spread_of

__all__ = ["BEYOND", "ChannelStatistics", "amax_for_output", "channel_error", "shift_error", "shifted"]

Floats = NDArray[np.float64]

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
    parts: int = PARTS,
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
    spread = spread_of(channels, parts)
    reaches = clips[:, None] * scales
    errors = largest_errors(channels, reaches, precision, bits)  # [N, C]
    errors *= np.where(channels.absmax > reaches, cut, 1.0)
    if scale is None:
        judged = mean_errors(spread.edges, clips, precision, bits)
        judged *= np.where(spread.edges[:-1] >= clips[:, None], cut, 1.0)
        errors += judged @ spread.masses.T
    else:
        rows = max(1, _RANGES_AT_ONCE // (spread.edges.size * max(count, 1)))
        for start in range(0, clips.size, rows):
            own = reaches[start : start + rows]  # [n, C]
            judged = mean_errors(spread.edges, own.ravel(), precision, bits).reshape(*own.shape, -1)
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
    key = "amax_for_output", digest_of(energy), precision, largest, bits
    return known(channels, key, lambda: _least_damage(channels, energy, precision, largest, bits))


def _least_damage(channels: ChannelStatistics, energy: Floats, precision: str, largest: float, bits: int) -> float:
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


def shift_error(
    channels: ChannelStatistics, centre: Floats, small: float, sign: float, clip: float, bits: int = 8
) -> Floats:
    """The expected squared error [C] per value in INT8 up to ``clip``, after ``centre`` [C] has been taken away.

    Values that fit in are taken as spread evenly between two levels. ``small`` and ``sign`` are those of
    :func:`shifted`.
    """
    values, masses = _signed(channels, small, sign)
    step = clip / grid_levels("int8", bits)[-1]
    beyond = np.maximum(np.abs(values - centre[:, None]) - clip, 0.0)
    errors: Floats = (np.maximum(np.square(beyond), step**2 / 12.0) * masses).sum(axis=1)
    return errors / np.maximum(channels.count, 1)


def shifted(channels: ChannelStatistics, centre: Floats, small: float, sign: float = 1.0) -> ChannelStatistics:
    """The statistics of a tensor after ``centre`` [C] has been taken from its channels.

    Of values of magnitude up to ``small`` either sign is as likely; all others have the sign of ``sign``.
    """
    values, masses = _signed(channels, small, sign)
    count = channels.count.size
    moved = np.abs(values - centre[:, None])
    reach = np.where(masses > 0, moved, 0.0).max(axis=1)
    anchor = max(int(np.frexp(reach.max())[1]), channels.anchor - LOG_BINS // 2)
    emptied = dataclasses.replace(channels, anchor=anchor)
    mantissa, exponent = np.frexp(moved)
    octave = exponent.astype(np.intp) - 1 - (anchor - LOG_BINS // 2)
    bins = np.clip(2 * octave + (mantissa >= 0.75), 0, LOG_BINS - 1)
    bins[moved == 0.0] = 0
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


@functools.lru_cache(maxsize=4)
def _signed(channels: ChannelStatistics, small: float, sign: float) -> tuple[Floats, Floats]:
    """Values and how many of each, both [C, 2·96 + 2]: towards ``sign``, against it, exact zeros, and the largest."""
    spread = spread_of(channels, 2)
    count = channels.count.size
    middles = np.broadcast_to((spread.edges[:-1] + spread.edges[1:]) / 2.0, spread.masses.shape)
    middles = np.minimum(middles, channels.absmax[:, None])
    zeros = np.maximum(channels.count - channels.log_histogram.sum(axis=1), 0.0)
    largest = sign * channels.absmax.astype(np.float64)[:, None]
    values = np.concatenate([sign * middles, -sign * middles, np.zeros((count, 1)), largest], axis=1)
    half = np.where(middles <= small, 0.5, 0.0) * spread.masses
    masses = np.concatenate([spread.masses - half, half, zeros[:, None], np.ones((count, 1))], axis=1)
    return values, masses


def _moved(reach: NDArray[np.float32], sign: float, centre: Floats, least: Floats) -> NDArray[np.float32]:
    """How far channels that reached so far towards ``sign`` reach from their ``centre``."""
    return np.maximum(np.abs(sign * reach.astype(np.float64) - centre), least).astype(np.float32)
