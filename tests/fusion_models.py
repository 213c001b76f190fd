"""Small networks of every family, exported and quantised as a build does it, for tests of the graph rewrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_engines.progress import SILENT
from resvit_engines.targets.table import Precision
from resvit_export.loading.libraries import import_timm
from resvit_export.loading.source import NetworkSource
from resvit_export.loading.spec import ModelSpec
from resvit_export.stage import File
from resvit_export.stages.export import Export
from resvit_export.stages.fold import PROGRAM, Fold
from resvit_quantize.fusion.fuse import Operands
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

PRECISIONS = (Precision.FP16, Precision.INT8)
WIDTH, HEADS = 32, 2


class Separate(nn.Module):
    """Attention with a linear layer each for queries, keys and values, as HuggingFace's ViT and DPT have it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).view(x.shape[0], -1, HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)
            for one in (self.query, self.key, self.value)
        )
        shares = torch.softmax(q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5, -1)
        mixed = (shares @ v).permute(0, 2, 1, 3).contiguous().view(x.shape[0], -1, WIDTH)
        return x + self.dense(mixed)


class Multihead(nn.Module):
    """PyTorch's own, with the batch first or second."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        mixed, _ = self.inner(y, y, y, need_weights=False)
        return x + (mixed if self.batch_first else mixed.transpose(0, 1))


class Tokens(nn.Module):
    """A small trunk, a 1x1 projection, positions, something with attention, and a head."""

    input_shape = (3, 32, 32)

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.ReLU())
        self.proj = nn.Conv2d(32, WIDTH, 1)
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks, self.head = blocks, nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(self.trunk(x)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


def separate() -> nn.Module:
    return Tokens(Separate())


def multihead() -> nn.Module:
    return Tokens(Multihead(batch_first=True))


def multihead_batch_second() -> nn.Module:
    return Tokens(Multihead(batch_first=False))


def encoder_layer() -> nn.Module:
    return Tokens(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, norm_first=True, dropout=0.0))


def timm_vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=64, depth=1)


def timm_hybrid() -> nn.Module:
    return _timm("vit_tiny_r_s16_p8_224", img_size=64, depth=1)


def timm_resnet_hybrid() -> nn.Module:
    """As R26+ViT-S/32, with one block of each: a trunk with group norms, a 1x1 projection behind it, a class token."""
    import_timm()
    from timm.models import vision_transformer_hybrid as hybrid

    sizes = {"patch_size": 1, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 10}
    trunk = hybrid._resnetv2((1,))
    return _awake(hybrid._create_vision_transformer_hybrid("vit_small_r26_s32_224", backbone=trunk, **sizes), 32)


def mobilevit() -> nn.Module:
    import_timm()
    from timm.models.byobnet import ByobNet, ByoModelCfg
    from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block

    block = _mobilevit_block(d=1, c=32, s=2, transformer_dim=32, transformer_depth=2, patch_size=2, br=2.0)
    blocks = (_inverted_residual_block(d=1, c=16, s=1, br=2.0), block)
    config = ByoModelCfg(blocks=blocks, stem_chs=16, stem_type="3x3", stem_pool="", downsample="", act_layer="silu")
    return _awake(ByobNet(config, num_classes=10), 32)


def botnet() -> nn.Module:
    """Bottleneck attention over maps, with a bias that is computed from the queries."""
    import_timm()
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    sizes = [("bottle", 1, 32), ("self_attn", 2, 128)]
    config = ByoModelCfg(
        blocks=tuple(ByoBlockCfg(type=kind, d=depth, c=width, s=2, gs=0, br=0.25) for kind, depth, width in sizes),
        stem_chs=16,
        stem_type="",
        stem_pool="",
        fixed_input_size=True,
        self_attn_layer="bottleneck",
        self_attn_kwargs={"num_heads": 2},
    )
    return _awake(ByobNet(config, img_size=64, num_classes=10), 64)


def levit() -> nn.Module:
    """Heads packed one by one with a bias each, and a stage between that has fewer queries than keys."""
    import_timm()
    from timm.models.levit import Levit

    return _awake(
        Levit(img_size=64, embed_dim=(32, 48), depth=(1, 1), num_heads=(2, 3), key_dim=16, num_classes=10), 64
    )


def _timm(name: str, **options: object) -> nn.Module:
    module: nn.Module = import_timm().create_model(name, num_classes=10, **options)
    return _awake(module, int(options.get("img_size", 64)))


def _awake(module: nn.Module, side: int) -> nn.Module:
    """Give norms weights other than zero, with which training begins: else what they stand behind adds nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        if not torch.any(value):
            noise = torch.randn(value.shape, generator=generator)
            value.data.copy_(0.3 * noise + (1.0 if name.endswith("weight") and value.ndim == 1 else 0.0))
    module.input_shape = (3, side, side)  # type: ignore[assignment]
    return module


class Built:
    """A network as ONNX: in FP32, and quantised from the ranges of random images."""

    def __init__(self, folder: Path, model: str, opset: int) -> None:
        source = NetworkSource(ModelSpec(model))
        Fold(source).fill(folder, SILENT)
        network = source.network(SILENT)
        Export(File.of(folder / PROGRAM), network.record(), opset, None).fill(folder, SILENT)
        random = np.random.default_rng(0)
        shape = (2, *network.input_shape)
        first, self.images = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        self.folder, self.floating = folder, folder / "model.onnx"
        name = onnx.load(self.floating).graph.input[0].name
        statistics = collect_statistics(self.floating, [{name: first}, {name: self.images}])
        self.ranges: Ranges = ranges_from(statistics, "random")
        for precision in PRECISIONS:
            quantize_model(
                self.floating, self.ranges, QuantizeSettings(precision), self.path(precision), statistics=statistics
            )

    def path(self, precision: Precision) -> Path:
        return self.folder / f"{precision.value}.onnx"

    def operands(self, dtype: str) -> Operands:
        return Operands(dtype, lambda name: self.ranges.amax(name, dtype, Estimator.MAX))


def factory_name(factory: Callable[[], nn.Module]) -> str:
    """What ``--model`` takes for a factory of this file."""
    return f"{Path(__file__)}:{factory.__name__}"


def plain_names(model: ir.Model) -> set[str]:
    """All values that nodes compute."""
    return {str(value.name) for node in model.graph for value in node.outputs}


def values_of(model: ir.Model, images: np.ndarray, names: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Run a model just as it is written, and give its outputs and the named values in float64."""
    import onnxruntime

    proto = ir.serde.serialize_model(model)
    there = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [output.name for output in session.get_outputs()]
    found = session.run(wanted, {session.get_inputs()[0].name: images})
    return {name: array.astype(np.float64) for name, array in zip(wanted, found, strict=True)}
