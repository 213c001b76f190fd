"""Boxes with classes: COCO's mAP, with an interval over images drawn again."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.answers.average_precision import Matched, matched
from resvit_calibrate.answers.base import (
    Answers,
    Place,
    Task,
    finite_images,
    load_arrays,
    require_finite,
    require_same_images,
    save_arrays,
    targets_of,
)
from resvit_calibrate.answers.boxes import agreeing, pairs_of, stored_boxes
from resvit_calibrate.answers.raw import Raw, joined_raw, raw_of
from resvit_calibrate.gate.bootstrap import Floats, resampled
from resvit_calibrate.gate.comparison import POINTS, Chance, Resampled
from resvit_calibrate.gate.numbering import other_numbering
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import BoxTarget
from resvit_engines.answers.boxes import NO_BOXES, Boxes, BoxReader, DetectionOptions
from resvit_engines.answers.options import Array, options_from, stated
from resvit_engines.errors import ResvitError

_DRAWS = 1000
_MOST = 100
_NEAR_NOTHING = 1.0
"""Points of mAP 50:95 that an untrained detector may reach by luck."""


@dataclass(frozen=True, eq=False)
class Detections(Answers):
    """Of N images: the boxes found and the boxes known, best first, all in pixels of the input.

    ``finite`` bool [N]: no output held NaN or infinity; such an image counts as one without a detection.
    """

    found: tuple[Boxes, ...]
    known: tuple[BoxTarget, ...]
    finite: npt.NDArray[np.bool_]
    raw: Raw

    def __len__(self) -> int:
        return len(self.found)

    @functools.cached_property
    def matched(self) -> Matched:
        """The found boxes matched with the known ones."""
        return matched(self.found, self.known, _MOST)

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of what is known."""
        digest = hashlib.sha256()
        for item in self.known:
            digest.update(item.boxes.tobytes() + item.classes.tobytes() + item.crowd.tobytes() + b"|")
        return digest.digest()

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        known = stored_boxes([Boxes(t.boxes, np.zeros(len(t.classes), np.float32), t.classes) for t in self.known])
        arrays = {**stored_boxes(list(self.found)), "finite": self.finite, **self.raw.to_arrays()}
        arrays["known_crowd"] = np.concatenate([np.zeros(0, bool), *(t.crowd for t in self.known)])
        arrays |= {f"known_{name}": known[name] for name in ("boxes", "classes", "offsets")}
        save_arrays(path, "detection", arrays)

    def first(self, count: int) -> Detections:
        """Keep the first ``count`` images only."""
        return Detections(self.found[:count], self.known[:count], self.finite[:count], self.raw.first(count))


