"""What Q and DQ do to a tensor, in torch, with gradients: rounding passes them straight through.

The straight-through estimator is Bengio et al. 2013; the gradient of the scale is that of learned step size
quantisation (Esser et al. 2020), which follows from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resvit_engines.targets.table import Precision
from resvit_quantize.placement.grid import largest_level


def fake_quantize(x: Tensor, scale: Tensor, precision: Precision, bits: int = 8) -> Tensor:
    """Quantise and dequantise ``x`` with a ``scale`` that broadcasts against it, as QuantizeLinear does.

    What the grid holds passes gradients to ``x``; what is clipped passes them to ``scale`` alone.
    """
    largest = largest_level(precision, bits)
    steps = x / scale
    if precision is Precision.FP8:
        clipped = steps.clamp(-largest, largest)
        on_grid = clipped.detach().to(torch.float8_e4m3fn).to(x.dtype)
    else:
        # 8-bit activations saturate at -128; the levels of a simulated grid are cut by a Clip, symmetrically.
        clipped = steps.clamp(-128.0 if bits == 8 else -largest, largest)
        on_grid = clipped.detach().round()
    return (clipped + (on_grid - clipped.detach())) * scale
