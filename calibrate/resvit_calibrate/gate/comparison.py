"""How one network's answers stand against another's on the same images, whatever the task."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resvit_calibrate.gate.bootstrap import Floats, percentile_interval
from resvit_calibrate.gate.intervals import MOST_IMAGES, images_to_decide, paired_difference, two_digits_up
from resvit_calibrate.gate.numbering import OtherNumbering

POINTS = "points"
"""Hundredths of the metric: 1 point of mAP, mIoU or AbsRel is 0.01."""
SHARE = "percentage points"
"""Where the metric is a share of the images."""
DECIBELS = "dB"
"""Where there is no metric: a drop is by how much the SQNR misses the least one, negative where it keeps it."""
FEWEST_CHANGED = 10
"""With fewer images that count differently, the images drawn again say nothing of those not yet seen."""
MOST_SQNR_DB = 120.0
"""Above this, two float32 networks differ by the order of their sums alone (24 bits of a value are 144 dB)."""


@dataclass(frozen=True)
class Beside:
    """What must hold beside the drop: surely ``held``, surely ``missed``, or neither, in words that end a sentence."""

    held: bool
    missed: bool
    words: str


class Comparison(abc.ABC):
    """A candidate against a reference on the same images: what the gate judges and the report shows.

    ``drop`` is how much worse the candidate is by the task's first metric (negative: better) and ``interval`` its
    two-sided interval at ``confidence``, both in ``unit``. ``agreement`` is a share, 0 to 1, of what
    ``agreement_of`` says (NaN where there is nothing to agree on). ``sqnr_db`` is in dB, over the output with the
    lowest one: infinite where all outputs are equal, NaN where the candidate's are not finite.
    """

    images: int
    drop: float
    interval: tuple[float, float]
    confidence: float
    agreement: float
    sqnr_db: float
    not_finite: int
    """Images for which the candidate's outputs hold NaN or infinity."""
    metric: str
    """The first metric's name, a key of ``reference`` and ``candidate``."""
    what: str
    """The same within a sentence."""
    unit: str
    agreement_of: str
    reference: Mapping[str, float]
    """Every metric of the reference, by name."""
    candidate: Mapping[str, float]
    numbering: OtherNumbering | None
    """Other class numbers that the reference's answers fit much better; None where there are none, or no classes."""

    @abc.abstractmethod
    def interval_at(self, confidence: float) -> tuple[float, float]:
        """The interval of the drop at another confidence, in ``unit``."""

    @abc.abstractmethod
    def images_needed(self, limit: float, confidence: float) -> int | None:
        """Estimate how many such images would decide about ``limit``; None where no realistic number would."""

    @abc.abstractmethod
    def hopeless(self, confidence: float) -> str | None:
        """Why the reference's own answers are worth nothing, or None where they are."""

    def limit(self, max_drop: float) -> float:
        """The limit that the drop is held against, in ``unit``."""
        return max_drop

    def beside(self, confidence: float) -> Beside | None:
        """What the gate judges beside the drop; the worse of both is its verdict. None where that is nothing."""
        del confidence
        return None

    @property
    def caveat(self) -> str:
        """What else must be said of the candidate, empty where nothing."""
        return ""

    def measured(self, interval: tuple[float, float], confidence: float) -> str:
        """What was measured, as the beginning of a sentence."""
        return (
            f"the {self.what} drop is {self.drop:.2f} {self.unit}, between {interval[0]:.2f} and {interval[1]:.2f} "
            f"at {100 * confidence:g}% confidence on {self.images} images{self.caveat and '; ' + self.caveat}"
        )

    def outcome(self, limit: float, over: bool) -> str:
        """Which side of the limit the drop is on, as the end of a sentence."""
        return f"above the limit of {limit:g}" if over else f"within the limit of {limit:g}"

    def open_question(self, limit: float) -> str:
        """That the limit is inside the interval, in words."""
        return f"the limit of {limit:g} lies inside"

    def to_json(self) -> dict[str, Any]:
        """Plain values; a number that JSON cannot hold becomes None, and the SQNR is as ``recorded_sqnr`` says."""
        return {
            "images": self.images,
            "metric": self.metric,
            "unit": self.unit,
            "value": plain(self.candidate.get(self.metric, math.nan)),
            "values": {name: plain(value) for name, value in self.candidate.items()},
            "agreement": plain(self.agreement),
            "agreement_of": self.agreement_of,
            "sqnr_db": recorded_sqnr(self.sqnr_db),
            "drop": plain(self.drop),
            "interval": [plain(edge) for edge in self.interval],
            "confidence": self.confidence,
            "not_finite": self.not_finite,
        }


