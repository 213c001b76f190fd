"""The tail of a residual block in one kernel: relu(x + shortcut), in 16 bits or requantised.

Memory traffic: x, the shortcut and the output once each. With n elements, 16 bits all through: 6 n bytes; with an
8-bit shortcut and output: 4 n. Floating-point work: an addition, a ReLU, and a multiplication for each 8-bit tensor:
2 to 4 an element, so memory alone sets its speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resvit_engines.kernels.launch import ITEM_SIZES, Extent, Launch, Result, Source, dim
from resvit_engines.kernels.numerics import (
    EIGHT_BIT,
    FLOATS,
    POINTERS,
    Array,
    dtype_refusal,
    require_served,
    scale_refusal,
    stored,
)

_BLOCK = 2048


@dataclass(frozen=True)
class ResidualConfig:
    """What one such node computes. ``shape`` is that of one image (or one sequence), without the batch."""

    shape: tuple[int, ...]
    dtype: str = "fp16"
    shortcut_dtype: str = "fp16"
    shortcut_scale: float = 1.0
    out_dtype: str = "fp16"
    out_scale: float = 1.0
    relu: bool = True


def residual_reference(config: ResidualConfig, x: Array, shortcut: Array) -> Array:
    """relu(x + shortcut * scale) as the output tensor holds it, in float64. Inputs are stored numbers [B, *shape]."""
    total = x.astype(np.float64) + shortcut.astype(np.float64) * config.shortcut_scale
    return stored(np.maximum(total, 0.0) if config.relu else total, config.out_dtype, config.out_scale)


def residual_refusal(config: ResidualConfig, sm: int) -> str | None:
    """Why there is no such kernel for a GPU; None where there is."""
    if not config.shape or min(config.shape) < 1 or math.prod(config.shape) >= 2**30:
        return f"the shape {config.shape} of one image is empty or has 2^30 elements or more"
    if config.dtype not in FLOATS:
        return f"it adds to {' or '.join(FLOATS)}, not to {config.dtype}"
    for name, dtype in (("shortcut", config.shortcut_dtype), ("output", config.out_dtype)):
        if dtype not in (*FLOATS, *EIGHT_BIT):
            return f"the {name} cannot be {dtype}"
    return (
        dtype_refusal(sm, config.shortcut_dtype, config.out_dtype)
        or scale_refusal("the shortcut's scale", config.shortcut_scale, config.shortcut_dtype)
        or scale_refusal("the output's scale", config.out_scale, config.out_dtype)
    )


def residual_source(config: ResidualConfig, sm: int) -> Source:
    """The kernel for a GPU (87 is compute capability 8.7).

    Raises:
        ResvitError: IMPOSSIBLE with the reason of ``residual_refusal``.
    """
    require_served("fused residual", residual_refusal(config, sm))
    size = math.prod(config.shape)
    return Source(
        module="residual",
        function="residual",
        arguments=(
            ("x", POINTERS[config.dtype]),
            ("shortcut", POINTERS[config.shortcut_dtype]),
            ("y", POINTERS[config.out_dtype]),
        ),
        constants={
            "SIZE": size,
            "BLOCK": _BLOCK,
            "SCALE": config.shortcut_scale,
            "INVERSE": 1.0 / config.out_scale,
            "RELU": config.relu,
        },
        warps=4,
        stages=1,
        launch=Launch(
            inputs=(config.dtype, config.shortcut_dtype),
            scalars=(),
            outputs=(Result(config.out_dtype, tuple(dim(0, axis) for axis in range(len(config.shape) + 1))),),
            grid=(dim(0, 0, factor=-(-size // _BLOCK)), Extent(), Extent()),
        ),
    )


def traffic_bytes(config: ResidualConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that must cross memory for input ``shapes``."""
    dtypes = (config.dtype, config.shortcut_dtype, config.out_dtype)
    return math.prod(shapes[0]) * sum(ITEM_SIZES[dtype] for dtype in dtypes)


def operations(config: ResidualConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Floating-point operations for input ``shapes``."""
    scales = sum(dtype in EIGHT_BIT for dtype in (config.shortcut_dtype, config.out_dtype))
    return math.prod(shapes[0]) * (1 + config.relu + scales)
