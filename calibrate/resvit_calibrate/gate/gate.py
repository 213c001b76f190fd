"""The accuracy gate: is the drop within the limit, above it, or not known from these images?"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resvit_calibrate.gate.comparison import SHARE, Comparison
from resvit_engines.errors import ExitCode, ResvitError

_FAR = 5
"""From how few of the images that would decide their number is a guess: the shares that it rests on are not known."""


class VerdictKind(str, enum.Enum):
    """What the gate says."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    UNDECIDED = "undecided"


_EXIT = {
    VerdictKind.ACCEPTED: ExitCode.OK,
    VerdictKind.REJECTED: ExitCode.REJECTED,
    VerdictKind.UNDECIDED: ExitCode.UNDECIDED,
}


@dataclass(frozen=True)
class Verdict:
    """The gate's answer, with its reason in a sentence.

    ``max_drop`` and ``interval`` are in ``unit``, of ``metric``. ``images_needed`` estimates how many validation
    images would decide, if the networks went on disagreeing as they do now; None where no number would.
    ``chance_level`` says that the reference itself knows nothing of the images, or their classes by other numbers.
    """

    kind: VerdictKind
    reason: str
    max_drop: float
    confidence: float
    images: int
    interval: tuple[float, float]
    images_needed: int | None = None
    chance_level: bool = False
    metric: str = "top-1"
    unit: str = SHARE

    @property
    def exit_code(self) -> ExitCode:
        """What the process returns."""
        return _EXIT[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Plain values, the kind under ``verdict``."""
        return {
            "verdict": self.kind.value,
            "reason": self.reason,
            "max_drop": self.max_drop,
            "confidence": self.confidence,
            "images": self.images,
            "interval": list(self.interval),
            "images_needed": self.images_needed,
            "chance_level": self.chance_level,
            "metric": self.metric,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Verdict:
        """Read what ``to_json`` wrote; more than that is passed over."""
        kept = ("reason", "max_drop", "confidence", "images", "images_needed", "chance_level", "metric", "unit")
        low, high = document["interval"]
        return cls(VerdictKind(document["verdict"]), interval=(low, high), **{name: document[name] for name in kept})


def judge(
    comparison: Comparison,
    max_drop: float,
    confidence: float = 0.95,
    class_names: Sequence[str] = (),
    doubt: str = "",
) -> Verdict:
    """Accept where the drop is surely at most ``max_drop``, reject where surely above; both in the task's unit.

    "Surely" is by the two-sided interval at ``confidence``, so that a network beyond the limit is accepted
    with a probability of about (1 - confidence) / 2 at most. What must hold beside the drop (``Comparison.beside``)
    is judged likewise, and the worse of both counts. Everything else is undecided; so is any
    comparison with a reference that is no better than what needs no network, or whose answers fit other class numbers
    than the data's, which ``class_names`` name, and any on images that may have been read wrongly, by ``doubt``. A
    candidate with NaN or infinite outputs is rejected. Raises ``ResvitError`` for a limit that means nothing.
    """
    if not 0.0 <= max_drop <= 100.0:
        raise ResvitError(
            f"A largest drop of {max_drop} {comparison.unit} cannot be used.", "Choose 0 to 100, such as 1."
        )
    limit = comparison.limit(max_drop)
    interval = comparison.interval_at(confidence)
    low, high = interval

    def verdict(kind: VerdictKind, reason: str, *, needed: int | None = None, chance: bool = False) -> Verdict:
        about = (comparison.metric, comparison.unit)
        return Verdict(kind, reason, limit, confidence, comparison.images, interval, needed, chance, *about)

    hopeless = comparison.hopeless(confidence)
    if comparison.numbering is not None:
        hopeless = comparison.numbering.words(class_names)
    if comparison.not_finite:
        return verdict(
            VerdictKind.REJECTED,
            f"the quantised network gives NaN or infinity for {comparison.not_finite} of {comparison.images} images",
        )
    if doubt:
        return verdict(VerdictKind.UNDECIDED, f"these images tell nothing yet: {doubt}")
    if hopeless:
        return verdict(VerdictKind.UNDECIDED, hopeless, chance=True)
    beside = comparison.beside(confidence)
    within, over = high <= limit, low > limit
    side = comparison.outcome(limit, over) if within or over else comparison.open_question(limit)
    measured = f"{comparison.measured(interval, confidence)}: {side}{f'; {beside.words}' if beside else ''}"
    if within and (beside is None or beside.held):
        return verdict(VerdictKind.ACCEPTED, measured)
    if over or (beside is not None and beside.missed):
        return verdict(VerdictKind.REJECTED, measured)
    needed = comparison.images_needed(limit, confidence)
    advice = f"about {needed} images would decide" if needed else "more of such images would not decide it"
    if needed and needed > _FAR * comparison.images:
        advice = f"perhaps {needed} images would decide, which from {comparison.images} is a guess"
    return verdict(VerdictKind.UNDECIDED, f"{measured}; {advice}", needed=needed)
