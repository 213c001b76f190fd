"""GroupNorm (+ ReLU) on maps and LayerNorm (+ addition) on tokens, in one kernel each, in 16 bits or requantised.

Statistics are in FP32 by methods that a large mean does not spoil. What fits in registers is summed in two passes, and
what rounding left of the mean is taken off as well (the corrected two-pass method; Chan, Golub and LeVeque,
"Algorithms for computing the sample variance", 1983). Longer groups are summed in one pass by Welford's recurrence in
every lane (1962), whose lanes are then merged by Chan's formula.

Memory traffic: a group that fits one tile, and every LayerNorm, reads each input once and writes each output once. A
longer group is read twice, the second time mostly from L2. Floating-point work: about 8 operations an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resvit_engines.kernels.launch import ITEM_SIZES, Extent, Launch, Result, Source, dim, product
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

_WIDEST_ROW = 4096
_GROUP_TILE = 8192


@dataclass(frozen=True)
class GroupNormConfig:
    """GroupNorm of a map [B, channels, h, w] with h * w = ``area``; inputs x, gamma [C], beta [C], the latter FP32."""

    channels: int
    groups: int
    area: int
    eps: float = 1e-5
    relu: bool = False
    dtype: str = "fp16"
    out_dtype: str = "fp16"
    out_scale: float = 1.0


@dataclass(frozen=True)
class LayerNormConfig:
    """LayerNorm of tokens [B, N, size]; inputs x, residual if ``add``, gamma [size], beta [size], the latter FP32.

    With ``add`` what is normalised is x + residual in FP32, and that sum is the first output, in ``dtype``.
    """

    size: int
    eps: float = 1e-6
    add: bool = False
    dtype: str = "fp16"
    out_dtype: str = "fp16"
    out_scale: float = 1.0


def group_norm_reference(config: GroupNormConfig, x: Array, gamma: Array, beta: Array) -> Array:
    """GroupNorm as the output tensor holds it, in float64: the definition (ONNX GroupNormalization)."""
    groups = x.astype(np.float64).reshape(len(x), config.groups, -1)
    mean = groups.mean(-1, keepdims=True)
    variance = ((groups - mean) ** 2).mean(-1, keepdims=True)
    y = ((groups - mean) / np.sqrt(variance + config.eps)).reshape(len(x), config.channels, -1)
    y = (y * gamma.astype(np.float64)[:, None] + beta.astype(np.float64)[:, None]).reshape(x.shape)
    return stored(np.maximum(y, 0.0) if config.relu else y, config.out_dtype, config.out_scale)


def layer_norm_reference(config: LayerNormConfig, *inputs: Array) -> tuple[Array, ...]:
    """The outputs (the sum, if ``add``; the normalised) as their tensors hold them, in float64."""
    *terms, gamma, beta = (value.astype(np.float64) for value in inputs)
    total = sum(terms[1:], terms[0])
    distance = total - total.mean(-1, keepdims=True)
    y = distance / np.sqrt((distance**2).mean(-1, keepdims=True) + config.eps) * gamma + beta
    y = stored(y, config.out_dtype, config.out_scale)
    return (stored(total, config.dtype), y) if config.add else (y,)


def refusal(config: GroupNormConfig | LayerNormConfig, sm: int) -> str | None:
    """Why there is no such kernel for a GPU; None where there is."""
    if isinstance(config, GroupNormConfig):
        if min(config.channels, config.groups, config.area) < 1 or config.channels % config.groups:
            return f"{config.channels} channels do not fall into {config.groups} groups"
        if config.channels * config.area >= 2**30:
            return "one image has 2^30 elements or more"
    elif not 1 <= config.size <= _WIDEST_ROW:
        return f"tokens of {config.size} values are not held whole (1 to {_WIDEST_ROW} are)"
    if config.dtype not in (*FLOATS, "fp32"):
        return f"it normalises {', '.join(FLOATS)} or fp32, not {config.dtype}"
    if config.out_dtype not in (*FLOATS, "fp32", *EIGHT_BIT):
        return f"the output cannot be {config.out_dtype}"
    return (
        dtype_refusal(sm, config.out_dtype)
        or scale_refusal("eps", config.eps)
        or scale_refusal("the output's scale", config.out_scale, config.out_dtype)
    )


def group_norm_source(config: GroupNormConfig, sm: int) -> Source:
    """The kernel for a GPU (87 is compute capability 8.7): one program for each group of each image.

    Raises:
        ResvitError: IMPOSSIBLE with the reason of ``refusal``.
    """
    require_served("fused normalisation", refusal(config, sm))
    channels = config.channels // config.groups
    tile = min(_GROUP_TILE, max(256, _power_of_two(channels * config.area)))
    return Source(
        module="norms",
        function="group_norm",
        arguments=(
            ("x", POINTERS[config.dtype]),
            ("gamma", "*fp32"),
            ("beta", "*fp32"),
            ("y", POINTERS[config.out_dtype]),
        ),
        constants={
            "GROUPS": config.groups,
            "CHANNELS": channels,
            "AREA": config.area,
            "ROWS": tile // 8,
            "EPS": config.eps,
            "RELU": config.relu,
            "INVERSE": 1.0 / config.out_scale,
        },
        warps=max(1, min(8, tile // 512)),
        stages=1,
        launch=Launch(
            inputs=(config.dtype, "fp32", "fp32"),
            scalars=(),
            outputs=(Result(config.out_dtype, tuple(dim(0, axis) for axis in range(4))),),
            grid=(dim(0, 0, factor=config.groups), Extent(), Extent()),
        ),
    )


def layer_norm_source(config: LayerNormConfig, sm: int) -> Source:
    """The kernel for a GPU: a few tokens to a program, a warp or more to a token.

    Raises:
        ResvitError: IMPOSSIBLE with the reason of ``refusal``.
    """
    require_served("fused normalisation", refusal(config, sm))
    columns = max(16, _power_of_two(config.size))
    rows = max(1, min(16, 4096 // columns))
    tokens = tuple(dim(0, axis) for axis in range(3))
    sums = (Result(config.dtype, tokens),) if config.add else ()
    inputs = ("x", *(["residual"] if config.add else []))
    pointer = POINTERS[config.dtype]
    return Source(
        module="norms",
        function="layer_norm",
        arguments=(
            *((name, pointer) for name in inputs),
            ("gamma", "*fp32"),
            ("beta", "*fp32"),
            ("n", "i32"),
            *((("total", pointer),) if config.add else ()),
            ("y", POINTERS[config.out_dtype]),
        ),
        constants={
            **({} if config.add else {"residual": None, "total": None}),
            "SIZE": config.size,
            "COLUMNS": columns,
            "ROWS": rows,
            "EPS": config.eps,
            "INVERSE": 1.0 / config.out_scale,
        },
        warps=4,
        stages=1,
        launch=Launch(
            inputs=(*(config.dtype for _ in inputs), "fp32", "fp32"),
            scalars=(dim(0, 1),),
            outputs=(*sums, Result(config.out_dtype, tokens)),
            grid=(product(dim(0, 1, divisor=rows), dim(0, 0)), Extent(), Extent()),
        ),
    )


def traffic_bytes(config: GroupNormConfig | LayerNormConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that must cross memory for input ``shapes``: a second read of a long group counts as none (it is in L2)."""
    copies = 3 if isinstance(config, LayerNormConfig) and config.add else 1
    elements = math.prod(shapes[0]) * (copies * ITEM_SIZES[config.dtype] + ITEM_SIZES[config.out_dtype])
    parameters = config.channels if isinstance(config, GroupNormConfig) else config.size
    return elements + 2 * parameters * ITEM_SIZES["fp32"]


def operations(config: GroupNormConfig | LayerNormConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Floating-point operations for input ``shapes``: mean, correction, variance, scaling, and what is fused to it."""
    extra = config.relu if isinstance(config, GroupNormConfig) else config.add
    return math.prod(shapes[0]) * (8 + extra + (config.out_dtype in EIGHT_BIT))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
