"""Random weights that fidelity and speed can be measured with, where there are no trained ones."""

from __future__ import annotations

import math

import torch
from torch import nn

_AROUND_ITS_BIAS = 1e-4
"""For a layer that begins as zero with a bias that says something: the grid of points that deformable attention samples
at. Drawn as others are, points lie anywhere, each layer multiplies what rounding moves, and no two runs agree."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def draw_weights(model: nn.Module) -> None:
    """Draw weights under which signals keep their size, and heads that begin as zero answer something.

    The libraries' own start dies out in a deep network of normalisations of 0.02: nothing could be compared, and FP16
    would hold zeros. He et al., "Delving Deep into Rectifiers", 2015, for convolutions; without the ReLU's gain for
    linear layers.
    """
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.numel():
                continue
            if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
                gain = 1.0 if isinstance(module, nn.Linear) else 2.0
                if not weight.any() and module.bias is not None and module.bias.any():
                    gain *= _AROUND_ITS_BIAS
                weight.normal_(0.0, math.sqrt(gain / weight[0].numel()), generator=random)
            elif weight.ndim == 1:
                weight.fill_(1.0)


def draw_heads(model: nn.Module) -> None:
    """Draw the matrices that begin as one number, such as a head of zeros: it would answer the same to every image."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and weight.numel() and bool((weight == weight.flatten()[0]).all()):
                weight.normal_(0.0, math.sqrt(1.0 / weight[0].numel()), generator=random)