@dataclass(frozen=True)
class Chance:
    """How far the reference is above what needs no network: ``margin`` > 0, its ``draws`` [R], and both in words."""

    margin: float
    draws: Floats
    words: str


@dataclass(frozen=True, eq=False)
class Resampled(Comparison):
    """A comparison whose interval comes from images drawn again (see ``bootstrap``).

    Where fewer than 10 images count differently in the two networks, the drawings are too alike to tell
    what other images would do: without any, all would be equal and the interval empty. Then the interval is
    widened to Tango's for as many images lost and gained, each counted whole, as for classes.
    """

    images: int
    metric: str
    reference: Mapping[str, float]
    candidate: Mapping[str, float]
    drop: float
    draws: Floats
    confidence: float
    agreement: float
    agreement_of: str
    sqnr_db: float
    not_finite: int
    worse: int
    """Images that count for less in the candidate."""
    better: int
    chance: Chance | None = None
    numbering: OtherNumbering | None = None
    unit: str = POINTS
    what: str = ""
    interval: tuple[float, float] = (math.nan, math.nan)

    def __post_init__(self) -> None:
        object.__setattr__(self, "what", self.what or self.metric)
        object.__setattr__(self, "interval", self.interval_at(self.confidence))

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """Percentiles of the drawings; wider where few images changed."""
        low, high = percentile_interval(self.drop, self.draws, self.images, confidence)
        if self.worse + self.better < FEWEST_CHANGED:
            least, most = paired_difference(self.worse, self.better, self.images, confidence)
            low, high = min(low, 100.0 * least), max(high, 100.0 * most)
        return low, high

    def images_needed(self, limit: float, confidence: float) -> int | None:
        """The interval shrinks as 1 / sqrt(images); Tango's, where it was taken, as it does for classes."""
        low, high = percentile_interval(self.drop, self.draws, self.images, confidence)
        width = high - self.drop if self.drop < limit else self.drop - low
        if self.drop == limit or width**2 * self.images > MOST_IMAGES * (self.drop - limit) ** 2:
            return None
        needed = math.ceil(self.images * (width / (self.drop - limit)) ** 2)
        changed = self.worse + self.better
        if changed < FEWEST_CHANGED:
            by_count = images_to_decide(self.worse, self.better, self.images, limit / 100.0, confidence)
            enough = -(-FEWEST_CHANGED * self.images // changed) if changed else None
            least = min((n for n in (by_count, enough) if n is not None), default=None)
            if least is None:
                return None
            needed = max(needed, least)
        return two_digits_up(max(needed, self.images + 1))

    def hopeless(self, confidence: float) -> str | None:
        """Where the reference is not clearly above what needs no network."""
        if self.chance is None:
            return None
        low, _ = percentile_interval(self.chance.margin, self.chance.draws, self.images, confidence)
        return None if low > 0.0 and self.images > 1 else self.chance.words


def recorded_sqnr(sqnr_db: float) -> float | None:
    """An SQNR in dB as records hold it: to a tenth, and no more than ``MOST_SQNR_DB``; None where it is not finite.

    What float32 rounds depends on the order of its sums, which threads and libraries choose; a record that is to be
    the same for the same inputs cannot hold more.
    """
    return round(min(float(sqnr_db), MOST_SQNR_DB), 1) if math.isfinite(sqnr_db) else None


def plain(value: float) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if math.isfinite(value) else None
