"""Who is to blame for outputs of low SQNR: the network, whose float answers move as far, or its quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from quantize_graphs import Graph, hybrid, offset_convolutions, outputs_of, ranges_from_extremes, ranges_of
from resvit_calibrate.ranges.estimators import Estimator
from resvit_engines.errors import ExitCode
from resvit_engines.targets.table import Precision
from resvit_export.cli.main import run
from resvit_export.records.verdict import VerdictRecord
from resvit_quantize.quantize import quantize_model
from resvit_quantize.sensitivity.own_noise import OwnNoise, own_noise
from resvit_quantize.settings import QuantizeSettings

INT8 = QuantizeSettings(Precision.INT8, Estimator.MAX)


def images_for(path: Path) -> np.ndarray:
    import onnxruntime

    shape = onnxruntime.InferenceSession(path).get_inputs()[0].shape
    sizes = [size if isinstance(size, int) else 2 for size in shape]
    return np.random.default_rng(1).standard_normal(sizes).astype(np.float32)


def cancelling(path: Path) -> Path:
    """What is left of the difference of two nearly equal things is their noise."""
    g = Graph("batch", 3, 8, 8)
    first = g.op("Relu", g.conv("input", 32, 3, name="first"))
    weight, other = np.random.default_rng(0).standard_normal((2, 32, 32, 3, 3)).astype(np.float32) / 17
    ways = [
        g.op("Conv", first, g.constant(f"w{i}", weight + share * other), name=f"way{i}", pads=[1] * 4)
        for i, share in enumerate((0.0, 0.002))
    ]
    left = g.op("Mul", g.op("Sub", *ways), g.constant("large", np.array(500.0, np.float32)))
    return g.save(path, g.op("Relu", g.conv(left, 32, 32, name="last")))


def test_a_network_that_cancels_is_to_blame_itself(tmp_path: Path) -> None:
    path, out = cancelling(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    images = images_for(path)
    quantize_model(path, ranges_of(path, images), INT8, out)
    measured = own_noise(path, out, Precision.INT8, {"input": images})
    assert measured is not None
    assert measured.places == 3 + 4  # tensors, and the weights of what reads them
    assert measured.under_noise_db < 20
    assert measured.network_is_sensitive
    assert "own sensitivity" in measured.sentence
    assert OwnNoise.from_json(json.loads(json.dumps(measured.to_json(), allow_nan=False))) == measured


@pytest.mark.whole
def test_the_verdict_says_who_is_to_blame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cancelling(tmp_path / "own.onnx")
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    plain = ["--preprocess", "mean=0,0,0", "--preprocess", "std=1,1,1"]
    few = [
        "--calibration-images",
        "16",
        "--validation-images",
        "8",
        "--no-search",
        "--target",
        "rtx-4090",
        "--run",
        "run",
    ]
    code = run(["validate", "--model", "own.onnx", "--data", "set.npz", "--task", "other", *plain, *few])
    assert code == ExitCode.REJECTED
    shown = " ".join(capsys.readouterr().out.split())
    assert "The network's own sensitivity is to blame, not the quantisation" in shown
    (file,) = Path("run").glob("validate-*/verdict.json")
    verdict = VerdictRecord.from_json(json.loads(file.read_bytes()))
    assert verdict.blame is not None
    assert verdict.blame.sentence in shown


def test_ranges_that_are_wrong_are_named(tmp_path: Path) -> None:
    path, out = hybrid(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    images = images_for(path)
    right = ranges_of(path, images)
    quantize_model(path, right, INT8, out)
    well = own_noise(path, out, Precision.INT8, {"input": images})
    assert well is not None
    assert well.outputs_db > 20
    spoilt = next(name for name in places_of(out) if name.startswith("trunk.0"))
    extremes = {name: (item.minimum, item.maximum) for name, item in right.tensors.items()}
    low, high = extremes[spoilt]
    extremes[spoilt] = (low / 30, high / 30)
    quantize_model(path, ranges_from_extremes(extremes), INT8, out)
    ill = own_noise(path, out, Precision.INT8, {"input": images})
    assert ill is not None
    assert not ill.network_is_sensitive
    assert ill.lossy[0][0] == spoilt
    assert spoilt in ill.sentence
    assert ill.outputs_db < well.outputs_db - 5
    assert abs(ill.under_noise_db - well.under_noise_db) < 1


def places_of(path: Path) -> list[str]:
    return [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]


def test_what_all_images_share_can_be_left_out_of_the_signal(tmp_path: Path) -> None:
    path = offset_convolutions(tmp_path / "float.onnx")
    images, out = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32), tmp_path / "int8.onnx"
    quantize_model(path, ranges_of(path, images), INT8, out)
    whole, apart = (own_noise(path, out, Precision.INT8, {"input": images}, apart=each) for each in (False, True))
    assert whole is not None
    assert apart is not None
    assert apart.outputs_db < whole.outputs_db - 10
    assert apart.under_noise_db < whole.under_noise_db - 10
    assert (apart.lossy, apart.places) == (whole.lossy, whole.places)


def test_what_is_not_quantised_is_not_asked(tmp_path: Path) -> None:
    path, out = hybrid(tmp_path / "float.onnx"), tmp_path / "half.onnx"
    images = images_for(path)
    quantize_model(path, ranges_of(path, images), QuantizeSettings(Precision.FP16), out)
    assert own_noise(path, out, Precision.FP16, {"input": images}) is None
    assert own_noise(path, out, Precision.INT8, {"input": images}) is None
    assert outputs_of(out, images)
