"""The bridge from trunk to transformer in one kernel: 1x1 convolution, token order, class token, position, LayerNorm.

The map [B, C, h, w] is read where it lies: position p of it is row p of the tokens, so flatten and transpose are only
the order in which a tile is read. Row t of a table [T, E] is added to token t: position, bias and class token, which
are all constants, folded into one on the host. The first ``prefix`` tokens are rows of the table and nothing else.

Memory traffic: the map, the weight and the table once (a weight comes again from L2 for every few tokens), the tokens
once, and their normalised copy once; a normalising program reads its own tokens again, from L1 or L2. With B images of
C channels in i bytes an element and E values a token of 2 bytes: B h w C i + C E i + 4 T E + 2 B T E (+ B T E times
the bytes of the normalised element). Floating-point work: 2 B h w C E on tensor cores, and about 10 a token's value.

The normalised output is the LayerNorm of the tokens as they are written, in 16 bits, as a graph of separate nodes
would have it. Statistics: every chunk of a row in two passes about the first chunk's mean, chunks merged by Chan,
Golub and LeVeque's formula (1983).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resvit_engines.kernels.launch import ITEM_SIZES, Extent, Launch, Result, Source, dim
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

_WIDEST = 4096


@dataclass(frozen=True)
class BridgeConfig:
    """What one such node computes. ``prefix`` counts the tokens before those of the map (1 with a class token).

    ``in_scale`` is the map's, for 8-bit maps; ``out_dtype`` and ``out_scale`` are those of the normalised output,
    which is there if ``norm``. ``batch`` is the one that tiles are chosen for; the kernel runs any.
    """

    channels: int
    height: int
    width: int
    embed: int
    prefix: int = 1
    dtype: str = "fp16"
    in_scale: float = 1.0
    token_dtype: str = "fp16"  # noqa: S105 - a token of a transformer
    norm: bool = False
    eps: float = 1e-6
    out_dtype: str = "fp16"
    out_scale: float = 1.0
    batch: int = 1

    @property
    def area(self) -> int:
        """Positions of the map."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.prefix + self.area


def bridge_reference(config: BridgeConfig, *inputs: Array) -> tuple[Array, ...]:
    """The outputs (tokens; if ``norm``, normalised) as their tensors hold them, in float64.

    Inputs in the kernel's order: map [B, C, h, w], weight [E, C], weight_scale [E] if they have 8 bits, table [T, E],
    and, if ``norm``, gamma [E], beta [E].
    """
    image, weight, *rest = (value.astype(np.float64) for value in inputs)
    if config.dtype in EIGHT_BIT:
        weight = weight * rest.pop(0)[:, None] * config.in_scale
    product = image.reshape(len(image), config.channels, -1).transpose(0, 2, 1) @ weight.T
    tokens = np.concatenate([np.zeros((len(image), config.prefix, config.embed)), product], 1) + rest.pop(0)
    tokens = stored(tokens, config.token_dtype)
    if not config.norm:
        return (tokens,)
    gamma, beta = rest
    return tokens, stored(layer_norm(tokens, gamma, beta, config.eps), config.out_dtype, config.out_scale)


def layer_norm(tokens: Array, gamma: Array, beta: Array, eps: float) -> Array:
    """LayerNorm over the last dimension in float64: the definition (ONNX LayerNormalization)."""
    distance = tokens - tokens.mean(-1, keepdims=True)
    normalised: Array = distance / np.sqrt((distance**2).mean(-1, keepdims=True) + eps) * gamma + beta
    return normalised


def bridge_refusal(config: BridgeConfig, sm: int) -> str | None:
    """Why there is no such kernel for a GPU; None where there is."""
    if min(config.channels, config.height, config.width, config.embed, config.batch) < 1 or config.prefix < 0:
        return "a size is below 1"
    if max(config.channels * config.area, config.tokens * config.embed, config.channels * config.embed) >= 2**30:
        return "the map, the tokens or the weight has 2^30 elements or more"
    if config.norm and config.embed > _WIDEST:
        return f"tokens of {config.embed} values are not normalised whole (up to {_WIDEST} are)"
    if config.dtype not in (*FLOATS, *EIGHT_BIT):
        return f"the map cannot be {config.dtype}"
    if config.token_dtype not in FLOATS:
        return f"tokens are {' or '.join(FLOATS)}, not {config.token_dtype}"
    if config.norm and config.out_dtype not in (*FLOATS, *EIGHT_BIT):
        return f"the normalised tokens cannot be {config.out_dtype}"
    return (
        dtype_refusal(sm, config.dtype, *([config.out_dtype] if config.norm else []))
        or scale_refusal("the map's scale", config.in_scale, config.dtype)
        or scale_refusal("eps", config.eps)
        or scale_refusal("the output's scale", config.out_scale, config.out_dtype)
    )


