"""Numbers and the bits that tensors keep them as, for types that numpy has and that it lacks."""

from __future__ import annotations

import numpy as np

from resvit_engines.kernels.numerics import stored

_PLAIN = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "int32": np.int32, "bool": np.bool_}


def _fp8_numbers() -> np.ndarray:
    """All 256 numbers of E4M3 by their bits: 1 bit of sign, 4 of exponent (bias 7), 3 of fraction; no infinity."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7))
    size[bits & 127 == 127] = np.nan
    return np.where(bits > 127, -size, size)


FP8_NUMBERS = _fp8_numbers()


def bits_of(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """An array as the GPU gets it; ``numbers`` must be such as ``dtype`` holds."""
    if dtype in _PLAIN:
        bits = numbers.astype(_PLAIN[dtype])
    elif dtype == "bf16":
        bits = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        order = np.argsort(FP8_NUMBERS[:127])
        place = np.searchsorted(FP8_NUMBERS[:127], np.abs(numbers), sorter=order).clip(0, 126)
        bits = (order[place] + 128 * np.signbit(numbers)).astype(np.uint8)
    assert np.array_equal(numbers_of(bits, dtype), numbers, equal_nan=True), f"not numbers of {dtype}"
    return bits


def numbers_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """What an array from the GPU holds, in float64."""
    if dtype in _PLAIN:
        return bits.astype(np.float64)
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return FP8_NUMBERS[bits]


def some_numbers(dtype: str) -> np.ndarray:
    """Numbers of both signs over the whole range of a type."""
    wide = np.concatenate([np.linspace(-400, 400, 4001), [0.0, 2.0**-9, -(2.0**-9)]])
    return (np.abs(wide) > 200).astype(np.float64) if dtype == "bool" else stored(wide, dtype)
