"""A task's own loss of a network's outputs, image by image: what its labels say is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.answers.base import Task
from resvit_calibrate.answers.boxes import BoxReader
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import BoxTarget
from resvit_calibrate.tasks.detection import Detection
from resvit_engines.errors import ResvitError

TaskLoss: TypeAlias = Callable[[Mapping[str, Tensor], Batch], Tensor]
"""From a batch's outputs [B, …] by name, and what is known of its images, to the loss of each image, [B]."""
_CELLS = 3
"""Cells that answer for one object, of a head without queries (YOLOX's and TOOD's range is 1 to 13)."""
_OVERLAP_POWER = 6.0
_BOX_WEIGHT = 2.0
_NO_OBJECT = 0.1
"""The weight of an unmatched query of a softmax head: DETR's own."""
_BACKGROUND = 0.75
_TINY = 1e-6


def task_loss(task: Task, images: ImageSet) -> TaskLoss | None:
    """The loss of ``task`` where the images' labels give one that ranks layers better than output distance does.

    That is so for boxes (benchmarks/sensitivity_losses.py): a detector's outputs are mostly background, whose noise
    costs nothing. For classes and masks the outputs' own distance ranks as well or better, without labels.
    """
    if isinstance(task, Detection) and images.task == "detection":
        return DetectionLoss(task, images)
    return None


class DetectionLoss:
    """Classification and box loss after an assignment of predictions to objects.

    An object goes to the predictions with the largest score x IoU^6, its alignment (Feng et al., "TOOD", 2021): one
    for the DETR family, whose queries suppress each other, else three. Their scores are to be the IoU (Zhang et al.,
    "VarifocalNet", 2021), all others 0 with weight 0.75 score^2; a softmax head has cross-entropy with "no object" at
    weight 0.1 (Carion et al., "DETR", 2020). Boxes lose 2 (1 - GIoU) each. The gradient holds the assignment and what
    scores are to be; a loss that is measured anew has them anew.

    Raises:
        ResvitError: where called, for outputs that are not a detector's, classes that it does not have, and a loss that
            is not finite.
    """

    def __init__(self, task: Detection, images: ImageSet) -> None:
        self.task, self.images = task, images
        self.reader: BoxReader | None = None

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss of each image, [B]."""
        if self.reader is None:
            plain = {name: value.detach().numpy() for name, value in outputs.items()}
            self.reader = BoxReader(self.task.options, plain, self.images.num_classes)
        reader, losses = self.reader, []
        size = (int(batch.images.shape[2]), int(batch.images.shape[3]))
        for index, target in enumerate(batch.targets or ()):
            assert isinstance(target, BoxTarget)
            known = self.task.numbered(target, self.images, reader.classes)
            corners = _corners(outputs[reader.boxes][index], reader, size)
            losses.append(self._of_one(outputs[reader.scores][index], corners, known, reader))
        loss = torch.stack(losses)
        if not bool(loss.isfinite().all()):
            raise ResvitError(
                "The detector's loss on the calibration images is NaN or infinite.",
                "Check the checkpoint and the boxes; 'resvit-export validate' names what is not finite.",
            )
        return loss

    def _of_one(self, scores: Tensor, corners: Tensor, known: BoxTarget, reader: BoxReader) -> Tensor:
        kept = ~known.crowd
        true = torch.from_numpy(np.ascontiguousarray(known.boxes[kept]))
        classes = torch.from_numpy(np.ascontiguousarray(known.classes[kept]))
        likely = _likely(scores, reader.activation)
        family = reader.activation != "none"
        rows, objects, overlap = _assigned(likely.detach(), corners.detach(), true, classes, 1 if family else _CELLS)
        boxes = _BOX_WEIGHT * (1.0 - _giou(corners[rows], true[objects])).sum()
        if reader.activation == "softmax":
            wanted = torch.full((len(scores),), scores.shape[1] - 1)
            wanted[rows] = classes[objects]
            weights = torch.where(wanted == scores.shape[1] - 1, _NO_OBJECT, 1.0)
            return boxes + (weights * F.cross_entropy(scores, wanted, reduction="none")).sum()
        wanted = torch.zeros_like(likely)
        wanted.index_put_((rows, classes[objects]), overlap)
        weights = torch.where(wanted > 0, wanted, _BACKGROUND * likely.detach().square())
        bounded = likely.clamp(_TINY, 1.0 - _TINY)
        # Written out: torch's own stops at NaN with a message about its arguments.
        entropy = -(wanted * bounded.log() + (1.0 - wanted) * (1.0 - bounded).log())
        return boxes + (weights * entropy).sum()


def _likely(scores: Tensor, activation: str) -> Tensor:
    """Probabilities [Q, K]."""
    if activation == "softmax":
        return scores.softmax(1)[:, :-1]
    return scores.sigmoid() if activation == "sigmoid" else scores


def _corners(boxes: Tensor, reader: BoxReader, size: tuple[int, int]) -> Tensor:
    """Boxes [Q, 4] as x1, y1, x2, y2 in pixels of the input."""
    if reader.centres:
        half = boxes[:, 2:] / 2
        boxes = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1)
    return boxes * torch.tensor([size[1], size[0]] * 2) if reader.normalized else boxes


def _assigned(
    likely: Tensor, corners: Tensor, true: Tensor, classes: Tensor, each: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of predictions, the objects that they answer for, and their IoU; a prediction answers for one object.

    Beyond the first, an object has only predictions that overlap it.
    """
    overlap = _overlaps(corners[:, None], true[None])[0].nan_to_num()
    aligned = likely[:, classes] * overlap**_OVERLAP_POWER
    rows: list[int] = []
    objects: list[int] = []
    for item in range(len(true)):
        count = min(each, len(aligned))
        for place, row in enumerate(aligned[:, item].topk(count).indices.tolist()):
            if row not in rows and (place == 0 or float(aligned[row, item]) > 0.0):
                rows.append(row)
                objects.append(item)
                aligned[row] = -1.0
    at = torch.tensor(rows, dtype=torch.int64), torch.tensor(objects, dtype=torch.int64)
    return (*at, overlap[at])


def _overlaps(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union and the union's area, of boxes [..., 4]."""
    sides = torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])
    shared = sides.clamp(min=0.0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0.0).prod(-1) for box in (one, two)]
    union = (areas[0] + areas[1] - shared).clamp(min=_TINY)
    return shared / union, union


def _giou(one: Tensor, two: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of boxes [M, 4] in pairs."""
    overlap, union = _overlaps(one, two)
    sides: Any = torch.maximum(one[:, 2:], two[:, 2:]) - torch.minimum(one[:, :2], two[:, :2])
    around = sides.prod(1).clamp(min=_TINY)
    return torch.as_tensor(overlap - (around - union) / around)
