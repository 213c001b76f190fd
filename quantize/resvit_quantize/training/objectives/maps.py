"""Maps of a network at pixels of its input, as torch reads them, with gradients."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_PIXELS = 65_536
"""Of an image that are asked: scores of all classes at every pixel of a large input would not fit into memory."""


def lattice(height: int, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows and columns of every pixel, or of evenly spread ones: at most 65,536 in all."""
    step = math.ceil(math.sqrt(height * width / _MOST_PIXELS))
    return np.arange(step // 2, height, step), np.arange(step // 2, width, step)


def at_pixels(
    values: Tensor, size: tuple[int, int], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> Tensor:
    """Maps [B, K, h, w] of an input of ``size`` at the crossings of its rows and columns: [B, K, rows, columns].

    A coarser grid is interpolated bilinearly between the centres of cells, as ``answers.maps`` does.
    """
    if tuple(values.shape[2:]) == size:
        return values[:, :, torch.from_numpy(rows)][..., torch.from_numpy(columns)]
    y, x = ((2.0 * at + 1.0) / edge - 1.0 for at, edge in zip((rows, columns), size, strict=True))
    grid = torch.stack(torch.meshgrid(*(values.new_tensor(axis) for axis in (x, y)), indexing="xy"), -1)
    grid = grid[None].expand(len(values), -1, -1, -1)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
