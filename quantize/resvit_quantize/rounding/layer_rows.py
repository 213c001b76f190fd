"""Layers as matrix products: sampled rows of their inputs, and weights as matrices, group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_quantize.torch_graph.graph import attributes_of
from resvit_quantize.torch_graph.layers import pads_of

_MOST_ROWS = 16_384
_LEAST_ROWS = 4_096
_ROW_VALUES = 1 << 26
"""Most values in all rows of a layer: 256 MiB."""


class LayerRows:
    """Which positions of a layer's output are sampled: the same for the float and the quantised input.

    Rows come chunk by chunk, about the same number from each, at positions drawn with a fixed seed: the more likely,
    the more ``importance`` [P, by position within an image] they have.
    """

    def __init__(self, node: ir.Node, weight: Sequence[int], chunks: int, importance: Tensor | None = None) -> None:
        self.node, self.weight = node, tuple(weight)
        self.attributes = attributes_of(node)
        self.groups = int(self.attributes.get("group", 1)) if node.op_type == "Conv" else 1
        self.each = max(-(-rows_for(columns_of(node, weight), self.groups) // chunks), 1)
        self.random = torch.Generator().manual_seed(0)
        self.importance = importance
        self.drawn: list[tuple[Tensor, Tensor]] = []
        """For each chunk, positions and what each row there stands for."""

    def of(self, chunks: Sequence[Tensor]) -> Tensor:
        """The rows [G, R, K] of an input tensor, given in chunks of images."""
        rows = torch.cat([self._pick(self._unfolded(chunk), index) for index, chunk in enumerate(chunks)])
        return rows.reshape(rows.shape[0], self.groups, -1).transpose(0, 1).contiguous()

    def _unfolded(self, chunk: Tensor) -> Tensor:
        """All rows [P, G·K] of a chunk."""
        if self.node.op_type in ("MatMul", "Gemm"):
            return chunk.reshape(-1, chunk.shape[-1])
        pads = pads_of(self.attributes, chunk.shape[2:], self.weight[2:])
        stride, dilation = (tuple(self.attributes.get(name) or (1, 1)) for name in ("strides", "dilations"))
        return F.unfold(F.pad(chunk, pads), self.weight[2:], dilation, stride=stride).mT.flatten(0, 1)

    def weights(self) -> Tensor:
        """What each row counts [R, 1], once rows have been drawn; the mean is one."""
        found = torch.cat([weights for _, weights in self.drawn])
        return (found / found.mean().clamp_min(1e-30))[:, None]

    def _pick(self, rows: Tensor, chunk: int) -> Tensor:
        if len(self.drawn) == chunk:
            self.drawn.append(self._draw(len(rows)))
        return rows[self.drawn[chunk][0]]

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        """About ``each`` of ``count`` rows without repetition, and the weights that make their sums unbiased."""
        importance = torch.ones(count)
        if self.importance is not None and count % len(self.importance) == 0:
            importance = self.importance.repeat(count // len(self.importance))
        likely = importance * self.each / importance.sum()
        for _ in range(4):  # What is certain leaves more for the others.
            certain = likely >= 1.0
            rest = likely[~certain].sum()
            if not rest > 0:
                break
            likely = torch.where(certain, 1.0, likely * (self.each - certain.sum()).clamp_min(0) / rest)
        likely = likely.clamp(max=1.0)
        drawn = torch.rand(count, generator=self.random) < likely
        positions = drawn.nonzero()[:, 0]
        return positions, importance[positions] / likely[positions]


def can_fit(node: ir.Node, weight: Sequence[int]) -> bool:
    """Whether a layer is a matrix product of rows and one matrix for each group.

    Not so transposed convolutions and those of one or three axes, stacks of matrices, and transposed activations.
    """
    if node.op_type == "Conv":
        return len(weight) == 4
    return node.op_type in ("MatMul", "Gemm") and len(weight) == 2 and not attributes_of(node).get("transA")


def grouped_weight(node: ir.Node, weight: Tensor) -> Tensor:
    """A layer's weight as matrices [G, K, O/G]."""
    attributes = attributes_of(node)
    if node.op_type == "MatMul":
        return weight[None]
    if node.op_type == "Gemm":
        return (weight.mT if attributes.get("transB") else weight)[None]
    groups = int(attributes.get("group", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1).mT


def ungrouped_weight(node: ir.Node, matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`grouped_weight`, for a weight of this ``shape``."""
    if node.op_type == "MatMul":
        return matrices[0]
    if node.op_type == "Gemm":
        return matrices[0].mT if attributes_of(node).get("transB") else matrices[0]
    return matrices.mT.reshape(tuple(shape))


def rows_for(columns: int, groups: int = 1) -> int:
    """How many rows are enough to fit ``columns`` weights of each output."""
    return min(max(4 * columns, _LEAST_ROWS), _MOST_ROWS, max(_ROW_VALUES // (columns * groups), 256))


def columns_of(node: ir.Node, weight: Sequence[int]) -> int:
    """The inputs that each output of a layer sums over."""
    if node.op_type == "Conv":
        return math.prod(weight[1:])
    transposed: Any = node.op_type == "Gemm" and attributes_of(node).get("transB")
    return weight[1] if transposed else weight[0]
