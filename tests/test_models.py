from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Silent
from resvit_export.models.hybrid import FeaturePyramid
from resvit_export.models.overrides import config_from_json
from resvit_export.models.presets import MODEL_NAMES, preset
from resvit_export.models.reference import resvit_config, resvit_model
from resvit_export.models.transformer import Attention, ClassTokenAndPositions

NANO = ("embed-nano", "fpn-nano", "dual-nano")
TRAIN = Path(__file__).parent.parent / "examples" / "fashion_mnist" / "train.py"


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "overrides", "pyramid", "tokens"),
    [
        ("embed-nano", {}, [(32, 14, 14), (64, 7, 7)], (50, 64)),
        ("embed-nano", {"image_size": [32, 24], "layer_scale": 0.1}, [(32, 16, 12), (64, 8, 6)], (49, 64)),
        ("fpn-nano", {}, [(32, 14, 14), (32, 7, 7)], (99, 64)),
        ("dual-nano", {}, [(32, 14, 14), (64, 7, 7)], (99, 64)),
        ("dual-nano", {"fusion": "add"}, [(32, 14, 14), (64, 7, 7)], (50, 64)),
        (
            "fpn-tiny",
            {"image_size": 64, "depth": 1},
            [(64, 8, 8), (64, 4, 4), (64, 2, 2)],
            (1 + 16 + 16 + 4, 192),
        ),
    ],
)
def test_features_have_the_shapes_that_the_config_says(name, overrides, pyramid, tokens):
    model = resvit_model(name, **overrides).eval()
    images = torch.randn(2, *model.config.input_shape)
    with torch.no_grad():
        features = model.features(images)
        both, alone = model(images), model(images[1:])
    assert [tuple(level.shape[1:]) for level in features.pyramid] == pyramid
    assert tuple(features.tokens.shape) == (2, *tokens)
    assert both.shape == (2, model.config.num_classes)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NANO)
def test_nano_weighs_less_than_two_megabytes(name):
    assert 4 * parameters(resvit_model(name)) < 2_000_000


@pytest.mark.whole
def test_sizes_are_the_published_ones():
    """timm's table: vit_small_r26_s32_224 36.43 M parameters, vit_base_r50_s16_384 98.95 M."""
    with torch.device("meta"):
        assert parameters(resvit_model("embed-small")) / 1e6 == pytest.approx(36.43, abs=0.01)
        assert parameters(resvit_model("embed-base", image_size=384)) / 1e6 == pytest.approx(98.95, abs=0.01)
        for name in MODEL_NAMES:
            assert parameters(resvit_model(name)) > 0


