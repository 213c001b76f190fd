"""The transformer half: pre-norm ViT blocks (Dosovitskiy et al. 2021) and what makes tokens of maps.

Token counts are known when the model is built, so shapes are written as constants with the batch left open:
the exported graph then needs no arithmetic on shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from resvit_export.models.config import HybridConfig


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, dim) → (B, N, dim)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads = config.dim // config.head_dim
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        tokens = x.shape[1]
        qkv = self.qkv(x).reshape(-1, tokens, 3 * self.heads, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # each (B, heads, N, head_dim)
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).reshape(-1, tokens, self.heads * self.head_dim)
        projected: torch.Tensor = self.proj(out)
        return projected


class Mlp(nn.Module):
    """Two linear layers with GELU between: (B, N, dim) → (B, N, dim)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_ratio * config.dim)
        self.fc2 = nn.Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply both layers."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """One learned factor per channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels, which come last."""
        return x * self.gamma


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch: (B, N, dim) → (B, N, dim)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.scale1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config)
        self.scale2 = _layer_scale(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        x = x + self.dropout(self.scale1(self.attn(self.norm1(x))))
        out: torch.Tensor = x + self.dropout(self.scale2(self.mlp(self.norm2(x))))
        return out


def _layer_scale(config: HybridConfig) -> nn.Module:
    return LayerScale(config.dim, config.layer_scale) if config.layer_scale > 0 else nn.Identity()


class ClassTokenAndPositions(nn.Module):
    """Put the class token in front and add learned positions: (B, N, dim) → (B, 1 + N, dim).

    The class token is row 0 of ``positions``: a zero row is padded in front of the tokens and the positions are
    added, which equals a separate token plus its own position without expanding anything to the batch.
    """

    def __init__(self, tokens: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, 1 + tokens, dim))
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed the tokens."""
        embedded: torch.Tensor = self.dropout(F.pad(tokens, (0, 0, 1, 0)) + self.positions)
        return embedded


def tokens_from_map(x: torch.Tensor) -> torch.Tensor:
    """One token per cell, row by row: (B, dim, H, W) → (B, H*W, dim)."""
    return x.reshape(-1, x.shape[1], x.shape[2] * x.shape[3]).transpose(1, 2)


def init_linear(module: nn.Module) -> None:
    """ViT's start: truncated normal weights of standard deviation 0.02, zero biases. For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
