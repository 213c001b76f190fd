"""A number for every pixel: AbsRel and delta 1 of depths, with an interval over images drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from resvit_calibrate.answers.base import Place, Task, finite_images, require_finite, require_same_images, targets_of
from resvit_calibrate.answers.maps import Maps, outcome_of, step_for
from resvit_calibrate.answers.raw import raw_of
from resvit_calibrate.gate.bootstrap import Floats, resampled
from resvit_calibrate.gate.comparison import POINTS, Chance, Resampled
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import UNKNOWN_DEPTH, DepthTarget
from resvit_engines.answers.maps import DepthOptions, as_depths, depths_name, map_at
from resvit_engines.answers.options import Array, options_from, stated
from resvit_engines.errors import ResvitError

_NEAR = 0.05
"""A pixel agrees where the two depths differ by at most this share of the first."""
_CHANGED = 0.95
_SAMPLES = 64
_WRONG = 1.0
"""AbsRel of an image without finite depths: as if all were 0."""


@dataclass(frozen=True, eq=False)
class Depths(Maps):
    """Of N images: their errors against the known depths, and their maps float16.

    ``abs_rel`` and ``delta1`` [N] are means over an image's known pixels, NaN where it has none. ``sample`` [N, 64] are
    known depths of each image, by which a network that always answers the same is measured.
    """

    task = "depth"
    abs_rel: Floats
    delta1: Floats
    sample: Floats


class Depth(Task):
    """Depths [B, 1, h, w] or [B, h, w], on the input's grid or interpolated to it."""

    name: ClassVar[str] = "depth"
    lower_is_better: ClassVar[bool] = True
    metric = "AbsRel"
    unit = POINTS

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(DepthOptions, self.name, options)

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Depths:
        """Depth maps of every image and their errors."""
        output = self._output(outputs)
        size = (int(batch.images.shape[2]), int(batch.images.shape[3]))
        step = step_for(place.count, size)
        fine = finite_images({"output": output}, len(output))
        maps, rows, digests = [], [], []
        targets = targets_of(batch, DepthTarget, self.name, image_set)
        for one, target, whole in zip(output, targets, fine, strict=True):
            found, row = self._scored(map_at(one, size) if whole else None, target.depth)
            rows.append(row)
            with np.errstate(over="ignore"):
                maps.append(found[::step, ::step].astype(np.float16))
            digests.append(hashlib.sha256(target.depth.tobytes()).digest())
        digest = np.frombuffer(b"".join(digests), np.uint8).reshape(len(maps), -1)
        scores = np.array([row[:2] for row in rows], np.float64).reshape(-1, 2)
        raw = raw_of({"output": output}, len(output), place.before)
        sample = np.stack([row[2] for row in rows])
        return Depths(np.stack(maps), step, fine, digest, raw, scores[:, 0], scores[:, 1], sample)

    def joined(self, parts: Sequence[Depths]) -> Depths:
        """All of them."""
        return Depths.joined(parts)

    def require_judgeable(self, answers: Depths, image_set: ImageSet) -> None:
        """Refuse images of which no pixel has a known depth; raises ``ResvitError``."""
        if not np.isfinite(answers.abs_rel).any():
            raise ResvitError(
                f"No pixel has a known depth ({image_set.description}).",
                "Check --task-option depth_scale, min_depth and max_depth.",
            )

    def load(self, data: bytes, where: str) -> Depths:
        """Read what ``Depths.save`` wrote."""
        return Depths.load(data, where)

    def compare(self, reference: Depths, candidate: Depths, confidence: float = 0.95) -> Resampled:
        """AbsRel and delta 1, means over images of means over pixels, and the interval of the rise of AbsRel.

        A point is 0.01 of AbsRel. Images without a known depth count for nothing. The reference must be better
        than one depth everywhere, the best one.
        """
        require_same_images(np.array_equal(reference.digest, candidate.digest), reference, candidate)
        require_finite(reference.finite)
        there = np.isfinite(reference.abs_rel)
        stats = np.stack([reference.abs_rel, candidate.abs_rel, self._constant(reference)], axis=1)
        stats = np.where(there[:, None], stats, 0.0)

        def statistic(weights: Floats) -> Floats:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray((weights @ stats) / (weights @ there.astype(float))[:, None], np.float64)

        whole = statistic(np.ones((1, len(reference))))[0]
        draws = resampled(statistic, len(reference))
        return Resampled(
            images=len(reference),
            metric=self.metric,
            reference={"AbsRel": float(whole[0]), "delta 1": float(reference.delta1[there].mean())},
            candidate={"AbsRel": float(whole[1]), "delta 1": float(candidate.delta1[there].mean())},
            drop=100.0 * float(whole[1] - whole[0]),
            draws=100.0 * (draws[:, 1] - draws[:, 0]),
            confidence=confidence,
            agreement=float(_agreement(reference, candidate).mean()),
            agreement_of=f"pixels whose depth differs by at most {_NEAR:.0%}",
            sqnr_db=reference.raw.sqnr_db(candidate.raw),
            not_finite=int((~candidate.finite).sum()),
            worse=int((stats[:, 1] > stats[:, 0]).sum()),
            better=int((stats[:, 1] < stats[:, 0]).sum()),
            what="AbsRel",
            chance=Chance(
                100.0 * float(whole[2] - whole[0]),
                100.0 * (draws[:, 2] - draws[:, 0]),
                f"the float network's AbsRel is {100 * whole[0]:.1f} points on {len(reference)} images, not clearly "
                f"better than one depth everywhere ({100 * whole[2]:.1f}): check the checkpoint, the preprocessing, "
                "the unit of the depths and the options inverted and align, or give more images",
            ),
        )

    def reading(self, answers: Any) -> dict[str, Any]:
        """The options that were said."""
        del answers
        return stated(self.options)

    def changed(self, reference: Depths, candidate: Depths) -> list[dict[str, Any]]:
        """The images in which more than 5% of the pixels moved by more than 5%, those that moved most first."""
        same = _agreement(reference, candidate)
        before, after = reference.abs_rel, candidate.abs_rel
        return [
            {
                "index": int(i),
                "label": None,
                "float": f"AbsRel {before[i]:.3f}",
                "quantized": f"AbsRel {after[i]:.3f}, {same[i]:.1%} of the pixels within {_NEAR:.0%}",
                "outcome": outcome_of(after[i] > before[i], after[i] < before[i]),
            }
            for i in np.argsort(same, kind="stable")
            if same[i] < _CHANGED
        ]

    def drawing(self, answers: Depths, index: int) -> dict[str, Array]:
        """``depth`` float16 [h, w]."""
        return {"depth": answers.maps[index]}

    def _output(self, outputs: Mapping[str, Array]) -> Array:
        value = outputs[self.name_of(outputs)]
        return value if value.ndim == 3 else value[:, 0]

    def name_of(self, outputs: Mapping[str, Array]) -> str:
        """Which output has the depths. Raises ``ResvitError`` where that is not clear, saying which there are."""
        return depths_name(self.options, outputs)

    def _scored(self, found: Array | None, known: Array) -> tuple[Array, tuple[float, float, Array]]:
        """The map as depths, and of it AbsRel, delta 1 (Eigen, NIPS 2014) and a sample of what is known."""
        low, high = self.options.min_depth, self.options.max_depth
        counts = (known != UNKNOWN_DEPTH) & (known >= low) & (known <= high)
        true = known[counts].astype(np.float64)
        sample = np.full(_SAMPLES, np.nan)
        if true.size:
            sample = np.sort(true)[((np.arange(_SAMPLES) + 0.5) * true.size / _SAMPLES).astype(np.int64)]
        if found is None:
            worst = (_WRONG, 0.0) if true.size else (np.nan, np.nan)
            return np.full(known.shape, np.nan, np.float32), (*worst, sample)
        found = as_depths(found, self.options)
        if self.options.align == "median" and true.size:
            middle = float(np.median(found[counts]))
            found = found * (float(np.median(true)) / middle if middle > 0 else 1.0)
        found = np.clip(found, low, high)
        if not true.size:
            return found, (np.nan, np.nan, sample)
        said = found[counts].astype(np.float64)
        error = float((np.abs(said - true) / true).mean())
        within = float((np.maximum(said / true, true / said) < 1.25).mean())
        return found, (error, within, sample)

    def _constant(self, answers: Depths) -> Floats:
        """AbsRel [N] of the best single depth, or of each image's median where medians are aligned."""
        sample = answers.sample
        if self.options.align == "median":
            constant: Any = np.median(sample, axis=1)[:, None]
        else:
            # The sum of |c - y| / y is least at the median of y weighted by 1 / y.
            flat = np.sort(sample[np.isfinite(sample)])
            weight = np.cumsum(1.0 / flat)
            constant = flat[int(np.searchsorted(weight, weight[-1] / 2))]
        return np.asarray((np.abs(constant - sample) / sample).mean(axis=1), np.float64)


def _agreement(reference: Depths, candidate: Depths) -> Floats:
    """Per image the share of pixels that agree: [N]."""
    shares = []
    for first, second in zip(reference.maps, candidate.maps, strict=True):
        before, after = first.astype(np.float32), second.astype(np.float32)
        with np.errstate(invalid="ignore"):
            shares.append(float((np.abs(before - after) <= _NEAR * before).mean()))
    return np.array(shares)
