"""A network that reads an image and the size of the photo behind it, as RT-DETR's own export does; its data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


class Sized(nn.Module):
    """A detector's form: boxes in pixels of the photo, since its sizes [B, 2] (width, height) come in beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())
        self.tokens = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.scores, self.boxes = nn.Linear(32, 5), nn.Linear(32, 4)

    def forward(self, images: torch.Tensor, sizes: torch.Tensor, bias: torch.Tensor | None = None) -> dict:
        x = self.tokens(self.trunk(images).flatten(2).transpose(1, 2))
        if bias is not None:
            x = x + bias
        scale = sizes.to(x.dtype).repeat(1, 2)[:, None]
        return {"scores": self.scores(x).sigmoid(), "boxes": self.boxes(x).sigmoid() * scale}


def network() -> nn.Module:
    return Sized().eval()


class Pair(nn.Module):
    """A matcher's form: two images, each through the trunk, and a vector of numbers through a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())
        self.angles, self.head = nn.Linear(32, 32), nn.Linear(96, 5)

    def forward(self, left: torch.Tensor, right: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        seen = [self.trunk(image).mean((2, 3)) for image in (left, right)]
        return self.head(torch.cat([*seen, self.angles(angles).relu()], 1))


def pair() -> nn.Module:
    return Pair().eval()


def pairs(split: str = "calibration") -> Iterator[dict]:
    random = np.random.default_rng(0 if split == "calibration" else 1)
    for _ in range(4):
        left, right = random.standard_normal((2, 4, 3, 16, 16), dtype=np.float32) * np.float32([[[[[1]]]], [[[[3]]]]])
        yield {"images": left, "inputs": {"right": right, "angles": random.standard_normal((4, 32), dtype=np.float32)}}


def data(split: str = "calibration") -> Iterator[dict]:
    random = np.random.default_rng(0 if split == "calibration" else 1)
    for _ in range(3):
        images = random.standard_normal((4, 3, 16, 16), dtype=np.float32)
        yield {"images": images, "inputs": {"sizes": random.integers(50, 90, (4, 2))}}


def training(split: str = "train") -> Iterator[dict]:
    random = np.random.default_rng(2)
    for _ in range(4):
        images = random.standard_normal((40, 3, 16, 16), dtype=np.float32)
        yield {"images": images, "inputs": {"sizes": random.integers(50, 90, (40, 2))}}


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)


def without_sizes() -> Iterator[np.ndarray]:
    yield images()


def wrong_sizes() -> Iterator[dict]:
    yield {"images": images(), "inputs": {"sizes": np.zeros((4, 3), np.int64)}}


def too_much() -> Iterator[dict]:
    yield {"images": images(), "inputs": {"sizes": np.ones((4, 2), np.int64), "angle": np.ones(4)}}
