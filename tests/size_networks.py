"""Networks that take images of several sizes, and some that do not: factories for tests."""

from __future__ import annotations

import math

import torch
from torch import nn


class Detector(nn.Module):
    """A trunk of stride 8 with a pyramid over it, sine codes of the size that comes, attention, boxes and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Sequential(nn.Conv2d(inputs, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for inputs in (3, 8, 8)
        )
        self.lateral = nn.Conv2d(8, 8, 1)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.boxes, self.scores = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        middle = self.second(self.first(images))
        deep = self.third(middle)
        raised = self.lateral(middle) + nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest")
        batch, channels, height, width = raised.shape
        rows = torch.arange(height, dtype=torch.float32)[:, None] / height
        columns = torch.arange(width, dtype=torch.float32)[None, :] / width
        codes = torch.stack([torch.sin(6.28 * (rows + columns)), torch.cos(6.28 * (rows - columns))], -1)
        tokens = raised.flatten(2).transpose(1, 2) + codes.flatten(0, 1).repeat(1, channels // 2)
        split = self.qkv(tokens).reshape(batch, height * width, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
        tokens = self.norm(tokens + self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels)))
        return {"boxes": self.boxes(tokens).sigmoid(), "scores": self.scores(tokens)}


class FixedPositions(nn.Module):
    """A position embedding of 64 tokens: images of 32x32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 64, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((self.patches(images).flatten(2).transpose(1, 2) + self.positions).mean(1))


class KeptSize(nn.Module):
    """Answers by a root of the height that Python takes: tracing keeps that of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3)) * math.sqrt(images.shape[2])


class WholeNumbers(nn.Module):
    """Makes Python numbers of its sizes, and asks for their types: as many people's position codes do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images)
        batch, height, width = int(maps.shape[0]), int(maps.shape[2]), int(maps.shape[3])
        assert isinstance(width, (int, torch.SymInt))
        rows = torch.arange(height, dtype=torch.float32)[:, None] / float(height)
        codes = (rows + torch.linspace(0, 1, width)[None, :]).reshape(1, height * width, 1)
        tokens = maps.reshape(batch, 8, height * width).transpose(1, 2) + codes
        return self.head(tokens.softmax(1) * tokens).sum(1)


class OpenHeads(nn.Module):
    """SegFormer's attention: fewer keys than queries, and the number of heads is left for a view to find."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.reduce = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 2, 2)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images)
        tokens, few = (x.flatten(2).transpose(1, 2) for x in (maps, self.reduce(maps)))
        split = [
            made.view(*made.shape[:-1], -1, 8).transpose(1, 2)
            for made in (self.query(tokens), self.key(few), self.value(few))
        ]
        mixed = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
        return self.head(mixed.transpose(1, 2).reshape(*tokens.shape[:-1], -1))


class Windows(nn.Module):
    """GroupNorm, patches by unfold, and attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8)
        self.narrow, self.head = nn.Linear(72, 8), nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.conv(images))
        patches = self.narrow(nn.functional.unfold(maps, 3, padding=1, stride=2).transpose(1, 2)).unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(patches, patches, patches)
        return self.head(mixed.squeeze(1))


def detector() -> nn.Module:
    torch.manual_seed(0)
    network = Detector().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.fill_(0.3)
    return network


def whole_numbers() -> nn.Module:
    torch.manual_seed(0)
    return WholeNumbers().eval()


def open_heads() -> nn.Module:
    torch.manual_seed(0)
    return OpenHeads().eval()


def fixed_positions() -> nn.Module:
    torch.manual_seed(0)
    return FixedPositions().eval()


def kept_size() -> nn.Module:
    torch.manual_seed(0)
    return KeptSize().eval()


def windows() -> nn.Module:
    torch.manual_seed(0)
    return Windows().eval()
