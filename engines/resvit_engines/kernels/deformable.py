"""Multi-scale deformable attention in one kernel: every sample is read where it lies, weighted and summed in registers.

Each query of each head reads a few points of every level of a pyramid, by bilinear interpolation, and sums them by its
weights (Zhu et al., "Deformable DETR", 2021). The pyramid is what the projection of the values writes: the positions
of all levels, one level behind the other. Outside a level there are zeros, and its borders are those of its outermost
pixels' areas (``grid_sample`` with ``padding_mode="zeros"`` and ``align_corners=False``): the position x of a level of
width W has its pixels at x = (i + 0.5) / W. A place that is infinite or no number gives no number, as in PyTorch.

Memory traffic: values, places, weights and output once each; what neighbouring queries read twice comes from L2. With B
images of S positions and Q queries, H heads of size D, P points of all levels, in i bytes a value and o an output, 4 a
coordinate and 2 a weight: B H (S D i + Q D o + 10 Q P). Arithmetic: 8 B Q H P D, in FP32, without tensor cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resvit_engines.kernels.launch import ITEM_SIZES, Extent, Launch, Result, Source, dim, product
from resvit_engines.kernels.multiprocessors import multiprocessors_of, power_of_two
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

MOST_LEVELS, MOST_POINTS = 8, 64
_LARGEST_HEAD, _MOST_HEADS = 256, 64
_WIDE = ("fp32", *FLOATS)
_LOAD_BYTES, _WARP = 16, 32


@dataclass(frozen=True)
class DeformableConfig:
    """What one such node computes.

    ``heights``, ``widths`` and ``points`` have one number for each level: its size, and how many points of it a head
    reads. Places (x, y) run from 0 to 1 across a level, or, unless ``unit``, from -1 to 1. ``value_scale`` and
    ``out_scale`` are those of 8-bit tensors. ``queries`` and ``batch`` are what tiles are chosen for; the kernel runs
    any.
    """

    heads: int
    head_size: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    points: tuple[int, ...]
    queries: int
    unit: bool = True
    dtype: str = "fp16"
    place_dtype: str = "fp32"
    weight_dtype: str = "fp16"
    out_dtype: str = "fp16"
    value_scale: float = 1.0
    out_scale: float = 1.0
    batch: int = 1

    @property
    def positions(self) -> int:
        """Of all levels together."""
        return sum(height * width for height, width in zip(self.heights, self.widths, strict=True))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first position of each level."""
        areas = [height * width for height, width in zip(self.heights, self.widths, strict=True)]
        return tuple(sum(areas[:level]) for level in range(len(areas)))

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first point of each level."""
        return tuple(sum(self.points[:level]) for level in range(len(self.points)))

    @property
    def samples(self) -> int:
        """Points of all levels together, which one head of one query reads."""
        return sum(self.points)


def deformable_reference(config: DeformableConfig, *inputs: Array) -> Array:
    """The output [B, Q, H D] as its tensor holds it, in float64.

    Inputs are the stored numbers: values [B, S, H D], places [B, Q, H, P, 2] as (x, y), weights [B, Q, H, P]. The two
    last may have the levels as a dimension of their own, or the last dimensions joined.
    """
    value, places, weights = (array.astype(np.float64) for array in inputs)
    batch, queries, heads = len(value), places.shape[1], config.heads
    places = places.reshape(batch, queries, heads, config.samples, 2)
    weights = weights.reshape(batch, queries, heads, config.samples)
    value = value.reshape(batch, config.positions, heads, config.head_size)
    result = np.zeros((batch, queries, heads, config.head_size))
    sizes = zip(config.heights, config.widths, config.starts, config.firsts, config.points, strict=True)
    for height, width, start, first, count in sizes:
        level = value[:, start : start + height * width].reshape(batch, height, width, heads, -1)
        own = slice(first, first + count)
        x, y = pixels(places[..., own, 0], width, config), pixels(places[..., own, 1], height, config)
        result += (sampled(level, x, y) * weights[..., own, None]).sum(-2)  # (B, Q, H, P, D) over P
    return stored(result.reshape(batch, queries, -1) * config.value_scale, config.out_dtype, config.out_scale)


def pixels(places: Array, size: int, config: DeformableConfig) -> Array:
    """Places along one dimension in pixels of a level: pixel i is at i, and its area reaches half a pixel around it."""
    across: Array = places if config.unit else (places + 1.0) / 2.0
    return across * size - 0.5


def sampled(level: Array, x: Array, y: Array) -> Array:
    """One level [B, h, w, H, D] at pixels x and y [B, Q, H, P], bilinear, zeros outside: [B, Q, H, P, D]."""
    batch, height, width, heads, _ = level.shape
    image, head = np.arange(batch)[:, None, None, None], np.arange(heads)[None, None, :, None]
    # All that lies a pixel beyond the border reads nothing.
    x, y = (np.where(np.isfinite(p), np.clip(p, -2.0, size + 1.0), np.nan) for p, size in ((x, width), (y, height)))
    left, top = np.floor(x), np.floor(y)
    total: Array = np.zeros((*x.shape, level.shape[-1]))
    for column, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
        i, j = left + column, top + row
        inside = (i >= 0) & (i < width) & (j >= 0) & (j < height)
        pick = [np.where(inside, index, 0).astype(int) for index in (j, i)]
        corner = np.where(inside[..., None], level[image, pick[0], pick[1], head], 0.0)
        share = (x - left if column else 1.0 - (x - left)) * (y - top if row else 1.0 - (y - top))
        total = total + corner * share[..., None]
    return total


def deformable_refusal(config: DeformableConfig, sm: int) -> str | None:
    """Why there is no such kernel for a GPU; None where there is."""
    levels = len(config.heights)
    if not (1 <= levels <= MOST_LEVELS and len(config.widths) == len(config.points) == levels):
        return f"{levels} levels, not 1 to {MOST_LEVELS}"
    if min(*config.heights, *config.widths, *config.points, config.queries, config.batch) < 1:
        return "a size is below 1"
    if config.samples > MOST_POINTS:
        return f"{config.samples} points for each head, not 1 to {MOST_POINTS}"
    if not (1 <= config.heads <= _MOST_HEADS and 1 <= config.head_size <= _LARGEST_HEAD):
        return f"{config.heads} heads of {config.head_size}, not 1 to {_MOST_HEADS} of 1 to {_LARGEST_HEAD}"
    row = max(config.head_size, 2 * config.samples) * config.heads
    if max(config.positions, config.queries) * row >= 2**31:
        return "its values or places of one image have 2^31 elements or more"
    if config.dtype not in (*FLOATS, *EIGHT_BIT) or config.out_dtype not in (*FLOATS, *EIGHT_BIT):
        return f"its values are {config.dtype.upper()} and its output {config.out_dtype.upper()}"
    if config.place_dtype not in _WIDE or config.weight_dtype not in _WIDE:
        return f"its places are {config.place_dtype.upper()} and its weights {config.weight_dtype.upper()}"
    return (
        dtype_refusal(sm, config.dtype, config.out_dtype)
        or scale_refusal("the scale of the values", config.value_scale, config.dtype)
        or scale_refusal("the output's scale", config.out_scale, config.out_dtype)
    )


def deformable_source(config: DeformableConfig, sm: int) -> Source:
    """The kernel for a GPU (87 is compute capability 8.7).

    Raises:
        ResvitError: IMPOSSIBLE with the reason of ``deformable_refusal``.
    """
    require_served("deformable attention", deformable_refusal(config, sm))
    rows, warps = _tiles(config, sm)
    together = rows // config.heads
    return Source(
        module="deformable",
        function="deformable",
        arguments=(
            ("value", POINTERS[config.dtype]),
            ("places", POINTERS[config.place_dtype]),
            ("weights", POINTERS[config.weight_dtype]),
            ("queries", "i32"),
            ("out", POINTERS[config.out_dtype]),
        ),
        constants={
            "HEADS": config.heads,
            "SIZE": config.head_size,
            "HEIGHTS": config.heights,
            "WIDTHS": config.widths,
            "POINTS": config.points,
            "STARTS": config.starts,
            "FIRSTS": config.firsts,
            "POSITIONS": config.positions,
            "SAMPLES": config.samples,
            "UNIT": config.unit,
            "VALUE_SCALE": config.value_scale,
            "INVERSE": 1.0 / config.out_scale,
            "TOGETHER": together,
            "BM": rows,
            "BD": power_of_two(config.head_size),
        },
        warps=warps,
        stages=1,
        launch=Launch(
            inputs=(config.dtype, config.place_dtype, config.weight_dtype),
            scalars=(dim(1, 1),),
            outputs=(Result(config.out_dtype, (dim(0, 0), dim(1, 1), Extent(config.heads * config.head_size))),),
            grid=(product(dim(1, 1, divisor=together), dim(0, 0)), Extent(), Extent()),
        ),
    )


def traffic_bytes(config: DeformableConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that must cross memory for input ``shapes``, each tensor once."""
    types = (config.dtype, config.place_dtype, config.weight_dtype)
    read = sum(math.prod(shape) * ITEM_SIZES[dtype] for shape, dtype in zip(shapes, types, strict=True))
    written = shapes[0][0] * shapes[1][1] * config.heads * config.head_size
    return read + written * ITEM_SIZES[config.out_dtype]


def operations(config: DeformableConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Operations of the weighted sums for input ``shapes``: four corners of each point."""
    return 8 * shapes[0][0] * shapes[1][1] * config.heads * config.samples * config.head_size


def _tiles(config: DeformableConfig, sm: int) -> tuple[int, int]:
    """Rows (a head of a query each) and warps of a program: the most that still give every multiprocessor some.

    With one thread for 16 bytes of a row, a warp has as many rows as it can read in one load each. A program has whole
    queries: at least one, so as many rows as there are heads.
    """
    row_bytes = max(power_of_two(config.head_size) * ITEM_SIZES[config.dtype], 1)
    of_warp = max(_WARP * _LOAD_BYTES // row_bytes, 1)
    choices = [(max(warps * of_warp, power_of_two(config.heads)), warps) for warps in (4, 2, 1)]

    def fills(rows: int) -> bool:
        return config.batch * -(-config.queries // (rows // config.heads)) >= multiprocessors_of(sm)

    return next((choice for choice in choices if fills(choice[0])), choices[-1])
