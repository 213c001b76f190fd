"""Golden images tell a device's faults: sampling the nearest, a lost epsilon, one batch of several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.run import golden
from resvit_engines.run.golden import golden_batches, golden_check
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.golden_choice import choose_golden
from resvit_export.stages.score import write_golden

RANDOM = np.random.default_rng(0)
WEIGHT = (RANDOM.standard_normal((4, 3, 3, 3)) * 0.3).astype(np.float32)
HEAD = RANDOM.standard_normal((64, 5)).astype(np.float32)


def network(path: Path, *, mode: str = "linear", epsilon: float = 1e-8) -> Path:
    """Images [B, 3, 16, 16] → a convolution → sampled at [8, 8] places between pixels → tokens over their sum."""
    places = (np.stack(np.meshgrid(np.linspace(-0.9, 0.9, 4), np.linspace(-0.8, 0.85, 4)), -1)).astype(np.float32)
    constants = {
        "weight": WEIGHT,
        "places": places[None],
        "shape": np.array([0, -1], np.int64),
        "epsilon": np.array(epsilon, np.float32),
        "axes": np.array([1], np.int64),
        "head": HEAD,
        "start": np.array([0], np.int64),
        "rest": np.array([4, 4, 2], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["input", "weight"], ["map"], pads=[1, 1, 1, 1]),
        node("Shape", ["input"], ["batch"], end=1),
        node("Concat", ["batch", "rest"], ["grid_shape"], axis=0),
        node("Expand", ["places", "grid_shape"], ["grid"]),
        node("GridSample", ["map", "grid"], ["sampled"], mode=mode, align_corners=0),
        node("Relu", ["sampled"], ["positive"]),
        node("Reshape", ["positive", "shape"], ["tokens"]),
        node("ReduceSum", ["tokens", "axes"], ["sum"], keepdims=1),
        node("Add", ["sum", "epsilon"], ["guarded"]),
        node("Div", ["tokens", "guarded"], ["shares"]),
        node("MatMul", ["shares", "head"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", ["B", 3, 16, 16]), ("logits", ["B", 5]))
    ]
    graph = helper.make_graph(
        nodes, "net", ends[:1], ends[1:], [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def smooth_images(count: int) -> np.ndarray:
    """Photographs are smooth: what is sampled between pixels is near what is sampled at the nearest."""
    coarse = np.random.default_rng(1).standard_normal((count, 3, 6, 6))
    return np.kron(coarse, np.ones((1, 1, 3, 3)))[..., 1:17, 1:17].astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, Manifest]:
    shipped = onnx_runner(network(tmp_path / "model.onnx"))
    feeds, least = choose_golden({"input": smooth_images(32)}, shipped, shipped, sets=False)
    files = dataclasses.replace(write_golden(tmp_path, feeds, shipped(feeds)), least_db=least)
    build = BuildSettings(batch=(1, 3, 16))
    return tmp_path, Manifest(input=IoTensor("input", ("B", 3, 16, 16)), golden=files, build=build)


def test_the_validated_network_passes_at_every_batch(bundle: tuple[Path, Manifest]) -> None:
    folder, manifest = bundle
    report = golden_check(folder, manifest, "onnxruntime")
    assert report.images == 8
    assert report.sqnr_db is None or report.sqnr_db > 80
    assert golden_batches((1, 16), manifest, 8) == (1, 3, 16)
    assert golden_batches((2, 4), manifest, 8) == (2, 3, 4)
    assert golden_batches((1, 64), Manifest(), 8) == (1, 8)


@pytest.mark.parametrize(
    ("fault", "says"),
    [({"mode": "nearest"}, "SQNR"), ({"epsilon": 0.0}, "NaN or infinite")],
    ids=["nearest", "epsilon"],
)
def test_a_fault_of_the_builder_fails(bundle: tuple[Path, Manifest], fault: dict, says: str) -> None:
    folder, manifest = bundle
    network(folder / "model.onnx", **fault)
    with pytest.raises(ResvitError, match=says) as caught:
        golden_check(folder, manifest, "onnxruntime")
    assert caught.value.code is ExitCode.MISMATCH


@pytest.mark.parametrize("wrong", [1, 3, 16])
def test_a_fault_of_one_batch_fails(bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """SegFormer's batches above 1, on some TensorRTs (NVIDIA/TensorRT 4853)."""
    folder, manifest = bundle
    call = golden._InBatches.__call__

    def at_that_batch_alone(self, arrays):
        found = call(self, arrays)
        return {n: v if self.batch != wrong else np.roll(v, 1, axis=0) for n, v in found.items()}

    monkeypatch.setattr(golden._InBatches, "__call__", at_that_batch_alone)
    with pytest.raises(ResvitError, match=f"batch {wrong} computes something else"):
        golden_check(folder, manifest, "onnxruntime")


def test_images_are_chosen_whose_answers_differ() -> None:
    """Of 30 all but equal images and two others, the others are taken."""
    images = np.ones((32, 1, 2, 2), np.float32) + 1e-4 * np.arange(32, dtype=np.float32)[:, None, None, None]
    images[11], images[23] = 5.0, -5.0

    def run(arrays):
        return {"logits": arrays["input"].reshape(-1, 4)}

    chosen, least = choose_golden({"input": images}, run, run, sets=True)
    values = sorted(chosen["input"][:, 0, 0, 0].round(1))
    assert len(values) == 6
    assert (values[0], values[-1]) == (-5.0, 5.0)
    assert least == {"logits": 35.0}


def test_noise_under_a_large_common_part_is_seen() -> None:
    """Logits that all images share hide noise from the plain SQNR; what moves does not."""
    true = np.random.default_rng(0).standard_normal((8, 10)) + 1000.0
    noisy = true + np.random.default_rng(1).standard_normal((8, 10))
    assert golden.sqnr_db(true, noisy) > 50
    assert golden.moving_sqnr_db(true, noisy) < 5
    assert golden.moving_sqnr_db(true, true) is None
    assert golden.moving_sqnr_db(np.ones((3, 2)), np.ones((3, 2)) * 1.1) is None
