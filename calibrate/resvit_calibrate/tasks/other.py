"""Anything else: a metric of the user's, or none, and then how near the outputs are to the float network's."""

from __future__ import annotations

import math
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
from resvit_calibrate.gate.comparison import POINTS, Comparison, Resampled
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.readers.user.code import Reads, user_files, watched
from resvit_calibrate.readers.user.loader import function_from
from resvit_engines.answers.options import Array, options_from, require_between, shapes_of
from resvit_engines.errors import ResvitError

_IMAGES = 1024
_BYTES = 256 << 20
_POSITIONS = 4096
_MOST_DB = 100.0
"""Outputs that are equal or nearly so have this SQNR."""
_FEW = 0.05
_SPREAD_DB = 6.0
"""All images but one of twenty must keep the least SQNR less this: noise of twice the amplitude."""
SHAPE = (
    "The metric is called with the outputs of a batch, a dictionary of arrays by name, and what is known of its "
    "images (targets, else labels, else None); it returns one score for each image, [B], higher is better, "
    "as a share from 0 to 1."
)


@dataclass(frozen=True)
class OtherOptions:
    """``least_sqnr_db``: the SQNR that outputs must keep where there is no metric.

    20 dB is noise of a tenth on every image, or one image of a hundred that is noise alone.
    """

    least_sqnr_db: float = 20.0

    def __post_init__(self) -> None:
        require_between("other", "least_sqnr_db", self.least_sqnr_db, 0.0, _MOST_DB)


@dataclass(frozen=True, eq=False)
class Outputs(Answers):
    """Of N images: the user's ``scores`` [N], none without a metric; outputs of at most 1024 images under ``raw``.

    Of large outputs ``raw`` has every s-th value, 256 MiB in all. ``decisions`` int32 [n, positions] are the largest
    entries along the class axes of the same images' outputs, of at most 4096 positions each.
    """

    scores: Floats
    finite: npt.NDArray[np.bool_]
    raw: Raw
    decisions: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.finite)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        own = {"scores": self.scores, "finite": self.finite, "decisions": self.decisions}
        save_arrays(path, "other", {**own, **self.raw.to_arrays()})

    def first(self, count: int) -> Outputs:
        """Keep the first ``count`` images only."""
        return Outputs(self.scores[:count], self.finite[:count], self.raw.first(count), self.decisions[:count])


