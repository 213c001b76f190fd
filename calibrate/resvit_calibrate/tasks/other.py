"""Anything else: a metric of the user's, or none, and then how near the outputs are to the float network's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.base import (
    Answers,
    Place,
    Task,
    finite_images,
    load_arrays,
    require_finite,
    require_same_images,
    save_arrays,
)
from resvit_calibrate.answers.raw import Raw, joined_raw, raw_of
from resvit_calibrate.gate.bootstrap import Floats, resampled
from resvit_calibrate.gate.comparison import DECIBELS, POINTS, Comparison, Resampled
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.readers.user.code import Reads, user_files, watched
from resvit_calibrate.readers.user.loader import function_from
from resvit_calibrate.tasks.nearness import (
    FEW,
    MOST_DB,
    SPREAD_DB,
    Nearness,
    cosine,
    decibels,
    kept_of,
    noise_shares,
)
from resvit_engines.answers.options import Array, options_from, require_between, shapes_of
from resvit_engines.errors import ResvitError

_IMAGES = 1024
_BYTES = 256 << 20
_POSITIONS = 4096
_BOX = 4
SHAPE = (
    "The metric is called with the outputs of a batch, a dictionary of arrays by name, and what is known of its "
    "images (targets, else labels, else None); it returns one score for each image, [B], higher is better, "
    "as a share from 0 to 1."
)


@dataclass(frozen=True)
class OtherOptions:
    """What outputs must keep where there is no metric: an SQNR, and a share of the decisions that they make.

    20 dB is noise of a tenth on every image, or one image of a hundred that is noise alone. ``least_agreement`` is of
    the largest entries along the class axis, 0 to 1; 0 where those decide nothing, as in a vector of features.
    """

    least_sqnr_db: float = 20.0
    least_agreement: float = 0.96

    def __post_init__(self) -> None:
        require_between("other", "least_sqnr_db", self.least_sqnr_db, 0.0, MOST_DB)
        require_between("other", "least_agreement", self.least_agreement, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Outputs(Answers):
    """Of N images: the user's ``scores`` [N], none without a metric; outputs of at most 1024 images under ``raw``.

    Of large outputs ``raw`` has every s-th value, 256 MiB in all. ``decisions`` int32 [n, positions] are the largest
    entries along the class axes of the same images' outputs, of at most 4096 positions each; ``positions`` int64
    [outputs] is how many each output has.
    """

    scores: Floats
    finite: npt.NDArray[np.bool_]
    raw: Raw
    decisions: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.finite)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        own = {"scores": self.scores, "finite": self.finite, "decisions": self.decisions}
        own["positions"] = self.positions
        save_arrays(path, "other", {**own, **self.raw.to_arrays()})

    def first(self, count: int) -> Outputs:
        """Keep the first ``count`` images only."""
        kept = (self.scores[:count], self.finite[:count], self.raw.first(count), self.decisions[:count])
        return Outputs(*kept, self.positions)


class Other(Task):
    """Outputs of any kind, by ``metric`` (``package.module:function`` or ``file.py:function``) or by SQNR alone."""

    name: ClassVar[str] = "other"

    def __init__(self, options: Mapping[str, Any], metric: str | None = None) -> None:
        self.options = options_from(OtherOptions, self.name, options)
        self.reads = None if metric is None else Reads()
        self.function = None if metric is None else _function(metric, self.reads)
        self.metric = "SQNR" if metric is None else metric.rpartition(":")[2]
        self.unit = DECIBELS if metric is None else POINTS

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Outputs:
        """The user's scores of every image, and outputs."""
        del image_set
        outputs, count = dict(outputs), len(batch.images)
        if not any(value.ndim and value.dtype.kind == "f" for value in outputs.values()):
            raise ResvitError(
                f"The network has no output of floating-point numbers: {shapes_of(outputs)}.",
                "Give its outputs before the classes are chosen.",
            )
        fine = finite_images(outputs, count)
        scores = self._scores(self.function, outputs, batch, fine) if self.function else np.zeros(0)
        decisions, positions = _largest(outputs, count)
        raw = raw_of(outputs, count, place.before, _IMAGES, _BYTES)
        return Outputs(scores, fine, raw, decisions[: max(0, _IMAGES - place.before)], positions)

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """All of them."""
        return Outputs(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.finite for part in parts]),
            joined_raw([part.raw for part in parts]),
            np.concatenate([part.decisions for part in parts]),
            parts[0].positions,
        )

    def load(self, data: bytes, where: str) -> Outputs:
        """Read what ``Outputs.save`` wrote."""
        arrays = load_arrays(data, where, self.name)
        decided = arrays["decisions"], arrays["positions"]
        return Outputs(arrays["scores"], arrays["finite"], Raw.from_arrays(arrays), *decided)

    def compare(self, reference: Outputs, candidate: Outputs, confidence: float = 0.95) -> Comparison:
        """The mean of the user's scores and the interval of its fall; or the SQNR and its interval.

        There is one SQNR: -10 log10 of the mean over images of noise energy / signal energy, each image counting the
        same and none more than one that is noise alone, of the output that fares worst. The signal is what differs
        between images (see ``noise_shares``): what is the same for all of them would drown the noise on what tells them
        apart. A mean of decibels would be carried by images whose outputs are equal, at 100 dB each, and the energy of
        all together by the few with the largest outputs; either can hide that half of the images are noise. Beside it,
        all images but one of twenty must come within 6 dB of the least: a mean can hide one line of twenty that is
        misread. And of the decisions that outputs make (see ``kept_of``), the least share must be kept.
        """
        require_same_images(True, reference, candidate)
        require_finite(reference.finite)
        noise, constant = noise_shares(reference.raw, candidate.raw)
        sqnr = decibels(noise.mean(axis=0)).min()
        common: dict[str, Any] = {
            "metric": self.metric,
            "confidence": confidence,
            "agreement": float(cosine(reference.raw, candidate.raw)),
            "agreement_of": "the outputs' direction (cosine)",
            "sqnr_db": float(sqnr),
            "not_finite": int((~candidate.finite).sum()),
            "unit": self.unit,
        }
        if self.function is None:
            least, images = self.options.least_sqnr_db, len(noise)
            each = decibels(noise).min(axis=1)
            order = np.argsort(each)

            def nearness(weights: Floats) -> Floats:
                """The pooled SQNR and the low quantile, both as they are held against the least."""
                pooled = decibels((weights @ noise) / images).min(axis=1)
                drawn = np.cumsum(weights[:, order], axis=1) >= FEW * images
                return np.stack([pooled, each[order][drawn.argmax(axis=1)] + SPREAD_DB], axis=1)

            whole, low = nearness(np.ones((1, images)))[0]
            draws = resampled(nearness, images).min(axis=1)
            nearest = float(min(whole, low))
            kept = kept_of(reference.decisions, candidate.decisions, reference.positions, self.options.least_agreement)
            if kept is not None:
                common.update(agreement=kept.share, agreement_of="decisions for another class than the commonest")
            return Nearness(
                images=images,
                reference={"SQNR": MOST_DB},
                candidate={"SQNR": float(sqnr)},
                drop=least - nearest,
                draws=least - draws,
                worse=0,
                better=0,
                least=least,
                pooled=float(sqnr),
                low=float(low) - SPREAD_DB,
                decisions=_decisions(reference, candidate),
                kept=kept,
                constant=constant,
                **common,
            )
        first, second = reference.scores, candidate.scores
        apart = first - second
        draws = resampled(lambda weights: (weights @ apart)[:, None] / len(apart), len(apart))[:, 0]
        return Resampled(
            images=len(apart),
            reference={self.metric: float(first.mean())},
            candidate={self.metric: float(second.mean())},
            drop=100.0 * float(apart.mean()),
            draws=100.0 * draws,
            worse=int((apart > 0).sum()),
            better=int((apart < 0).sum()),
            **common,
        )

    def changed(self, reference: Outputs, candidate: Outputs) -> list[dict[str, Any]]:
        """The images that score lower or whose outputs miss the least SQNR, the worst first."""
        if self.function is not None:
            apart = reference.scores - candidate.scores
            words = [f"{self.metric} {value:.4g}" for value in candidate.scores]
            before, limit = [f"{self.metric} {value:.4g}" for value in reference.scores], 0.0
        else:
            near = decibels(noise_shares(reference.raw, candidate.raw)[0].max(axis=1))
            apart, limit = self.options.least_sqnr_db - near, 0.0
            words, before = [f"SQNR {value:.1f} dB" for value in near], ["" for _ in near]
        return [
            {"index": int(i), "label": None, "float": before[i], "quantized": words[i], "outcome": "lost"}
            for i in np.argsort(-apart, kind="stable")
            if apart[i] > limit
        ]

    def _scores(
        self, function: Callable[..., Any], outputs: dict[str, Array], batch: Batch, fine: npt.NDArray[np.bool_]
    ) -> Floats:
        """The user's scores of one batch; 0 for an image whose outputs are not finite, whatever the metric says."""
        known = batch.targets if batch.targets is not None else batch.labels
        count = len(batch.images)
        try:
            with watched(self.reads):
                said = np.asarray(function(dict(outputs), known), np.float64)
        except (ResvitError, MemoryError):
            raise
        except Exception as error:
            raise ResvitError(f"The metric {self.metric} failed: {type(error).__name__}: {error}", SHAPE) from error
        if said.shape != (count,):
            raise ResvitError(
                f"The metric {self.metric} returned the shape {list(said.shape)} for {count} images.", SHAPE
            )
        broken = int((~np.isfinite(said) & fine).sum())
        if broken:
            raise ResvitError(
                f"The metric {self.metric} returned NaN or infinity for {broken} of {count} images, whose outputs "
                "are finite.",
                "Let it return a number for every image, 0 where nothing is right.",
            )
        return np.where(fine, said, 0.0)


