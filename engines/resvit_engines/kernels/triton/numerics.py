"""Rounding, as every kernel here does it."""
# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language: parameters have its types, and constants are in capitals.

import triton
import triton.language as tl


@triton.jit
def stored(values, INVERSE: tl.constexpr, dtype: tl.constexpr):
    """FP32 values as ``dtype``: times ``INVERSE`` (1 / scale) and saturated where it has 8 bits; half to even."""
    if dtype == tl.int8:
        scaled = tl.minimum(tl.maximum(values * INVERSE, -128.0), 127.0)
        # 1.5 * 2^23: the sum has no bits left for a fraction, so the addition itself rounds, half to even.
        return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    if dtype == tl.float8e4nv:
        return tl.minimum(tl.maximum(values * INVERSE, -448.0), 448.0).to(dtype)
    return values.to(dtype)
