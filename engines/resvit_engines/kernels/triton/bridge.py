"""The bridge from trunk to transformer in Triton; see bridge.py for what it computes."""
# mypy: ignore-errors
# ruff: noqa: N803, PLR0915
# Triton's language: parameters have its types, and constants are in capitals.

import triton
import triton.language as tl

from resvit_engines.kernels.triton.numerics import stored


@triton.jit
def bridge(
    image, weight, weight_scale, table, gamma, beta, tokens, normal,
    CHANNELS: tl.constexpr, AREA: tl.constexpr, EMBED: tl.constexpr, PREFIX: tl.constexpr,
    IN_SCALE: tl.constexpr, EPS: tl.constexpr, INVERSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``BM`` positions of one image: ``BN`` values of their tokens, or, where they are normalised, all of them."""
    blocks: tl.constexpr = (AREA + BM - 1) // BM
    chunks: tl.constexpr = (EMBED + BN - 1) // BN if gamma is None else 1
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks % blocks
    batch = (tl.program_id(0) // (chunks * blocks)).to(tl.int64)
    image += batch * (CHANNELS * AREA)
    tokens += batch * ((PREFIX + AREA) * EMBED)
    place = block * BM + tl.arange(0, BM)
    rows = (PREFIX + place)[:, None] * EMBED
    inside = (place < AREA)[:, None]
    if gamma is None:
        columns = chunk * BN + tl.arange(0, BN)
        values = _projected(
            image, weight, weight_scale, table, place, columns, CHANNELS, AREA, EMBED, PREFIX, IN_SCALE, BM, BN, BK
        )
        real = inside & (columns < EMBED)[None, :]
        tl.store(tokens + rows + columns[None, :], values.to(tokens.dtype.element_ty), mask=real)
        if block == 0:
            for row in range(PREFIX):
                known = columns < EMBED
                first = tl.load(table + row * EMBED + columns, mask=known, other=0.0)
                tl.store(tokens + row * EMBED + columns, first.to(tokens.dtype.element_ty), mask=known)
    else:
        normal += batch * ((PREFIX + AREA) * EMBED)
        about = tl.zeros([BM], tl.float32)
        mean = tl.zeros([BM], tl.float32)
        squares = tl.zeros([BM], tl.float32)
        for start in range(0, EMBED, BN):
            columns = start + tl.arange(0, BN)
            known = (columns < EMBED)[None, :]
            values = _projected(
                image, weight, weight_scale, table, place, columns, CHANNELS, AREA, EMBED, PREFIX, IN_SCALE, BM, BN, BK
            )
            token = values.to(tokens.dtype.element_ty)
            tl.store(tokens + rows + columns[None, :], token, mask=inside & known)
            # What is normalised is the token as it was written: padding is zero in it.
            values = token.to(tl.float32)
            count = tl.minimum(EMBED - start, BN).to(tl.float32)
            # Counted from the first chunk's mean, or a large mean would swallow small distances.
            about = tl.where(start == 0, tl.sum(values, 1) / count, about)
            values = tl.where(known, values - about[:, None], 0.0)
            own = tl.sum(values, 1) / count
            values = tl.where(known, values - own[:, None], 0.0)
            share = count / (start + count)
            squares += tl.sum(values * values, 1) + (own - mean) * (own - mean) * (share * start)
            mean += (own - mean) * share
        inverse = tl.rsqrt(squares / EMBED + EPS)
        # Other threads of this program wrote what is read now.
        tl.debug_barrier()
        for start in range(0, EMBED, BN):
            columns = start + tl.arange(0, BN)
            known = columns < EMBED
            real = inside & known[None, :]
            values = tl.load(tokens + rows + columns[None, :], mask=real, other=0.0).to(tl.float32)
            values = ((values - about[:, None]) - mean[:, None]) * inverse[:, None]
            scale = tl.load(gamma + columns, mask=known, other=0.0)
            shift = tl.load(beta + columns, mask=known, other=0.0)
            values = values * scale[None, :] + shift[None, :]
            tl.store(normal + rows + columns[None, :], stored(values, INVERSE, normal.dtype.element_ty), mask=real)
        if block == 0:
            for row in range(PREFIX):
                columns = tl.arange(0, COLUMNS)
                at = row * EMBED + columns[None, :]
                known = (columns < EMBED)[None, :]
                token = tl.load(table + at, mask=known, other=0.0).to(tokens.dtype.element_ty)
                tl.store(tokens + at, token, mask=known)
                values = _normalised(token.to(tl.float32), gamma, beta, columns, EMBED, EPS)
                tl.store(normal + at, stored(values, INVERSE, normal.dtype.element_ty), mask=known)


@triton.jit
def _projected(
    image, weight, weight_scale, table, place, columns,
    CHANNELS: tl.constexpr, AREA: tl.constexpr, EMBED: tl.constexpr, PREFIX: tl.constexpr, IN_SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``BM`` x ``BN`` values in FP32: the 1x1 convolution at these places, and the table's rows added to it."""
    # Transposed, [values, positions]: both factors are then read into shared memory as they lie, without registers.
    sums = tl.zeros([BN, BM], tl.int32 if image.dtype.element_ty == tl.int8 else tl.float32)
    inside = place < AREA
    known = columns < EMBED
    for first in range(0, CHANNELS, BK):
        depth = first + tl.arange(0, BK)
        if CHANNELS % BK == 0:
            pixels = tl.load(image + depth[:, None] * AREA + place[None, :], mask=inside[None, :], other=0.0)
            factors = tl.load(weight + columns[:, None] * CHANNELS + depth[None, :], mask=known[:, None], other=0.0)
        else:
            there = depth < CHANNELS
            pixels = tl.load(
                image + depth[:, None] * AREA + place[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            factors = tl.load(
                weight + columns[:, None] * CHANNELS + depth[None, :], mask=known[:, None] & there[None, :], other=0.0
            )
        if image.dtype.element_ty == tl.float8e4nv:
            # Tensor cores add FP8 products with few bits: after each tile into a real FP32 sum.
            sums = tl.dot(factors, pixels, sums, max_num_imprecise_acc=BK)
        else:
            sums = tl.dot(factors, pixels, sums, out_dtype=sums.dtype)
    values = tl.trans(sums.to(tl.float32))
    if weight_scale is not None:
        values *= tl.load(weight_scale + columns, mask=known, other=0.0)[None, :] * IN_SCALE
    return values + tl.load(
        table + (PREFIX + place)[:, None] * EMBED + columns[None, :], mask=inside[:, None] & known[None, :], other=0.0
    )


@triton.jit
def _normalised(values, gamma, beta, columns, SIZE: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of whole FP32 rows, padded with zeros, by the corrected two-pass method."""
    real = columns[None, :] < SIZE
    values = tl.where(real, values - (tl.sum(values, 1) / SIZE)[:, None], 0.0)
    # What rounding left of the mean (Chan, Golub and LeVeque 1983).
    values = tl.where(real, values - (tl.sum(values, 1) / SIZE)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / SIZE + EPS)
    scale = tl.load(gamma + columns, mask=columns < SIZE, other=0.0)
    shift = tl.load(beta + columns, mask=columns < SIZE, other=0.0)
    return values * inverse[:, None] * scale[None, :] + shift[None, :]
