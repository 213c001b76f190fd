"""A task's own loss of a network's outputs, image by image: what its labels say is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.answers.base import Task
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_calibrate.images.targets import BoxTarget
from resvit_calibrate.tasks.detection import Detection
from resvit_engines.answers.boxes import BoxReader
from resvit_engines.errors import ResvitError
from resvit_quantize.training.objectives.boxes import CELLS, asked, assigned, corners, giou, likely

TaskLoss: TypeAlias = Callable[[Mapping[str, Tensor], Batch], Tensor]
"""From a batch's outputs [B, …] by name, and what is known of its images, to the loss of each image, [B]."""
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
    where predictions suppress each other, as the DETR family's queries do, else three. Their scores are to be the IoU
    (Zhang et al., "VarifocalNet", 2021), all others 0 with weight 0.75 score^2; a softmax head has cross-entropy with
    "no object" at weight 0.1 (Carion et al., "DETR", 2020). Boxes lose 2 (1 - GIoU) each. The gradient holds the
    assignment and what scores are to be; a loss that is measured anew has them anew.

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
            known = self.task.numbered(target, self.images.class_ids, reader.classes)
            found = corners(outputs[reader.boxes][index], reader, size)
            losses.append(self._of_one(outputs[reader.scores][index], found, known, reader))
        loss = torch.stack(losses)
        if not bool(loss.isfinite().all()):
            raise ResvitError(
                "The detector's loss on the calibration images is NaN or infinite.",
                "Check the checkpoint and the boxes; 'resvit-export validate' names what is not finite.",
            )
        return loss

    def _of_one(self, scores: Tensor, found: Tensor, known: BoxTarget, reader: BoxReader) -> Tensor:
        true, classes = asked(known, scores.device)
        own = likely(scores, reader)
        each = 1 if reader.overlap is None else CELLS
        rows, objects, overlap = assigned(own.detach(), found.detach(), true, classes, each)
        boxes = _BOX_WEIGHT * (1.0 - giou(found[rows], true[objects])).sum()
        if reader.activation == "softmax":
            wanted = torch.full((len(scores),), scores.shape[1] - 1)
            wanted[rows] = classes[objects]
            weights = torch.where(wanted == scores.shape[1] - 1, _NO_OBJECT, 1.0)
            return boxes + (weights * F.cross_entropy(scores, wanted, reduction="none")).sum()
        wanted = torch.zeros_like(own)
        wanted.index_put_((rows, classes[objects]), overlap)
        weights = torch.where(wanted > 0, wanted, _BACKGROUND * own.detach().square())
        bounded = own.clamp(_TINY, 1.0 - _TINY)
        # Written out: torch's own stops at NaN with a message about its arguments.
        entropy = -(wanted * bounded.log() + (1.0 - wanted) * (1.0 - bounded).log())
        return boxes + (weights * entropy).sum()
