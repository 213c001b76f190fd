"""The accuracy gate: is the drop within the limit, above it, or not known from these images?"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from resvit_calibrate.intervals import normal_quantile, paired_difference, score, share
from resvit_calibrate.metrics import Comparison
from resvit_engines.errors import ExitCode, ResvitError

_MOST_IMAGES = 10_000_000


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

    ``max_drop`` and ``interval`` are in percentage points. ``images_needed`` estimates how many validation
    images would decide, if the networks went on disagreeing as they do now; None where no number would.
    ``chance_level`` says that the reference itself does not know the classes.
    """

    kind: VerdictKind
    reason: str
    max_drop: float
    confidence: float
    images: int
    interval: tuple[float, float]
    images_needed: int | None = None
    chance_level: bool = False

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
        }


def judge(comparison: Comparison, max_drop_pp: float, num_classes: int, confidence: float = 0.95) -> Verdict:
    """Accept where the drop is surely at most ``max_drop_pp`` percentage points, reject where surely above.

    "Surely" is by the two-sided interval at ``confidence``, so that a network beyond the limit is accepted
    with a probability of about (1 - confidence) / 2 at most. Everything else is undecided; so is any
    comparison with a reference that cannot be told from guessing among ``num_classes``. A candidate with NaN
    or infinite logits is rejected. Raises ``ResvitError`` for a limit or a number of classes that means nothing.
    """
    if not 0.0 <= max_drop_pp <= 100.0:
        raise ResvitError(
            f"A largest drop of {max_drop_pp} percentage points cannot be used.", "Choose 0 to 100, such as 1."
        )
    if num_classes < 2:
        raise ResvitError(f"A network of {num_classes} classes cannot be judged.", "It needs two or more.")
    low, high = _percent(paired_difference(comparison.lost, comparison.gained, comparison.images, confidence))

    def verdict(kind: VerdictKind, reason: str, *, needed: int | None = None, chance: bool = False) -> Verdict:
        return Verdict(kind, reason, max_drop_pp, confidence, comparison.images, (low, high), needed, chance)

    if comparison.not_finite:
        return verdict(
            VerdictKind.REJECTED,
            f"the quantised network gives NaN or infinity for {comparison.not_finite} of {comparison.images} images",
        )
    if guessing := _guessing(comparison, num_classes, confidence):
        return verdict(VerdictKind.UNDECIDED, guessing, chance=True)
    measured = (
        f"the accuracy drop is {comparison.drop:.2f} percentage points, between {low:.2f} and {high:.2f} "
        f"at {100 * confidence:g}% confidence on {comparison.images} images"
    )
    if comparison.candidate_answers == 1 < comparison.images:
        measured += "; the quantised network answers the same class for every image"
    if high <= max_drop_pp:
        return verdict(VerdictKind.ACCEPTED, f"{measured}: within the limit of {max_drop_pp:g}")
    if low > max_drop_pp:
        return verdict(VerdictKind.REJECTED, f"{measured}: above the limit of {max_drop_pp:g}")
    needed = images_needed(comparison, max_drop_pp, confidence)
    advice = f"about {needed} images would decide" if needed else "more of such images would not decide it"
    return verdict(
        VerdictKind.UNDECIDED, f"{measured}: the limit of {max_drop_pp:g} lies inside; {advice}", needed=needed
    )


def images_needed(comparison: Comparison, max_drop_pp: float, confidence: float = 0.95) -> int | None:
    """How many images would decide, if both networks went on as on these: the shares of lost and gained images.

    None where the observed drop is too near to the limit for any realistic number (10 million).
    """
    limit, z = max_drop_pp / 100.0, normal_quantile(confidence)
    lost, gained = comparison.lost / comparison.images, comparison.gained / comparison.images

    def decides(count: int) -> bool:
        # The interval's end passes the limit exactly where the score there passes z.
        return abs(score(limit, lost * count, gained * count, count)) >= z

    if not decides(_MOST_IMAGES):
        return None
    few, enough = 0, comparison.images
    while not decides(enough):
        few, enough = enough, min(2 * enough, _MOST_IMAGES)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if decides(middle) else (middle, enough)
    return _two_digits_up(enough)


def _guessing(comparison: Comparison, num_classes: int, confidence: float) -> str | None:
    """Why the reference's accuracy says nothing, or None where it does."""
    top1, images = comparison.reference_top1, comparison.images
    low, high = share(top1 * images, images, confidence)
    chance = 1.0 / num_classes
    against = f"the float network is right on {100 * top1:.1f}% of {images} images"
    if low <= chance:
        how = "worse than" if high < chance else "not clearly better than"
        return (
            f"{against}, {how} guessing among {num_classes} classes ({100 * chance:.3g}%): check the checkpoint, "
            "the preprocessing and the order of the classes, or give more images"
        )
    if comparison.reference_answers == 1 and images > 1:
        return f"{against}, and answers the same class for every one: check the checkpoint and the preprocessing"
    return None


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100.0 * interval[0], 100.0 * interval[1]


def _two_digits_up(count: int) -> int:
    """Round up to two digits: an estimate should not look more exact than it is."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
