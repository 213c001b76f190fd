"""How far one network's answers are from another's, on the same images."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.image_set import ImageSet
from resvit_calibrate.intervals import paired_difference
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from resvit_calibrate.runtime import Runner

INPUT, OUTPUT = "input", "logits"
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

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote; raises ``ResvitError`` for anything else."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(stored["logits"].astype(np.float32), stored["labels"].astype(np.int64))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ResvitError(
                f"The predictions {path} cannot be read: {error}.", "Remove the run's folder and run again."
            ) from error


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference on the same images.

    ``reference_top1``, ``candidate_top1`` and ``agreement`` (same answer) are shares, 0 to 1. ``drop`` is
    the reference's accuracy less the candidate's and ``interval`` its two-sided confidence interval at
    ``confidence``, both in percentage points. ``sqnr_db`` is in dB: infinite where all logits are equal, NaN
    where the candidate's are not finite.
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

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``top1`` is the candidate's, and a number that JSON cannot hold becomes None."""
        plain = dataclasses.asdict(self)
        plain["top1"] = plain.pop("candidate_top1")
        plain["interval"] = list(self.interval)
        plain["sqnr_db"] = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        return plain


def predict(
    runner: Runner,
    image_set: ImageSet,
    batch_size: int,
    reporter: Reporter = SILENT,
    what: str = "validate",
) -> Predictions:
    """Run a network on every image. The runner's array ``input`` goes in; ``logits``, or its only output, is read.

    Raises ``ResvitError`` for outputs that are not [B, K], and labels that are missing or not below K.
    """
    logits: list[npt.NDArray[np.float32]] = []
    labels: list[npt.NDArray[np.int64]] = []
    batches = reporter.track(image_set.batches(batch_size), what, len(image_set), batch_size)
    for batch in batches:
        if batch.labels is None:
            raise ResvitError(
                f"The images have no labels ({image_set.description}).", "Validation needs labelled images."
            )
        logits.append(_logits(runner({INPUT: batch.images}), len(batch.images)))
        labels.append(batch.labels)
    if not logits:
        raise ResvitError(f"There is no image ({image_set.description}).", "Give more images.")
    found = Predictions(np.concatenate(logits), np.concatenate(labels))
    classes, highest = found.logits.shape[1], int(found.labels.max())
    if highest >= classes or int(found.labels.min()) < 0:
        raise ResvitError(
            f"The data has the label {highest if highest >= classes else found.labels.min()}, but the network "
            f"knows classes 0 to {classes - 1}.",
            "Use the data that the network was trained for; its classes must be in the same order.",
        )
    return found


def compare(reference: Predictions, candidate: Predictions, confidence: float = 0.95) -> Comparison:
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
    return Comparison(
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


def _logits(outputs: dict[str, Any], count: int) -> npt.NDArray[np.float32]:
    if OUTPUT not in outputs and len(outputs) != 1:
        raise ResvitError(
            f"The network has the outputs {', '.join(outputs)}; none is called `{OUTPUT}`.",
            f"Name the classification output `{OUTPUT}`.",
        )
    logits = np.asarray(outputs[OUTPUT] if OUTPUT in outputs else next(iter(outputs.values())))
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        raise ResvitError(
            f"The network's output has the shape {list(logits.shape)} for {count} images, not [{count}, classes].",
            "Validation is for classification networks of two or more classes.",
            ExitCode.INPUT,
        )
    # A float16 or float64 output beyond float32 is infinite here, and is found as such.
    with np.errstate(over="ignore"):
        return logits.astype(np.float32)
