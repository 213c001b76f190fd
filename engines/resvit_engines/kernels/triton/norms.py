"""GroupNorm and LayerNorm in Triton; see norms.py for what they compute."""
# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language: parameters have its types, and constants are in capitals.

import triton
import triton.language as tl

from resvit_engines.kernels.triton.numerics import rectified, stored


@triton.jit
def group_norm(
    x, gamma, beta, y,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, AREA: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, RELU: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One group of one image: ``CHANNELS`` planes of ``AREA`` elements, all in one row in memory.

    Tiles are ROWS x 8, eight neighbours to a thread. A group that fits one tile stays in registers.
    """
    size: tl.constexpr = CHANNELS * AREA
    tile: tl.constexpr = ROWS * 8
    start = tl.program_id(0).to(tl.int64) * size
    x += start
    y += start
    channel = (tl.program_id(0) % GROUPS) * CHANNELS
    index = tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if size <= tile:
        real = index < size
        values = tl.load(x + index, mask=real, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(values, 1), 0) / size
        values = tl.where(real, values - mean, 0.0)
        # What rounding left of the mean (the corrected two-pass method).
        values -= tl.sum(tl.sum(values, 1), 0) / size
        squares = tl.where(real, values * values, 0.0)
        inverse = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / size + EPS)
        _finish(values * inverse, gamma + channel, beta + channel, y, index, real, AREA, RELU, INVERSE)
    else:
        means = tl.zeros([ROWS, 8], tl.float32)
        squares = tl.zeros([ROWS, 8], tl.float32)
        whole: tl.constexpr = size // tile * tile
        # Counted from one of them, or a large mean would swallow small distances.
        about = tl.load(x).to(tl.float32)
        count = 0.0
        for first in range(0, whole, tile):
            count += 1.0
            values = tl.load(x + first + index).to(tl.float32) - about
            distance = values - means
            means += distance / count
            squares += distance * (values - means)
        counts = tl.full([ROWS, 8], whole // tile, tl.float32)
        if whole < size:
            real = index < size - whole
            values = tl.load(x + whole + index, mask=real, other=0.0).to(tl.float32) - about
            distance = tl.where(real, values - means, 0.0)
            means += distance / (count + 1.0)
            squares += distance * (values - means)
            counts += tl.where(real, 1.0, 0.0)
        mean = tl.sum(tl.sum(means * counts, 1), 0) / size
        means -= mean
        squares += counts * means * means
        inverse = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / size + EPS)
        # Backwards: what was read last is nearest.
        for step in range((size + tile - 1) // tile):
            at = ((size - 1) // tile - step) * tile + index
            real = at < size
            values = (tl.load(x + at, mask=real, other=0.0).to(tl.float32) - about) - mean
            _finish(values * inverse, gamma + channel, beta + channel, y, at, real, AREA, RELU, INVERSE)


@triton.jit
def _finish(
    values, gamma, beta, y, index, real, AREA: tl.constexpr, RELU: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    if AREA % 8 == 0:
        # Eight neighbours are of one channel: one look-up for all of them.
        at = (tl.min(index, 1) // AREA)[:, None]
        known = (tl.max(real.to(tl.int32), 1) > 0)[:, None]
    else:
        at = index // AREA
        known = real
    values = values * tl.load(gamma + at, mask=known, other=0.0) + tl.load(beta + at, mask=known, other=0.0)
    if RELU:
        values = rectified(values)
    tl.store(y + index, stored(values, INVERSE, y.dtype.element_ty), mask=real)


@triton.jit
def layer_norm(
    x, residual, gamma, beta, n, total, y,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """``ROWS`` tokens of one sequence, each held whole; ``COLUMNS`` is ``SIZE`` rounded up to a power of two."""
    blocks = tl.cdiv(n, ROWS)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    start = (tl.program_id(0) // blocks).to(tl.int64) * n * SIZE
    index = start + rows[:, None].to(tl.int64) * SIZE + columns[None, :]
    real = (rows[:, None] < n) & (columns[None, :] < SIZE)
    values = tl.load(x + index, mask=real, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + index, mask=real, other=0.0).to(tl.float32)
        tl.store(total + index, values.to(total.dtype.element_ty), mask=real)
    values = normalised(values, gamma, beta, columns, SIZE, EPS)
    tl.store(y + index, stored(values, INVERSE, y.dtype.element_ty), mask=real)


@triton.jit
def normalised(values, gamma, beta, columns, SIZE: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of whole FP32 rows, padded with zeros, by the corrected two-pass method."""
    real = columns[None, :] < SIZE
    values = tl.where(real, values - (tl.sum(values, 1) / SIZE)[:, None], 0.0)
    values = tl.where(real, values - (tl.sum(values, 1) / SIZE)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / SIZE + EPS)
    scale = tl.load(gamma + columns, mask=columns < SIZE, other=0.0)
    shift = tl.load(beta + columns, mask=columns < SIZE, other=0.0)
    return values * inverse[:, None] * scale[None, :] + shift[None, :]
