"""The convolutional half: a BatchNorm ResNet (He et al. 2016, the stride on the 3x3 convolution), or a mobile one."""

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


class SqueezeExcitation(nn.Module):
    """Channels times a gate that is told from their means (Hu et al. 2018), a hard sigmoid: the shape stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, max(8, width // 4), 1)
        self.relu = nn.ReLU(inplace=True)
        self.excite = nn.Conv2d(max(8, width // 4), width, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels."""
        gate: torch.Tensor = self.gate(self.excite(self.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return x * gate


class MobileBlock(nn.Module):
    """MobileNetV3's: ``project(gated(depthwise(expand(x))))``, plus ``x`` where the shape stays."""

    def __init__(self, width_in: int, width_out: int, stride: int, expansion: int = 4, kernel: int = 5) -> None:
        super().__init__()
        inner = expansion * width_in
        self.expand = ConvNorm(width_in, inner, 1, relu=False)
        self.depthwise = nn.Conv2d(inner, inner, kernel, stride, padding=kernel // 2, groups=inner, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.swish = nn.Hardswish()
        self.gated = SqueezeExcitation(inner)
        self.project = ConvNorm(inner, width_out, 1, relu=False)
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        inner = self.swish(self.norm(self.depthwise(self.swish(self.expand(x)))))
        out: torch.Tensor = self.project(self.gated(inner))
        return x + out if self.residual else out


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
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(_block(config.block, width, width_out, stride))
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


def _block(kind: Block, width_in: int, width_out: int, stride: int) -> nn.Module:
    if kind is Block.MOBILE:
        return MobileBlock(width_in, width_out, stride)
    return ResidualBlock(kind, width_in, width_out, stride)
