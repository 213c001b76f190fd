"""How near outputs are to the float network's where no metric says what they are worth: SQNR, and decisions kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.apart import shared_of
from resvit_calibrate.answers.raw import Raw
from resvit_calibrate.gate.bootstrap import Floats, percentile_interval, resampled
from resvit_calibrate.gate.comparison import Beside, Resampled
from resvit_calibrate.gate.intervals import MOST_IMAGES, two_digits_up
from resvit_engines.errors import ResvitError

MOST_DB = 100.0
"""Outputs that are equal or nearly so have this SQNR."""
FEW = 0.05
SPREAD_DB = 6.0
"""All images but one of twenty must keep the least SQNR less this: noise of twice the amplitude."""
_FEWEST = 10
"""Of fewer decisions nothing can be said."""


@dataclass(frozen=True, eq=False)
class Kept:
    """How many decisions a network keeps of another's; see ``kept_of``.

    ``share`` is that of all ``count``, from 0 to 1, ``draws`` [R] what it is on images drawn again, and ``least``
    what it must be.
    """

    share: float
    draws: Floats
    count: int
    least: float

    def interval(self, images: int, confidence: float) -> tuple[float, float]:
        """The two-sided interval of the share."""
        low, high = percentile_interval(self.share, self.draws, images, confidence)
        return max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True, eq=False)
class Nearness(Resampled):
    """A comparison without a metric: ``drop`` is by how many dB the SQNR misses the least one.

    ``low`` is the SQNR that all images but one of twenty have; where that misses its own limit by more, ``drop`` is of
    it. ``decisions`` are the shares of positions and of images whose largest entry along the class axis is the same in
    both networks, None where no output has such an axis; ``kept`` is what is judged of them, None where there is
    nothing to judge. ``constant`` says that the reference's outputs are the same for every image.
    """

    least: float = 20.0
    pooled: float = math.nan
    low: float = math.nan
    decisions: tuple[float, float] | None = None
    kept: Kept | None = None
    constant: bool = False

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """From the images drawn again; nothing can be said of outputs that are all equal but that they are."""
        return percentile_interval(self.drop, self.draws, self.images, confidence)

    def hopeless(self, confidence: float) -> str | None:
        """Where the reference sees no difference between images."""
        del confidence
        if not self.constant:
            return None
        return (
            f"accuracy was not measured, and the float network gives the same outputs for every one of {self.images} "
            "images, so that nearness to them tells nothing: check the checkpoint and the preprocessing"
        )

    def beside(self, confidence: float) -> Beside | None:
        """The agreement of decisions against its least, where there are any."""
        if self.kept is None:
            return None
        low, high = self.kept.interval(self.images, confidence)
        held, missed = low >= self.kept.least, high < self.kept.least
        side = "not below" if held else "below" if missed else "on both sides of"
        words = (
            f"{self.kept.share:.1%} of {self.kept.count:,} decisions for another class than the commonest are kept, "
            f"between {low:.1%} and {high:.1%}: {side} the least of {self.kept.least:.1%}"
        )
        if not held:
            words += " (where the largest entry decides nothing: --task-option least_agreement=0)"
        return Beside(held, missed, words)

    def images_needed(self, limit: float, confidence: float) -> int | None:
        """Of both halves, where both are open: intervals shrink as 1 / sqrt(images)."""
        halves = [(self.drop, self.draws, limit)]
        if self.kept is not None:
            halves.append((self.kept.share, self.kept.draws, self.kept.least))
        needed = self.images + 1.0
        for point, draws, edge in halves:
            low, high = percentile_interval(point, draws, self.images, confidence)
            if low < edge < high:
                width = high - point if point < edge else point - low
                if width**2 * self.images > MOST_IMAGES * (point - edge) ** 2:
                    return None
                needed = max(needed, self.images * (width / (point - edge)) ** 2)
        return two_digits_up(math.ceil(needed))

    def limit(self, max_drop: float) -> float:
        """No accuracy was measured, so that no drop of it can be limited."""
        del max_drop
        return 0.0

    def measured(self, interval: tuple[float, float], confidence: float) -> str:
        """What was measured instead."""
        low, high = self.least - interval[1], self.least - interval[0]
        which = "" if self.least - self.pooled >= self.drop else f" (that of the worst {FEW:.0%}, plus {SPREAD_DB:g})"
        alike = ""
        if self.decisions is not None:
            alike = f"; the largest entry is the same at {self.decisions[0]:.1%} of the positions and " + (
                f"everywhere in {self.decisions[1]:.1%} of the images"
            )
        return (
            f"accuracy was not measured; the outputs' SQNR against the float network is {self.pooled:.1f} dB, and at "
            f"least {self.low:.1f} dB in {1 - FEW:.0%} of {self.images} images{alike}; {self.least - self.drop:.1f} dB"
            f"{which} lies between {low:.1f} and {high:.1f} at {100 * confidence:g}% confidence"
        )

    def outcome(self, limit: float, over: bool) -> str:
        """On which side of the least SQNR."""
        del limit
        return f"below the least of {self.least:g} dB" if over else f"above the least of {self.least:g} dB"

    def open_question(self, limit: float) -> str:
        """That the least SQNR is inside the interval."""
        del limit
        return f"the least of {self.least:g} dB lies inside"


def kept_of(
    first: npt.NDArray[np.int32], second: npt.NDArray[np.int32], positions: npt.NDArray[np.int64], least: float
) -> Kept | None:
    """How many decisions for another class than the commonest, CTC's blank or the background, are the reference's.

    ``first`` and ``second`` int32 [N, positions] are those of the reference and the candidate, ``positions`` [outputs]
    how many each output has. The share is of those that the reference makes, or of those that the candidate makes where
    they are more: what is invented counts as what is lost does. None with fewer than ten, or where ``least`` is 0.
    """
    if first.shape != second.shape or not first.size or not least:
        return None
    parts = np.split(first, np.cumsum(positions)[:-1], axis=1)
    commonest = np.concatenate([np.full(part.shape[1], np.bincount(part.ravel()).argmax()) for part in parts])
    stated = first != commonest
    counts = np.stack([((first == second) & stated).sum(1), stated.sum(1), (second != commonest).sum(1)], axis=1)

    def shares(weights: Floats) -> Floats:
        same, theirs, own = (weights @ counts).T
        made = np.maximum(theirs, own)
        return np.where(made > 0, same / np.maximum(made, 1.0), np.nan)[:, None]

    made = int(counts[:, 1:].sum(0).max())
    if made < _FEWEST:
        return None
    images = len(first)
    return Kept(float(shares(np.ones((1, images)))[0, 0]), resampled(shares, images)[:, 0], made, least)


def noise_shares(reference: Raw, candidate: Raw) -> tuple[Floats, bool]:
    """Noise energy / signal energy of every image and output [N, outputs], from 0 to 1; NaN counts as 1.

    And whether all outputs of the reference are the same for every image.
    """
    shares, constant = [], True
    for name, clean in reference.outputs.items():
        theirs = candidate.outputs.get(name)
        if theirs is None or theirs.shape != clean.shape:
            raise ResvitError(f"The two networks differ in the output {name}.", "Compare networks of the same outputs.")
        wide = clean.astype(np.float64)
        signal, same = _signals(wide)
        constant = constant and same
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            noise = np.square(wide - theirs).sum(axis=1)
            share = np.where(noise == 0.0, 0.0, noise / signal)
        shares.append(np.clip(np.nan_to_num(share, nan=1.0), 0.0, 1.0))
    return np.stack(shares, axis=1), constant


def _signals(values: Floats) -> tuple[Floats, bool]:
    """The signal energy of every image [N] of one output [N, values], and whether it is the same for every image.

    It is of what differs between images. One whose outputs are near what all share has no noise of its own making for
    it: no signal counts for less than the mean of all, in which the twentieth with the most takes no part.
    """
    shared = shared_of(values)
    signal = shared.signal(values, shared.members)
    if shared.mean is None:
        return signal, shared.constant
    usual = float(np.minimum(signal, np.quantile(signal, 1.0 - FEW, method="higher")).mean())
    return np.maximum(signal, usual), False


def decibels(noise: Floats) -> Floats:
    """Shares of noise as SQNR in dB, from 0 to 100."""
    return -10.0 * np.log10(np.clip(noise, 10.0 ** (-MOST_DB / 10.0), 1.0))


def cosine(reference: Raw, candidate: Raw) -> float:
    """The mean over images of the cosine between outputs, the lowest of a network's outputs."""
    found = []
    for name, first in reference.outputs.items():
        one, two = first.astype(np.float64), candidate.outputs[name].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(float(np.mean((one * two).sum(1) / np.sqrt(np.square(one).sum(1) * np.square(two).sum(1)))))
    return min(found)
