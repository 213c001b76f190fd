"""Attention of every shape that PyTorch takes becomes ONNX, as its operator where ONNX defines that for the shape."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resvit_export.loading.program.trace import program_from_module
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program

WIDTH, HEADS = 32, 4


class Attends(nn.Module):
    """Tokens of an image, and one attention of a certain shape."""

    mask: Tensor | None

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape
        narrow = WIDTH // HEADS if shape.startswith(("one head", "groups")) else WIDTH
        narrow *= 2 if shape.startswith("groups") else 1
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, narrow), nn.Linear(WIDTH, narrow)
        self.head = nn.Linear(WIDTH, 10)
        self.register_buffer("mask", -torch.eye(16) if shape.endswith("masked") else None)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, 10] of images [B, 3, 32, 32]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        parts = self.query(tokens), self.key(tokens), self.value(tokens)
        return self.head(self.attend(*parts).mean(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention itself, on [B, tokens, channels]."""
        batch, tokens, _ = query.shape
        size = WIDTH // HEADS

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, tokens, -1, size).transpose(1, 2)

        if self.shape == "no heads":
            return F.scaled_dot_product_attention(query, key, value)
        if self.shape == "no heads, causal":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if self.shape == "windows":
            windows = [x.view(batch, 4, tokens // 4, HEADS, size).transpose(2, 3) for x in (query, key, value)]
            return F.scaled_dot_product_attention(*windows).transpose(2, 3).reshape(batch, tokens, WIDTH)
        grouped = self.shape == "groups of heads"
        parts = heads(query), heads(key), heads(value)
        found = F.scaled_dot_product_attention(*parts, self.mask, enable_gqa=grouped)
        return found.transpose(1, 2).reshape(batch, tokens, WIDTH)


@pytest.mark.whole
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(
    ("shape", "operators"),
    [
        ("heads", 1),
        ("no heads", 0),
        ("no heads, causal", 0),
        ("one head of keys", 0),
        ("one head of keys, masked", 0),
        ("windows", 0),
        ("groups of heads", 1),
    ],
)
def test_attention_of_any_shape_is_written(shape: str, operators: int, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, _ = program_from_module(Attends(shape), (3, 32, 32))
    report = onnx_from_program(program, tmp_path / "model.onnx", opset=opset)
    assert report.parity_max_rel < 1e-4
    graph = onnx.load(tmp_path / "model.onnx").graph
    found = sum(node.op_type == "Attention" for node in graph.node)
    assert found == (operators if opset == 23 else 0)


class RelativePositions(nn.Module):
    """A bias that is looked up, as BEiT, Swin and LeViT have it, and too large to be kept as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 10)
        self.bias = nn.Parameter(torch.randn(9, HEADS))
        self.register_buffer("index", torch.randint(9, (196, 196)))

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, 10] of images [B, 3, 112, 112]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias[self.index.view(-1)].view(count, count, HEADS).permute(2, 0, 1).unsqueeze(0)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.head(found.transpose(1, 2).reshape(batch, count, width).mean(1))


@pytest.mark.whole
@pytest.mark.parametrize("opset", [20, 23])
def test_what_attention_gives_is_reshaped_whatever_its_strides(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, _ = fold_program(program_from_module(RelativePositions(), (3, 112, 112))[0])
    nodes = [node.name for node in program.graph.nodes]
    report = onnx_from_program(program, tmp_path / "model.onnx", opset=opset)
    assert report.parity_max_rel < 1e-4
    assert [node.name for node in program.graph.nodes] == nodes
