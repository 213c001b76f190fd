"""Queries, keys and values in 8 bits, for attention whose products run on 8-bit tensor cores.

One tensor holds all three, and Q/DQ has one scale per tensor, but their ranges differ. So each part is multiplied up to
the range of the largest before it is quantised, and the node's own scales, one for each part, undo that: as if each had
been quantised by itself. The factors are rounded to FP16 first and the scales follow from the rounded ones. What is
lost is the rounding to 8 bits and, of the smaller parts, that of the product, which is 2^-11 of a value at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.attention import AttentionConfig
from resvit_quantize.fusion.attention import Attention
from resvit_quantize.fusion.attention_node import Inserter
from resvit_quantize.fusion.match import RefusedError
from resvit_quantize.graph.network import add_initializer

Amax = Callable[[str], float]
"""The clip of a tensor, by its name."""

_TINY = 2.0**-18
"""Scales are stored in FP16; of one that is smaller, fewer than six bits are left."""
_MOST = 2.0**15
"""What FP16 holds of a factor."""
_REACH = 60000.0
"""What FP16 holds of a value, with some room."""
_LARGEST = {"int8": 127.0, "fp8": 448.0}
STORED = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


def narrowed(attention: Attention, amax: Amax, dtype: str) -> tuple[Attention, tuple[float, ...]]:
    """The same attention with operands in ``int8`` or ``fp8``, and the scale of each tensor that it reads.

    Raises:
        RefusedError: where the range of an operand is not known, or is nothing.
    """
    clips = [clip_of(str(value.name), amax) for value in attention.block.operands]
    largest = _LARGEST[dtype]
    reach = f"its operands reach to {', '.join(f'{clip:.3g}' for clip in clips)}"
    if attention.config.dtype != "fp16":
        raise RefusedError(f"its operands are {attention.config.dtype.upper()}, and only FP16 is quantised for it")
    if not all(0.0 < clip < _REACH for clip in clips):
        raise RefusedError(reach)
    shared = {"split": (0, 1, 2), "q_kv": (0, 1, 1)}.get(attention.config.layout, (0, 0, 0))
    # The scale of the tensor that holds a part is that of the largest part in it.
    held = [max(clip for clip, other in zip(clips, shared, strict=True) if other == holder) for holder in shared]
    rounded = [_scale(clip, largest) for clip in held]
    if min(rounded) < _TINY or max(whole / clip for whole, clip in zip(held, clips, strict=True)) > _MOST:
        raise RefusedError(f"{reach}, and one scale in FP16 does not serve that")
    factors = [
        1.0 if clip == whole else float(np.float16(scale * largest / clip))
        for clip, whole, scale in zip(clips, held, rounded, strict=True)
    ]
    own = [scale / factor for scale, factor in zip(rounded, factors, strict=True)]
    config = dataclasses.replace(
        attention.config, dtype=dtype, pv="fp16", q_scale=own[0], k_scale=own[1], v_scale=own[2]
    )
    return dataclasses.replace(attention, config=config), tuple(factors)


def clip_of(name: str, amax: Amax) -> float:
    """The clip of a tensor.

    Raises:
        RefusedError: where its range is not known.
    """
    try:
        return amax(name)
    except KeyError as error:
        raise RefusedError(f"the range of {error} was not calibrated") from error


def scale_of(clip: float, dtype: str) -> float:
    """The scale of a tensor in ``int8`` or ``fp8``, as FP16 holds it.

    Raises:
        RefusedError: where FP16 holds too little of it.
    """
    scale = _scale(clip, _LARGEST[dtype]) if 0.0 < clip < _REACH else 0.0
    if scale < _TINY:
        raise RefusedError(f"its values reach to {clip:.3g}, and one scale in FP16 does not serve that")
    return scale


def insert(model: ir.Model, attention: Attention, factors: tuple[float, ...]) -> Attention:
    """Put the factors and quantisers behind the tensors that ``attention`` (as ``narrowed`` gave it) reads.

    What must be rearranged is so in 16 bits: ONNX Runtime neither transposes nor reshapes FP8.
    """
    config, inserter = attention.config, Inserter(model, attention.before)
    scales = [config.q_scale * factors[0], config.k_scale * factors[1], config.v_scale * factors[2]]
    made: dict[ir.Value, ir.Value] = {}
    for index, value in enumerate(attention.inputs):
        if value in made:
            continue
        source, name = inserter.tokens(value, index, attention), f"{value.name}/attention/{attention.before.name}"
        vector = _vector(config, factors, index)
        if np.any(vector != 1.0):
            factor = add_initializer(model, f"{name}/factor", vector.astype(np.float16))
            source = inserter.node("Mul", [source, factor], name)
        made[value] = inserter.quantised(source, scales[index], STORED[config.dtype], name)
    return dataclasses.replace(attention, inputs=tuple(made[value] for value in attention.inputs), sequence_first=False)


def _scale(clip: float, largest: float) -> float:
    """The FP16 number next to clip / largest that still lets a value of the clip keep within half a step."""
    scale = np.float16(clip / largest)
    if float(scale) * (largest + 0.5) < clip:
        scale = np.nextafter(scale, np.float16(np.inf))
    return float(scale)


def _vector(config: AttentionConfig, factors: tuple[float, ...], index: int) -> np.ndarray:
    """The factor of every channel of one input."""
    heads, dk, dv = config.heads, config.head_size, config.value_size
    q, k, v = factors
    if config.layout == "split":
        return np.full(heads * (dv if index == 2 else dk), factors[index])
    if config.layout == "q_kv":
        return np.full(heads * dk, q) if index == 0 else np.tile(np.repeat([k, v], [dk, dv]), heads)
    if config.layout == "per_head":
        return np.tile(np.repeat([q, k, v], [dk, dk, dv]), heads)
    whole = np.repeat([q, k, v], [heads * dk, heads * dk, heads * dv])
    return whole.reshape(-1, 1, 1) if config.layout == "channels" else whole