class Detection(Task):
    """Two outputs: boxes [B, Q, 4] and scores [B, Q, K] (see ``DetectionOptions``)."""

    name: ClassVar[str] = "detection"
    metric = "mAP 50:95"
    unit = POINTS

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(DetectionOptions, self.name, options)

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Detections:
        """The best boxes of every image, with the known ones."""
        reader = BoxReader(self.options, outputs, image_set.num_classes)
        targets = targets_of(batch, BoxTarget, self.name, image_set)
        known = tuple(self.numbered(target, image_set.class_ids, reader.classes) for target in targets)
        boxes, scores = outputs[reader.boxes], outputs[reader.scores]
        both = {reader.boxes: boxes, reader.scores: scores}
        fine = finite_images(both, len(boxes))
        size = (int(batch.images.shape[2]), int(batch.images.shape[3]))
        found = tuple(reader.read(boxes[i], scores[i], size) if fine[i] else NO_BOXES for i in range(len(boxes)))
        return Detections(found, known, fine, raw_of(both, len(boxes), place.before))

    def joined(self, parts: Sequence[Detections]) -> Detections:
        """All of them."""
        known = tuple(target for part in parts for target in part.known)
        found = tuple(boxes for part in parts for boxes in part.found)
        return Detections(
            found, known, np.concatenate([part.finite for part in parts]), joined_raw([part.raw for part in parts])
        )

    def require_judgeable(self, answers: Detections, image_set: ImageSet) -> None:
        """Refuse images of which none has a box; raises ``ResvitError``."""
        if not any((~target.crowd).any() for target in answers.known):
            raise ResvitError(
                f"No image has a box ({image_set.description}).", "Detection is measured on images with objects."
            )

    def load(self, data: bytes, where: str) -> Detections:
        """Read what ``Detections.save`` wrote."""
        arrays = load_arrays(data, where, self.name)
        names = ("boxes", "scores", "classes")
        found = [Boxes(*(arrays[n][part] for n in names)) for part in _parts(arrays["offsets"])]
        names = ("known_boxes", "known_classes", "known_crowd")
        known = [BoxTarget(*(arrays[n][part] for n in names)) for part in _parts(arrays["known_offsets"])]
        found = [replace(item, classes=item.classes.astype(np.int64)) for item in found]
        known = [replace(item, classes=item.classes.astype(np.int64)) for item in known]
        return Detections(tuple(found), tuple(known), arrays["finite"], Raw.from_arrays(arrays))

    def compare(self, reference: Detections, candidate: Detections, confidence: float = 0.95) -> Resampled:
        """MAP 50:95 and mAP 50, and the interval of the difference in mAP 50:95.

        The reference must be clearly above 1 point.
        """
        require_same_images(reference.digest == candidate.digest, reference, candidate)
        require_finite(reference.finite)
        first, second = reference.matched, candidate.matched

        def statistic(weights: Floats) -> Floats:
            before = first.average_precision(weights)
            return np.concatenate([before, before if second is first else second.average_precision(weights)], axis=1)

        whole = statistic(np.ones((1, len(reference))))[0]
        draws = resampled(statistic, len(reference), _DRAWS)
        counts = np.array(
            [agreeing(a, b, self.options.shown) for a, b in zip(reference.found, candidate.found, strict=True)]
        ).sum(axis=0)
        return Resampled(
            images=len(reference),
            metric=self.metric,
            reference={"mAP 50:95": float(whole[0]), "mAP 50": float(whole[1])},
            candidate={"mAP 50:95": float(whole[2]), "mAP 50": float(whole[3])},
            drop=100.0 * float(whole[0] - whole[2]),
            draws=100.0 * (draws[:, 0] - draws[:, 2]),
            confidence=confidence,
            agreement=float(2 * counts[0] / (counts[1] + counts[2])) if counts[1] + counts[2] else float("nan"),
            agreement_of=f"boxes from a score of {self.options.shown:g} on with the same class and place (IoU 0.5)",
            sqnr_db=reference.raw.sqnr_db(candidate.raw),
            not_finite=int((~candidate.finite).sum()),
            worse=int((second.found < first.found).sum()),
            better=int((second.found > first.found).sum()),
            chance=Chance(
                100.0 * float(whole[0]) - _NEAR_NOTHING,
                100.0 * draws[:, 0] - _NEAR_NOTHING,
                f"the float network has {100 * whole[0]:.2f} points of mAP 50:95 on {len(reference)} images, not "
                f"clearly above {_NEAR_NOTHING:g}: check the checkpoint, the preprocessing, the order of the classes "
                "and the form of the boxes, or give more images",
            ),
            numbering=other_numbering(pairs_of(reference.found, reference.known), confidence),
        )

    def reading(self, answers: Any) -> dict[str, Any]:
        """The options that were said."""
        del answers
        return stated(self.options)

    def changed(self, reference: Detections, candidate: Detections) -> list[dict[str, Any]]:
        """The images in which a shown box is missing, new, or of another class; those with the most first."""
        rows = []
        hits = candidate.matched.found - reference.matched.found
        for index, (before, after) in enumerate(zip(reference.found, candidate.found, strict=True)):
            both, first, second = agreeing(before, after, self.options.shown)
            if first + second > 2 * both:
                rows.append((first + second - 2 * both, index, both, first, second))
        return [
            {
                "index": index,
                "label": None,
                "float": f"{first} {'box' if first == 1 else 'boxes'}",
                "quantized": f"{second} {'box' if second == 1 else 'boxes'}, {both} the same",
                "outcome": "lost" if hits[index] < 0 else "gained" if hits[index] > 0 else "neutral",
            }
            for _, index, both, first, second in sorted(rows, key=lambda row: (-row[0], row[1]))
        ]

    def drawing(self, answers: Detections, index: int) -> dict[str, Array]:
        """``boxes`` [M, 4] in pixels of the input, ``scores`` and ``classes`` [M], from the shown score on.

        ``known_boxes`` [K, 4] and ``known_classes`` [K] are the truth, without crowds.
        """
        item, truth = answers.found[index], answers.known[index]
        shown = item.scores >= self.options.shown
        return {
            "boxes": item.boxes[shown],
            "scores": item.scores[shown],
            "classes": item.classes[shown],
            "known_boxes": truth.boxes[~truth.crowd],
            "known_classes": truth.classes[~truth.crowd],
        }

    def numbered(self, target: BoxTarget, ids: Sequence[int], classes: int) -> BoxTarget:
        """The target with the network's class numbers, the data's own being ``ids``; refuses those it doesn't have."""
        if self.options.class_numbers == "id" and ids:
            target = replace(target, classes=np.array(ids, np.int64)[target.classes])
        highest = int(target.classes.max(initial=-1))
        if highest >= classes or int(target.classes.min(initial=0)) < 0:
            raise ResvitError(
                f"The boxes have the class {highest}, but the network knows classes 0 to {classes - 1}.",
                "Use the data that the network was trained for; if it answers with the data's own numbers, say "
                "--task-option class_numbers=id.",
            )
        return target


def _parts(offsets: Array) -> list[slice]:
    edges = offsets.tolist()
    return [slice(first, last) for first, last in itertools.pairwise(edges)]
