"""How far one classifier's answers are from another's, on the same images."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.gate.comparison import SHARE, Comparison
from resvit_calibrate.gate.intervals import images_to_decide, paired_difference, share
from resvit_calibrate.gate.numbering import OtherNumbering, Pairs, other_numbering
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_engines.answers.vectors import logits_of
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_file

if TYPE_CHECKING:
    from resvit_calibrate.runtime.sessions import Arrays

INPUT = "input"
_CHUNK = 4096


@dataclass(frozen=True)
class Predictions:
    """What a network says of N images: logits float32 [N, K] and the true labels int64 [N]."""

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.labels.shape != self.logits.shape[:1]:
            raise ValueError(f"logits {self.logits.shape} and labels {self.labels.shape} do not fit")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Which images got finite logits only: bool [N]."""
        return np.asarray(np.isfinite(self.logits).all(axis=1))

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """The class with the largest logit, and -1 where a logit is NaN or infinite: int64 [N]."""
        return np.where(self.finite, self.logits.argmax(axis=1), -1).astype(np.int64, copy=False)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        with atomic_file(path) as partial, partial.open("wb") as stream:
            np.savez(stream, logits=self.logits, labels=self.labels)

    def first(self, count: int) -> Predictions:
        """Keep the first ``count`` images only."""
        return Predictions(self.logits[:count], self.labels[:count])

    @classmethod
    def load(cls, data: bytes, where: str) -> Predictions:
        """Read what ``save`` wrote, which errors call ``where``; raises ``ResvitError`` for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                return cls(stored["logits"].astype(np.float32), stored["labels"].astype(np.int64))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ResvitError(
                f"The predictions {where} cannot be read: {error}.", "Remove the run's folder and run again."
            ) from error


@dataclass(frozen=True)
class ClassComparison(Comparison):
    """Two classifiers on the same images.

    ``reference_top1``, ``candidate_top1`` and ``agreement`` (same answer) are shares, 0 to 1. ``drop`` is
    the reference's accuracy less the candidate's and ``interval`` Tango's at ``confidence``, both in percentage
    points.
    """

    images: int
    reference_top1: float
    candidate_top1: float
    agreement: float
    sqnr_db: float
    drop: float
    interval: tuple[float, float]
    confidence: float
    lost: int
    """Images that only the reference gets right."""
    gained: int
    """Images that only the candidate gets right."""
    not_finite: int
    """Images for which the candidate's logits hold NaN or infinity."""
    reference_answers: int
    """How many different classes the reference ever answers."""
    candidate_answers: int
    classes: int = 2
    """How many classes there are to guess among."""
    top5: tuple[float, float] | None = None
    """The share of images with the right class among the five largest, of both; None below six classes."""
    numbering: OtherNumbering | None = None
    reference: Mapping[str, float] = field(init=False)
    candidate: Mapping[str, float] = field(init=False)

    metric = "top-1"
    what = "accuracy"
    unit = SHARE
    agreement_of = "images with the same class"

    def __post_init__(self) -> None:
        for name, top1, which in (("reference", self.reference_top1, 0), ("candidate", self.candidate_top1, 1)):
            values = {"top-1": top1, **({"top-5": self.top5[which]} if self.top5 else {})}
            object.__setattr__(self, name, values)

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """Tango's interval (see ``intervals``)."""
        low, high = paired_difference(self.lost, self.gained, self.images, confidence)
        return 100.0 * low, 100.0 * high

    def images_needed(self, limit: float, confidence: float) -> int | None:
        """If both networks went on as on these: the shares of lost and gained images."""
        return images_to_decide(self.lost, self.gained, self.images, limit / 100.0, confidence)

    def hopeless(self, confidence: float) -> str | None:
        """Where the reference cannot be told from guessing, or always answers the same."""
        if self.classes < 2:
            raise ResvitError(f"A network of {self.classes} classes cannot be judged.", "It needs two or more.")
        low, high = share(self.reference_top1 * self.images, self.images, confidence)
        chance = 1.0 / self.classes
        against = f"the float network is right on {100 * self.reference_top1:.1f}% of {self.images} images"
        if low <= chance:
            how = "worse than" if high < chance else "not clearly better than"
            return (
                f"{against}, {how} guessing among {self.classes} classes ({100 * chance:.3g}%): check the checkpoint, "
                "the preprocessing and the order of the classes, or give more images"
            )
        if self.reference_answers == 1 and self.images > 1:
            return f"{against}, and answers the same class for every one: check the checkpoint and the preprocessing"
        return None

    @property
    def caveat(self) -> str:
        """That the candidate is constant, where it is."""
        constant = self.candidate_answers == 1 < self.images
        return "the quantised network answers the same class for every image" if constant else ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``top1`` is the candidate's, and a number that JSON cannot hold becomes None."""
        return {
            **super().to_json(),
            "top1": self.candidate_top1,
            "reference_top1": self.reference_top1,
            **{name: getattr(self, name) for name in ("lost", "gained", "reference_answers", "candidate_answers")},
        }


