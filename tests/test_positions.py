"""Products that compute positions stay in FP16, found from structure; their neighbours are quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from hf_models import folder_of
from resvit_engines.targets.table import Precision
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.reference import resvit_model
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.graph.analysis import Analysis, analyse
from resvit_quantize.graph.network import network_from_onnx
from resvit_quantize.placement.placement import place
from resvit_quantize.placement.positions import position_products


def analysed(module: nn.Module, shape: tuple[int, ...], folder: Path) -> Analysis:
    program = export(module.eval(), (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim.AUTO(min=1)},))
    onnx_from_program(fold_program(program)[0], folder / "model.onnx", opset=20)
    return analyse(network_from_onnx(folder / "model.onnx"))


def found(analysis: Analysis) -> dict[str, str]:
    return {str(node.name): why for node, why in position_products(analysis).items()}


@pytest.mark.slow
def test_a_detection_transformer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    network = load_network(ModelSpec(f"hf:{folder_of('rt_detr', tmp_path / 'model')}"))
    onnx_from_program(fold_program(network.program)[0], tmp_path / "model.onnx", opset=20)
    analysis = analyse(network_from_onnx(tmp_path / "model.onnx"))
    reasons = {name.removeprefix("model."): why for name, why in found(analysis).items()}
    named = {
        "enc_score_head": "selects the queries",
        "sampling_offsets": "where GridSample reads",
        "enc_bbox_head.layers.0": "where GridSample reads",
        "bbox_embed.1.layers.0": "the detector's boxes",
        "bbox_embed.1.layers.2": "the detector's boxes",
        "class_embed.1": "the detector's scores",
        "query_pos_head.layers.1": "codes a position",
    }
    for part, why in named.items():
        assert any(part in name and why in reason for name, reason in reasons.items()), part
    for part in ("value_proj", "output_proj", "mlp.fc1", "fpn_blocks", "q_proj", "backbone"):
        assert not any(part in name for name in reasons), part
    placement = place(analysis, Precision.INT8)
    quantised = {str(edge.node.name) for edge in placement.edges}
    assert not quantised & set(found(analysis))
    assert any("mlp.fc1" in name for name in quantised)
    # What the user names goes before the rule.
    offsets = next(name for name in found(analysis) if "sampling_offsets" in name)
    asked = place(analysis, Precision.INT8, include=[offsets])
    assert offsets in {str(edge.node.name) for edge in asked.edges}


@pytest.mark.slow
def test_an_anchor_free_head_leaves_its_last_convolutions_alone(tmp_path: Path) -> None:
    module = resvit_model("fpn-nano-det")
    config = module.config
    reasons = found(analysed(module, (config.in_channels, *config.image_size), tmp_path))
    assert {why.rpartition(" ")[2] for why in reasons.values()} == {"boxes", "scores"}
    assert 2 <= len(reasons) <= 9


class Warp(nn.Module):
    """A spatial transformer: one head says where to look, the other what to make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 32, 3, padding=1)
        self.flow = nn.Conv2d(32, 2, 3, padding=1)
        self.value = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.trunk(images).relu()
        grid = self.flow(x).permute(0, 2, 3, 1).tanh()
        return self.out(F.grid_sample(self.value(x), grid, align_corners=False))


@pytest.mark.whole
def test_what_is_sampled_is_quantised_and_where_is_not(tmp_path: Path) -> None:
    assert list(found(analysed(Warp(), (3, 16, 16), tmp_path))) == ["flow/Conv"]


@pytest.mark.slow
def test_classifiers_and_segmenters_have_none(tmp_path: Path) -> None:
    for name in ("embed-nano", "fpn-nano-seg"):
        module = resvit_model(name)
        (tmp_path / name).mkdir()
        assert found(analysed(module, (module.config.in_channels, *module.config.image_size), tmp_path / name)) == {}
