"""Every shape at which the reference hybrids call a kernel of ours.

Sizes are those of timm's ``vit_small_r26_s32`` (224, 384), ``vit_base_r50_s16`` (224, 384; DPT-Hybrid's backbone is the
latter), ``vit_large_r50_s32`` (224, 384), ``mobilevit_s`` (256), and ``botnet26t_256`` and ``botnet50ts_256``; for
deformable attention, of the detectors and segmenters that have it, as they are published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.kernels import attention, bridge, deformable
from resvit_engines.kernels.attention import AttentionConfig, attention_source
from resvit_engines.kernels.bridge import BridgeConfig, bridge_source
from resvit_engines.kernels.deformable import DeformableConfig, deformable_source
from resvit_engines.kernels.launch import Source

BATCHES = (1, 8, 32)
DTYPES = ("fp16", "int8", "fp8")
SCALE = 0.03
"""Of every 8-bit tensor here: nothing's speed depends on it."""


@dataclass(frozen=True)
class Model:
    """A hybrid: tokens and the trunk's last map (channels, side), embedding and heads. ``models`` share these sizes."""

    name: str
    channels: int
    side: int
    embed: int
    heads: int
    class_token: bool = True

    @property
    def tokens(self) -> int:
        """The length of its sequences."""
        return self.side**2 + self.class_token


VITS = (
    Model("R26+ViT-S 224", 2048, 7, 384, 6),
    Model("R26+ViT-S 384", 2048, 12, 384, 6),
    Model("R50+ViT-B 224", 1024, 14, 768, 12),
    Model("R50+ViT-B 384, DPT-Hybrid", 1024, 24, 768, 12),
    Model("R50+ViT-L 224", 2048, 7, 1024, 16),
    Model("R50+ViT-L 384", 2048, 12, 1024, 16),
)
MOBILEVIT = (("MobileViT-S 32x32", 256, 144), ("MobileViT-S 16x16", 64, 192), ("MobileViT-S 8x8", 16, 240))
"""Patches of 2 x 2: four sequences an image, of a quarter of the map's positions; four heads."""
BOTNET = (
    ("BoTNet 32x32, D 32", 32, 32),
    ("BoTNet 16x16, D 64", 16, 64),
    ("BoTNet 16x16, D 128", 16, 128),
    ("BoTNet 8x8, D 128", 8, 128),
)
"""Side and head size; four heads and a bias of relative positions for each image and head."""

_DETR_800 = ((100, 50, 25, 13), (134, 67, 34, 17), (4, 4, 4, 4))
"""Heights, widths and points of the levels of an image of 800 x 1066."""
PYRAMIDS = (
    ("RT-DETR 640, decoder", ((80, 40, 20), (80, 40, 20), (4, 4, 4)), 300),
    ("D-FINE 640, decoder", ((80, 40, 20), (80, 40, 20), (3, 6, 3)), 300),
    ("Grounding DINO 800, decoder", _DETR_800, 900),
    ("Deformable DETR 800, encoder", _DETR_800, 17821),
    ("Mask2Former 1024, pixel decoder", ((32, 64, 128), (32, 64, 128), (4, 4, 4)), 21504),
)
"""Levels and queries; all have eight heads of 32."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. ``shapes`` are those of its inputs, in order."""

    kind: str
    model: str
    dtype: str
    batch: int
    config: Any
    shapes: tuple[tuple[int, ...], ...]
    source: Callable[[int], Source]
    bytes: int
    """What must cross memory."""
    operations: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.kind} {self.model} {self.dtype} batch {self.batch}"


def all_cases(
    kinds: Sequence[str] = (), dtypes: Sequence[str] = DTYPES, batches: Sequence[int] = BATCHES
) -> Iterator[Case]:
    """Every case of some kinds (all, if none is named)."""
    for kind, make in {"attention": _attention, "bridge": _bridge, "deformable": _deformable}.items():
        if not kinds or kind in kinds:
            for dtype in dtypes:
                for batch in batches:
                    yield from make(dtype, batch)


def _scale(dtype: str) -> float:
    return SCALE if dtype in ("int8", "fp8") else 1.0


def _attention(dtype: str, batch: int) -> Iterator[Case]:
    def case(model: str, shapes: Sequence[tuple[int, ...]], heads: int, size: int, tokens: int, **more: Any) -> Case:
        scales = dict.fromkeys(("q_scale", "k_scale", "v_scale", "out_scale"), _scale(dtype))
        kinds = {"dtype": dtype, "out_dtype": dtype, "pv": dtype, **scales, "batch": shapes[0][0]}
        config = AttentionConfig(heads, size, size, size**-0.5, tokens, tokens, **{**kinds, **more})
        return Case(
            "attention", model, dtype, batch, config, tuple(shapes), lambda sm: attention_source(config, sm),
            attention.traffic_bytes(config, shapes), attention.operations(config, shapes),
        )  # fmt: skip

    for vit in VITS:
        sizes = ([(batch, vit.tokens, 3 * vit.embed)], vit.heads, vit.embed // vit.heads, vit.tokens)
        yield case(vit.name, *sizes)
        if dtype != "fp16":
            yield case(f"{vit.name}, shares in FP16", *sizes, pv="fp16")
    for name, tokens, embed in MOBILEVIT:
        yield case(name, [(4 * batch, tokens, 3 * embed)], 4, embed // 4, tokens)
    for name, side, size in BOTNET:
        tokens = side * side
        shapes = [(batch, 12 * size, side, side), (batch, 4, tokens, tokens)]
        yield case(name, shapes, 4, size, tokens, layout="channels", area=(side, side), bias=(True, True, True))


def _bridge(dtype: str, batch: int) -> Iterator[Case]:
    for vit in VITS:
        config = BridgeConfig(
            vit.channels, vit.side, vit.side, vit.embed, prefix=int(vit.class_token), dtype=dtype,
            in_scale=_scale(dtype), norm=True, out_dtype=dtype, out_scale=_scale(dtype), batch=batch,
        )  # fmt: skip
        eight_bit = dtype in ("int8", "fp8")
        shapes = (
            (batch, vit.channels, vit.side, vit.side),
            (vit.embed, vit.channels),
            *([(vit.embed,)] if eight_bit else []),
            (vit.tokens, vit.embed),
            (vit.embed,),
            (vit.embed,),
        )
        yield Case(
            "bridge", vit.name, dtype, batch, config, shapes, lambda sm, config=config: bridge_source(config, sm),
            bridge.traffic_bytes(config, shapes), bridge.operations(config, shapes),
        )  # fmt: skip


def _deformable(dtype: str, batch: int) -> Iterator[Case]:
    for name, (heights, widths, points), queries in PYRAMIDS:
        config = DeformableConfig(
            8, 32, heights, widths, points, queries, dtype=dtype, out_dtype=dtype, value_scale=_scale(dtype),
            out_scale=_scale(dtype), batch=batch,
        )  # fmt: skip
        sampled = (batch, queries, config.heads, config.samples)
        shapes = ((batch, config.positions, 8 * 32), (*sampled, 2), sampled)
        yield Case(
            "deformable", name, dtype, batch, config, shapes, lambda sm, config=config: deformable_source(config, sm),
            deformable.traffic_bytes(config, shapes), deformable.operations(config, shapes),
        )  # fmt: skip