def predictions_of(batch: Batch, outputs: Arrays, image_set: ImageSet) -> Predictions:
    """Logits and labels of one batch with a network's ``logits``, or its only output, [B, K].

    Raises ``ResvitError`` for outputs that are not [B, K], and labels that are missing or not below K.
    """
    if batch.labels is None:
        raise ResvitError(f"The images have no labels ({image_set.description}).", "Validation needs labelled images.")
    logits = logits_of(outputs, len(batch.images))
    classes = logits.shape[1]
    wrong = batch.labels[(batch.labels >= classes) | (batch.labels < 0)]
    if len(wrong):
        raise ResvitError(
            f"The data has the label {wrong.max()}, but the network knows classes 0 to {classes - 1}.",
            "Use the data that the network was trained for; its classes must be in the same order.",
        )
    return Predictions(logits, batch.labels)


def compare(reference: Predictions, candidate: Predictions, confidence: float = 0.95) -> ClassComparison:
    """Measure the candidate against the reference; both must be of the same images in the same order.

    The interval is Tango's (see ``intervals``). An image with NaN or infinity in the candidate's logits
    counts as answered wrongly. Raises ``ResvitError`` where the reference's own logits are not finite.
    """
    if reference.logits.shape != candidate.logits.shape or not np.array_equal(reference.labels, candidate.labels):
        raise ResvitError(
            f"Two networks cannot be compared: {reference.logits.shape} and {candidate.logits.shape} logits, "
            "or other labels.",
            "Run both on the same images; remove the run's folder if the data has changed.",
        )
    count = len(reference)
    if not count:
        raise ResvitError("There is no image to compare two networks on.", "Give validation images.")
    broken = int(count - reference.finite.sum())
    if broken:
        raise ResvitError(
            f"The reference network gives NaN or infinity for {broken} of {count} images.",
            "Check the checkpoint and the preprocessing: nothing can be compared with such a network.",
        )
    first, second = reference.answers, candidate.answers
    right, still = first == reference.labels, second == reference.labels
    lost, gained = int((right & ~still).sum()), int((still & ~right).sum())
    low, high = paired_difference(lost, gained, count, confidence)
    return ClassComparison(
        images=count,
        reference_top1=float(right.mean()),
        candidate_top1=float(still.mean()),
        agreement=float((first == second).mean()),
        sqnr_db=sqnr(reference.logits, candidate.logits),
        drop=100.0 * (lost - gained) / count,
        interval=(100.0 * low, 100.0 * high),
        confidence=confidence,
        lost=lost,
        gained=gained,
        not_finite=int(count - candidate.finite.sum()),
        reference_answers=len(np.unique(first)),
        candidate_answers=len(np.unique(second)),
        classes=reference.logits.shape[1],
        top5=(_top5(reference), _top5(candidate)) if reference.logits.shape[1] > 5 else None,
        numbering=other_numbering(
            Pairs(np.arange(count), reference.labels, first, np.ones(count, np.int64)), confidence
        ),
    )


def sqnr(reference: npt.NDArray[np.floating[Any]], candidate: npt.NDArray[np.floating[Any]]) -> float:
    """Signal to quantisation noise ratio in dB: 10·log10(Σ reference² / Σ (reference - candidate)²).

    Infinite where both are equal, -infinite where only the reference is all zero, NaN where a value is not
    finite. Summed in float64, a slice at a time.
    """
    signal = noise = 0.0
    for start in range(0, len(reference), _CHUNK):
        clean = reference[start : start + _CHUNK].astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = clean - candidate[start : start + _CHUNK].astype(np.float64)
        signal += float(np.square(clean).sum())
        noise += float(np.square(error).sum())
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def changed_answers(reference: Predictions, candidate: Predictions) -> list[dict[str, int]]:
    """List the images that the two answer differently: index, label, and both answers (-1: not a number)."""
    first, second = reference.answers, candidate.answers
    return [
        {
            "index": int(index),
            "label": int(reference.labels[index]),
            "float": int(first[index]),
            "quantized": int(second[index]),
        }
        for index in np.flatnonzero(first != second)
    ]


def _top5(predictions: Predictions) -> float:
    """The share of images whose label is among the five largest logits; one with NaN counts as wrong."""
    with np.errstate(invalid="ignore"):
        true = np.take_along_axis(predictions.logits, predictions.labels[:, None], axis=1)
        within = (predictions.logits > true).sum(axis=1) < 5
    return float((within & predictions.finite).mean())
