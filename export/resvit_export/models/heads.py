"""What stands on a hybrid's features: class scores of the image, boxes, or class scores of every pixel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from resvit_export.models.config import HybridConfig, Task
from resvit_export.models.trunk import ConvNorm

_PRIOR = 0.01
"""How likely an untrained detector finds something in a cell, so that empty cells don't drown the first steps."""

_FIRST_DISTANCE = 2.0
"""Well above the ReLU's zero, where no gradient passes."""


class Features(NamedTuple):
    """What a head may read.

    ``pyramid`` holds maps (B, width, H/stride, W/stride), finest first; ``tokens`` is (B, 1 + N, dim), normalised,
    the class token first and the tokens of the maps last.
    """

    pyramid: tuple[torch.Tensor, ...]
    tokens: torch.Tensor


class ClassificationHead(nn.Module):
    """Class scores from the class token: (B, 1 + N, dim) → (B, num_classes)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.dim, config.num_classes)

    def forward(self, features: Features) -> torch.Tensor:
        """Read the class token."""
        logits: torch.Tensor = self.fc(features.tokens[:, 0])
        return logits


class TokensOnMaps(nn.Module):
    """Bring what the transformer made of each map back to that map.

    Maps of ``config.levels`` and tokens → as many maps (B, width, H/stride, W/stride): the map, through a 1x1
    convolution where it has another width, plus its tokens, projected and repeated over the cells of their patch.
    """

    def __init__(self, config: HybridConfig, width: int) -> None:
        super().__init__()
        self.sizes = [(*config.grid(stride * patch), patch) for _, stride, patch in config.levels if patch]
        self.counts = [rows * columns for rows, columns, _ in self.sizes]
        self.first = len(config.levels) - len(self.sizes)
        self.lateral = nn.ModuleList(
            nn.Identity() if own == width else nn.Conv2d(own, width, 1) for own, _, _ in config.levels
        )
        self.proj = nn.ModuleList(nn.Linear(config.dim, width) for _ in self.sizes)

    def forward(self, features: Features) -> list[torch.Tensor]:
        """Add the tokens to their maps."""
        maps = [lateral(x) for lateral, x in zip(self.lateral, features.pyramid, strict=True)]
        parts = torch.split(features.tokens[:, -sum(self.counts) :], self.counts, dim=1)
        for level, (proj, part) in enumerate(zip(self.proj, parts, strict=True)):
            rows, columns, patch = self.sizes[level]
            seen = proj(part).transpose(1, 2).reshape(-1, proj.out_features, rows, columns)
            if patch > 1:
                seen = F.interpolate(seen, scale_factor=float(patch), mode="nearest")
            maps[self.first + level] = maps[self.first + level] + seen
        return maps


class RawDetections(NamedTuple):
    """What a detection head computes for each of the Q cells of all levels, finest level first.

    ``classes`` (B, Q, K) and ``centreness`` (B, Q, 1) before the sigmoid; ``distances`` (B, Q, 4), at least 0, from
    the cell's centre to the left, upper, right and lower side of the box, in cells of its level.
    """

    classes: torch.Tensor
    distances: torch.Tensor
    centreness: torch.Tensor


class DetectionHead(nn.Module):
    """One box per cell of every level, without anchors: FCOS (Tian et al. 2019).

    Every level has convolutions of its own, so that each BatchNorm sees one level and folds into its convolution.
    Distances are in cells and end in a ReLU, as in the authors' later code: an exponential would multiply
    rounding errors.
    """

    points: torch.Tensor
    strides: torch.Tensor

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        width = config.pyramid_width
        self.maps = TokensOnMaps(config, width)
        self.class_towers = nn.ModuleList(_tower(width) for _ in config.levels)
        self.box_towers = nn.ModuleList(_tower(width) for _ in config.levels)
        prior = -math.log((1 - _PRIOR) / _PRIOR)
        self.classes = nn.ModuleList(_answers(width, config.num_classes, prior) for _ in config.levels)
        self.distances = nn.ModuleList(_answers(width, 4, _FIRST_DISTANCE) for _ in config.levels)
        self.centreness = nn.ModuleList(_answers(width, 1, 0.0) for _ in config.levels)
        points, strides = cells(config)
        # Made here for the one image size: the graph then holds two constants and no arithmetic on shapes.
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("strides", strides, persistent=False)

    def raw(self, features: Features) -> RawDetections:
        """What the loss reads."""
        found: tuple[list[torch.Tensor], ...] = ([], [], [])
        for level, x in enumerate(self.maps(features)):
            of_class, of_box = self.class_towers[level](x), self.box_towers[level](x)
            found[0].append(self.classes[level](of_class).flatten(2))
            found[1].append(self.distances[level](of_box).flatten(2))
            found[2].append(self.centreness[level](of_box).flatten(2))
        classes, distances, centreness = (torch.cat(parts, dim=2).transpose(1, 2) for parts in found)
        return RawDetections(classes, F.relu(distances), centreness)

    def boxes(self, distances: torch.Tensor) -> torch.Tensor:
        """Distances (B, Q, 4) in cells → x1, y1, x2, y2 in pixels of the input."""
        return self.points + distances * self.strides

    def forward(self, features: Features) -> dict[str, torch.Tensor]:
        """``boxes`` (B, Q, 4), x1 y1 x2 y2 in pixels of the input, and ``scores`` (B, Q, K) from 0 to 1.

        Boxes of one object are not yet reduced to one: that is left to whoever reads them.
        """
        raw = self.raw(features)
        scores = torch.sigmoid(raw.classes) * torch.sigmoid(raw.centreness)
        return {"boxes": self.boxes(raw.distances), "scores": scores}


class SegmentationHead(nn.Module):
    """Class scores of every pixel (B, num_classes, H, W): all maps summed at the finest (Kirillov et al. 2019)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        width, stride = config.levels[0][:2]
        self.stride = float(stride)
        self.maps = TokensOnMaps(config, width)
        self.mix = ConvNorm(width, width, 3)
        self.classes = nn.Conv2d(width, config.num_classes, 1)

    def forward(self, features: Features) -> torch.Tensor:
        """Sum from coarse to fine, mix, classify, and enlarge to the size of the input."""
        *finer, x = self.maps(features)
        for each in reversed(finer):
            x = each + F.interpolate(x, scale_factor=2.0, mode="nearest")
        scores = self.classes(self.mix(x))
        return F.interpolate(scores, scale_factor=self.stride, mode="bilinear", align_corners=False)


def cells(config: HybridConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The cells of all levels: centres (1, Q, 4) as x y x y in pixels, and strides (1, Q, 4) as -s -s +s +s."""
    points, strides = [], []
    for _, stride, _ in config.levels:
        rows, columns = config.grid(stride)
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        points.append(torch.stack([x, y, x, y], dim=-1).reshape(1, -1, 4) * stride)
        strides.append(torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand(1, rows * columns, 4) * stride)
    return torch.cat(points, dim=1), torch.cat(strides, dim=1)


def head_from_config(config: HybridConfig) -> nn.Module:
    """The head of ``config.task``, with fresh weights."""
    kinds: dict[Task, type[nn.Module]] = {
        Task.CLASSIFICATION: ClassificationHead,
        Task.DETECTION: DetectionHead,
        Task.SEGMENTATION: SegmentationHead,
    }
    return kinds[config.task](config)


def _tower(width: int) -> nn.Sequential:
    return nn.Sequential(ConvNorm(width, width, 3), ConvNorm(width, width, 3))


def _answers(width: int, count: int, bias: float) -> nn.Conv2d:
    conv = nn.Conv2d(width, count, 1)
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv
