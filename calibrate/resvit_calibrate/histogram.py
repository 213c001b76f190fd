"""What is remembered of a tensor: exact extremes, and a histogram of magnitudes that grows with them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

BINS = 2048


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
