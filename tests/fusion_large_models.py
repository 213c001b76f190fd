"""Networks that are used whole, and forms of attention that only some networks have, for tests of the rewrites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion_models import HEADS, WIDTH, Separate, Tokens, _timm


def levit_128s() -> nn.Module:
    module = _small("levit_128s", img_size=64)
    for inner in module.modules():
        if hasattr(inner, "attention_biases"):
            inner.scale *= 1000  # its random queries and keys are small
    return module


def botnet26t() -> nn.Module:
    return _small("botnet26t_256", img_size=128)


def vit_of_two_blocks() -> nn.Module:
    return _sharp(_timm("vit_tiny_patch16_224", img_size=64, depth=2))


class Cross(nn.Module):
    """PyTorch's attention of a few learned queries to all tokens, and of the tokens to them, as decoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.read, self.write = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries + x.mean(1, keepdim=True)
        read, _ = self.read(queries, x, x, need_weights=False)
        written, _ = self.write(x, read, read, need_weights=False)
        return x + written


class Masked(nn.Module):
    """An encoder's layer whose tokens see those of their own and the previous rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, dropout=0.0)
        rows = torch.arange(16) // 4
        hidden = rows[None, :] > rows[:, None]
        self.register_buffer("mask", torch.zeros(16, 16).masked_fill(hidden, float("-inf")))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, src_mask=self.mask)


class Dense(nn.Module):
    """As DPT: a class token, tokens of two depths turned back into maps, refined and added."""

    input_shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.start = nn.Conv2d(3, WIDTH, 8, 8), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.ModuleList(Separate() for _ in range(2))
        self.turns = nn.ModuleList(nn.Conv2d(WIDTH, 8, 1) for _ in range(2))
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        maps = []
        for block, turn in zip(self.blocks, self.turns, strict=True):
            tokens = block(tokens)
            maps.append(turn(tokens[:, 1:].transpose(1, 2).reshape(x.shape[0], WIDTH, 4, 4)))
        return self.head(nn.functional.interpolate(maps[0] + maps[1], scale_factor=2.0, mode="bilinear"))


class Windows(nn.Module):
    """Attention within windows of four tokens, each with a bias by head, as Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(1, HEADS, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 2, 2, 2, WIDTH).transpose(2, 3).reshape(-1, 4, WIDTH)
        q, k, v = self.qkv(windows).reshape(-1, 4, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        shares = torch.softmax((q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1) + self.bias, -1)
        mixed = self.dense((shares @ v).transpose(1, 2).reshape(-1, 4, WIDTH))
        return x + mixed.reshape(-1, 2, 2, 2, 2, WIDTH).transpose(2, 3).reshape(x.shape[0], 16, WIDTH)


def cross() -> nn.Module:
    return _sharp(Tokens(Cross()))


def masked() -> nn.Module:
    return _sharp(Tokens(Masked()))


def dense() -> nn.Module:
    return _sharp(Dense())


def windows() -> nn.Module:
    return _sharp(Tokens(Windows()))


def _small(name: str, img_size: int) -> nn.Module:
    """One of timm's for smaller images than it was trained on, which its own configuration still names."""
    module = _timm(name, img_size=img_size)
    module.pretrained_cfg = {**module.pretrained_cfg, "input_size": module.input_shape}  # type: ignore[assignment]
    return module


def _sharp(module: nn.Module) -> nn.Module:
    """Make logits of a few units: at the start of training all tokens are seen alike, whatever Q and K are."""
    for name, value in module.named_parameters():
        if any(part in name for part in ("qkv", "in_proj", "query", "key.")) and value.ndim > 1:
            value.data.mul_(4.0)
    return module
