"""What the detection and the segmentation head are trained with.

Focal loss (Lin et al. 2017, "Focal loss for dense object detection"), GIoU (Rezatofighi et al. 2019), assignment
and centre-ness of FCOS (Tian et al. 2019), Dice (Milletari et al. 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from resvit_export.models.heads import DetectionHead, RawDetections

_RADIUS = 1.5
"""How far from a box's centre its cells lie at most, in cells along each axis."""
_NEAR = 3.0
"""A level takes boxes whose farthest side is this many cells away at most; the coarsest takes the rest."""
_ALPHA, _GAMMA = 0.25, 2.0


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of B images, padded to M: ``corners`` (B, M, 4) in pixels of the input, ``classes`` (B, M), -1 for none."""

    corners: torch.Tensor
    classes: torch.Tensor


class Assigned(NamedTuple):
    """What each of Q cells answers for: ``classes`` (B, Q), -1 for the background, and ``corners`` (B, Q, 4)."""

    classes: torch.Tensor
    corners: torch.Tensor


def assign(head: DetectionHead, boxes: Boxes) -> Assigned:
    """Give every cell near a box's centre, on the level that fits its size, that box; the smallest of several."""
    points, strides = head.points[:, :, None, :2], head.strides[:, :, None, 2]  # (1, Q, 1, 2), (1, Q, 1)
    corners = boxes.corners[:, None]  # (B, 1, M, 4)
    sides = torch.cat([points - corners[..., :2], corners[..., 2:] - points], dim=-1)  # (B, Q, M, 4)
    centres = (corners[..., :2] + corners[..., 2:]) / 2
    central = ((points - centres).abs() < _RADIUS * strides[..., None]).all(-1)
    farthest = sides.amax(-1)
    levels: torch.Tensor = torch.unique(head.strides[:, :, 2])
    above = torch.where(strides == levels[0], 0.0, _NEAR / 2 * strides)
    below = torch.where(strides == levels[-1], float("inf"), _NEAR * strides)
    fits = (sides.amin(-1) > 0) & central & (farthest > above) & (farthest <= below)
    fits &= boxes.classes[:, None] >= 0
    area = (corners[..., 2:] - corners[..., :2]).prod(-1)
    smallest, index = torch.where(fits, area, float("inf")).min(-1)  # (B, Q)
    classes = torch.where(smallest.isinf(), -1, boxes.classes.gather(1, index))
    return Assigned(classes, boxes.corners.gather(1, index[..., None].expand(-1, -1, 4)))


def detection_loss(head: DetectionHead, raw: RawDetections, boxes: Boxes) -> torch.Tensor:
    """The sum of classification, box and centre-ness losses of B images, as one number."""
    classes, corners = assign(head, boxes)
    found = classes >= 0
    count = found.sum().clamp(min=1)
    wanted = F.one_hot(classes.clamp(min=0), raw.classes.shape[-1]) * found[..., None]
    loss = focal_loss(raw.classes, wanted.to(raw.classes)) / count
    # How central each cell is, which also weighs its box.
    left, top, right, bottom = ((corners - head.points) * head.strides.sign())[found].unbind(-1)
    ratio = torch.minimum(left, right) / torch.maximum(left, right)
    ratio = ratio * torch.minimum(top, bottom) / torch.maximum(top, bottom)
    central = ratio.clamp(min=0).sqrt()
    off = (1 - giou(head.boxes(raw.distances)[found], corners[found])) * central
    loss = loss + off.sum() / central.sum().clamp(min=1)
    doubt = F.binary_cross_entropy_with_logits(raw.centreness[..., 0][found], central, reduction="sum")
    return loss + doubt / count


def focal_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of sigmoid scores, where what is right already counts for little."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = (logits.sigmoid() - wanted).abs()
    alpha = _ALPHA * wanted + (1 - _ALPHA) * (1 - wanted)
    return (alpha * missed**_GAMMA * entropy).sum()


def giou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised intersection over union of boxes (N, 4), one by one: (N), from -1 to 1."""
    overlap = _area(torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:]))
    hull = _area(torch.minimum(first[:, :2], second[:, :2]), torch.maximum(first[:, 2:], second[:, 2:]))
    union = _area(first[:, :2], first[:, 2:]) + _area(second[:, :2], second[:, 2:]) - overlap
    return overlap / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def segmentation_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus Dice for ``logits`` (B, K, H, W) and ``classes`` (B, H, W); -1 counts for nothing."""
    known = classes >= 0
    entropy = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum") / known.sum().clamp(min=1)
    wanted = F.one_hot(classes.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2) * known[:, None]
    scores = logits.softmax(1) * known[:, None]
    both, sizes = (scores * wanted).sum((0, 2, 3)), (scores + wanted).sum((0, 2, 3))
    present = wanted.sum((0, 2, 3)) > 0
    dice = 1 - (2 * both + 1) / (sizes + 1)
    return entropy + (dice * present).sum() / present.sum().clamp(min=1)


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0).prod(-1)
