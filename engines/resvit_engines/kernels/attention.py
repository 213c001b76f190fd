"""Attention in one kernel, straight from the projection's output: nothing is transposed in memory.

softmax(scale Q K^T + bias) V by the online softmax (Milakov and Gimelshein 2018; Dao et al.,
"FlashAttention", 2022), in FP32. Q K^T runs in the operands' own precision, in 8 bits with integer or FP8 tensor
cores; the product with V in FP16, BF16, or 8 bits as ``pv`` says. A head size that is no power of two is padded in
registers. A mask is a bias of minus infinity, since TensorRT's plugins take no boolean tensors; rows that are left
nothing give zeros.

Memory traffic: queries, keys, values and output once each (keys and values come again from L2 for every tile of
queries), the bias once. With B images of N tokens and H heads of size D in i bytes: B N H D (3 i + o) for an
output in o bytes. Floating-point work: 4 B H N^2 D on tensor cores, and about 8 B H N^2 for the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resvit_engines.kernels.launch import ITEM_SIZES, LAUNCH_SHARED_BYTES, Extent, Launch, Result, Source, dim, product
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

LAYOUTS = ("packed", "per_head", "channels", "split", "q_kv")
"""Packed [B, N, 3, H, D]; per head [B, N, H, 2 Dk + Dv]; channels [B, 3 H D, h, w]; split: three of [B, N, H D]; q_kv:
q [B, Nq, H Dk] and twice the tensor that holds keys and values per head, [B, Nk, H, Dk + Dv]."""
THREE_TENSORS = ("split", "q_kv")
MOST_TOKENS = 4096
_SMALLEST, _LARGEST = 8, 128
_WIDEST = 2**31 // MOST_TOKENS
_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionConfig:
    """What one such node computes.

    ``head_size`` is that of queries and keys, ``value_size`` that of values. ``bias``, which is added to the scaled
    logits, is None, or says whether it differs by batch, by head and by query: (False, True, True) is [1, H, Nq, Nk].
    ``queries`` and ``keys`` are the lengths that tiles are chosen for; the kernel runs any, but for the layout of
    channels, where ``area`` (h, w) is compiled in. ``pv`` is what the shares are rounded to: ``fp16``, ``bf16``, or
    ``int8`` and ``fp8`` for operands of that type.
    """

    heads: int
    head_size: int
    value_size: int
    scale: float
    queries: int
    keys: int
    layout: str = "packed"
    dtype: str = "fp16"
    out_dtype: str = "fp16"
    pv: str = "fp16"
    q_scale: float = 1.0
    k_scale: float = 1.0
    v_scale: float = 1.0
    out_scale: float = 1.0
    bias: tuple[bool, bool, bool] | None = None
    bias_dtype: str = "fp16"
    area: tuple[int, int] | None = None
    batch: int = 1

    @property
    def width(self) -> int:
        """Channels of the packed tensor."""
        return self.heads * (2 * self.head_size + self.value_size)


def attention_reference(config: AttentionConfig, *inputs: Array) -> Array:
    """The output as its tensor holds it, in float64.

    Inputs are the stored numbers, in the kernel's order: the packed tensor, or q, k and v; bias.
    """
    shares, value = attention_shares(config, *inputs)
    result = shares @ (value * config.v_scale)  # (B, H, Nq, Nk) x (B, H, Nk, Dv)
    return stored(joined(config, result), config.out_dtype, config.out_scale)


def attention_shares(config: AttentionConfig, *inputs: Array) -> tuple[Array, Array]:
    """The softmax [B, H, Nq, Nk] and the stored values [B, H, Nk, Dv], in float64."""
    count = 3 if config.layout in THREE_TENSORS else 1
    rest = list(inputs[count:])
    q, k, v = (part.astype(np.float64) for part in parts_of(config, *inputs[:count]))
    logits = (q @ k.swapaxes(-1, -2)) * (config.scale * config.q_scale * config.k_scale)
    if config.bias is not None:
        logits = logits + rest.pop(0).astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0.0, 1.0, total), v


def parts_of(config: AttentionConfig, *inputs: Array) -> tuple[Array, Array, Array]:
    """Queries, keys [B, H, N, Dk] and values [B, H, N, Dv] out of what the layout holds."""
    heads, dk, dv = config.heads, config.head_size, config.value_size
    if config.layout in THREE_TENSORS:
        q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).swapaxes(1, 2) for x in inputs)
        return (q, k, v) if config.layout == "split" else (q, k[..., :dk], v[..., dk:])
    (packed,) = inputs
    if config.layout == "channels":
        packed = packed.reshape(len(packed), config.width, -1).swapaxes(1, 2)
    if config.layout == "per_head":
        whole = packed.reshape(len(packed), -1, heads, 2 * dk + dv).swapaxes(1, 2)
        return whole[..., :dk], whole[..., dk : 2 * dk], whole[..., 2 * dk :]
    sizes = (heads * dk, 2 * heads * dk)
    q, k, v = (
        part.reshape(len(part), part.shape[1], heads, -1).swapaxes(1, 2) for part in np.split(packed, sizes, axis=2)
    )
    return q, k, v


def joined(config: AttentionConfig, result: Array) -> Array:
    """[B, H, N, Dv] as the layout has its output: [B, N, H Dv], or [B, H Dv, h, w]."""
    batch, _, tokens, _ = result.shape
    rows: Array = result.swapaxes(1, 2).reshape(batch, tokens, -1)
    return rows.swapaxes(1, 2).reshape(batch, -1, *(config.area or ())) if config.layout == "channels" else rows


def attention_refusal(config: AttentionConfig, sm: int) -> str | None:
    """Why there is no such kernel for a GPU; None where there is."""
    if config.layout not in LAYOUTS:
        return f"the layout {config.layout!r} is not one of {', '.join(LAYOUTS)}"
    if config.heads < 1 or not all(_SMALLEST <= size <= _LARGEST for size in (config.head_size, config.value_size)):
        return f"a head of {config.head_size} and {config.value_size}, not of {_SMALLEST} to {_LARGEST}"
    if not all(1 <= length <= MOST_TOKENS for length in (config.queries, config.keys)):
        return f"{config.queries} queries and {config.keys} keys, not 1 to {MOST_TOKENS}"
    if config.width >= _WIDEST:
        return f"tokens of {config.width} values, whose offsets would pass 2^31"
    if config.layout not in THREE_TENSORS and config.queries != config.keys:
        return "queries and keys of one tensor are equally many"
    if config.layout == "channels" and (config.area is None or math.prod(config.area) != config.keys):
        return f"the map of {config.area} does not hold {config.keys} tokens"
    if config.dtype not in (*FLOATS, *EIGHT_BIT) or config.out_dtype not in (*FLOATS, *EIGHT_BIT):
        return f"it multiplies {config.dtype} and writes {config.out_dtype}"
    if config.pv not in _SHARES[config.dtype]:
        return f"shares in {config.pv} do not go with values in {config.dtype}"
    if config.bias is not None and config.bias_dtype not in ("fp32", *FLOATS):
        return f"a bias in {config.bias_dtype}"
    return (
        dtype_refusal(sm, config.dtype, config.out_dtype)
        or scale_refusal("the scale of the queries", config.q_scale, config.dtype)
        or scale_refusal("the scale of the keys", config.k_scale, config.dtype)
        or scale_refusal("the scale of the values", config.v_scale, config.dtype)
        or scale_refusal("the output's scale", config.out_scale, config.out_dtype)
        or _factor_refusal(_factor(config))
    )


_SHARES = {"fp16": ("fp16",), "bf16": ("bf16",), "int8": ("fp16", "int8"), "fp8": ("fp16", "fp8")}


def attention_source(config: AttentionConfig, sm: int) -> Source:
    """The kernel for a GPU (87 is compute capability 8.7).

    Raises:
        ResvitError: IMPOSSIBLE with the reason of ``attention_refusal``.
    """
    require_served("fused attention", attention_refusal(config, sm))
    split, channels = config.layout in THREE_TENSORS, config.layout == "channels"
    tensors = ("q", "k", "v") if split else ("q",)
    types = [config.dtype] * len(tensors)
    if config.bias is not None:
        tensors, types = (*tensors, "bias"), [*types, config.bias_dtype]
    queries, keys = (Extent(config.keys),) * 2 if channels else (dim(0, 1), dim(1 if split else 0, 1))
    tiles = _tiles(config)
    blocks = Extent(-(-config.keys // tiles["BM"])) if channels else dim(0, 1, divisor=tiles["BM"])
    area = config.area or (0, 0)
    shape = (
        (dim(0, 0), Extent(config.heads * config.value_size), Extent(area[0]), Extent(area[1]))
        if channels
        else (dim(0, 0), dim(0, 1), Extent(config.heads * config.value_size))
    )
    return Source(
        module="attention",
        function="attention",
        arguments=(
            *((name, POINTERS[dtype]) for name, dtype in zip(tensors, types, strict=True)),
            ("queries", "i32"),
            ("keys", "i32"),
            ("out", POINTERS[config.out_dtype]),
        ),
        constants={
            **{name: None for name in ("k", "v", "bias") if name not in tensors},
            "HEADS": config.heads,
            "HEAD": config.head_size,
            "VALUE": config.value_size,
            **_strides(config),
            **_broadcast(config.bias),
            "SCALE": _factor(config),
            # Shares in FP8 are multiplied by 256, those in INT8 by 127; so is their sum, and it cancels.
            "V_SCALE": config.v_scale,
            "INVERSE": 1.0 / config.out_scale,
            "PV": config.pv,
            **tiles,
        },
        warps=_WARPS,
        stages=_stages(config, sm),
        launch=Launch(
            inputs=tuple(types),
            scalars=(queries, keys),
            outputs=(Result(config.out_dtype, shape),),
            grid=(product(blocks, dim(0, 0, factor=config.heads)), Extent(), Extent()),
        ),
    )


def traffic_bytes(config: AttentionConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that must cross memory for input ``shapes``, each tensor once."""
    types = [config.dtype] * (3 if config.layout in THREE_TENSORS else 1)
    types += [config.bias_dtype] if config.bias is not None else []
    read = sum(math.prod(shape) * ITEM_SIZES[dtype] for shape, dtype in zip(shapes, types, strict=True))
    if config.layout == "q_kv":  # the second and the third are one
        read -= math.prod(shapes[2]) * ITEM_SIZES[config.dtype]
    written = shapes[0][0] * config.queries * config.heads * config.value_size
    return read + written * ITEM_SIZES[config.out_dtype]


