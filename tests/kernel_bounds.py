"""What a right kernel may write: bounds from an error analysis, and inputs as tensors hold them.

Rounding to a type is monotone. So a kernel whose real result errs by at most ``slack`` writes a number between the
rounded ends of that interval, whatever the type: no tolerance has to be guessed for the rounding itself.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

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
