from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Silent
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.reference import resvit_config
from resvit_export.models.training.scenes import SceneRecipe, finished, train

pytestmark = pytest.mark.whole

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {"dim": 32, "depth": 1, "stage_widths": (16, 16, 16, 16)}


class Killed(Silent):
    """Interrupts the training in its second epoch."""

    def track(self, items, what, total, weight=1, before=0):
        if what.startswith("epoch 2/"):
            raise KeyboardInterrupt
        return super().track(items, what, total, weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metrics"), [("fpn-nano-det", {"mAP 50:95", "mAP 50"}), ("fpn-nano-seg", {"mIoU", "Dice"})]
)
def test_a_killed_training_goes_on_and_ends_the_same(name, metrics, tmp_path):
    recipe = SceneRecipe(resvit_config(name, **SMALL, dropout=0.1), 8, 2, seed=1, tested=4, batch=4)
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    record = train(recipe, whole, SILENT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, killed, Killed())
    assert not killed.exists()
    train(recipe, killed, SILENT)
    first, second = (torch.load(path, weights_only=True) for path in (whole, killed))
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(value, second["state_dict"][key], rtol=0, atol=0, msg=key)
    assert first["scores"] == record["scores"] == second["scores"]
    assert set(first["scores"]) == metrics
    assert first["config"]["task"] == recipe.config.task.value
    assert finished(whole, recipe.key) == record
    assert finished(whole, "other") is None
    network = load_network(ModelSpec(f"resvit:{name}", whole, dict(SMALL, stage_widths="16,16,16,16")))
    assert network.record().num_classes == recipe.config.num_classes


@pytest.mark.parametrize(
    ("name", "overrides", "problem"),
    [
        ("embed-nano", {}, "classifies"),
        ("fpn-nano-det", {"in_channels": 3}, "one channel"),
        ("fpn-nano-det", {"image_size": 192}, "96 to 160"),
    ],
)
def test_networks_without_scenes_are_refused(name, overrides, problem):
    with pytest.raises(ResvitError) as caught:
        SceneRecipe(resvit_config(name, **overrides), 8, 1, 0)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("task", "model", "metric"), [("detection", "fpn-nano-det", "mAP"), ("segmentation", "embed-nano-seg", "mIoU")]
)
def test_example_trains_skips_and_refuses(task, model, metric, tmp_path):
    spec = importlib.util.spec_from_file_location(f"{task}_train", EXAMPLES / task / "train.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    out = tmp_path / "nano.pt"
    sizes = ["--scenes", "8", "--epochs", "1", "--test-scenes", "4"]
    arguments = ["--model", f"resvit:{model}", "--out", str(out), *sizes, "--quiet"]
    first = CliRunner().invoke(example.main, arguments)
    assert first.exit_code == 0, first.output
    assert f"{metric} " in first.output
    assert "on 4 test scenes" in first.output
    written = out.stat().st_mtime_ns
    again = CliRunner().invoke(example.main, arguments)
    assert "finished before and unchanged" in again.output
    assert out.stat().st_mtime_ns == written
    refused = CliRunner().invoke(example.main, ["--model", "resvit:embed-nano"])
    assert refused.exit_code == 3
