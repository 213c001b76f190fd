"""Other ways to what a kernel of ours computes, in PyTorch: with what each needs around it.

What comes in and goes out is the same as for ours. Where that is 8 bits, a rival that has no such kernel pays for
dequantising and requantising; where heads must be apart, for the transposes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_peers.cases import Case

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip

Work = Callable[..., Any]


def rivals(case: Case, *, compiled: bool) -> Iterator[tuple[str, Work, Any]]:
    """Name, function of the kernel's inputs, and the context to run it in."""
    plain = FUNCTIONS[case.kind](case)
    if case.kind == "attention":
        for name, backend in BACKENDS.items():
            yield f"sdpa {name}", plain, sdpa_kernel(backend)
    else:
        yield "eager", plain, contextlib.nullcontext()
    if compiled:
        torch._dynamo.reset()
        made = torch.compile(plain, dynamic=False, mode="max-autotune-no-cudagraphs")
        yield "torch.compile", made, contextlib.nullcontext()


def inputs_of(case: Case, generator: torch.Generator) -> list[torch.Tensor]:
    """Random inputs on the GPU, none of them zeros."""
    found = []
    for index, (shape, dtype) in enumerate(zip(case.shapes, case.source(_sm()).launch.inputs, strict=True)):
        values = torch.randn(shape, generator=generator, device="cuda")
        if case.kind == "deformable" and index == 1:
            # All over the levels, which is the hardest on the cache.
            found.append(torch.rand(shape, generator=generator, device="cuda").to(TYPES[dtype]))
            continue
        if dtype == "bool":
            found.append(values > -1)
            continue
        if dtype == "int8":
            values = (values * 40).round().clamp(-128, 127)
        # Weights' scales, gains and positions: small, so that sums of thousands of products stay within FP16.
        found.append((values * 0.05).abs() if dtype == "fp32" else values.to(TYPES[dtype]))
    return found


def _sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def _real(value: torch.Tensor, scale: float) -> torch.Tensor:
    return value if value.dtype == torch.float16 else value.to(torch.float16) * scale


def _stored(value: torch.Tensor, dtype: str, scale: float) -> torch.Tensor:
    if dtype == "int8":
        return (value / scale).round().clamp(-128, 127).to(torch.int8)
    if dtype == "fp8":
        return (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return value.to(TYPES[dtype])


def _attention(case: Case) -> Work:
    config = case.config
    heads, size, value_size = config.heads, config.head_size, config.value_size

    def work(packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        batch = packed.shape[0]
        real = _real(packed, config.q_scale)
        if config.layout == "channels":
            # (B, 3 * H * D, h, w) -> three of (B, H, N, D)
            q, k, v = real.flatten(2).view(batch, 3, heads, size, -1).transpose(-1, -2).unbind(1)
        else:
            # (B, N, 3 * H * D) -> three of (B, H, N, D)
            q, k, v = real.view(batch, -1, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        if config.layout == "channels":
            q, k, v = (part.contiguous() for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=config.scale)
        if config.layout == "channels":
            y = y.transpose(-1, -2).reshape(batch, heads * value_size, *packed.shape[2:])
        else:
            y = y.transpose(1, 2).reshape(batch, -1, heads * value_size)
        return _stored(y, config.out_dtype, config.out_scale)

    return work


def _bridge(case: Case) -> Work:
    config = case.config

    def work(image: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> Any:
        others = list(rest)
        if config.dtype in ("int8", "fp8"):
            weight = weight.to(torch.float16) * others.pop(0).to(torch.float16)[:, None]
        table = others.pop(0).to(torch.float16)
        y = F.conv2d(_real(image, config.in_scale), weight[:, :, None, None]).flatten(2).transpose(1, 2)
        first = table[: config.prefix].expand(len(y), -1, -1)
        tokens = torch.cat([first, y + table[config.prefix :]], 1)
        if not config.norm:
            return tokens
        gamma, beta = (value.to(torch.float16) for value in others)
        normal = F.layer_norm(tokens, (config.embed,), gamma, beta, config.eps)
        return tokens, _stored(normal, config.out_dtype, config.out_scale)

    return work


def _deformable(case: Case) -> Work:
    config = case.config
    heads, size = config.heads, config.head_size

    def work(value: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        batch, queries = places.shape[:2]
        # In FP32, as autocast has grid_sample: places in FP16 are off by up to a tenth of a pixel.
        real = _real(value, config.value_scale).float().view(batch, -1, heads, size)
        # (B, Q, H, P, 2) -> (B * H, Q, P, 2) of each level
        grids = (2 * places.float() - 1).transpose(1, 2).flatten(0, 1).split(config.points, -2)
        areas = [height * width for height, width in zip(config.heights, config.widths, strict=True)]
        samples = []
        for level, grid, height, width in zip(real.split(areas, 1), grids, config.heights, config.widths, strict=True):
            image = level.permute(0, 2, 3, 1).reshape(batch * heads, size, height, width)
            samples.append(F.grid_sample(image, grid, align_corners=False))
        shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        y = (torch.cat(samples, -1) * shares).sum(-1).view(batch, heads * size, queries).transpose(1, 2)
        return _stored(y.contiguous(), config.out_dtype, config.out_scale)

    return work


FUNCTIONS: dict[str, Callable[[Case], Work]] = {
    "attention": _attention, "bridge": _bridge, "deformable": _deformable,
}  # fmt: skip