def test_attention_is_multi_head_attention():
    config = preset("embed-nano")
    ours, theirs = Attention(config), nn.MultiheadAttention(64, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(3, 50, 64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_class_token_stands_in_front():
    embed = ClassTokenAndPositions(tokens=4, dim=8, dropout=0.0)
    tokens = torch.randn(2, 4, 8)
    expected = torch.cat([embed.positions[:, :1].expand(2, 1, 8), tokens + embed.positions[:, 1:]], dim=1)
    torch.testing.assert_close(embed(tokens), expected)


def test_pyramid_adds_the_coarse_level_to_the_fine_one():
    pyramid = FeaturePyramid((1, 1), 1)
    for conv in [*pyramid.lateral, *pyramid.smooth]:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    fine, coarse = torch.zeros(1, 1, 4, 4), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    out = pyramid((fine, coarse))
    rows = [[1.0, 1.0, 2.0, 2.0]] * 2 + [[3.0, 3.0, 4.0, 4.0]] * 2
    assert out[0][0, 0].tolist() == rows
    assert out[1][0, 0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("name", "overrides", "problem", "fix"),
    [
        ("embed-nanno", {}, "embed-nanno", "embed-nano"),
        ("resnet50", {}, "resnet50", "dual-base"),
        ("embed-nano", {"num_clases": 3}, "num_clases", "num_classes"),
        ("embed-nano", {"name": "x"}, "'name'", "Did you mean"),
        ("embed-nano", {"image_size": 30}, "30x30", "28x28 or 32x32"),
        ("embed-nano", {"image_size": (28, 28, 28)}, "3 values", "square"),
        ("embed-nano", {"image_size": 1_000_000}, "out of range", "4096"),
        ("fpn-tiny", {"image_size": 240}, "32x32", "224x224 or 256x256"),
        ("dual-nano", {"patch_size": 5}, "20x20", "multiples of 20"),
        ("dual-small", {"fusion": "add"}, "equal grids", "patch_size = 32"),
        ("embed-nano", {"patch_size": 4}, "dual hybrids", "dual"),
        ("embed-nano", {"num_classes": "ten"}, "not a whole number", "whole number"),
        ("embed-nano", {"num_classes": True}, "not a whole number", "whole number"),
        ("embed-nano", {"num_classes": 0}, "out of range", "between 1"),
        ("embed-nano", {"dropout": float("nan")}, "out of range", "0.95"),
        ("embed-nano", {"task": "depth"}, "depth", "segmentation"),
        ("embed-nano", {"dim": 72}, "multiple of 16", "64"),
        ("embed-nano", {"dim": 80}, "do not divide", "head_dim"),
        ("embed-nano", {"block": "bottleneck"}, "stage_widths = 32, 64", "multiples of 64"),
        ("embed-nano", {"stage_depths": (1, 1, 1)}, "3 stage_depths", "same number"),
        ("embed-nano", {"mean": [0.1, 0.2]}, "2 values", "one value per channel"),
        ("embed-nano", {"std": 0.0}, "divides by zero", "positive"),
        ("embed-nano", {"mean": float("inf")}, "not a finite", "trained with"),
        ("fpn-nano", {"level_patches": (1,)}, "1 level_patches", "2 to 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_fix(name, overrides, problem, fix):
    with pytest.raises(ResvitError) as caught:
        resvit_config(name, **overrides)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_channels_bring_their_own_statistics():
    assert resvit_config("embed-nano").mean == (0.286,)
    assert resvit_config("embed-nano", in_channels=3).std == (0.353, 0.353, 0.353)
    assert resvit_config("embed-small", in_channels=1).mean == (0.449,)
    assert resvit_config("embed-nano", in_channels=3, mean="0.1,0.2,0.3").mean == (0.1, 0.2, 0.3)
    assert resvit_model("embed-nano", in_channels=3)(torch.zeros(1, 3, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_configs_survive_json(name):
    config = resvit_config(name, num_classes=7, dropout=0.1)
    assert config_from_json(json.loads(json.dumps(config.to_json())), preset(name)) == config


def test_names_and_configs_need_no_torch():
    code = (
        "import sys, resvit_export.models.reference as m\n"
        "m.resvit_config('dual-nano')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@functools.cache
def traced(name):
    """The network of random weights and its program for any batch; both opsets are written from one."""
    torch.manual_seed(0)
    model = resvit_model(name).eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    return model, torch.export.export(model, (torch.randn(2, 1, 28, 28),), dynamic_shapes=shapes)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "opset"),
    [
        pytest.param(name, opset, marks=() if (name, opset) == (NANO[0], 20) else pytest.mark.slow)
        for name in NANO
        for opset in (20, 23)
    ],
)
def test_export_is_plain_and_right_at_any_batch(name, opset, tmp_path):
    model, program = traced(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False).save(path)
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    blocks = ops["Gelu"]
    assert not ops.keys() & {"If", "Loop", "Scan", "Expand", "Range", "ConstantOfShape", "Cast"}
    # At opset 20 torch's exporter asks each attention's key for its shape; nothing of ours does.
    assert ops["Shape"] == (blocks if opset == 20 else 0)
    assert ops["Attention"] == (blocks if opset == 23 else 0)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 1, 28, 28)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(images).numpy(), atol=1e-4, rtol=1e-4)


# --- examples/fashion_mnist/train.py ---


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fashion_mnist_train", TRAIN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(example):
    """Four classes, told apart by which quarter of the rows is bright."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 192)
    pixels = generator.integers(0, 40, (192, 28, 28)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[7 * label : 7 * label + 7] += 180
    return example.Images(pixels[:128], labels[:128], pixels[128:], labels[128:])


def test_augmented_images_are_windows_of_the_padded_ones(example):
    torch.manual_seed(0)
    shift = example.SHIFT
    padded = F.pad(torch.randint(1, 255, (5, 28, 28), dtype=torch.uint8), (shift,) * 4)
    index = torch.tensor([4, 0, 0, 3, 2, 1, 1])
    out = example.shifted_and_flipped(padded, index)
    seen = set()
    for image, source in zip(out, index, strict=True):
        matches = [
            (y, x, flip)
            for y in range(2 * shift + 1)
            for x in range(2 * shift + 1)
            for flip in (False, True)
            if torch.equal(image.flip(1) if flip else image, padded[source, y : y + 28, x : x + 28])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 3


class Killed(Silent):
    """Interrupts the training in the given epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def track(self, items, what, total, weight=1, before=0):
        if what.startswith(f"epoch {self.epoch}/"):
            raise KeyboardInterrupt
        return super().track(items, what, total, weight)


@pytest.mark.whole
def test_a_killed_training_goes_on_and_ends_the_same(example, images, tmp_path):
    recipe = example.Recipe(resvit_config("embed-nano", dim=32, depth=1, dropout=0.1), 3, seed=1, batch=32)
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    record = example.train(recipe, images, whole, SILENT)
    with pytest.raises(KeyboardInterrupt):
        example.train(recipe, images, killed, Killed(epoch=3))
    assert not killed.exists()
    assert example.resumable(killed, recipe.key(images), SILENT)["epochs"] == 2
    assert example.resumable(killed, "other", SILENT) is None
    example.train(recipe, images, killed, Killed(epoch=1))  # epochs 1 and 2 are not trained again

    first, second = (torch.load(path, weights_only=True) for path in (whole, killed))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(value, second["state_dict"][name], msg=name)
    assert first["config"]["name"] == "embed-nano"
    assert first["top1"] == record["top1"] > 0.3
    model = resvit_model("embed-nano", dim=32, depth=1)
    model.load_state_dict(first["state_dict"])
    assert example.test_top1(model, recipe, images, SILENT) == first["top1"]

    assert {path.name for path in tmp_path.iterdir()} == {
        name + end for name in ("whole.pt", "killed.pt") for end in ("", ".json")
    }
    assert example.finished(whole, recipe.key(images)) == record
    assert example.finished(whole, "other") is None
    whole.write_bytes(whole.read_bytes()[:-1])
    assert example.finished(whole, recipe.key(images)) is None


def test_a_damaged_resume_file_is_passed_over(example, images, tmp_path):
    out = tmp_path / "x.pt"
    example.beside(out, ".resume").write_bytes(b"not a checkpoint")
    assert example.resumable(out, "key", SILENT) is None


@pytest.mark.whole
def test_command_trains_skips_and_refuses(example, images, tmp_path, monkeypatch):
    from click.testing import CliRunner

    monkeypatch.setattr(example, "read_images", lambda limit: images)
    out = tmp_path / "nano.pt"
    arguments = ["--model", "resvit:fpn-nano", "--out", str(out), "--epochs", "1", "--quiet"]
    first = CliRunner().invoke(example.main, arguments)
    assert first.exit_code == 0, first.output
    assert "64 test images" in first.output
    changed = out.stat().st_mtime_ns
    again = CliRunner().invoke(example.main, arguments)
    assert "finished before and unchanged" in again.output
    assert out.stat().st_mtime_ns == changed
    refused = CliRunner().invoke(example.main, ["--model", "resvit:embed-small"])
    assert refused.exit_code == 3
    assert "resvit:dual-nano" in refused.output


def test_epochs_of_some_images_see_others_each_time(example):
    recipe = example.Recipe(resvit_config("embed-mini"), 3, seed=1, per_epoch=40)
    seen = [example.drawn(100, recipe, epoch) for epoch in range(3)]
    assert [len(part) for part in seen] == [40, 40, 40]
    assert len(set(torch.cat(seen).tolist())) == 100
    assert torch.equal(example.drawn(100, recipe, 0), seen[0])


def test_enlarged_images_are_prepared_as_the_device_does(example):
    config = resvit_config("embed-mini")
    pixels = torch.randint(0, 255, (2, 28, 28), dtype=torch.uint8)
    ready = example.prepared(pixels, config)
    assert ready.shape == (2, 1, 64, 64)
    preprocess = example.Preprocess(size=(64, 64), channels=1, mean=config.mean, std=config.std)
    assert np.array_equal(ready[1].numpy(), preprocess.apply(pixels[1].numpy()))
    assert example.config_of("resvit:embed-mini") == config
    with pytest.raises(ResvitError, match="Fashion-MNIST"):
        example.config_of("resvit:embed-tiny")
