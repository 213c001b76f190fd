"""What quantising costs each channel by how far the grid reaches in it, for many grids and scales of one tensor.

Factors between channels and ranges are searched together: hundreds of grids for each of thousands of channels. What a
grid costs a channel hangs on nothing but how far it reaches there, so it is worked out at 32 reaches an octave, and
read between them in a straight line. Errors grow with the square of a step, so that a line is less than 0.1% off; where
a range just begins to cut, it may be a quarter.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from resvit_calibrate.observe.histogram import ChannelStatistics
from resvit_calibrate.ranges.spread import largest_errors, mean_errors, spread_of

Floats = NDArray[np.float64]

_AN_OCTAVE = 32
"""Reaches that are worked out, an octave."""
_PIECES = 2
"""Pieces that a bin of the histogram is cut into."""


class ReachErrors:
    """The expected squared error per value of each channel; reaches that were not asked for before are worked out."""

    def __init__(self, channels: ChannelStatistics, precision: str, bits: int = 8) -> None:
        """``precision`` is "int8", of 2^(bits-1) - 1 positive levels, or "fp8" (E4M3)."""
        self._channels, self._precision, self._bits = channels, precision, bits
        # In units of the range, where single precision holds every square.
        self._unit = float(np.ldexp(1.0, channels.anchor))
        spread = spread_of(channels, _PIECES)
        self._edges = spread.edges / self._unit
        self._masses = np.ascontiguousarray(spread.masses.T, np.float32)  # [B, C]
        self._first = 0
        self._table = np.zeros((0, channels.count.size), np.float32)  # [R, C], of the sums over values

    def __call__(self, reaches: Floats) -> Floats:
        """The errors [N, C] of grids whose largest level lies at ``reaches`` [N, C] in the units of the channels.

        Raises ValueError for reaches that are not finite and positive.
        """
        if not (np.isfinite(reaches).all() and (reaches > 0.0).all()):
            raise ValueError("reaches must be finite and positive")
        if not reaches.size:
            return np.zeros(reaches.shape)
        place = np.log2(reaches / self._unit) * _AN_OCTAVE
        below = np.floor(place)
        self._cover(int(below.min()), int(below.max()) + 1)
        width = self._table.shape[1]
        at = (below.astype(np.intp) - self._first) * width + np.arange(width)
        lower, upper = self._table.take(at), self._table.take(at + width)
        sums = (lower + (place - below) * (upper - lower)) * self._unit**2
        sums += largest_errors(self._channels, reaches, self._precision, self._bits)
        shares: Floats = sums / np.maximum(self._channels.count, 1)
        return shares

    def _cover(self, low: int, high: int) -> None:
        """Hold the rows ``low`` to ``high``."""
        low, high = math.floor(low / _AN_OCTAVE) * _AN_OCTAVE, (high // _AN_OCTAVE + 1) * _AN_OCTAVE
        if not len(self._table):
            self._first, self._table = low, self._rows(low, high)
            return
        last = self._first + len(self._table)
        parts = [self._rows(low, self._first)] if low < self._first else []
        parts.append(self._table)
        parts += [self._rows(last, high)] if high > last else []
        if len(parts) > 1:
            self._first, self._table = min(low, self._first), np.concatenate(parts)

    def _rows(self, low: int, high: int) -> NDArray[np.float32]:
        reaches = np.exp2(np.arange(low, high) / _AN_OCTAVE)
        errors = mean_errors(self._edges, reaches, self._precision, self._bits)
        return np.asarray(errors.astype(np.float32) @ self._masses, np.float32)


@functools.lru_cache(maxsize=32)
def reach_errors(channels: ChannelStatistics, precision: str, bits: int = 8) -> ReachErrors:
    """The table of one tensor's statistics, kept while others are few."""
    return ReachErrors(channels, precision, bits)
