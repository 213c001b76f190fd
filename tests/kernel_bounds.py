"""What a right kernel may write: bounds from an error analysis, and inputs as tensors hold them.

Rounding to a type is monotone. So a kernel whose real result errs by at most ``slack`` writes a number between the
rounded ends of that interval, whatever the type: no tolerance has to be guessed for the rounding itself.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from resvit_engines.kernels.attention import (
    THREE_TENSORS,
    AttentionConfig,
    attention_reference,
    attention_shares,
    joined,
    parts_of,
)
from resvit_engines.kernels.deformable import DeformableConfig, deformable_reference
from resvit_engines.kernels.launch import ITEM_SIZES, Source
from resvit_engines.kernels.numerics import EIGHT_BIT, stored

UNIT = 2.0**-24
"""The unit roundoff of FP32, in which all kernels calculate."""


def outside(got: np.ndarray, real: np.ndarray, slack: np.ndarray, dtype: str, scale: float = 1.0) -> int:
    """How many of ``got`` (numbers as stored) a right kernel could not have written; NaN counts."""
    assert got.shape == real.shape
    low, high = stored(real - slack, dtype, scale), stored(real + slack, dtype, scale)
    return int(np.sum(~((low <= got) & (got <= high))))


def norm_slack(z: np.ndarray, gamma: np.ndarray, beta: np.ndarray, terms: int) -> np.ndarray:
    """The error of z * gamma + beta in FP32, where z is centred and divided by its deviation.

    A sum of n terms errs by n u times the sum of their magnitudes, in any order (Higham, "Accuracy and Stability of
    Numerical Algorithms", section 4.2). The mean thus errs by n u deviations, the variance by n u of itself and its
    root by half of that; ten more roundings (rsqrt of two units among them) are each one of z.
    """
    return UNIT * (np.abs(gamma) * (terms + np.abs(z) * (terms / 2 + 10)) + 4 * np.abs(beta))


def attention_slack(config: AttentionConfig, inputs: list[np.ndarray], fp8_unit: float = UNIT) -> np.ndarray:
    """How far a right kernel's real result may be off, in the shape of its output.

    Weights w are the shares before they are divided. A kernel whose weights err by d writes sum (w + d) v over
    sum (w + d), so its result errs by at most sum |d| |v - o| over that second sum, o being the right result. Where
    sums are of weights not yet rounded to ``pv``, that rounding moves it by sum |d| |v| instead.

    - A logit is a sum of D products: 2 D units of its magnitudes, since tensor cores may cut off (INT8 is exact).
      Scale, bias and their constants are six roundings more; the distance from the largest logit, and the distances
      between the largest so far, are four of the row's largest magnitude. All of that is a relative error of w.
    - exp2 errs by 2^-22 (CUDA's ex2.approx); so does the factor of every further tile of 32 keys or more.
    - Rounding to ``pv`` errs by half a step, or by all of a weight. The largest weight is 1 and exact.
    - Sums run over the keys, and a division and two factors follow: six roundings.

    ``fp8_unit`` is the unit roundoff of sums of FP8 products, which the tensor cores of SM 8.9 and 9.0 add with 13
    bits of fraction (Zhang et al., "SageAttention2", 2024).
    """
    count = 3 if config.layout in THREE_TENSORS else 1
    q, k, v = (np.abs(part) for part in parts_of(config, *inputs[:count]))
    shares, values = attention_shares(config, *inputs)
    result = np.abs(shares @ values)
    units = {"int8": 0.0, "fp8": fp8_unit}
    products = abs(config.scale) * config.q_scale * config.k_scale * (q @ k.swapaxes(-1, -2))
    bias = np.abs(inputs[count]) if config.bias is not None else np.zeros((1, 1, 1, 1))
    magnitude = products + np.where(np.isfinite(bias), bias, 0.0)
    tiles = -(-shares.shape[-1] // 32)
    off = 2 * config.head_size * units.get(config.dtype, UNIT) * products
    off = off + UNIT * (6 * magnitude + 4 * magnitude.max(-1, keepdims=True)) + tiles * 2.0**-21
    worst = off.max(-1, keepdims=True)
    off, capped = np.minimum(off, _VAST), np.minimum(worst, _VAST)

    relative, absolute = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-125), "int8": (0.0, 0.5 / 127),
                          "fp8": (2.0**-4, 2.0**-18)}[config.pv]  # fmt: skip
    largest = shares.max(-1, keepdims=True)
    rounded = np.minimum(shares * np.exp(off) * relative + absolute * largest, shares * np.exp(off))
    moved = shares * np.expm1(off)
    consistent = config.pv in EIGHT_BIT
    least = np.exp(-capped)
    if consistent:
        least = least * np.maximum(largest, 1.0 - rounded.sum(-1, keepdims=True))
    both = moved + rounded if consistent else moved
    error = (moved + rounded) @ v + both.sum(-1, keepdims=True) * result
    keys = 2 * shares.shape[-1] * units.get(config.pv, UNIT) + 4 * tiles * UNIT
    error = error + keys * ((shares + moved + rounded) @ v) + (shares.shape[-1] + 6) * UNIT * result
    # A mean of values is among the values, however wrong the weights.
    most = 2.01 * v.max(-2, keepdims=True)
    return joined(config, np.where(worst >= _VAST, most, np.minimum(error / least, most)) * config.v_scale)


_VAST = 50.0


def attention_outside(
    config: AttentionConfig, inputs: list[np.ndarray], got: np.ndarray, fp8_unit: float = UNIT
) -> int:
    """How many numbers of an attention's output a right kernel could not have written."""
    real = attention_reference(dataclasses.replace(config, out_dtype="fp32", out_scale=1.0), *inputs)
    slack = attention_slack(config, inputs, fp8_unit) + 4 * UNIT * np.abs(real)
    return outside(got, real, slack, config.out_dtype, config.out_scale)


def deformable_outside(config: DeformableConfig, inputs: list[np.ndarray], got: np.ndarray) -> int:
    """How many numbers of deformable attention's output a right kernel could not have written.

    A place in pixels is a product and two sums, of which the largest is at most |place| size + size: it errs by three
    roundings of that. Between two pixels a sample changes by their difference at most, so by twice the level's largest
    magnitude for every pixel of error, along both dimensions. A share of a corner is a product of three numbers with
    four roundings, and the sum runs over four corners of all points; then two scales.
    """
    exact = dataclasses.replace(config, out_dtype="fp32", out_scale=1.0)
    real = deformable_reference(exact, *inputs)
    value, places, weights = (np.abs(array) for array in inputs)
    batch, queries, heads = len(value), places.shape[1], config.heads
    size = deformable_reference(dataclasses.replace(exact, value_scale=1.0), value, inputs[1], weights)
    places = places.reshape(batch, queries, heads, config.samples, 2)
    weights = weights.reshape(batch, queries, heads, config.samples)
    moved = np.zeros((batch, queries, heads, config.head_size))
    sizes = zip(config.heights, config.widths, config.starts, config.firsts, config.points, strict=True)
    for height, width, start, first, count in sizes:
        largest = value[:, start : start + height * width].max(1).reshape(batch, 1, heads, -1)
        off = 3 * UNIT * ((places[..., first : first + count, :] + 1.0) * (width, height)).sum(-1)
        moved += (weights[..., first : first + count] * off).sum(-1)[..., None] * 2.0 * largest
    slack = moved.reshape(real.shape) + (4 * config.samples + 8) * UNIT * size
    return outside(got, real, slack * config.value_scale + 4 * UNIT * np.abs(real), config.out_dtype, config.out_scale)


def held(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    """Random numbers of a few units, as a tensor of ``dtype`` holds them."""
    return stored(rng.normal(0, 1.5, shape), dtype, scale if dtype in EIGHT_BIT else 1.0)


def with_constants(source: Source, **constants: object) -> Source:
    """The same kernel with other choices compiled into it."""
    assert set(constants) <= set(source.constants)
    return dataclasses.replace(source, constants={**source.constants, **constants})


def bytes_of_tensors(source: Source, shapes: list[tuple[int, ...]]) -> int:
    """Bytes of all inputs and outputs."""
    outputs = [(result.dtype, [extent.at(shapes) for extent in result.shape]) for result in source.launch.outputs]
    tensors = [*zip(source.launch.inputs, shapes, strict=True), *outputs]
    return sum(ITEM_SIZES[dtype] * math.prod(shape) for dtype, shape in tensors)
