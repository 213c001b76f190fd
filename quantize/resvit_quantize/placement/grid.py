"""The grids that 8 bits are: the largest level, scales from amax, and weights rounded onto them."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.network import constant
from resvit_quantize.placement.placement import Weight

LARGEST = {Precision.INT8: 127.0, Precision.FP8: 448.0}
"""What the largest magnitude maps to: the symmetric INT8 grid leaves -128 out, E4M3 ends at 448."""


SMALLEST_SCALE = 2.0**-20
"""FP16 holds this scale and its neighbours to within 6%; smaller ones lose their digits."""


LARGEST_SCALE = 65504.0


_TINIEST = 1e-30


FLOOR_COST = 1e-4
"""The share of a tensor's power that steps of ``SMALLEST_SCALE`` may cost where smaller ones were wanted."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight in 8 bits and its FP32 scales along the channel axis."""

    values: np.ndarray
    scale: np.ndarray

    def restored(self, axis: int) -> np.ndarray:
        """What DequantizeLinear gives: float32, of the weight's shape, with the scales along ``axis``."""
        shape, _ = weight_shape(self.values, axis)
        return np.asarray(self.values.astype(np.float32) * self.scale.reshape(shape))


def largest_level(precision: Precision, bits: int = 8) -> float:
    """What the largest magnitude maps to; integers of fewer ``bits`` use fewer of INT8's levels."""
    return LARGEST[precision] if bits == 8 or precision is Precision.FP8 else float(2 ** (bits - 1) - 1)


def scale_from_amax(amax: np.ndarray | float, precision: Precision, bits: int = 8) -> np.ndarray:
    """The scale for a largest magnitude, FP32 and never too small for ``amax``.

    It is exact in FP16 where FP16 has one that serves; else what reads through it must compute in FP32
    (``is_beyond_half``): a few weak channels beside strong ones get a coarser step, a tensor of them does not.
    Rounding up keeps ``amax`` on the grid. Zeros (a channel without weights) get the smallest scale.
    """
    wanted = np.asarray(amax, np.float64) / largest_level(precision, bits)
    weak = (wanted > 0) & (wanted < SMALLEST_SCALE)
    # Values reach to about three times their root mean square; a step costs a twelfth of its square, or the value.
    power = np.square(np.asarray(amax, np.float64) / 3.0)
    cost = np.where(weak, np.minimum(power, SMALLEST_SCALE**2 / 12.0), 0.0).sum()
    if (wanted > LARGEST_SCALE).any() or cost > FLOOR_COST * power.sum():
        exact = np.where(wanted > 0, wanted, SMALLEST_SCALE).clip(_TINIEST)
        scale = exact.astype(np.float32)
        return np.nextafter(scale, np.where(scale < exact, np.float32(np.inf), scale))
    wanted = np.clip(wanted, SMALLEST_SCALE, LARGEST_SCALE)
    half = wanted.astype(np.float16)
    low = half.astype(np.float64) < wanted
    half = np.nextafter(half, np.where(low, np.float16(np.inf), half))
    return half.astype(np.float32)


def unsigned_grid(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The scale (float32) and zero point (uint8), both scalars, of unsigned bytes from ``low`` ≤ 0 to ``high`` ≥ 0.

    Zero lies on the grid, so that what a ReLU or padding writes is exact. In FP32 alone: FP16 may lose the scale.
    """
    span = max(float(high) - float(low), _TINIEST)
    scale = np.float32(span / 255.0)
    return np.asarray(scale), np.asarray(np.clip(round(-float(low) / float(scale)), 0, 255), np.uint8)


def is_beyond_half(scale: np.ndarray) -> bool:
    """Whether FP16 loses scales: the digits of small ones, large ones altogether."""
    return bool(((scale > 0) & (scale < SMALLEST_SCALE)).any() or (scale > LARGEST_SCALE).any())


def weight_shape(weight: np.ndarray, axis: int) -> tuple[list[int], tuple[int, ...]]:
    """How scales [C] broadcast against ``weight``, and the axes that run inside a channel."""
    return [-1 if i == axis else 1 for i in range(weight.ndim)], tuple(i for i in range(weight.ndim) if i != axis)


def quantise_weight(
    weight: np.ndarray, axis: int, precision: Precision, bits: int = 8, amax: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel symmetric quantisation: (8-bit weights of ``weight``'s shape, FP32 scales along ``axis``).

    ``amax`` [C] clips each channel; without it, each channel's largest magnitude is kept.
    """
    shape, others = weight_shape(weight, axis)
    if amax is None:
        amax = np.abs(weight).max(axis=others, initial=0.0)
    scale = scale_from_amax(amax, precision, bits)
    steps = weight / scale.reshape(shape)
    largest = largest_level(precision, bits)
    if precision is Precision.INT8:
        return np.clip(np.rint(steps), -largest, largest).astype(np.int8), scale
    return np.clip(steps, -largest, largest).astype(ml_dtypes.float8_e4m3fn), scale


def require_finite(place: Weight) -> np.ndarray:
    """The float weight of a place. Raises :class:`ResvitError` where it holds NaN or infinity."""
    weight = place.node.inputs[place.index]
    array = constant(weight)
    assert array is not None
    if not np.isfinite(array).all():
        raise ResvitError(
            f"The weight '{weight and weight.name}' of {place.node.name} holds NaN or infinity.",
            "Check the checkpoint; this layer was not trained.",
        )
    return array
