"""Small models of Hugging Face's transformers as folders: the architectures that people deploy, in a size for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resvit_export.loading.libraries import import_transformers

CLASSES = 10
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def folder_of(kind: str, folder: Path, *, weights: bool = False) -> Path:
    """Write ``kind`` (rt_detr, detr, vit or segformer) into ``folder``: its configuration, and weights if asked for."""
    transformers = import_transformers()
    config, name, processor = _KINDS[kind](transformers)
    config.architectures = [name]
    config.num_labels = CLASSES
    if weights:
        getattr(transformers, name)(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _resnet(transformers: Any, **settings: Any) -> Any:
    kind = transformers.RTDetrResNetConfig if settings.pop("rt_detr", False) else transformers.ResNetConfig
    return kind(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic", **settings)


def _rt_detr(transformers: Any) -> tuple[Any, str, dict[str, Any]]:
    config = transformers.RTDetrConfig(
        backbone_config=_resnet(transformers, rt_detr=True, out_features=["stage2", "stage3", "stage4"]),
        encoder_in_channels=[24, 32, 48],
        encoder_hidden_dim=32,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=20,
        hidden_expansion=0.5,
    )
    size = {"height": 96, "width": 96}
    return config, "RTDetrForObjectDetection", {"do_normalize": False, "size": size, "resample": 2}


def _detr(transformers: Any) -> tuple[Any, str, dict[str, Any]]:
    config = transformers.DetrConfig(
        backbone_config=_resnet(transformers, out_features=["stage4"]),
        use_timm_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=20,
    )
    size = {"shortest_edge": 96, "longest_edge": 160}
    return config, "DetrForObjectDetection", {"image_mean": _MEAN, "image_std": _STD, "size": size, "resample": 2}


def _vit(transformers: Any) -> tuple[Any, str, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return (
        config,
        "ViTForImageClassification",
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "resample": 3},
    )


def _segformer(transformers: Any) -> tuple[Any, str, dict[str, Any]]:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32,
    )
    size = {"height": 96, "width": 96}
    return config, "SegformerForSemanticSegmentation", {"image_mean": _MEAN, "image_std": _STD, "size": size}


_KINDS = {"rt_detr": _rt_detr, "detr": _detr, "vit": _vit, "segformer": _segformer}
