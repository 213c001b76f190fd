"""What is remembered of a tensor: exact extremes, and histograms of magnitudes that grow with them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

BINS = 2048
LOG_BINS = 48
_SMALLEST_ANCHOR = -100
_HALF_OCTAVE = 22
"""Shifting a float32 by this many bits leaves exponent and first bit of the mantissa: 2·exponent, +1 from 1.5 on."""
_BIAS = 127


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """The sampled values of a tensor by channel; arrays are over channels [C].

    Channels run along the axis that the reader sums over: axis 1 in front of a convolution, the last axis in front
    of a matrix product (the last but one for its second operand).
    """

    count: NDArray[np.int64]
    """[C] sampled values, exact zeros among them."""
    mean: NDArray[np.float64]
    """[C] E[x]."""
    mean_square: NDArray[np.float64]
    """[C] E[x²]."""
    absmax: NDArray[np.float32]
    """[C] the largest magnitude in the sample; the tensor's exact maximum may lie above all of them."""
    log_histogram: NDArray[np.int32]
    """[C, 48] counts of the magnitudes that are not zero, by the half octaves of ``edges``."""
    anchor: int
    """All values of the tensor, sampled or not, are of magnitude below 2^anchor."""
    reach: NDArray[np.float32] | None = None
    """[C] how far all values are taken to reach, of which these are a sample; None for no further than ``absmax``."""
    halves: tuple[ChannelStatistics, ...] = ()
    """The same of every other image, and of those between: what is chosen by one is judged by the other, as by images
    that calibration never saw. Empty where there was one image."""

    @classmethod
    def of_halves(cls, first: ChannelStatistics, second: ChannelStatistics) -> ChannelStatistics:
        """Both, of one anchor, added up."""
        count = first.count + second.count
        share = first.count / np.maximum(count, 1)
        return cls(
            count,
            second.mean + share * (first.mean - second.mean),
            second.mean_square + share * (first.mean_square - second.mean_square),
            np.maximum(first.absmax, second.absmax),
            first.log_histogram + second.log_histogram,
            first.anchor,
            None,
            (first, second) if first.count.any() and second.count.any() else (),
        )

    @property
    def extent(self) -> NDArray[np.float32]:
        """[C] ``reach``, or ``absmax`` where that is all that is known."""
        return self.absmax if self.reach is None else self.reach

    @property
    def edges(self) -> NDArray[np.float64]:
        """Edges [49] of the bins: bin i holds edges[i] ≤ |x| < edges[i + 1].

        Downwards from 2^anchor each octave is cut once, at 1.5 times its lower end: 2^a, 1.5·2^(a-1), 2^(a-1), …
        The first bin begins at zero, so that the bins cover everything and resolve 2^-23 to 1 of the range.
        """
        index = np.arange(LOG_BINS + 1)
        edges: NDArray[np.float64] = np.ldexp(np.where(index % 2, 1.5, 1.0), self.anchor - LOG_BINS // 2 + index // 2)
        edges[0] = 0.0
        return edges


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """A tensor's values over all calibration images."""

    count: int
    """Values in the sample, exact zeros among them (the histogram has the others only)."""
    minimum: float
    """Exact, over every value and not only the sample."""
    maximum: float
    histogram: NDArray[np.int64] | None
    """Counts [2048] of magnitudes: bin i has i·width < |x| ≤ (i+1)·width. None where none was kept."""
    bin_width: float
    """A power of two; 0 without a histogram."""
    channels: ChannelStatistics | None = None
    """By channel, for tensors that a weighted operator or a residual reads and whose layout is known."""
    image_absmax: NDArray[np.float32] | None = None
    """[images] the exact largest magnitude in each image, in the order in which they came."""

    @property
    def absmax(self) -> float:
        """The exact largest magnitude."""
        return max(abs(self.minimum), abs(self.maximum))


class GrowingHistogram:
    """A histogram of magnitudes whose range doubles when it must, merging bins in pairs.

    Bin widths are powers of two, so the result does not depend on the order in which values come.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.bin_width = 0.0
        self.count = 0

    def add(self, sample: NDArray[np.float32], absmax: float) -> None:
        """Count a sample [N] of finite values, none of a magnitude above ``absmax``."""
        self.count += sample.size
        if absmax > self.bin_width * BINS:
            self._grow(absmax)
        if self.bin_width:
            # Bin 0 of the count takes exact zeros, which no grid gets wrong.
            bins = np.ceil(np.abs(sample) * np.float32(1.0 / self.bin_width)).astype(np.int32)
            self.counts += np.bincount(bins, minlength=BINS + 1)[1 : BINS + 1]

    def _grow(self, absmax: float) -> None:
        # The smallest power of two w with 2048·w ≥ absmax; kept where 1/w is a float32.
        width = 2.0 ** max(math.ceil(math.log2(absmax / BINS)), -120)
        while width * BINS < absmax:  # log2 rounds
            width *= 2.0
        if self.bin_width:
            merged = min(round(width / self.bin_width), BINS)
            sums = self.counts.reshape(-1, merged).sum(axis=1)
            self.counts = np.pad(sums, (0, BINS - sums.size))
        self.bin_width = width


_ENOUGH = 1 << 17
"""Values of a tensor after which its channels are looked at less often: counting them takes time."""


class GrowingChannels:
    """Adds up ``ChannelStatistics``; its anchor rises with the tensor's maximum, bins moving down with it."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.anchor: int | None = None
        # One half of the images behind the other; column 0 takes exact zeros.
        self.counts = np.zeros((2 * channels, LOG_BINS + 1), np.int32)
        self.sums, self.squares = np.zeros(2 * channels), np.zeros(2 * channels)
        self.absmax = np.zeros(2 * channels, np.float32)

    def wants_more(self, batch: int) -> bool:
        """Whether this batch is to be counted: all at first, every fourth when there are enough values."""
        return batch % 4 == 0 or int(self.counts.sum(dtype=np.int64)) < _ENOUGH

    def add(
        self, sample: NDArray[np.float32], channel: NDArray[np.int32], absmax: float, image: NDArray[np.int64]
    ) -> None:
        """Count a sample [N] of finite values, none of a magnitude above ``absmax``.

        ``channel`` [N] and ``image`` [N] say where each is from.
        """
        anchor = max(math.frexp(absmax)[1], _SMALLEST_ANCHOR)
        if self.anchor is None or anchor > self.anchor:
            self._raise_anchor(anchor)
        assert self.anchor is not None
        row = channel + (image % 2).astype(np.int32) * np.int32(self.channels)
        magnitude = np.abs(sample)
        bits = magnitude.view(np.int32)
        lowest = 2 * (self.anchor + _BIAS) - LOG_BINS - 1
        bins = np.maximum((bits >> _HALF_OCTAVE) - lowest, 1) * (bits != 0)
        rows, width = 2 * self.channels, LOG_BINS + 1
        counted = np.bincount(row * width + bins, minlength=rows * width)
        self.counts += counted.reshape(rows, width).astype(np.int32)
        self.sums += np.bincount(row, sample, rows)
        self.squares += np.bincount(row, np.square(sample, dtype=np.float64), rows)
        larger = np.flatnonzero(magnitude > self.absmax[row])
        np.maximum.at(self.absmax, row[larger], magnitude[larger])

    def _raise_anchor(self, anchor: int) -> None:
        if self.anchor is not None:
            moved = min(2 * (anchor - self.anchor), LOG_BINS - 1)
            bins = self.counts[:, 1:]
            lowest = bins[:, : moved + 1].sum(axis=1, dtype=np.int32)
            bins[:, : LOG_BINS - moved] = bins[:, moved:].copy()
            bins[:, LOG_BINS - moved :] = 0
            bins[:, 0] = lowest
        self.anchor = anchor

    def statistics(self) -> ChannelStatistics:
        """Everything added up."""
        return ChannelStatistics.of_halves(self._half(0), self._half(1))

    def _half(self, number: int) -> ChannelStatistics:
        rows = slice(number * self.channels, (number + 1) * self.channels)
        count = self.counts[rows].sum(axis=1, dtype=np.int64)
        divisor = np.maximum(count, 1)
        anchor = self.anchor if self.anchor is not None else _SMALLEST_ANCHOR
        histogram = np.ascontiguousarray(self.counts[rows, 1:])
        means = self.sums[rows] / divisor, self.squares[rows] / divisor
        return ChannelStatistics(count, *means, self.absmax[rows].copy(), histogram, anchor)
