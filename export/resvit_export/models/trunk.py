"""The convolutional half: a BatchNorm ResNet (He et al. 2016, with the stride on the 3x3 convolution)."""

from __future__ import annotations

import torch
from torch import nn

from resvit_export.models.config import Block, HybridConfig, Stem


class ConvNorm(nn.Sequential):
    """Convolution and BatchNorm, then ReLU if asked: (B, in, H, W) → (B, out, H/stride, W/stride)."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width_out)
        if relu:
            self.relu = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class ResidualBlock(nn.Module):
    """``relu(branch(x) + shortcut(x))``: (B, in, H, W) → (B, out, H/stride, W/stride)."""

    def __init__(self, block: Block, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        if block is Block.BASIC:
            self.branch = nn.Sequential(
                ConvNorm(width_in, width_out, 3, stride), ConvNorm(width_out, width_out, 3, relu=False)
            )
        else:
            inner = width_out // 4
            self.branch = nn.Sequential(
                ConvNorm(width_in, inner, 1),
                ConvNorm(inner, inner, 3, stride),
                ConvNorm(inner, width_out, 1, relu=False),
            )
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else ConvNorm(width_in, width_out, 1, stride, relu=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        out: torch.Tensor = self.relu(self.branch(x) + self.shortcut(x))
        return out


class Trunk(nn.Module):
    """Stem and stages: images (B, C, H, W) → one map (B, width, H/stride, W/stride) per stage, finest first."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        width = config.stem_width
        if config.stem is Stem.SMALL:
            self.stem = nn.Sequential(ConvNorm(config.in_channels, width, 3, stride=2))
        else:
            self.stem = nn.Sequential(
                ConvNorm(config.in_channels, width, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)
            )
        self.stages = nn.ModuleList()
        for index, (depth, width_out) in enumerate(zip(config.stage_depths, config.stage_widths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(ResidualBlock(config.block, width, width_out, stride))
                width = width_out
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute every stage's map."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)
