"""Deformable attention as every model of Hugging Face's transformers has it, each in a network of one such layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resvit_export.loading.libraries import import_transformers

SIDE, WIDTH, HEADS, QUERIES = 48, 32, 4, 20
LEVELS = ((12, 12), (6, 6), (3, 3))


class Network(nn.Module):
    """A trunk of three levels, queries with boxes to look in, one deformable attention, and classes."""

    def __init__(self, attention: nn.Module, *, levels: int = 3, points_of_level: bool = True) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(
            nn.Conv2d(3 if index == 0 else WIDTH, WIDTH, 4 if index == 0 else 2, stride=4 if index == 0 else 2)
            for index in range(levels)
        )
        self.attention, self.points_of_level = attention, points_of_level
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.mix, self.boxes, self.classes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 10)
        shapes = LEVELS[:levels]
        starts = [sum(height * width for height, width in shapes[:index]) for index in range(levels)]
        self.shapes_list = list(shapes)
        self.register_buffer("shapes", torch.tensor(shapes))
        self.register_buffer("starts", torch.tensor(starts))
        self.input_shape = (3, SIDE, SIDE)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.trunk:
            x = torch.relu(stage(x))
            maps.append(x.flatten(2).transpose(1, 2))
        memory = torch.cat(maps, 1)
        queries = self.queries + self.mix(memory.mean(1, keepdim=True))  # (B, Q, C)
        boxes = self.boxes(queries).sigmoid().unsqueeze(2)  # (B, Q, 1, 4)
        if self.points_of_level:
            boxes = boxes.expand(-1, -1, len(self.shapes_list), -1)
        return self.answer(queries, memory, boxes)

    def answer(self, queries: Tensor, memory: Tensor, places: Tensor) -> Tensor:
        """Classes [B, K] of queries [B, Q, C] that look around places [B, Q, L, 2 or 4] of the memory [B, S, C]."""
        out = self.attention(
            hidden_states=queries,
            encoder_hidden_states=memory,
            reference_points=places,
            spatial_shapes=self.shapes,
            spatial_shapes_list=self.shapes_list,
            level_start_index=self.starts,
        )
        attended = out[0] if isinstance(out, tuple) else out
        return self.classes((queries + attended).relu()).mean(1)


class OfImages(Network):
    """The same as an encoder has it: the queries are the values, and look around their own places."""

    def forward(self, x: Tensor) -> Tensor:
        maps, places = [], []
        for stage, (height, width) in zip(self.trunk, self.shapes_list, strict=True):
            x = torch.relu(stage(x))
            maps.append(x.flatten(2).transpose(1, 2))
            y, across = torch.meshgrid(
                (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
            )
            places.append(torch.stack((across, y), -1).flatten(0, 1))
        memory = torch.cat(maps, 1)
        around = torch.cat(places)[None, :, None].expand(len(memory), -1, len(self.shapes_list), -1)
        return self.answer(memory, memory, around)


def _awake(network: nn.Module) -> nn.Module:
    """Offsets of a few pixels and weights that differ, which training would have given."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            size = 0.4 if value.ndim == 2 else 2.0
            value.data.copy_(size * torch.randn(value.shape, generator=generator))
    return network.eval()


def _configured(module: str, prefix: str, **settings: Any) -> nn.Module:
    """The attention of a model: some take heads and points beside the configuration, others find them there."""
    transformers = import_transformers()
    config = getattr(transformers, f"{prefix}Config")(**settings)
    models = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=["x"])
    kind = getattr(models, f"{prefix}MultiscaleDeformableAttention")
    return kind(config, *((HEADS, 4) if _takes_heads(kind) else ()))


def _takes_heads(kind: type) -> bool:
    import inspect

    return "num_heads" in inspect.signature(kind.__init__).parameters


_DETR = {"d_model": WIDTH, "num_feature_levels": 3}


def rt_detr() -> nn.Module:
    return _awake(Network(_configured("rt_detr", "RTDetr", **_DETR), points_of_level=False))


def rt_detr_v2() -> nn.Module:
    attention = _configured("rt_detr_v2", "RTDetrV2", d_model=WIDTH, decoder_attention_heads=HEADS, decoder_n_levels=3)
    return _awake(Network(attention, points_of_level=False))


def d_fine() -> nn.Module:
    settings = {"decoder_attention_heads": HEADS, "decoder_n_points": [3, 6, 3], **_DETR}
    return _awake(Network(_configured("d_fine", "DFine", **settings), points_of_level=False))


def deim() -> nn.Module:
    settings = {"decoder_attention_heads": HEADS, "decoder_n_points": [3, 6, 3], **_DETR}
    return _awake(Network(_configured("deimv2", "Deimv2", **settings), points_of_level=False))


def deformable_detr() -> nn.Module:
    return _awake(OfImages(_configured("deformable_detr", "DeformableDetr", **_DETR)))


def grounding_dino() -> nn.Module:
    return _awake(Network(_configured("grounding_dino", "GroundingDino", **_DETR)))


def omdet_turbo() -> nn.Module:
    settings = {"encoder_hidden_dim": WIDTH, "decoder_num_heads": HEADS, "num_feature_levels": 3}
    return _awake(Network(_configured("omdet_turbo", "OmDetTurbo", **settings), points_of_level=False))


def lw_detr() -> nn.Module:
    """One level, so that nothing is joined."""
    settings = {"d_model": WIDTH, "decoder_cross_attention_heads": HEADS, "num_feature_levels": 1}
    return _awake(Network(_configured("lw_detr", "LwDetr", **settings), levels=1, points_of_level=False))


def mask2former() -> nn.Module:
    return _awake(OfImages(_pixel_decoder("mask2former", "Mask2Former")))


def oneformer() -> nn.Module:
    return _awake(OfImages(_pixel_decoder("oneformer", "OneFormer")))


class _WithoutShapes(nn.Module):
    """An attention that does not take the shapes as a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, spatial_shapes: Tensor, **rest: Any) -> Any:
        return self.inner(**rest)


def _pixel_decoder(module: str, prefix: str) -> nn.Module:
    models = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=["x"])
    kind = getattr(models, f"{prefix}PixelDecoderEncoderMultiscaleDeformableAttention")
    made = kind(WIDTH, HEADS, 3, 4)
    return made if module == "oneformer" else _WithoutShapes(made)


MODELS: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made
    for made in (
        rt_detr, rt_detr_v2, d_fine, deim, deformable_detr, grounding_dino, omdet_turbo, lw_detr, mask2former,
        oneformer,
    )
}  # fmt: skip
