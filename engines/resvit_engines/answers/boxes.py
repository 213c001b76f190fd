"""From a detector's outputs to boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.options import Array, require_between, require_choice, shapes_of
from resvit_engines.errors import ResvitError

_TASK = "detection"
_BEFORE_NMS = 1000
"""Candidates of an image that overlap is looked for among, the best first."""
PAIRS = (("boxes", "scores"), ("pred_boxes", "logits"))
"""Output names that are known: boxes and scores."""


@dataclass(frozen=True)
class DetectionOptions:
    """How a detector's two outputs are to be read. None: as fits the outputs' names.

    ``boxes`` [B, Q, 4] and ``scores`` [B, Q, K or K + 1] name the outputs: ``boxes`` and ``scores``, or
    ``pred_boxes`` and ``logits``. ``box_format``: ``xyxy`` or ``cxcywh``; ``normalized``: 0 to 1 instead of pixels of
    the input; ``activation`` of the scores: ``none``, ``sigmoid``, or ``softmax`` with a last "no object" class. For
    the first pair xyxy, pixels, none; for the second cxcywh, normalised, and softmax where there is one score
    more than the data has classes, else sigmoid. ``nms_iou``: overlap above which the weaker of two boxes of a class
    goes, 1 for none; said for neither, 0.6 for the first pair and none for the second. ``class_numbers``:
    ``index``, or ``id`` where the network answers with the data's own numbers (COCO's 1 to 90). ``shown``: the score
    from which a box counts for agreement and is drawn.
    """

    boxes: str | None = None
    scores: str | None = None
    box_format: str | None = None
    normalized: bool | None = None
    activation: str | None = None
    nms_iou: float | None = None
    score_threshold: float = 0.0
    top_k: int = 100
    class_numbers: str = "index"
    shown: float = 0.3

    def __post_init__(self) -> None:
        if self.box_format is not None:
            require_choice(_TASK, "box_format", self.box_format, ("xyxy", "cxcywh"))
        if self.activation is not None:
            require_choice(_TASK, "activation", self.activation, ("none", "sigmoid", "softmax"))
        require_choice(_TASK, "class_numbers", self.class_numbers, ("index", "id"))
        if self.nms_iou is not None:
            require_between(_TASK, "nms_iou", self.nms_iou, 0.0, 1.0)
        require_between(_TASK, "score_threshold", self.score_threshold, 0.0, 1.0)
        require_between(_TASK, "shown", self.shown, 0.0, 1.0)
        require_between(_TASK, "top_k", self.top_k, 1, 10_000)


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image, best first: float32 [M, 4] x1, y1, x2, y2 in input pixels, scores [M], classes int64 [M]."""

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]


NO_BOXES = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