@dataclass(frozen=True, eq=False)
class Nearness(Resampled):
    """A comparison without a metric: ``drop`` is by how many dB the SQNR misses the least one.

    ``low`` is the SQNR that all images but one of twenty have; where that misses its own limit by more, ``drop`` is of
    it. ``decisions`` are the shares of positions and of images whose largest entry along the class axis is the same in
    both networks, None where no output has such an axis.
    """

    least: float = 20.0
    pooled: float = math.nan
    low: float = math.nan
    decisions: tuple[float, float] | None = None

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """From the images drawn again; nothing can be said of outputs that are all equal but that they are."""
        from resvit_calibrate.gate.bootstrap import percentile_interval

        return percentile_interval(self.drop, self.draws, self.images, confidence)

    def limit(self, max_drop: float) -> float:
        """No accuracy was measured, so that no drop of it can be limited."""
        del max_drop
        return 0.0

    def measured(self, interval: tuple[float, float], confidence: float) -> str:
        """What was measured instead."""
        low, high = self.least - interval[1], self.least - interval[0]
        which = "" if self.least - self.pooled >= self.drop else f" (that of the worst {_FEW:.0%}, plus {_SPREAD_DB:g})"
        alike = ""
        if self.decisions is not None:
            alike = f"; the largest entry is the same at {self.decisions[0]:.1%} of the positions and " + (
                f"everywhere in {self.decisions[1]:.1%} of the images"
            )
        return (
            f"accuracy was not measured; the outputs' SQNR against the float network is {self.pooled:.1f} dB, and at "
            f"least {self.low:.1f} dB in {1 - _FEW:.0%} of {self.images} images{alike}; {self.least - self.drop:.1f} dB"
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


class Other(Task):
    """Outputs of any kind, by ``metric`` (``package.module:function`` or ``file.py:function``) or by SQNR alone."""

    name: ClassVar[str] = "other"

    def __init__(self, options: Mapping[str, Any], metric: str | None = None) -> None:
        self.options = options_from(OtherOptions, self.name, options)
        self.reads = None if metric is None else Reads()
        self.function = None if metric is None else _function(metric, self.reads)
        self.metric = "SQNR" if metric is None else metric.rpartition(":")[2]
        self.unit = "dB" if metric is None else POINTS

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
        decisions = _largest(outputs, count)[: max(0, _IMAGES - place.before)]
        return Outputs(scores, fine, raw_of(outputs, count, place.before, _IMAGES, _BYTES), decisions)

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """All of them."""
        return Outputs(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.finite for part in parts]),
            joined_raw([part.raw for part in parts]),
            np.concatenate([part.decisions for part in parts]),
        )

    def load(self, data: bytes, where: str) -> Outputs:
        """Read what ``Outputs.save`` wrote."""
        arrays = load_arrays(data, where, self.name)
        return Outputs(arrays["scores"], arrays["finite"], Raw.from_arrays(arrays), arrays["decisions"])

    def compare(self, reference: Outputs, candidate: Outputs, confidence: float = 0.95) -> Comparison:
        """The mean of the user's scores and the interval of its fall; or the SQNR and its interval.

        There is one SQNR: -10 log10 of the mean over images of noise energy / signal energy, each image counting the
        same and none more than one that is noise alone, of the output that fares worst. A mean of decibels would be
        carried by images whose outputs are equal, at 100 dB each, and the energy of all together by the few with the
        largest outputs; either can hide that half of the images are noise. Beside it, all images but one of twenty
        must come within 6 dB of the least: a mean can hide one line of twenty that is misread.
        """
        require_same_images(True, reference, candidate)
        require_finite(reference.finite)
        noise = _noise_shares(reference.raw, candidate.raw)
        sqnr = _decibels(noise.mean(axis=0)).min()
        common: dict[str, Any] = {
            "metric": self.metric,
            "confidence": confidence,
            "agreement": float(_cosine(reference.raw, candidate.raw)),
            "agreement_of": "the outputs' direction (cosine)",
            "sqnr_db": float(sqnr),
            "not_finite": int((~candidate.finite).sum()),
            "unit": self.unit,
        }
        if self.function is None:
            least, images = self.options.least_sqnr_db, len(noise)
            each = _decibels(noise).min(axis=1)
            order = np.argsort(each)

            def nearness(weights: Floats) -> Floats:
                """The pooled SQNR and the low quantile, both as they are held against the least."""
                pooled = _decibels((weights @ noise) / images).min(axis=1)
                drawn = np.cumsum(weights[:, order], axis=1) >= _FEW * images
                return np.stack([pooled, each[order][drawn.argmax(axis=1)] + _SPREAD_DB], axis=1)

            whole, low = nearness(np.ones((1, images)))[0]
            draws = resampled(nearness, images).min(axis=1)
            nearest = float(min(whole, low))
            return Nearness(
                images=images,
                reference={"SQNR": _MOST_DB},
                candidate={"SQNR": float(sqnr)},
                drop=least - nearest,
                draws=least - draws,
                worse=0,
                better=0,
                least=least,
                pooled=float(sqnr),
                low=float(low) - _SPREAD_DB,
                decisions=_decisions(reference, candidate),
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
            near = _decibels(_noise_shares(reference.raw, candidate.raw).max(axis=1))
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


def _largest(outputs: Mapping[str, Array], count: int) -> npt.NDArray[np.int32]:
    """The largest entry along the class axis of every output that has one: [B, positions], 0 positions where none has.

    Classes are the second axis of [B, K] and of maps [B, K, h, w], and the last of [B, positions, K].
    """
    found = [np.zeros((count, 0), np.int32)]
    for value in outputs.values():
        axis = {2: 1, 3: 2, 4: 1}.get(value.ndim)
        if axis is not None and value.dtype.kind == "f" and value.shape[axis] > 1:
            largest = value.argmax(axis=axis).reshape(count, -1)
            step = -(-largest.shape[1] // _POSITIONS) or 1
            found.append(largest[:, ::step].astype(np.int32))
    return np.concatenate(found, axis=1)


def _decisions(reference: Outputs, candidate: Outputs) -> tuple[float, float] | None:
    """The shares of positions and of images with the same largest entries."""
    if reference.decisions.shape != candidate.decisions.shape or not reference.decisions.size:
        return None
    same = reference.decisions == candidate.decisions
    return float(same.mean()), float(same.all(axis=1).mean())


def _noise_shares(reference: Raw, candidate: Raw) -> Floats:
    """Noise energy / signal energy of every image and output [N, outputs], from 0 to 1; NaN counts as 1."""
    shares = []
    for name, clean in reference.outputs.items():
        theirs = candidate.outputs.get(name)
        if theirs is None or theirs.shape != clean.shape:
            raise ResvitError(f"The two networks differ in the output {name}.", "Compare networks of the same outputs.")
        wide = clean.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            noise = np.square(wide - theirs).sum(axis=1)
            share = np.where(noise == 0.0, 0.0, noise / np.square(wide).sum(axis=1))
        shares.append(np.clip(np.nan_to_num(share, nan=1.0), 0.0, 1.0))
    return np.stack(shares, axis=1)


def _decibels(noise: Floats) -> Floats:
    """Shares of noise as SQNR in dB, from 0 to 100."""
    return -10.0 * np.log10(np.clip(noise, 10.0 ** (-_MOST_DB / 10.0), 1.0))


def _cosine(reference: Raw, candidate: Raw) -> float:
    """The mean over images of the cosine between outputs, the lowest of a network's outputs."""
    found = []
    for name, first in reference.outputs.items():
        one, two = first.astype(np.float64), candidate.outputs[name].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(float(np.mean((one * two).sum(1) / np.sqrt(np.square(one).sum(1) * np.square(two).sum(1)))))
    return min(found)
