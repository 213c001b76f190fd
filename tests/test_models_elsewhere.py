"""Models from torchvision, and one of a user's own file: what is taken, and what is refused with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.main import run
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program

EXAMPLE = Path(__file__).parent.parent / "examples" / "transunet"


SMALL_VIT = {"patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("VisionTransformer", SMALL_VIT), pytest.param("vit_b_16", {}, marks=pytest.mark.slow)],
)
def test_torchvisions_vit_says_its_size_itself(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    arguments = {"image_size": 32, "num_classes": 7, **sizes}
    network = load_network(ModelSpec(f"torchvision.models:{name}", model_args=arguments))
    assert (network.input_shape, network.num_classes) == ((3, 32, 32), 7)
    report = onnx_from_program(fold_program(network.program)[0], tmp_path / "model.onnx", opset=20)
    assert report.outputs == (("logits", ("batch", 7)),)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    found = onnx_runner(tmp_path / "model.onnx")({"input": images})["logits"]
    np.testing.assert_allclose(found, network.runner()({"input": images})["logits"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.whole
def test_torchvisions_segmenters_name_their_outputs() -> None:
    name = "torchvision.models.segmentation:lraspp_mobilenet_v3_large"
    network = load_network(ModelSpec(name, model_args={"num_classes": 5}, input_shape=(3, 64, 64)))
    images = np.zeros((1, 3, 64, 64), np.float32)
    assert {name: value.shape for name, value in network.runner()({"input": images}).items()} == {"out": (1, 5, 64, 64)}


class GeneralizedRCNN(torch.nn.Module):
    """Stands where torchvision's does: building the real one needs its compiled operators."""

    def __init__(self, two_stages: bool) -> None:
        super().__init__()
        if two_stages:
            self.roi_heads = torch.nn.Identity()


@pytest.mark.parametrize(
    ("two_stages", "words"), [(True, "between its two stages it picks"), (False, "a varying number of boxes")]
)
def test_detectors_without_a_fixed_graph_are_refused(two_stages: bool, words: str, monkeypatch) -> None:
    monkeypatch.setattr(GeneralizedRCNN, "__module__", "torchvision.models.detection.generalized_rcnn")
    import resvit_export.loading.load as load

    monkeypatch.setattr(load, "module_from_name", lambda *_: GeneralizedRCNN(two_stages))
    with pytest.raises(ResvitError, match=words) as caught:
        load_network(ModelSpec("torchvision.models.detection:fasterrcnn_resnet50_fpn"))
    assert "RT-DETR" in caught.value.fix


@pytest.mark.whole
def test_the_real_faster_rcnn_is_refused() -> None:
    name = "torchvision.models.detection:fasterrcnn_mobilenet_v3_large_fpn"
    with pytest.raises(ResvitError, match="has no fixed graph: between its two stages"):
        load_network(ModelSpec(name, model_args={"num_classes": 5}))


@pytest.mark.slow
@pytest.mark.whole
def test_the_transunet_example_from_its_readme(workspace: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    train = [sys.executable, str(EXAMPLE / "train.py"), "--out", "runs/transunet.pt", "--scenes", "640", "--quiet"]
    subprocess.run(train, check=True, env=environment, capture_output=True)
    model = ["--model", f"{EXAMPLE / 'model.py'}:transunet", "--checkpoint", "runs/transunet.pt"]
    data = [
        "--data",
        "resvit_calibrate.readers.scenes:segmentation",
        "--calibration-images",
        "32",
        "--validation-images",
        "60",
    ]
    targets = ["--target", "rtx-4090", "--target", "jetson-orin", "--run", "runs/transunet"]
    assert run(["build", *model, *data, *targets, "--no-search", "--quiet"]) in (0, ExitCode.UNDECIDED)
    verdicts = [json.loads(path.read_bytes()) for path in Path("runs/transunet").glob("validate-*/verdict.json")]
    assert {verdict["metric"] for verdict in verdicts} == {"mIoU"}
    assert all(verdict["stages"][-1]["agreement"] > 0.9 for verdict in verdicts)
    assert len(list(Path("runs/transunet").glob("bundle-*/*.resvit"))) == 2
    assert len(list(Path("runs/transunet").glob("compile-*/engine.plan"))) == 1
