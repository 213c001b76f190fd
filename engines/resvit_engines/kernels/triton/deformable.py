"""Multi-scale deformable attention in Triton; see deformable.py for what it computes."""
# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language: parameters have its types, and constants are in capitals.

import triton
import triton.language as tl

from resvit_engines.kernels.triton.numerics import stored


@triton.jit
def deformable(
    value, places, weights, queries, out,
    HEADS: tl.constexpr, SIZE: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, POINTS: tl.constexpr,
    STARTS: tl.constexpr, FIRSTS: tl.constexpr, POSITIONS: tl.constexpr, SAMPLES: tl.constexpr, UNIT: tl.constexpr,
    VALUE_SCALE: tl.constexpr, INVERSE: tl.constexpr, TOGETHER: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``TOGETHER`` queries of one image with all heads: a row of ``BM`` is one head of one query."""
    blocks = tl.cdiv(queries, TOGETHER)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    own = tl.arange(0, BM)
    row = (tl.program_id(0) % blocks) * (TOGETHER * HEADS) + own
    real = (own < TOGETHER * HEADS) & (row < queries * HEADS)
    channel = tl.arange(0, BD)
    known = (channel < SIZE)[None, :]

    value += image * (POSITIONS * HEADS * SIZE)
    places += image * queries * (HEADS * SAMPLES * 2)
    weights += image * queries * (HEADS * SAMPLES)
    out += image * queries * (HEADS * SIZE)
    column = (row % HEADS)[:, None] * SIZE + channel[None, :]

    result = tl.zeros([BM, BD], tl.float32)
    for level in tl.static_range(len(HEIGHTS)):
        result = _level(
            result, value, places, weights, row * SAMPLES, column, real, known,
            HEADS * SIZE, HEIGHTS[level], WIDTHS[level], STARTS[level], FIRSTS[level], POINTS[level], UNIT,
        )  # fmt: skip
    written = stored(result * VALUE_SCALE, INVERSE, out.dtype.element_ty)
    tl.store(out + row[:, None] * SIZE + channel[None, :], written, mask=real[:, None] & known)


@triton.jit
def _level(
    result, value, places, weights, first, column, real, known,
    WIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, FIRST: tl.constexpr,
    POINTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``result`` and what its rows read of one level, whose positions are ``WIDE`` values apart."""
    for point in tl.static_range(POINTS):
        at = first + (FIRST + point)
        x = tl.load(places + at * 2, mask=real, other=0.0).to(tl.float32)
        y = tl.load(places + at * 2 + 1, mask=real, other=0.0).to(tl.float32)
        share = tl.load(weights + at, mask=real, other=0.0).to(tl.float32)
        x, left = _pixel(x, WIDTH, UNIT)
        y, top = _pixel(y, HEIGHT, UNIT)
        # Compared as floating-point numbers: what is not a number is nowhere inside.
        in_left = real & (left >= 0.0) & (left <= WIDTH - 1.0)
        in_right = real & (left >= -1.0) & (left <= WIDTH - 2.0)
        in_top = (top >= 0.0) & (top <= HEIGHT - 1.0)
        in_bottom = (top >= -1.0) & (top <= HEIGHT - 2.0)
        to_right, to_bottom = x - left, y - top
        above, below = share * (1.0 - to_bottom), share * to_bottom
        position = top.to(tl.int32) * WIDTH + left.to(tl.int32) + START
        corner = value + position[:, None] * WIDE + column
        one = tl.load(corner, mask=(in_left & in_top)[:, None] & known, other=0.0)
        two = tl.load(corner + WIDE, mask=(in_right & in_top)[:, None] & known, other=0.0)
        three = tl.load(corner + WIDTH * WIDE, mask=(in_left & in_bottom)[:, None] & known, other=0.0)
        four = tl.load(corner + (WIDTH + 1) * WIDE, mask=(in_right & in_bottom)[:, None] & known, other=0.0)
        result += one.to(tl.float32) * (above * (1.0 - to_right))[:, None]
        result += two.to(tl.float32) * (above * to_right)[:, None]
        result += three.to(tl.float32) * (below * (1.0 - to_right))[:, None]
        result += four.to(tl.float32) * (below * to_right)[:, None]
    return result


@triton.jit
def _pixel(place, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """A place in pixels, and the pixel before it; what lies far outside is brought to two pixels outside."""
    pixel = place * SIZE - 0.5 if UNIT else place * (0.5 * SIZE) + (0.5 * SIZE - 0.5)
    near = tl.minimum(tl.maximum(pixel, -2.0), SIZE + 1.0)
    pixel = tl.where(tl.abs(pixel) < float("inf"), near, float("nan"))
    return pixel, tl.floor(pixel)
