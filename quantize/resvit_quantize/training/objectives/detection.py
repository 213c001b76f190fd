"""Boxes of a student that is taught by a detector, and by labelled boxes where there are any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.images.targets import BoxTarget
from resvit_calibrate.tasks.detection import Detection
from resvit_engines.answers.boxes import BoxReader
from resvit_quantize.training.objectives.base import Objective, Outputs
from resvit_quantize.training.objectives.boxes import (
    CELLS,
    asked,
    assigned,
    class_divergence,
    corners,
    divergence,
    giou,
    likely,
    overlaps,
)

CLASS, SIDES, OVERLAP = 2.0, 5.0, 2.0
"""The weights of classes, L1 (in shares of the input) and GIoU: Deformable DETR's (Zhu et al. 2021)."""
_SAME = 0.5
"""IoU from which a labelled box and the teacher's of its class are one object."""


class DetectionObjective(Objective):
    """Each image's boxes against the teacher's and the labelled ones.

    Where predictions suppress each other, or the network picks its rows by score, objects are matched with them one to
    one, at the least loss in all (Carion et al., "DETR", 2020). Where every cell answers and overlapping boxes are
    removed later, each cell is held to the teacher's own, as far as either sees something there.
    """

    def __init__(
        self, task: Detection, reader: BoxReader, class_ids: tuple[int, ...], selects: bool, *, labelled: bool
    ) -> None:
        self.task, self.reader, self.class_ids, self.labelled = task, reader, class_ids, labelled
        self.reads = (reader.boxes, reader.scores)
        self.matches = reader.overlap is None or selects
        labels = " and labelled boxes" if labelled else ""
        how = "matched one to one" if self.matches else "cell by cell"
        self.told = f"the teacher's boxes{labels}, {how}: classes, L1 and GIoU"

    def loss(self, outputs: Outputs, targets: Outputs, batch: Batch) -> Tensor:
        """The mean over the objects of the batch."""
        size, reader = (int(batch.images.shape[2]), int(batch.images.shape[3])), self.reader
        scores, aims = outputs[reader.scores].float(), targets[reader.scores].float()
        found, wanted = (corners(each[reader.boxes].float(), reader, size) for each in (outputs, targets))
        nothing = BoxTarget(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
        known = [self._known(target) for target in batch.targets or ()] or [nothing] * len(scores)
        if not self.matches:
            return cells_loss(scores, found, aims, wanted, known, reader, size)
        losses, weights = zip(
            *(
                matched_loss(scores[index], found[index], aims[index], wanted[index], target, reader, size)
                for index, target in enumerate(known)
            ),
            strict=True,
        )
        return torch.stack(losses).sum() / torch.stack(weights).sum().clamp(min=1.0)

    def _known(self, target: object) -> BoxTarget:
        assert isinstance(target, BoxTarget)
        return self.task.numbered(target, self.class_ids, self.reader.classes)


def cells_loss(
    scores: Tensor,
    found: Tensor,
    aims: Tensor,
    wanted: Tensor,
    known: Sequence[BoxTarget],
    reader: BoxReader,
    size: tuple[int, int],
) -> Tensor:
    """Each cell's scores [B, Q, K] and corners [B, Q, 4] against the teacher's, the mean over what it sees.

    A cell's weight is its largest probability squared, the teacher's or the student's: most cells are background, and
    their noise costs nothing. Boxes count by the teacher's alone. Labelled boxes stand in the place of the teacher's,
    see ``_correct``. Zero where student and teacher are equal and no box is labelled.
    """
    own, aim, wanted = likely(scores, reader).detach(), _probabilities(aims, reader).clone(), wanted.clone()
    for index, target in enumerate(known):
        _correct(aim[index], wanted[index], own[index], found[index].detach(), target, reader)
    seen = aim[..., : reader.classes].amax(-1).square()  # [B, Q]
    either = torch.maximum(own.amax(-1).square(), seen)
    losses = either * CLASS * class_divergence(scores, aim, reader) + seen * box_loss(found, wanted, size)
    return losses.sum() / seen.sum().clamp(min=1.0)


def _correct(aim: Tensor, wanted: Tensor, own: Tensor, found: Tensor, known: BoxTarget, reader: BoxReader) -> None:
    """Put one image's labelled boxes into what its cells are to say: ``aim`` [Q, K or K + 1] and ``wanted`` [Q, 4].

    Each of the teacher's boxes that overlaps a labelled one of its class becomes that one, and keeps its
    probabilities. An object that it has missed goes to the student's own best cells, which are to be as sure of it as
    they overlap it (Zhang et al., "VarifocalNet", 2021).
    """
    true, classes = asked(known, aim.device)
    if not len(true):
        return
    overlap = overlaps(wanted[:, None], true[None])[0].nan_to_num()  # [Q, N]
    near = overlap >= _SAME
    missed = ~(near & (aim[:, classes] >= reader.options.shown)).any(0)
    overlap = overlap * (aim[:, : reader.classes].argmax(-1)[:, None] == classes[None])
    most, of = overlap.max(-1)
    wanted[most >= _SAME] = true[of[most >= _SAME]]
    rows, objects, sure = assigned(own, found, true[missed], classes[missed], CELLS)
    wanted[rows] = true[missed][objects]
    if reader.activation == "softmax":
        aim[rows] = 0.0
        aim[rows, -1] = 1.0 - sure
    aim[rows, classes[missed][objects]] = sure


def matched_loss(
    scores: Tensor,
    found: Tensor,
    aims: Tensor,
    wanted: Tensor,
    known: BoxTarget,
    reader: BoxReader,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Of one image: scores [Q, K or K + 1] and corners [Q, 4] against the teacher's confident boxes and the labelled.

    The loss is the least of all assignments of predictions to objects, so that their order is of no account. Other
    predictions lose what they have above the teacher's background. Zero where student and teacher are equal and no box
    is labelled. Gives the loss's sum and the objects' weights, which are the teacher's scores, and 1 for a label.
    """
    own, aim = likely(scores, reader), likely(aims, reader)
    sure = aim.amax(-1) >= reader.options.shown  # [Q]
    classes, boxes, weights = _objects(_probabilities(aims, reader)[sure], wanted[sure], known, reader)
    with torch.no_grad():
        cost = CLASS * class_divergence(scores[:, None], classes[None], reader)
        cost = (cost + box_loss(found[:, None], boxes[None], size)) * weights
        rows, columns = linear_sum_assignment(np.nan_to_num(cost.cpu().numpy(), nan=1e9, posinf=1e9))
    at, of = (torch.as_tensor(index, dtype=torch.int64, device=scores.device) for index in (rows, columns))
    loss = CLASS * class_divergence(scores[at], classes[of], reader) + box_loss(found[at], boxes[of], size)
    left = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    left[at] = False
    background = aim[~sure].amax(0) if bool((~sure).any()) else torch.full_like(aim[0], reader.options.shown)
    above = divergence(own[left], torch.minimum(own[left].detach(), background))
    return (weights[of] * loss).sum() + CLASS * above.sum(), weights.sum()


def _objects(
    probabilities: Tensor, boxes: Tensor, known: BoxTarget, reader: BoxReader
) -> tuple[Tensor, Tensor, Tensor]:
    """What is to be found: probabilities [M, K or K + 1], corners [M, 4], weights [M].

    A labelled box stands in the place of the teacher's of its class that overlaps it, which keeps its probabilities;
    one that the teacher has missed is certain.
    """
    weights = probabilities[:, : reader.classes].amax(-1) if len(probabilities) else probabilities.new_zeros(0)
    true, labels = asked(known, boxes.device)
    if not len(true):
        return probabilities, boxes, weights
    same = overlaps(boxes[:, None], true[None])[0]  # [M, N]
    if len(boxes):
        same = same * (probabilities[:, : reader.classes].argmax(-1)[:, None] == labels[None])
    rows, columns = linear_sum_assignment(same.cpu().numpy(), maximize=True)
    pairs = [(row, column) for row, column in zip(rows, columns, strict=True) if float(same[row, column]) >= _SAME]
    boxes = boxes.clone()
    for row, column in pairs:
        boxes[row] = true[column]
    missed = sorted(set(range(len(true))) - {column for _, column in pairs})
    certain = F.one_hot(labels[missed], probabilities.shape[-1]).to(probabilities)
    one = weights.new_ones(len(missed))
    return torch.cat([probabilities, certain]), torch.cat([boxes, true[missed]]), torch.cat([weights, one])


def box_loss(found: Tensor, wanted: Tensor, size: tuple[int, int]) -> Tensor:
    """L1 in shares of the input, and GIoU, of corners [..., 4] in pixels that broadcast: [...]."""
    sides = found.new_tensor([size[1], size[0]] * 2)
    return SIDES * ((found - wanted) / sides).abs().sum(-1) + OVERLAP * (1.0 - giou(found, wanted))


def _probabilities(scores: Tensor, reader: BoxReader) -> Tensor:
    """What the scores say of each class, and of "no object" as the last of a softmax: the same shape."""
    return scores.softmax(-1) if reader.activation == "softmax" else likely(scores, reader)