class BoxReader:
    """Turns one image's outputs into ``Boxes``; made for the outputs of a network, which it checks.

    Raises ``ResvitError`` for outputs that are not boxes and scores, saying which there are.
    """

    def __init__(self, options: DetectionOptions, outputs: Mapping[str, Array], classes: int | None) -> None:
        self.boxes, self.scores = names_of(options, outputs)
        family = self.boxes == "pred_boxes" or self.scores == "logits"
        boxes, scores = outputs[self.boxes], outputs[self.scores]
        fits = boxes.ndim == 3 and boxes.shape[2] == 4 and scores.ndim == 3 and scores.shape[1] == boxes.shape[1]
        if not fits:
            raise ResvitError(
                f"Detection reads boxes from {self.boxes} and scores from {self.scores}, and the network has "
                f"{shapes_of(outputs)}: not [B, boxes, 4] and [B, boxes, classes].",
                "Name them with --task-option boxes=NAME --task-option scores=NAME.",
            )
        width = scores.shape[2]
        guess = "sigmoid" if classes is None or width != classes + 1 else "softmax"
        self.activation = options.activation or (guess if family else "none")
        self.classes = width - 1 if self.activation == "softmax" else width
        self.centres = (options.box_format or ("cxcywh" if family else "xyxy")) == "cxcywh"
        self.normalized = family if options.normalized is None else options.normalized
        overlap = (1.0 if family else 0.6) if options.nms_iou is None else options.nms_iou
        self.overlap = overlap if overlap < 1.0 else None
        self.options = options

    def read(self, boxes: Array, scores: Array, size: tuple[int, int]) -> Boxes:
        """The best boxes of one image: [Q, 4] and [Q, K or K + 1], for an input of ``size`` (height, width)."""
        likely = self._likely(scores.astype(np.float64))
        if self.activation == "none" and likely.size and not (likely.min() >= 0.0 and likely.max() <= 1.0):
            raise ResvitError(
                f"The scores in {self.scores} are {likely.min():.3g} to {likely.max():.3g}, not probabilities.",
                "Say what turns them into such: --task-option activation=sigmoid, or softmax.",
            )
        most = self.options.top_k if self.overlap is None else max(_BEFORE_NMS, self.options.top_k)
        flat = likely.ravel()
        order = _largest(flat, most)
        order = order[flat[order] >= self.options.score_threshold]
        which, classes = np.divmod(order, likely.shape[1])
        corners = self._corners(boxes.astype(np.float32), size)[which]
        if self.overlap is not None:
            kept = without_overlaps(corners, classes, self.overlap)[: self.options.top_k]
            order, corners, classes = order[kept], corners[kept], classes[kept]
        return Boxes(corners, flat[order].astype(np.float32), classes.astype(np.int64))

    def _likely(self, scores: Array) -> Array:
        """Probabilities [Q, K]; of a softmax only each box's best class, as DETR's users expect."""
        if self.activation == "none":
            return scores
        if self.activation == "sigmoid":
            return np.asarray(0.5 + 0.5 * np.tanh(0.5 * scores))
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        likely = (powers / powers.sum(axis=1, keepdims=True))[:, :-1]
        best = likely.argmax(axis=1)
        only = np.full_like(likely, -1.0)
        only[np.arange(len(best)), best] = likely[np.arange(len(best)), best]
        return np.asarray(only)

    def _corners(self, boxes: Array, size: tuple[int, int]) -> Array:
        if self.centres:
            half = boxes[:, 2:] / 2
            boxes = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
        return boxes * np.array([size[1], size[0]] * 2, np.float32) if self.normalized else boxes


def names_of(options: DetectionOptions, outputs: Mapping[str, Array]) -> tuple[str, str]:
    """The outputs that hold boxes and scores: those named, else a known pair, else the only two that fit.

    Raises:
        ResvitError: where that is not clear, saying which outputs there are.
    """
    for boxes, scores in ((options.boxes, options.scores), *PAIRS):
        chosen = (options.boxes or boxes, options.scores or scores)
        if chosen[0] in outputs and chosen[1] in outputs:
            return str(chosen[0]), str(chosen[1])
    fours = [name for name, value in outputs.items() if value.ndim == 3 and value.shape[2] == 4]
    others = [name for name, value in outputs.items() if value.ndim == 3 and value.shape[2] != 4]
    if not (options.boxes or options.scores) and len(outputs) == 2 and len(fours) == len(others) == 1:
        return fours[0], others[0]
    raise ResvitError(
        f"Detection needs outputs called boxes and scores, or pred_boxes and logits; the network has "
        f"{shapes_of(outputs)}.",
        "Name them with --task-option boxes=NAME --task-option scores=NAME.",
    )


def overlaps(first: Array, second: Array) -> npt.NDArray[np.float64]:
    """Intersection over union of each of [M, 4] with each of [N, 4]: [M, N]."""
    one, two = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    sides = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
    shared = np.maximum(sides, 0.0).prod(axis=-1)
    areas = [np.maximum(box[..., 2:] - box[..., :2], 0.0).prod(axis=-1) for box in (one, two)]
    union = areas[0] + areas[1] - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def without_overlaps(boxes: Array, classes: Array, most: float) -> npt.NDArray[np.int64]:
    """Indices of boxes, given best first, that overlap no better one of their class by more than ``most``."""
    kept: list[npt.NDArray[np.int64]] = []
    for number in np.unique(classes):
        left = np.flatnonzero(classes == number)
        while len(left):
            kept.append(left[:1])
            near = overlaps(boxes[left[:1]], boxes[left[1:]])[0]
            left = left[1:][near <= most]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def _largest(values: Array, most: int) -> npt.NDArray[np.int64]:
    """Indices of the ``most`` largest values, largest first, the earlier of equals first."""
    some = np.arange(len(values)) if len(values) <= most else np.argpartition(-values, most - 1)[:most]
    if len(some) < len(values):
        # Of values equal to the smallest that is taken, which ones are taken must not be left to chance.
        edge = values[some].min()
        above, equal = np.flatnonzero(values > edge), np.flatnonzero(values == edge)
        some = np.concatenate([above, equal[: most - len(above)]])
    return np.asarray(some[np.lexsort((some, -values[some]))], np.int64)