def bridge_source(config: BridgeConfig, sm: int) -> Source:
    """The kernel for a GPU (87 is compute capability 8.7).

    Raises:
        ResvitError: IMPOSSIBLE with the reason of ``bridge_refusal``.
    """
    require_served("bridge", bridge_refusal(config, sm))
    positions, columns, depth, warps, stages = _tiles(config, sm)
    pointer = POINTERS[config.dtype]
    scaled = config.dtype in EIGHT_BIT
    sizes = (dim(0, 0), Extent(config.tokens), Extent(config.embed))
    programs = -(-config.area // positions) * (1 if config.norm else -(-config.embed // columns))
    return Source(
        module="bridge",
        function="bridge",
        arguments=(
            ("image", pointer),
            ("weight", pointer),
            *([("weight_scale", "*fp32")] if scaled else []),
            ("table", "*fp32"),
            *([("gamma", "*fp32"), ("beta", "*fp32")] if config.norm else []),
            ("tokens", POINTERS[config.token_dtype]),
            *([("normal", POINTERS[config.out_dtype])] if config.norm else []),
        ),
        constants={
            **({} if scaled else {"weight_scale": None}),
            **({} if config.norm else {"gamma": None, "beta": None, "normal": None}),
            "CHANNELS": config.channels,
            "AREA": config.area,
            "EMBED": config.embed,
            "PREFIX": config.prefix,
            "IN_SCALE": config.in_scale,
            "EPS": config.eps,
            "INVERSE": 1.0 / config.out_scale,
            "BM": positions,
            "BN": columns,
            "BK": depth,
            "COLUMNS": max(16, power_of_two(config.embed)),
        },
        warps=warps,
        stages=stages,
        launch=Launch(
            inputs=(
                config.dtype,
                config.dtype,
                *(["fp32"] if scaled else []),
                "fp32",
                *(["fp32", "fp32"] if config.norm else []),
            ),
            scalars=(),
            outputs=(
                Result(config.token_dtype, sizes),
                *([Result(config.out_dtype, sizes)] if config.norm else []),
            ),
            grid=(dim(0, 0, factor=programs), Extent(), Extent()),
        ),
    )


def _tiles(config: BridgeConfig, sm: int) -> tuple[int, int, int, int, int]:
    """Positions, values and channels of a tile, warps, stages: the largest tile that still fills the GPU.

    A large tile reads the map and the weight less often; a normalising program computes whole tokens, so at batch 1
    only few positions to a program give every multiprocessor some.
    """
    depth = 64 if config.dtype in EIGHT_BIT else 32
    choices = [(64, 128, 8), (32, 128, 4), (16, 128, 4)] if config.norm else [(64, 128, 8), (32, 64, 4)]

    def fills(positions: int, columns: int) -> bool:
        programs = -(-config.area // positions) * (1 if config.norm else -(-config.embed // columns))
        return config.batch * programs >= multiprocessors_of(sm)

    positions, columns, warps = next((choice for choice in choices if fills(*choice[:2])), choices[-1])
    return positions, columns, depth, warps, 3


def traffic_bytes(config: BridgeConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that must cross memory for input ``shapes``."""
    item = ITEM_SIZES[config.dtype]
    written = ITEM_SIZES[config.token_dtype] + (ITEM_SIZES[config.out_dtype] if config.norm else 0)
    vectors = 4 * config.embed * ((config.dtype in EIGHT_BIT) + 2 * config.norm)
    read = math.prod(shapes[0]) * item + config.channels * config.embed * item + 4 * config.tokens * config.embed
    return read + vectors + shapes[0][0] * config.tokens * config.embed * written


def operations(config: BridgeConfig, shapes: Sequence[Sequence[int]]) -> int:
    """Floating-point (or integer) operations for input ``shapes``: those on tensor cores, the rest is below 1%."""
    return 2 * math.prod(shapes[0]) * config.embed
