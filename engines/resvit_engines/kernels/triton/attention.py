"""Fused attention in Triton; see attention.py for what it computes."""
# mypy: ignore-errors
# ruff: noqa: N803, N806, PLR0915
# Triton's language: parameters have its types, and constants are in capitals.

import triton
import triton.language as tl

from resvit_engines.kernels.triton.numerics import stored


@triton.jit
def attention(
    q, k, v, bias, queries, keys, out,
    HEADS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr,
    K_START: tl.constexpr, V_START: tl.constexpr, PACKED: tl.constexpr, CHANNELS: tl.constexpr, AREA: tl.constexpr,
    BIAS_BATCH: tl.constexpr, BIAS_HEADS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    SCALE: tl.constexpr, V_SCALE: tl.constexpr, INVERSE: tl.constexpr, PV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """``BM`` queries of one head of one image against all keys, ``BN`` at a time; online softmax in FP32."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if CHANNELS:
        queries, keys = AREA, AREA
    blocks = tl.cdiv(queries, BM)
    image_head = tl.program_id(0) // blocks
    image, head = (image_head // HEADS).to(tl.int64), image_head % HEADS
    rows = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    dk, dv, columns = tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, BN)
    real_rows = rows < queries

    # In the layout of channels, [B, C, N], a head's channels are N apart and its tokens follow each other. N is then
    # compiled in, since the width of loads hangs on what divides it.
    step: tl.constexpr = AREA if CHANNELS else 1
    q_token: tl.constexpr = 1 if CHANNELS else Q_ROW
    k_token: tl.constexpr = 1 if CHANNELS else K_ROW
    v_token: tl.constexpr = 1 if CHANNELS else V_ROW
    q_base = q + image * queries * Q_ROW + head * (Q_HEAD * step)
    k_base = (q if PACKED else k) + image * keys * K_ROW + head * (K_HEAD * step) + K_START * step
    v_base = (q if PACKED else v) + image * keys * V_ROW + head * (V_HEAD * step) + V_START * step

    q_real = real_rows[:, None] & (dk < HEAD)[None, :]
    query = tl.load(q_base + rows[:, None] * q_token + dk[None, :] * step, mask=q_real, other=0.0)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, DV], tl.float32)
    bias_row = rows
    if bias is not None:
        bias_heads: tl.constexpr = HEADS if BIAS_HEADS else 1
        bias_rows = queries if BIAS_ROWS else 1
        group = (image * bias_heads if BIAS_BATCH else 0) + (head if BIAS_HEADS else 0)
        bias_base = bias + group.to(tl.int64) * bias_rows * keys
        bias_row = (rows if BIAS_ROWS else rows * 0) * keys

    for start in range(0, keys, BN):
        column = start + columns
        real = column < keys
        key = tl.load(
            k_base + dk[:, None] * step + column[None, :] * k_token,
            mask=(dk < HEAD)[:, None] & real[None, :],
            other=0.0,
        )
        logits = tl.dot(query, key).to(tl.float32) * SCALE
        if bias is not None:
            inside = real_rows[:, None] & real[None, :]
            added = tl.load(bias_base + bias_row[:, None] + column[None, :], mask=inside, other=0.0)
            logits += added.to(tl.float32) * LOG2E
        logits = tl.where(real[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        # A row that nothing was seen of has no largest logit yet: minus infinity less itself is not a number.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(largest - finite)
        value = tl.load(
            v_base + column[:, None] * v_token + dv[None, :] * step,
            mask=real[:, None] & (dv < VALUE)[None, :],
            other=0.0,
        )
        result *= shrink[:, None]
        if PV == "int8":
            steps = (share * 127.0 + 12582912.0) - 12582912.0
            total = total * shrink + tl.sum(steps, 1)
            result += tl.dot(steps.to(tl.int8), value).to(tl.float32)
        elif PV == "fp8":
            steps = (share * 256.0).to(tl.float8e4nv)
            total = total * shrink + tl.sum(steps.to(tl.float32), 1)
            result += tl.dot(steps, value)
        elif PV == "bf16":
            total = total * shrink + tl.sum(share, 1)
            result = tl.dot(share.to(tl.bfloat16), value.to(tl.bfloat16), result)
        else:
            total = total * shrink + tl.sum(share, 1)
            result = tl.dot(share.to(tl.float16), value.to(tl.float16), result)
        largest = higher

    result = result * (V_SCALE / tl.where(total == 0.0, 1.0, total))[:, None]
    out_real = real_rows[:, None] & (dv < VALUE)[None, :]
    out_base = out + image * queries * (HEADS * VALUE)
    if CHANNELS:
        place = (head * VALUE + dv)[None, :] * queries + rows[:, None]
    else:
        place = rows[:, None] * (HEADS * VALUE) + (head * VALUE + dv)[None, :]
    tl.store(out_base + place, stored(result, INVERSE, out.dtype.element_ty), mask=out_real)
