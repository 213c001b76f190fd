"""TransUNet as its users write it: one file of plain PyTorch, with nothing of resvit-export in it.

Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation", 2021: a ResNet's last map
becomes the tokens of a Vision Transformer, and a cascade of upsamplings with the trunk's maps as shortcuts becomes the
mask. ``transunet`` is small enough for scenes of 96x96 grey pixels, ``transunet_base`` of the paper's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A residual block of three convolutions (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Block(nn.Module):
    """A transformer block with its norms in front (Dosovitskiy et al. 2021)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Up(nn.Module):
    """Twice the size, the trunk's map of that size beside it, two convolutions."""

    def __init__(self, inputs: int, shortcut: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs + shortcut, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.convolutions(x if shortcut is None else torch.cat([x, shortcut], 1))


class TransUNet(nn.Module):
    """Images [B, C, H, W] to scores [B, classes, H, W]; H and W are multiples of 16."""

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, width: int, depths: tuple[int, int, int], dim: int,
        blocks: int, heads: int, decoder: tuple[int, int, int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_shape = input_shape
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages, channels = [], width
        for number, depth in enumerate(depths):
            outputs = width * 4 * 2**number
            parts = [Bottleneck(channels, outputs, 1 if number == 0 else 2)]
            parts += [Bottleneck(outputs, outputs, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*parts))
            channels = outputs
        self.stages = nn.ModuleList(stages)
        self.embed = nn.Conv2d(channels, dim, 1)
        tokens = (input_shape[1] // 16) * (input_shape[2] // 16)
        self.positions = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        shortcuts = [width * 8, width * 4, width, 0]
        self.ups = nn.ModuleList(
            Up(inputs, shortcut, outputs)
            for inputs, shortcut, outputs in zip((dim, *decoder[:3]), shortcuts, decoder, strict=True)
        )
        self.head = nn.Conv2d(decoder[-1], classes, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)  # 1/2
        maps = [stem]
        x = F.max_pool2d(stem, 3, 2, 1)  # 1/4
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = self.embed(x)  # 1/16
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens)
        x = self.norm(tokens).transpose(1, 2).unflatten(2, (height, width))
        for up, shortcut in zip(self.ups, (maps[2], maps[1], maps[0], None), strict=True):
            x = up(x, shortcut)
        return self.head(x)


def transunet(classes: int = 11, size: int = 96) -> TransUNet:
    """Grey images of ``size`` pixels, 1.1 million weights."""
    return TransUNet((1, size, size), classes, 16, (2, 2, 2), 128, 3, 4, (64, 32, 24, 16))


def transunet_base(classes: int = 9, size: int = 224) -> TransUNet:
    """The paper's R50+ViT-B/16 on colour images of ``size`` pixels, 102 million weights."""
    return TransUNet((3, size, size), classes, 64, (3, 4, 9), 768, 12, 12, (256, 128, 64, 16))
