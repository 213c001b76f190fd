"""A class for every pixel: mIoU and Dice, with an interval over images drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.base import Place, Task, finite_images, require_finite, require_same_images, targets_of
from resvit_calibrate.answers.maps import Maps, outcome_of, step_for
from resvit_calibrate.answers.mask_counts import commonest, counts, dice, ious, mean_iou, pairs_in_map
from resvit_calibrate.answers.raw import raw_of
from resvit_calibrate.gate.bootstrap import Floats, resampled
from resvit_calibrate.gate.comparison import POINTS, Chance, Resampled
from resvit_calibrate.gate.numbering import Pairs, other_numbering
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import IGNORED, MaskTarget
from resvit_engines.answers.maps import SegmentationOptions, label_map, masks_name, require_masks
from resvit_engines.answers.options import Array, options_from, stated
from resvit_engines.errors import ResvitError

_CHANGED = 0.99
"""An image of which a larger share of pixels has the same class is not called changed."""


@dataclass(frozen=True, eq=False)
class Masks(Maps):
    """Of N images: label maps int16, and how many pixels of each class they share with what is known.

    ``maps`` are for drawing and agreement. ``shared``, ``answered`` and ``known`` int64 [N, K] count labelled pixels,
    all of them: of class k in both, in the answer, in truth. ``pairs`` int64 [M, 4] are image, known class, answered
    class and pixels (see ``gate.numbering``).
    """

    task = "segmentation"
    together = ("pairs",)
    shared: npt.NDArray[np.int64]
    answered: npt.NDArray[np.int64]
    known: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]

    def first(self, count: int) -> Masks:
        """Keep the first ``count`` images only."""
        return replace(super().first(count), pairs=self.pairs[self.pairs[:, 0] < count])

    def with_classes(self, classes: int) -> Masks:
        """The same with room for so many classes: those that are added have no pixel."""
        more = ((0, 0), (0, classes - self.shared.shape[1]))
        wider: dict[str, Any] = {name: np.pad(getattr(self, name), more) for name in ("shared", "answered", "known")}
        return replace(self, **wider)


class Segmentation(Task):
    """Scores [B, K, h, w] on the input's grid or a coarser one of the same proportions, or class numbers [B, h, w]."""

    name: ClassVar[str] = "segmentation"
    metric = "mIoU"
    unit = POINTS

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(SegmentationOptions, self.name, options)

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Masks:
        """Label maps of every image and their counts against the known masks."""
        output = self.output_of(outputs)
        size = (int(batch.images.shape[2]), int(batch.images.shape[3]))
        require_masks(output, size)
        classes = output.shape[1] if output.ndim == 4 else image_set.num_classes or 0
        step, fine = step_for(place.count, size), finite_images({"output": output}, len(output))
        rows: list[tuple[Array, Array, Array]] = []
        pairs, maps, digests = [], [], []
        targets = targets_of(batch, MaskTarget, self.name, image_set)
        for one, target, whole in zip(output, targets, fine, strict=True):
            classes = _classes(classes, output.ndim, one if whole else np.zeros(1), target)
            found = label_map(one, size) if whole else np.full(size, IGNORED, np.int16)
            pairs.append(pairs_in_map(place.before + len(rows), found, target.classes))
            rows.append(counts(found, target.classes, classes))
            maps.append(found[::step, ::step].copy())
            digests.append(hashlib.sha256(target.classes.tobytes()).digest())
        shared, answered, known = (_stacked([row[i] for row in rows], classes) for i in range(3))
        digest = np.frombuffer(b"".join(digests), np.uint8).reshape(len(maps), -1)
        raw = raw_of({"output": output}, len(output), place.before)
        return Masks(np.stack(maps), step, fine, digest, raw, shared, answered, known, np.concatenate(pairs))

    def joined(self, parts: Sequence[Masks]) -> Masks:
        """All of them, with as many classes as the part that has most."""
        classes = max(part.shared.shape[1] for part in parts)
        return Masks.joined([part.with_classes(classes) for part in parts])

    def load(self, data: bytes, where: str) -> Masks:
        """Read what ``Masks.save`` wrote."""
        return Masks.load(data, where)

    def compare(self, reference: Masks, candidate: Masks, confidence: float = 0.95) -> Resampled:
        """MIoU and Dice over classes, and the interval of the difference in mIoU.

        A class that is neither known nor answered anywhere in the images counts for neither. The reference must be
        better than answering the commonest class everywhere.
        """
        require_same_images(np.array_equal(reference.digest, candidate.digest), reference, candidate)
        require_finite(reference.finite)
        classes = max(reference.shared.shape[1], candidate.shared.shape[1])
        if not reference.known.any():
            raise ResvitError("No pixel of the masks is labelled.", "Check the masks, and the unlabelled value.")
        first, second = _widened(reference, classes), _widened(candidate, classes)
        constant = commonest(first)
        stats = np.concatenate([first, second, constant], axis=1)

        def statistic(weights: Floats) -> Floats:
            sums = (weights @ stats).reshape(len(weights), 3, 3, classes)
            return np.stack([mean_iou(*sums[:, network].swapaxes(0, 1)) for network in range(3)], axis=1)

        whole = statistic(np.ones((1, len(reference))))[0]
        draws = resampled(statistic, len(reference))
        apart = ious(first) - ious(second)
        return Resampled(
            images=len(reference),
            metric=self.metric,
            reference={"mIoU": float(whole[0]), "Dice": dice(first)},
            candidate={"mIoU": float(whole[1]), "Dice": dice(second)},
            drop=100.0 * float(whole[0] - whole[1]),
            draws=100.0 * (draws[:, 0] - draws[:, 1]),
            confidence=confidence,
            agreement=float(_agreement(reference, candidate).mean()),
            agreement_of="pixels with the same class",
            sqnr_db=reference.raw.sqnr_db(candidate.raw),
            not_finite=int((~candidate.finite).sum()),
            worse=int((apart > 0).sum()),
            better=int((apart < 0).sum()),
            chance=Chance(
                100.0 * float(whole[0] - whole[2]),
                100.0 * (draws[:, 0] - draws[:, 2]),
                f"the float network has {100 * whole[0]:.1f} points of mIoU on {len(reference)} images, not clearly "
                f"better than answering the commonest class everywhere ({100 * whole[2]:.1f}): check the checkpoint, "
                "the preprocessing and the order of the classes, or give more images",
            ),
            numbering=other_numbering(Pairs(*reference.pairs.T), confidence),
        )

    def reading(self, answers: Any) -> dict[str, Any]:
        """The options that were said."""
        del answers
        return stated(self.options)

    def changed(self, reference: Masks, candidate: Masks) -> list[dict[str, Any]]:
        """The images in which more than 1% of the pixels got another class, those that changed most first."""
        same = _agreement(reference, candidate)
        before, after = (_per_image(x) for x in (reference, candidate))
        return [
            {
                "index": int(i),
                "label": None,
                "float": f"mIoU {100 * before[i]:.1f}",
                "quantized": f"mIoU {100 * after[i]:.1f}, {same[i]:.1%} of the pixels the same",
                "outcome": outcome_of(after[i] < before[i], after[i] > before[i]),
            }
            for i in np.argsort(same, kind="stable")
            if same[i] < _CHANGED
        ]

    def drawing(self, answers: Masks, index: int) -> dict[str, Array]:
        """``mask`` int16 [h, w]."""
        return {"mask": answers.maps[index]}

    def name_of(self, outputs: Mapping[str, Array]) -> str:
        """Which output has the masks; raises as ``maps.masks_name``."""
        return masks_name(self.options, outputs)

    def output_of(self, outputs: Mapping[str, Array]) -> Array:
        """The output with the masks; raises as ``name_of``."""
        return outputs[self.name_of(outputs)]


