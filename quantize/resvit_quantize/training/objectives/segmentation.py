"""Classes of pixels of a student that is taught by a segmenter, and by labelled masks where there are any."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.images.targets import IGNORED, MaskTarget
from resvit_engines.errors import ResvitError
from resvit_quantize.training.objectives.maps import at_pixels, lattice
from resvit_quantize.training.objectives.objective import Objective, Outputs


class SegmentationObjective(Objective):
    """Scores [B, K, h, w]: divergence from the teacher's map, and cross-entropy with the masks."""

    def __init__(self, output: str, *, labelled: bool) -> None:
        self.reads, self.labelled = (output,), labelled
        labels = ", and the labelled masks: cross-entropy" if labelled else ""
        self.told = f"the teacher's map: divergence at each pixel{labels}"

    def loss(self, outputs: Outputs, targets: Outputs, batch: Batch) -> Tensor:
        """The mean over pixels; labels that are ignored count for nothing."""
        scores, aims = outputs[self.reads[0]].float(), targets[self.reads[0]].float()
        loss = map_divergence(scores, aims)
        if not batch.targets:
            return loss
        return loss + mask_entropy(scores, batch.targets)  # type: ignore[arg-type]


def map_divergence(scores: Tensor, aims: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each pixel's classes from the teacher's, [B, K, h, w]: the mean over pixels."""
    own, aim = F.log_softmax(scores, 1), F.log_softmax(aims, 1)
    return (aim.exp() * (aim - own)).sum(1).mean()


def mask_entropy(scores: Tensor, known: tuple[MaskTarget, ...]) -> Tensor:
    """Cross-entropy of scores [B, K, h, w] with masks [H, W], in nats: the mean over labelled pixels.

    Scores of a coarser grid are interpolated as they are when they are scored; of masks with more than 65,536 pixels,
    a lattice of them is asked. Raises ``ResvitError`` for a class that the network does not have.
    """
    height, width = known[0].classes.shape
    rows, columns = lattice(height, width)
    classes = np.stack([target.classes[np.ix_(rows, columns)] for target in known]).astype(np.int64)
    wanted = torch.from_numpy(classes).to(scores.device)
    highest = int(wanted.max())
    if highest >= scores.shape[1]:
        raise ResvitError(
            f"The masks have the class {highest}, but the network knows classes 0 to {scores.shape[1] - 1}.",
            "Train on data that the network was trained for, or name its unlabelled value: --task-option ignore=255.",
        )
    entropy = F.cross_entropy(
        at_pixels(scores, (height, width), rows, columns), wanted, ignore_index=IGNORED, reduction="sum"
    )
    return entropy / max(1, math.prod(wanted.shape) - int((wanted == IGNORED).sum()))
