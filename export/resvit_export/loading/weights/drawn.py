"""Random weights that fidelity and speed can be measured with, where there are no trained ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from resvit_quantize.pruning.answers import tensors_in
from resvit_quantize.pruning.copies import forgetting

_AROUND_ITS_BIAS = 1e-4
"""For a layer that begins as zero with a bias that says something: the grid of points that deformable attention samples
at. Drawn as others are, points lie anywhere, each layer multiplies what rounding moves, and no two runs agree."""
_ALIVE = 1e-4, 1e4
"""Outputs that reach less far than the first have come through layers whose own are below FP16's smallest normal
number; beyond the second, they are on their way to its end."""
_IMAGES = 4
"""Enough for a variance over images where a layer answers with one position each."""
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


def keep_signals_alive(model: nn.Module, image: Sequence[int]) -> bool:
    """Give ``model`` other random weights where signals die out in it, or grow beyond bounds; returns whether it did.

    Weights are drawn as by :func:`draw_weights`; where that is not enough, as where branches add up, the batch norms
    take mean and variance of images [C, H, W] of noise. A model that takes no such image, or fails on it, stays as it
    is: who traces it says why.
    """
    if len(image) != 3:
        return False
    noise = torch.randn(_IMAGES, *image, generator=torch.Generator().manual_seed(0))
    model.eval()
    changed = False
    for change in (draw_weights, lambda one: _measure_norms(one, noise)):
        try:
            with forgetting(model), torch.no_grad():
                reach = _reach(model(noise[:1]))
                if reach is None or _ALIVE[0] <= reach <= _ALIVE[1]:
                    return changed
                change(model)
                changed = True
        except Exception:  # noqa: BLE001 the user's own code runs here
            return changed
    return changed


def _reach(answer: object) -> float | None:
    """The largest magnitude in what a model answered with; none where there are no numbers, and infinity for NaN."""
    floats = [tensor for tensor in tensors_in(answer) if tensor.is_floating_point()]
    found = [float(x.abs().max()) for x in floats if x.numel()]
    return max((math.inf if math.isnan(each) else each for each in found), default=None)


def _measure_norms(model: nn.Module, images: torch.Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def draw_heads(model: nn.Module) -> None:
    """Draw the matrices that begin as one number, such as a head of zeros: it would answer the same to every image."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and weight.numel() and bool((weight == weight.flatten()[0]).all()):
                weight.normal_(0.0, math.sqrt(1.0 / weight[0].numel()), generator=random)
