"""The reference hybrids by name: three joins in four sizes, mobile ones, and some with other heads. Needs no torch."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_export.models.config import Block, HybridConfig, Join, Stem, Task

_FASHION_MNIST: dict[str, Any] = {
    "image_size": (28, 28),
    "in_channels": 1,
    "mean": (0.2860,),
    "std": (0.3530,),
    "num_classes": 10,
}
_IMAGENET: dict[str, Any] = {
    "image_size": (224, 224),
    "in_channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
}
_RESNET_WIDTHS = (256, 512, 1024, 2048)

_SIZES: dict[str, dict[str, Any]] = {
    # Trains on two CPU cores in minutes; less than 2 MB of FP32 weights.
    "nano": _FASHION_MNIST
    | {"stem": Stem.SMALL, "stem_width": 32, "block": Block.BASIC}
    | {"stage_depths": (1, 1), "stage_widths": (32, 64), "dim": 64, "depth": 3, "head_dim": 32, "mlp_ratio": 2},
    "tiny": _IMAGENET
    | {"stem": Stem.RESNET, "stem_width": 32, "block": Block.BASIC}
    | {"stage_depths": (2, 2, 2, 2), "stage_widths": (32, 64, 128, 256)}
    | {"dim": 192, "depth": 12, "head_dim": 64},
    # R26+ViT-S/32 (Steiner et al. 2022).
    "small": _IMAGENET
    | {"stem": Stem.RESNET, "stem_width": 64, "block": Block.BOTTLENECK}
    | {"stage_depths": (2, 2, 2, 2), "stage_widths": _RESNET_WIDTHS}
    | {"dim": 384, "depth": 12, "head_dim": 64},
    # R50+ViT-B/16 (Dosovitskiy et al. 2021): the fourth stage's blocks are moved into the third.
    "base": _IMAGENET
    | {"stem": Stem.RESNET, "stem_width": 64, "block": Block.BOTTLENECK}
    | {"stage_depths": (3, 4, 9), "stage_widths": _RESNET_WIDTHS[:3]}
    | {"dim": 768, "depth": 12, "head_dim": 64},
}

# The finest level gives as many tokens as the next one, so that 224 pixels make 442 tokens: TensorRT fuses INT8
# attention up to 512.
_JOINS: dict[Join, dict[str, dict[str, Any]]] = {
    Join.EMBED: {size: {} for size in _SIZES},
    Join.FPN: {
        "nano": {"depth": 2, "pyramid_width": 32, "level_patches": (2, 1)},
        "tiny": {"pyramid_width": 64, "level_patches": (2, 1, 1)},
        "small": {"pyramid_width": 128, "level_patches": (2, 1, 1)},
        "base": {
            "stage_depths": (3, 4, 6, 3),
            "stage_widths": _RESNET_WIDTHS,
            "pyramid_width": 256,
            "level_patches": (2, 1, 1),
        },
    },
    Join.DUAL: {
        "nano": {"depth": 1, "fusion_depth": 2, "patch_size": 4},
        "tiny": {"depth": 8, "fusion_depth": 4, "patch_size": 16},
        "small": {"depth": 8, "fusion_depth": 4, "patch_size": 16},
        "base": {"depth": 8, "fusion_depth": 4, "patch_size": 16},
    },
}

# For scenes of many items (resvit_calibrate.readers.scenes). Any hybrid takes a `task`; these have the right size too.
_SCENES: dict[str, Any] = {
    "image_size": (96, 96),
    "stem_width": 16,
    "stage_depths": (1, 1, 1, 1),
    "stage_widths": (16, 32, 64, 128),
    "depth": 2,
}
_HEADS: dict[str, dict[str, Any]] = {
    "fpn-nano-det": _SCENES | {"task": Task.DETECTION, "pyramid_width": 64, "level_patches": (2, 1)},
    # A background beside the ten classes.
    "fpn-nano-seg": _SCENES
    | {"task": Task.SEGMENTATION, "num_classes": 11, "pyramid_width": 32, "level_patches": (4, 2, 1)},
    "embed-nano-seg": _SCENES | {"task": Task.SEGMENTATION, "num_classes": 11},
}

# Large enough that 8 bits pay on a Jetson, small enough to be trained on two CPU cores in minutes.
_ENLARGED: dict[str, dict[str, Any]] = {
    "embed-mini": {"image_size": (64, 64), "stem": Stem.RESNET, "stem_width": 64}
    | {"stage_depths": (2, 2, 2), "stage_widths": (64, 128, 256), "dim": 128, "depth": 2},
}

# What phones and small Jetsons run (MobileNetV3, Howard et al. 2019; its trunk in front of a ViT).
_MOBILE: dict[str, dict[str, Any]] = {
    "mobile-nano": {"stem_width": 16, "stage_depths": (1, 2), "stage_widths": (32, 48)},
    "mobile-tiny": {"stem_width": 16, "stage_depths": (1, 2, 3, 2), "stage_widths": (16, 32, 48, 96), "depth": 4},
    "mobile-small": {"stem_width": 16, "stage_depths": (1, 2, 3, 4), "stage_widths": (16, 32, 64, 160), "depth": 6},
}

MODEL_NAMES: tuple[str, ...] = (
    *(f"{join.value}-{size}" for join in Join for size in _SIZES),
    *_ENLARGED,
    *_MOBILE,
    *_HEADS,
)


def preset(name: str) -> HybridConfig:
    """The config of a reference hybrid, such as ``embed-nano``.

    Raises ``ResvitError`` with the nearest names when there is none of that name.
    """
    if name not in MODEL_NAMES:
        near = get_close_matches(name, MODEL_NAMES, n=3, cutoff=0.5)
        raise ResvitError(
            f"There is no reference model named {name!r}.",
            f"Did you mean {' or '.join(near)}?" if near else f"Choose one of {', '.join(MODEL_NAMES)}.",
        )
    kind, size = name.split("-")[:2]
    size = "nano" if name in _ENLARGED else size
    join = Join.EMBED if name in _MOBILE else Join(kind)
    mobile = {"stem": Stem.SMALL, "block": Block.MOBILE} | _MOBILE[name] if name in _MOBILE else {}
    values = _SIZES[size] | _JOINS[join][size] | mobile | _ENLARGED.get(name, {}) | _HEADS.get(name, {})
    return HybridConfig(**values, name=name, join=join)