def _classes(known: int, dimensions: int, one: Array, target: MaskTarget) -> int:
    """How many classes there are; refuses those that the network can't answer."""
    highest = int(target.classes.max(initial=-1))
    if dimensions == 4 and highest >= known:
        raise ResvitError(
            f"The masks have the class {highest}, but the network knows classes 0 to {known - 1}.",
            "Use the data that the network was trained for, or name its unlabelled value: --task-option ignore=255.",
        )
    if dimensions == 3:
        low, most = float(one.min()), float(one.max())
        if low < 0 or most >= 32768 or not np.array_equal(one, np.round(one)):
            raise ResvitError(
                f"The segmentation output [B, h, w] holds {low:g} to {most:g}, which are no class numbers.",
                "Give the scores of all classes, [B, classes, h, w]; for depths say --task depth.",
            )
        return max(known, highest + 1, int(most) + 1)
    return known


def _stacked(rows: list[Array], classes: int) -> npt.NDArray[np.int64]:
    return np.stack([np.pad(row, (0, classes - len(row))) for row in rows]).astype(np.int64)


def _widened(answers: Masks, classes: int) -> Floats:
    """Counts [N, 3 K]: shared, answered, known."""
    parts = (answers.shared, answers.answered, answers.known)
    return np.concatenate([np.pad(part, ((0, 0), (0, classes - part.shape[1]))) for part in parts], 1).astype(float)


def _per_image(answers: Masks) -> Floats:
    return np.nan_to_num(ious(_widened(answers, answers.shared.shape[1])))


def _agreement(reference: Masks, candidate: Masks) -> Floats:
    """Per image the share of pixels with the same class: [N]."""
    return np.array([(a == b).mean() for a, b in zip(reference.maps, candidate.maps, strict=True)])
