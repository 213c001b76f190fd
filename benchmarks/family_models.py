"""What ``families.py`` goes through: every vision architecture of transformers, in small, and timm's by family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLASSES = 10
MAPPINGS = (
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "IMAGE_MATTING",
    "IMAGE_TO_IMAGE",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "BACKBONE",
    "IMAGE",
    "MASK_GENERATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
)
"""Of transformers' own lists (``MODEL_FOR_…_MAPPING_NAMES``), in the order of the table."""
HEADLESS = ("BACKBONE", "IMAGE")
"""Lists whose architectures stand in another list with a head, for the most part: only the others are taken."""
OTHER_INPUTS = (
    "MASK_GENERATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
)
"""What takes prompts, text or films beside or instead of an image: whether a refusal says so is what is measured."""

_VIT = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
_DINO = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 2}
_SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4, "image_size": 128}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_FOUR = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_PYRAMID = {"out_features": ["stage2", "stage3", "stage4"]}
_HGNET = {
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 32, 64, 96],
    "stage_mid_channels": [8, 16, 24, 32],
    "stage_out_channels": [32, 64, 96, 128],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 96, 128],
    "embedding_size": 16,
    "depths": [1, 1, 1, 1],
}
_LCNET = {
    "stem_channels": [3, 8, 16],
    "block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 24, 2, False]],
        [[3, 24, 32, 2, True]],
        [[3, 32, 48, 2, False]],
    ],
}
_STRIPES = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{name}_{ratio}ratio": [[side if name[0] != "h" else 1, side if name[0] != "v" else 1], [1, 1],
                                 [side // 2 if name[0] != "h" else 0, side // 2 if name[0] != "v" else 0]]
        for ratio, side in (("long", 7), ("mid", 5), ("short", 3))
        for name in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
    },
}  # fmt: skip
"""Strides and paddings of the blocks of a text detector that look along and across the lines."""
_DETR = {
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 20,
}
_TIMM_RESNET = {"use_timm_backbone": False, "backbone": None}
_RT_DETR = {
    **_DETR,
    "encoder_hidden_dim": 48,
    "encoder_in_channels": [32, 48, 64],
    "decoder_in_channels": [48, 48, 48],
    "hidden_expansion": 0.5,
}
_WINDOWS = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "window_block_indices": [0, 2],
    "image_size": 128,
    "out_features": ["stage2", "stage4"],
}
_TEXT = {"text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}}
_VISION = {"vision_config": {**_VIT, "image_size": 64, "patch_size": 16}, **_TEXT}


@dataclass(frozen=True)
class Small:
    """An architecture of transformers in small: settings of its configuration, and of the backbone inside it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    backbone: tuple[str, Mapping[str, Any]] | None = None
    """The configuration's class and settings; goes in as ``backbone_config``."""
    size: tuple[int, int] = (64, 64)
    channels: int = 3


_DEPTH_ANYTHING = Small(
    {
        "reassemble_hidden_size": 96,
        "neck_hidden_sizes": [16, 24, 32, 48],
        "fusion_hidden_size": 32,
        "head_hidden_size": 16,
    },
    ("Dinov2Config", {**_DINO, **_FOUR, "image_size": 56, "reshape_hidden_states": False}),
    (56, 56),
)
_SAM = Small(
    {
        "vision_config": {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "mlp_dim": 192,
            "image_size": 128,
            "window_size": 4,
            "global_attn_indexes": [1],
            "output_channels": 32,
        }
    },
    size=(128, 128),
)
SMALL: dict[str, Small] = {
    "aimv2_vision_model": Small({**_VIT, "patch_size": 16, "image_size": 64}),
    "align": Small(
        {**_TEXT, "vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 640}}
    ),
    "beit": Small({**_VIT, "num_hidden_layers": 4, "image_size": 64, "out_indices": [1, 2, 3, 4]}),
    "bit": Small({**_RESNET, "layer_type": "preactivation", "num_groups": 8}),
    "blip": Small(_VISION),
    "blip-2": Small({**_VISION, "qformer_config": {"hidden_size": 32, "num_hidden_layers": 1}}),
    "chinese_clip": Small(_VISION),
    "chmv2": Small(
        {"post_process_channels": [16, 24, 32, 48], "fusion_hidden_size": 32, "head_hidden_size": 16},
        ("DINOv3ViTConfig", {**_VIT, "num_hidden_layers": 4, "image_size": 64, **_FOUR, "return_class_token": True}),
    ),
    "clip": Small(_VISION),
    "altclip": Small(_VISION),
    "owlvit": Small(_VISION),
    "owlv2": Small(_VISION),
    "sam": _SAM,
    "sam_hq": _SAM,
    "sam2": Small(
        {
            "vision_config": {
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "hidden_size": 16,
                    "image_size": [128, 128],
                    "blocks_per_stage": [1, 1, 2, 1],
                    "embed_dim_per_stage": [16, 32, 48, 64],
                    "num_attention_heads_per_stage": [1, 2, 3, 4],
                    "window_size_per_stage": [4, 4, 4, 4],
                    "global_attention_blocks": [3],
                },
                "backbone_channel_list": [64, 48, 32, 16],
                "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
                "fpn_hidden_size": 32,
            }
        },
        size=(128, 128),
    ),
    "clipseg": Small({**_VISION, "extract_layers": [0, 1], "reduce_dim": 16}),
    "conditional_detr": Small(
        {**_DETR, **_TIMM_RESNET}, ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]}), (96, 96)
    ),
    "convnext": Small({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
    "convnextv2": Small({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
    "cvt": Small({"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    "d_fine": Small({**_RT_DETR, "feat_strides": [8, 16, 32]}, ("HGNetV2Config", {**_HGNET, **_PYRAMID}), (96, 96)),
    "dab-detr": Small(
        {**_DETR, "hidden_size": 48, **_TIMM_RESNET},
        ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]}),
        (96, 96),
    ),
    "data2vec-vision": Small({**_VIT, "num_hidden_layers": 4, "image_size": 64, "out_indices": [0, 1, 2, 3]}),
    "deformable_detr": Small(
        {**_DETR, "d_model": 64, **_TIMM_RESNET}, ("ResNetConfig", {**_RESNET, **_PYRAMID}), (96, 96)
    ),
    "deimv2": Small({**_RT_DETR}, ("HGNetV2Config", {**_HGNET, **_PYRAMID}), (96, 96)),
    "deit": Small({**_VIT, "image_size": 64}),
    "depth_anything": _DEPTH_ANYTHING,
    "detr": Small(
        {**_DETR, "d_model": 128, "decoder_attention_heads": 8, "encoder_attention_heads": 8, **_TIMM_RESNET},
        ("ResNetConfig", {**_RESNET, **_FOUR}),
        (96, 96),
    ),
    "dinat": Small({"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}),
    "dinov2": Small({**_DINO, "image_size": 56}, size=(56, 56)),
    "dinov2_with_registers": Small({**_DINO, "image_size": 64}),
    "dinov3_convnext": Small({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
    "dinov3_vit": Small({**_VIT, "image_size": 64, "num_register_tokens": 4}),
    "donut-swin": Small(_SWIN, size=(128, 128)),
    "dpt": Small(
        {
            **_VIT,
            "num_hidden_layers": 4,
            "image_size": 64,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
            "use_auxiliary_head": False,
        }
    ),
    "efficientloftr": Small(
        {
            "stage_num_blocks": [1, 1, 1, 1],
            "out_features": [16, 16, 32, 64],
            "hidden_size": 64,
            "num_attention_layers": 1,
        },
        channels=1,
    ),
    "efficientnet": Small({"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}),
    "eomt": Small({**_DINO, "num_blocks": 2, "num_queries": 20, "image_size": 64}),
    "eomt_dinov3": Small({**_VIT, "num_hidden_layers": 4, "num_blocks": 2, "num_queries": 20, "image_size": 64}),
    "focalnet": Small({"embed_dim": 24, "hidden_sizes": [24, 48, 96, 96], "depths": [1, 1, 1, 1], "image_size": 64}),
    "glpn": Small(
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        }
    ),
    "hgnet_v2": Small(_HGNET),
    "hiera": Small({"embed_dim": 24, "depths": [1, 1, 2, 1], "image_size": [128, 128]}, size=(128, 128)),
    "ijepa": Small({**_VIT, "image_size": 64}),
    "levit": Small(
        {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "image_size": 64}
    ),
    "llama4": Small(
        {
            "vision_config": {
                "hidden_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 384,
                "image_size": 56,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "vision_output_dim": 64,
            }
        },
        size=(56, 56),
    ),
    "depth_pro": Small(
        {
            "patch_size": 56,
            "fusion_hidden_size": 32,
            "intermediate_hook_ids": [3, 1],
            "intermediate_feature_dims": [32, 32],
            "scaled_images_feature_dims": [32, 32, 16],
            **{
                part: {"model_type": "dinov2", **_DINO, "image_size": 56}
                for part in ("image_model_config", "patch_model_config", "fov_model_config")
            },
        },
        size=(224, 224),
    ),
    "lw_detr_vit": Small({**_WINDOWS, "out_features": ["stage4"]}, size=(128, 128)),
    "maskformer-swin": Small(_SWIN, size=(128, 128)),
    "perceiver": Small(
        {
            "num_latents": 16,
            "d_latents": 64,
            "num_self_attends_per_block": 1,
            "num_cross_attention_heads": 1,
            "image_size": 224,
            "num_self_attention_heads": 4,
        },
        size=(224, 224),
    ),
    "timm_wrapper": Small({"architecture": "resnet18"}),
    "timm_backbone": Small({"backbone": "resnet18", "use_pretrained_backbone": False}),
    "lw_detr": Small(
        {
            **_DETR,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "projector_scale_factors": [1.0],
            "group_detr": 1,
        },
        ("LwDetrViTConfig", _WINDOWS),
        (128, 128),
    ),
    "mask2former": Small(
        {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 48,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "num_attention_heads": 4,
            "dim_feedforward": 48,
            "num_queries": 20,
        },
        ("SwinConfig", {**_SWIN, **_FOUR}),
        (128, 128),
    ),
    "maskformer": Small(
        {"fpn_feature_size": 32, "mask_feature_size": 32}, ("SwinConfig", {**_SWIN, **_FOUR}), (128, 128)
    ),
    "metaclip_2": Small(_VISION),
    "mlcd": Small({**_VIT, "image_size": 56}, size=(56, 56)),
    "mlcd_vision_model": Small({**_VIT, "image_size": 56}, size=(56, 56)),
    "mobilenet_v1": Small({"depth_multiplier": 0.25}),
    "mobilenet_v2": Small({"depth_multiplier": 0.35}),
    "mobilevit": Small(
        {"hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96], "image_size": 64}
    ),
    "mobilevitv2": Small({"width_multiplier": 0.5, "image_size": 64}),
    "oneformer": Small(
        {"hidden_dim": 32, "num_queries": 20, "encoder_layers": 1, "decoder_layers": 2},
        ("SwinConfig", {**_SWIN, **_FOUR}),
        (128, 128),
    ),
    "pixio": Small({**_VIT, "image_size": 64}),
    "poolformer": Small({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
    "pp_doclayout_v2": Small(
        {**_RT_DETR, "class_thresholds": [0.5] * CLASSES, "class_order": list(range(CLASSES))},
        ("HGNetV2Config", {**_HGNET, **_PYRAMID}),
        (96, 96),
    ),
    "pp_doclayout_v3": Small({**_RT_DETR, "x4_feat_dim": 32}, ("HGNetV2Config", {**_HGNET, **_FOUR}), (96, 96)),
    "pp_doclayout_v4": Small({**_RT_DETR}, ("HGNetV2Config", {**_HGNET, **_PYRAMID}), (96, 96)),
    "pp_ocrv5_server_det": Small(
        {
            "neck_out_channels": 32,
            "intraclass_block_config": _STRIPES,
            "scale_factor_list": [1, 2, 4, 8],
            "kernel_list": [3, 2, 2],
        },
        ("HGNetV2Config", {**_HGNET, **_FOUR}),
    ),
    "pp_ocrv6_medium_det": Small(
        {
            "neck_out_channels": 32,
            "intraclass_block_config": _STRIPES,
            "scale_factor_list": [1, 2, 4, 8],
            "kernel_list": [3, 2, 2],
        },
        ("PPLCNetV4Config", {**_LCNET, **_FOUR}),
    ),
    "pp_ocrv6_small_det": Small(
        {"neck_out_channels": 32, "layer_list_out_channels": [16, 24, 32, 48]},
        ("PPLCNetV4Config", {**_LCNET, **_FOUR}),
    ),
    "pp_lcnet_v4": Small({**_LCNET, **_FOUR}),
    "prompt_depth_anything": _DEPTH_ANYTHING,
    "pvt": Small(
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "image_size": 64,
        }
    ),
    "pvt_v2": Small(
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "image_size": 64,
        }
    ),
    "regnet": Small(
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "groups_width": 8, "embedding_size": 16}
    ),
    "resnet": Small({**_RESNET, "layer_type": "bottleneck"}),
    "rf_detr": Small(
        {**_DETR, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4, "group_detr": 1},
        (
            "RfDetrDinov2Config",
            {
                **_DINO,
                "num_windows": 2,
                "image_size": 112,
                "out_features": ["stage2", "stage4"],
                "window_block_indexes": [0, 2],
            },
        ),
        (112, 112),
    ),
    "rf_detr_dinov2": Small({**_DINO, "num_windows": 2, "image_size": 112}, size=(112, 112)),
    "rt_detr": Small(_RT_DETR, ("RTDetrResNetConfig", {**_RESNET, **_PYRAMID}), (96, 96)),
    "rt_detr_resnet": Small(_RESNET),
    "rt_detr_v2": Small(_RT_DETR, ("RTDetrResNetConfig", {**_RESNET, **_PYRAMID}), (96, 96)),
    "sapiens2": Small(
        {
            "head_config": {"upsample_out_channels": [48, 32], "conv_out_channels": [32]},
            **_VIT,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "image_size": 64,
            "num_first_full_attention_layers": 1,
            "num_last_full_attention_layers": 1,
        }
    ),
    "segformer": Small(
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        }
    ),
    "siglip": Small(_VISION),
    "siglip2": Small(_VISION),
    "siglip_vision_model": Small({**_VIT, "image_size": 64}),
    "superpoint": Small({"encoder_hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32}),
    "swiftformer": Small({"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
    "swin": Small(_SWIN, size=(128, 128)),
    "swin2sr": Small({"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 2], "image_size": 32}, size=(32, 32)),
    "swinv2": Small(_SWIN, size=(128, 128)),
    "table-transformer": Small(
        {**_DETR, **_TIMM_RESNET}, ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]}), (96, 96)
    ),
    "textnet": Small({"image_size": [64, 64]}),
    "tipsv2_dpt": Small(
        {"neck_hidden_sizes": [16, 24, 32, 48], "fusion_hidden_size": 32},
        ("Tipsv2VisionConfig", {**_DINO, **_FOUR, "image_size": 56, "reshape_hidden_states": False}),
        (56, 56),
    ),
    "tipsv2_vision_model": Small({**_DINO, "image_size": 56}, size=(56, 56)),
    "upernet": Small(
        {"hidden_size": 48, "auxiliary_channels": 16, "auxiliary_in_channels": 48},
        ("ConvNextConfig", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], **_FOUR}),
    ),
    "vit": Small({**_VIT, "image_size": 64}),
    "vit_mae": Small({**_VIT, "image_size": 64, "mask_ratio": 0.0}),
    "vit_msn": Small({**_VIT, "image_size": 64}),
    "vitdet": Small({**_DINO, "image_size": 64}),
    "vitmatte": Small(
        {"hidden_size": 96, "convstream_hidden_sizes": [16, 24, 32], "fusion_hidden_sizes": [48, 32, 24, 16]},
        ("VitDetConfig", {**_DINO, "image_size": 64, "num_channels": 4, "out_features": ["stage4"]}),
        channels=4,
    ),
    "vitpose_backbone": Small({**_DINO, "image_size": [64, 64]}),
    "yolos": Small({**_VIT, "image_size": [64, 64], "num_detection_tokens": 20}),
    "zoedepth": Small(
        {
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
            "bottleneck_features": 32,
            "bin_embedding_dim": 16,
            "num_relative_features": 16,
            "bin_configurations": [{"n_bins": 16, "min_depth": 0.001, "max_depth": 10.0}],
        },
        (
            "BeitConfig",
            {
                **_VIT,
                "num_hidden_layers": 4,
                "image_size": 64,
                **_FOUR,
                "reshape_hidden_states": False,
                "use_relative_position_bias": True,
            },
        ),
    ),
}
"""By the type of its configuration. What is not here is built as its own defaults say."""

TOWERS = (
    ("clip", "CLIPVisionModelWithProjection"),
    ("sam", "SamVisionModel"),
    ("sam_hq", "SamHQVisionModel"),
    ("sam2", "Sam2VisionModel"),
    ("owlvit", "OwlViTVisionModel"),
    ("owlv2", "Owlv2VisionModel"),
    ("align", "AlignVisionModel"),
    ("altclip", "AltCLIPVisionModel"),
    ("blip", "BlipVisionModel"),
    ("blip-2", "Blip2VisionModel"),
    ("chinese_clip", "ChineseCLIPVisionModel"),
    ("clipseg", "CLIPSegVisionModel"),
)
"""The parts that see, of what reads prompts or text besides: the kind of the whole, and the class of the part."""

TIMM = [line.split(":") for line in (Path(__file__).parent / "family_timm.txt").read_text(encoding="utf-8").split()]
"""By family, the smallest of each; then those of which a family has several kinds. Behind a name, the side of the image
where one of the network's own size takes a minute."""


def write_folder(kind: str, architecture: str, folder: Path) -> Path:
    """Write a folder with the small configuration of ``kind`` and no weights, for the class ``architecture``."""
    from resvit_export.loading.libraries import import_transformers

    transformers = import_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    small = SMALL.get(kind, Small())
    settings = dict(small.settings)
    if small.backbone is not None:
        settings["backbone_config"] = getattr(transformers, small.backbone[0])(**small.backbone[1])
    config = CONFIG_MAPPING[kind](**settings)
    config.num_labels, config.architectures = CLASSES, [architecture]
    config.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    size = {"height": small.size[0], "width": small.size[1]}
    processor = {"image_mean": mean, "image_std": std, "size": size, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder.resolve()


def four_channels() -> Iterator[tuple[Any, Any]]:
    """Images and a guess of their foreground as a fourth channel, as matting reads them: float32 [B, 4, 64, 64]."""
    import numpy as np

    random = np.random.default_rng(0)
    for _ in range(8):
        yield random.standard_normal((2, 4, 64, 64), dtype=np.float32), np.zeros(2, np.int64)
