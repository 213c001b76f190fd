"""The three ways of joining a ResNet and a ViT."""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as F
from torch import nn

from resvit_export.models.config import Fusion, HybridConfig, Join
from resvit_export.models.heads import Features, head_from_config
from resvit_export.models.transformer import ClassTokenAndPositions, TransformerBlock, init_linear, tokens_from_map
from resvit_export.models.trunk import Trunk


class Hybrid(nn.Module, abc.ABC):
    """A reference hybrid: ``head(features(images))`` for images (B, C, H, W) preprocessed as ``config`` says."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)

    @abc.abstractmethod
    def features(self, images: torch.Tensor) -> Features:
        """Everything but the head."""

    def forward(self, images: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the head of ``config.task`` answers, outputs by name where there are several: see ``heads``."""
        answer: torch.Tensor | dict[str, torch.Tensor] = self.head(self.features(images))
        return answer

    def _finish(self, tokens: int, depth: int) -> None:
        """Build the layers that every join ends with."""
        config = self.config
        self.embed = ClassTokenAndPositions(tokens, config.dim, config.dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(config) for _ in range(depth)))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = head_from_config(config)
        self.apply(init_linear)


class EmbedHybrid(Hybrid):
    """The trunk's last map, projected by a 1x1 convolution, becomes the tokens."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid(config.stage_strides[-1])
        self.proj = nn.Conv2d(config.stage_widths[-1], config.dim, 1)
        self._finish(rows * columns, config.depth)

    def features(self, images: torch.Tensor) -> Features:
        """Trunk, projection, transformer."""
        pyramid = self.trunk(images)
        tokens = self.embed(tokens_from_map(self.proj(pyramid[-1])))
        return Features(pyramid, self.norm(self.blocks(tokens)))


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, top-down upsampling and adding, 3x3 smoothing (Lin et al. 2017).

    Maps of widths ``widths``, finest first, each half as large as the one before → as many maps of ``width``.
    """

    def __init__(self, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Mix what the coarse maps know into the fine ones."""
        mixed = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(len(mixed) - 2, -1, -1):
            mixed[level] = mixed[level] + F.interpolate(mixed[level + 1], scale_factor=2.0, mode="nearest")
        return tuple(smooth(x) for smooth, x in zip(self.smooth, mixed, strict=True))


class FpnHybrid(Hybrid):
    """The tokens of all pyramid levels, each level marked by its own embedding, stand one behind the other."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        levels = len(config.level_patches)
        strides = config.stage_strides[-levels:]
        self.pyramid = FeaturePyramid(config.stage_widths[-levels:], config.pyramid_width)
        self.patches = nn.ModuleList(
            nn.Conv2d(config.pyramid_width, config.dim, patch, stride=patch) for patch in config.level_patches
        )
        self.levels = nn.Parameter(torch.empty(levels, config.dim))
        nn.init.trunc_normal_(self.levels, std=0.02)
        grids = [config.grid(s * patch) for s, patch in zip(strides, config.level_patches, strict=True)]
        self._finish(sum(rows * columns for rows, columns in grids), config.depth)

    def features(self, images: torch.Tensor) -> Features:
        """Trunk, pyramid, tokens of every level, transformer."""
        pyramid = self.pyramid(self.trunk(images)[-len(self.patches) :])
        tokens = [
            tokens_from_map(patch(x)) + self.levels[level]
            for level, (patch, x) in enumerate(zip(self.patches, pyramid, strict=True))
        ]
        return Features(pyramid, self.norm(self.blocks(self.embed(torch.cat(tokens, dim=1)))))


class DualHybrid(Hybrid):
    """A ViT over image patches and a trunk side by side; fusion blocks read the tokens of both."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid(config.patch_size)
        trunk_rows, trunk_columns = config.grid(config.stage_strides[-1])
        self.patch = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        self.proj = nn.Conv2d(config.stage_widths[-1], config.dim, 1)
        self.trunk_positions = nn.Parameter(torch.empty(1, trunk_rows * trunk_columns, config.dim))
        nn.init.trunc_normal_(self.trunk_positions, std=0.02)
        self._finish(rows * columns, config.depth)
        self.fusion_blocks = nn.Sequential(*(TransformerBlock(config) for _ in range(config.fusion_depth)))
        self.fusion_blocks.apply(init_linear)

    def features(self, images: torch.Tensor) -> Features:
        """Both branches, fusion, transformer."""
        pyramid = self.trunk(images)
        seen = tokens_from_map(self.proj(pyramid[-1])) + self.trunk_positions
        tokens = self.blocks(self.embed(tokens_from_map(self.patch(images))))
        if self.config.fusion is Fusion.CONCAT:
            tokens = torch.cat([tokens, seen], dim=1)
        else:
            tokens = tokens + F.pad(seen, (0, 0, 1, 0))  # nothing is added to the class token
        return Features(pyramid, self.norm(self.fusion_blocks(tokens)))


def hybrid_from_config(config: HybridConfig) -> Hybrid:
    """Build the network that ``config`` describes, with fresh weights from torch's global generator."""
    kinds: dict[Join, type[Hybrid]] = {
        Join.EMBED: EmbedHybrid,
        Join.FPN: FpnHybrid,
        Join.DUAL: DualHybrid,
    }
    return kinds[config.join](config)