def operations(config: AttentionConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Operations of the two products for input ``shapes``."""
    pairs = shapes[0][0] * config.heads * config.queries * config.keys
    return 2 * pairs * (config.head_size + config.value_size)


_WARPS = 4
_TENSOR_MEMORY_SMS = (100, 103, 110)


def _tiles(config: AttentionConfig) -> dict[str, int]:
    """Rows and columns at once, within the 48 KiB that a launch gets without asking; few rows for few queries."""
    dk, dv = (max(16, 1 << (size - 1).bit_length()) for size in (config.head_size, config.value_size))
    if config.dtype in EIGHT_BIT:
        dk = max(dk, 32)  # what an 8-bit tensor core takes at once
    rows = 64 if config.queries > 32 else 32 if config.queries > 16 else 16
    columns = 64 if max(dk, dv) <= 64 else 32
    # A bias that is read element by element takes a register for each and, where a tile of values is narrower or
    # wider than that of the bias, a layout in between: 255 registers, and hundreds of bytes of spills.
    if config.bias is not None and _ragged(config):
        columns = columns if dv >= 64 else 32
        rows = rows if dv <= 64 else min(rows, 32)
    return {"BM": rows, "BN": columns, "DK": dk, "DV": dv}


def _stages(config: AttentionConfig, sm: int) -> int:
    """How many tiles of keys are in flight. From SM 9.0 on, tensor cores read more operands from shared memory."""
    wide = max(config.head_size, config.value_size) > 64 and config.dtype in FLOATS
    full = wide and (sm in _TENSOR_MEMORY_SMS or (sm == 90 and config.bias is not None))
    tiles = _tiles(config)
    held = tiles["BN"] * (tiles["DK"] + tiles["DV"]) * ITEM_SIZES[config.dtype]
    if config.bias is not None and (config.layout == "channels" or config.bias_dtype == "fp32"):
        # Copies go by four bytes and more: what is two bytes and lies anywhere is not among them.
        held += tiles["BM"] * tiles["BN"] * ITEM_SIZES[config.bias_dtype]
    barriers = 64 if sm in _TENSOR_MEMORY_SMS else 0
    return 1 if config.keys <= 64 or full or 2 * held + barriers > LAUNCH_SHARED_BYTES else 2


def _ragged(config: AttentionConfig) -> bool:
    """Whether rows of the bias may begin anywhere, so that it is read element by element."""
    return config.layout != "channels" or config.keys % 4 != 0


def _strides(config: AttentionConfig) -> dict[str, int | bool]:
    """Elements from token to token and from head to head, and where keys and values begin in a packed tensor."""
    heads, dk, dv = config.heads, config.head_size, config.value_size
    if config.layout == "split":
        rows, head, starts = (heads * dk, heads * dk, heads * dv), (dk, dk, dv), (0, 0)
    elif config.layout == "q_kv":
        both = dk + dv
        rows, head, starts = (heads * dk, heads * both, heads * both), (dk, both, both), (0, dk)
    elif config.layout == "per_head":
        rows, head, starts = (config.width,) * 3, (2 * dk + dv,) * 3, (dk, 2 * dk)
    else:
        rows, head, starts = (config.width,) * 3, (dk, dk, dv), (heads * dk, 2 * heads * dk)
    return {
        **dict(zip(("Q_ROW", "K_ROW", "V_ROW"), rows, strict=True)),
        **dict(zip(("Q_HEAD", "K_HEAD", "V_HEAD"), head, strict=True)),
        **dict(zip(("K_START", "V_START"), starts, strict=True)),
        "PACKED": config.layout not in THREE_TENSORS,
        "CHANNELS": config.layout == "channels",
        "AREA": config.keys if config.layout == "channels" else 0,
    }


def _factor(config: AttentionConfig) -> float:
    """What turns products of stored numbers into logits to the base of two."""
    return config.scale * config.q_scale * config.k_scale * _LOG2E


def _factor_refusal(factor: float) -> str | None:
    """One that is no normal FP32 number, or zero, makes of all logits one, or none."""
    if 2.0**-126 <= abs(factor) <= 2.0**126:
        return None
    return f"the factor of the logits is {factor!r}, which FP32 does not hold"


def _broadcast(bias: tuple[bool, bool, bool] | None) -> dict[str, bool]:
    return dict(zip(("BIAS_BATCH", "BIAS_HEADS", "BIAS_ROWS"), bias or (False, False, False), strict=True))
