"""COCO's mAP from boxes matched once per image, for the images as they are and for images drawn again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.gate.bootstrap import Floats
from resvit_calibrate.images.targets import BoxTarget
from resvit_engines.answers.boxes import Boxes

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
_EVERY = (0.0, 1e10)  # areas, in pixels
_VALUES = 1 << 22  # float64 held at once: 32 MiB


@dataclass(frozen=True)
class _Class:
    """One class's detections in falling order of score, and its known boxes.

    ``image`` int64 [D] is where each was found. ``hit`` and ``counted`` bool [10, D]: it matched a box at that IoU,
    and it is not one that a crowd excuses. ``asked`` [N] counts the known boxes of each image that are no crowd.
    """

    image: npt.NDArray[np.int64]
    hit: npt.NDArray[np.bool_]
    counted: npt.NDArray[np.bool_]
    asked: Floats

    def precisions(self, weights: Floats, asked: Floats) -> Floats:
        """Average precision at each IoU, with images drawn ``weights`` [R, N] times: [10, R]."""
        drawn = weights[:, self.image]  # (R, D)
        found, counted, every = [], None, np.zeros(0)
        for hit, counts in zip(self.hit, self.counted, strict=True):
            if counted is None or not np.array_equal(counts, counted):
                counted, every = counts, np.cumsum(np.where(counts, drawn, 0.0), axis=1)
            at = np.flatnonzero(hit)
            found.append(_precision(np.cumsum(drawn[:, at], axis=1), every[:, at], asked))
        return np.stack(found)


@dataclass(frozen=True)
class Matched:
    """All detections of a network on N images, matched; ``found`` [N] counts the matches over all IoUs."""

    classes: tuple[_Class, ...]
    found: npt.NDArray[np.int64]

    def average_precision(self, weights: Floats) -> Floats:
        """MAP 50:95 and mAP 50 for images that count ``weights`` [R, N] times: [R, 2], NaN without known boxes.

        COCO's definition: precision interpolated at 101 recalls, the mean over classes that occur. Precision has
        its peaks where a detection hits, so that only these are looked at; each stands for the recalls that were
        not reached before it.
        """
        total, present = np.zeros((2, len(weights))), np.zeros(len(weights))
        for item in self.classes:
            asked = weights @ item.asked  # (R,)
            there = asked > 0
            present += there
            if not item.hit.any():
                continue
            rows = max(1, _VALUES // len(item.image))
            scores = np.concatenate(
                [item.precisions(weights[i : i + rows], asked[i : i + rows]) for i in range(0, len(weights), rows)], 1
            )
            total[0] += np.where(there, scores.mean(axis=0), 0.0)
            total[1] += np.where(there, scores[0], 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((total / present).T, np.float64)


def _precision(true: Floats, every: Floats, asked: Floats) -> Floats:
    """Average precision [R] from how many detections were true, and how many there were, at each hit: [R, hits]."""
    if not true.shape[1]:
        return np.zeros(len(true))
    precision = np.divide(true, every + np.spacing(1), out=np.zeros_like(true), where=every > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = np.divide(true, asked[:, None], out=np.zeros_like(true), where=asked[:, None] > 0)
    reached = np.searchsorted(RECALLS, recall, side="right").astype(np.float64)
    return np.asarray((best * np.diff(reached, axis=1, prepend=0.0)).sum(axis=1) / len(RECALLS), np.float64)


def matched(found: Sequence[Boxes], known: Sequence[BoxTarget], most: int) -> Matched:
    """Match the detections of every image with its known boxes, class by class, by ``pycocotools``.

    At most ``most`` detections of a class and an image count, the best. Boxes of crowds may be matched again and
    again, and neither ask for anything nor count.
    """
    from pycocotools.cocoeval import COCOeval  # only where boxes are scored

    judge = COCOeval(iouType="bbox")
    judge.params.iouThrs, judge.params.maxDets, judge.params.areaRng = IOUS, [most], [list(_EVERY)]
    judge._gts, judge._dts = defaultdict(list), defaultdict(list)
    pairs: dict[int, list[int]] = defaultdict(list)
    number = 0
    for image, (answers, target) in enumerate(zip(found, known, strict=True)):
        here = set()
        for box, kind, crowd in zip(target.boxes, target.classes.tolist(), target.crowd.tolist(), strict=True):
            number += 1
            judge._gts[image, kind].append({**_entry(number, box), "iscrowd": int(crowd), "ignore": int(crowd)})
            here.add(kind)
        for box, kind, score in zip(answers.boxes, answers.classes.tolist(), answers.scores.tolist(), strict=True):
            number += 1
            judge._dts[image, kind].append({**_entry(number, box), "score": score})
            here.add(kind)
        for kind in here:
            pairs[kind].append(image)
    judge.ious = {(image, kind): judge.computeIoU(image, kind) for kind, images in pairs.items() for image in images}
    hits = np.zeros(len(found), np.int64)
    classes = tuple(_class(judge, kind, pairs[kind], most, hits) for kind in sorted(pairs))
    return Matched(tuple(item for item in classes if item.asked.any()), hits)


def _entry(number: int, box: npt.NDArray[Any]) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(edge) for edge in box)
    return {"id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}


def _class(judge: Any, kind: int, images: list[int], most: int, hits: npt.NDArray[np.int64]) -> _Class:
    """Match one class in all images where it is known or found; ``hits`` is added to."""
    asked = np.zeros(len(hits))
    image, scores, hit, counted = [], [], [], []
    for index in images:
        one = judge.evaluateImg(index, kind, list(_EVERY), most)
        excused = one["dtIgnore"].astype(bool)
        fits = (one["dtMatches"] > 0) & ~excused
        image.append(np.full(fits.shape[1], index))
        scores.append(np.array(one["dtScores"], np.float64))
        hit.append(fits)
        counted.append(~excused)
        asked[index] = int((np.asarray(one["gtIgnore"]) == 0).sum())
        hits[index] += int(fits.sum())
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    joined = [np.concatenate(parts, axis=-1)[..., order] for parts in (image, hit, counted)]
    return _Class(joined[0].astype(np.int64), joined[1], joined[2], asked)