def _function(text: str, reads: Reads | None) -> Callable[..., Any]:
    with watched(reads):
        function = function_from(text, SHAPE)
    if function is None:
        raise ResvitError(f"The metric '{text}' is not package.module:function or file.py:function.", SHAPE)
    for file in user_files(function.__module__).values():
        if reads is not None:
            reads.opened(file)  # also what was imported before
    return function


def _largest(outputs: Mapping[str, Array], count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The largest entry along the class axis of every output that has one: [B, positions]; and positions of each.

    Classes are the second axis of [B, K] and of maps [B, K, h, w], and the last of [B, positions, K]; four of those are
    a box.
    """
    found = [np.zeros((count, 0), np.int32)]
    for value in outputs.values():
        axis = {2: 1, 3: 2, 4: 1}.get(value.ndim)
        if axis is None or value.dtype.kind != "f" or value.shape[axis] < 2 or value.shape[2:] == (_BOX,):
            continue
        largest = value.argmax(axis=axis).reshape(count, -1)
        step = -(-largest.shape[1] // _POSITIONS) or 1
        found.append(largest[:, ::step].astype(np.int32))
    return np.concatenate(found, axis=1), np.array([part.shape[1] for part in found[1:]], np.int64)


def _decisions(reference: Outputs, candidate: Outputs) -> tuple[float, float] | None:
    """The shares of positions and of images with the same largest entries."""
    if reference.decisions.shape != candidate.decisions.shape or not reference.decisions.size:
        return None
    same = reference.decisions == candidate.decisions
    return float(same.mean()), float(same.all(axis=1).mean())
