"""Numbers as tensors hold them: element types, rounding, saturation, and the scales of the 8-bit ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ExitCode, ResvitError

Array = npt.NDArray[Any]

POINTERS: Mapping[str, str] = {
    "fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv", "int32": "*i32", "bool": "*i1",
}  # fmt: skip
"""Triton's type of a tensor argument, by its element type."""
FLOATS = ("fp16", "bf16")
EIGHT_BIT = ("int8", "fp8")
LARGEST: Mapping[str, float] = {"fp32": float(np.finfo(np.float32).max), "fp16": 65504.0, "bf16": 2.0**128 - 2.0**120}
"""The largest finite number of the types that overflow to infinity."""
_SATURATES = {"int8": (-128.0, 127.0), "fp8": (-448.0, 448.0)}
_PRECISION = {"fp32": (24, -149), "fp16": (11, -24), "bf16": (8, -133), "fp8": (4, -9)}
"""Bits of the significand, and the exponent of the smallest number above zero."""
FIRST_FP8_SM = 89


def spacing(values: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of ``dtype`` around each value (of the stored number, unscaled)."""
    if dtype == "int8":
        return np.ones_like(np.asarray(values, np.float64))
    bits, smallest = _PRECISION[dtype]
    _, exponent = np.frexp(np.abs(np.asarray(values, np.float64)))
    step: Array = np.ldexp(1.0, np.maximum(exponent - bits, smallest))
    return step


def stored(values: Array, dtype: str, scale: float = 1.0) -> Array:
    """The numbers that a tensor of ``dtype`` holds for real ``values``, in float64: half to even, of values / scale.

    INT8 and FP8 (E4M3) saturate; the wider types overflow to infinity.
    """
    real = np.asarray(values, np.float64) / scale
    if dtype in _SATURATES:
        real = np.clip(real, *_SATURATES[dtype])
    finite = np.where(np.isfinite(real), real, 0.0)
    step = spacing(finite, dtype)
    rounded = np.where(np.isfinite(real), np.rint(finite / step) * step, real)
    if dtype in LARGEST:
        rounded = np.where(np.abs(rounded) > LARGEST[dtype], np.copysign(np.inf, rounded), rounded)
    return rounded


def dtype_refusal(sm: int, *dtypes: str) -> str | None:
    """Why kernels with these element types cannot be made for a GPU; None where they can."""
    if "fp8" in dtypes and sm < FIRST_FP8_SM:
        return f"FP8 needs SM 8.9 or newer, and this is SM {sm / 10:.1f}"
    return None


def require_served(what: str, reason: str | None) -> None:
    """Raise ``ResvitError`` IMPOSSIBLE where there is a reason why there is no such kernel."""
    if reason:
        raise ResvitError(f"There is no {what} kernel for this: {reason}.", "Use the plain graph.", ExitCode.IMPOSSIBLE)


def scale_refusal(name: str, scale: float, dtype: str = "int8") -> str | None:
    """Why ``scale`` cannot be compiled into a kernel for a tensor of ``dtype``; None where it can.

    Both it and its reciprocal must be normal FP32 numbers: kernels multiply by either. Wider types have no scale.
    """
    if not 2.0**-126 <= scale <= 2.0**126:
        return f"{name} is {scale!r}, which is no positive scale that FP32 can hold and invert"
    if dtype not in EIGHT_BIT and scale != 1.0:
        return f"{name} is {scale!r}, and a scale is for 8-bit tensors, not for {dtype}"
    return None
