"""Boxes and scores of a detector as torch reads them, with gradients: probabilities, corners, overlaps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_calibrate.images.targets import BoxTarget
from resvit_engines.answers.boxes import BoxReader

CELLS = 3
"""Cells that answer for one labelled object, of a head without queries (YOLOX's and TOOD's range is 1 to 13)."""
_ALIGNED_POWER = 6.0
_TINY = 1e-6


def likely(scores: Tensor, reader: BoxReader) -> Tensor:
    """Probabilities [..., Q, K] of the classes, without that of "no object"."""
    if reader.activation == "softmax":
        return scores.softmax(-1)[..., :-1]
    return scores.sigmoid() if reader.activation == "sigmoid" else scores


def corners(boxes: Tensor, reader: BoxReader, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] as x1, y1, x2, y2 in pixels of an input of ``size`` (height, width)."""
    if reader.centres:
        half = boxes[..., 2:] / 2
        boxes = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
    return boxes * boxes.new_tensor([size[1], size[0]] * 2) if reader.normalized else boxes


def overlaps(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union and the union's area, of corners [..., 4] that broadcast."""
    sides = torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])
    shared = sides.clamp(min=0.0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0.0).prod(-1) for box in (one, two)]
    union = (areas[0] + areas[1] - shared).clamp(min=_TINY)
    return shared / union, union


def giou(one: Tensor, two: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of corners [..., 4] that broadcast."""
    overlap, union = overlaps(one, two)
    sides = torch.maximum(one[..., 2:], two[..., 2:]) - torch.minimum(one[..., :2], two[..., :2])
    around = sides.clamp(min=0.0).prod(-1).clamp(min=_TINY)
    return overlap - (around - union) / around


def divergence(likely: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each probability, that of a yes or no, from what it is to be: the same shape."""
    held, aim = likely.float().clamp(_TINY, 1.0 - _TINY), wanted.float().clamp(_TINY, 1.0 - _TINY)
    return aim * (aim.log() - held.log()) + (1.0 - aim) * ((1.0 - aim).log() - (1.0 - held).log())


def class_divergence(scores: Tensor, wanted: Tensor, reader: BoxReader) -> Tensor:
    """The same of rows of scores [..., K], as the network gives them, from the probabilities ``wanted``: [...].

    Of a softmax both have the probability of "no object" as the last of K + 1.
    """
    if reader.activation == "softmax":
        aim = wanted.float().clamp(min=_TINY)
        return (aim * (aim.log() - F.log_softmax(scores.float(), -1))).sum(-1)
    if reader.activation == "sigmoid":  # by the logits: a probability near 0 would have no gradient
        aim = wanted.float().clamp(_TINY, 1.0 - _TINY)
        entropy = -(aim * aim.log() + (1.0 - aim) * (1.0 - aim).log())
        missed, seen = F.softplus(-scores.float()), F.softplus(scores.float())
        return (aim * missed + (1.0 - aim) * seen - entropy).sum(-1)
    return divergence(scores, wanted).sum(-1)


def asked(known: BoxTarget, device: torch.device) -> tuple[Tensor, Tensor]:
    """Corners [N, 4] and classes [N] of the labelled boxes that are no crowds."""
    kept = ~known.crowd
    boxes, classes = (torch.from_numpy(np.ascontiguousarray(part[kept])) for part in (known.boxes, known.classes))
    return boxes.to(device), classes.to(device)


def assigned(own: Tensor, found: Tensor, true: Tensor, classes: Tensor, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of predictions, the objects that they answer for, and their IoU; a prediction answers for one object.

    Of probabilities [Q, K] and corners [Q, 4], an object [N, 4] of a class [N] gets the ``each`` with the largest
    alignment, score x IoU^6 (Feng et al., "TOOD", 2021). Beyond the first, it has only some that overlap it.
    """
    overlap = overlaps(found[:, None], true[None])[0].nan_to_num()
    aligned = own[:, classes] * overlap**_ALIGNED_POWER
    rows: list[int] = []
    objects: list[int] = []
    for item in range(len(true)):
        count = min(each, len(aligned))
        for place, row in enumerate(aligned[:, item].topk(count).indices.tolist()):
            if row not in rows and (place == 0 or float(aligned[row, item]) > 0.0):
                rows.append(row)
                objects.append(item)
                aligned[row] = -1.0
    at, of = (torch.tensor(index, dtype=torch.int64, device=own.device) for index in (rows, objects))
    return at, of, overlap[at, of]
