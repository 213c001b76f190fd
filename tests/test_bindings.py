"""Inputs and outputs in the type that costs least: graphs, encodings, golden images, engines and plans."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from conftest import DEMO
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.bench.bench import bench_feeds
from resvit_engines.bench.commands import outputs_into
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.device_plan import plan_for_device
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import read_manifest
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.pictures.encoding import ENCODING_KEY, InputEncoding
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.records import Record
from resvit_engines.run.golden import golden_check
from resvit_engines.run.onnx_on_cpu import open_onnx
from resvit_engines.targets.choice import with_tensorrt
from resvit_engines.targets.table import find_target
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.cli.main import run
from resvit_export.recipe.choices import InputType
from resvit_export.to_tensorrt.bindings import retype_bindings

SIDE, CHANNELS, STEP = 8, 3, 0.02
PIXELS = PicturePreprocess((SIDE, SIDE), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NARROW = [InputType.FP16, InputType.INT8, InputType.UINT8]


def quantised(path: Path, *, shortcut: bool = False, zero: int = 0, half_first: bool = False) -> Path:
    """An image [B, 3, 8, 8] through Q/DQ and a convolution in FP16, averaged to [B, 4], in FP32 outside."""
    random = np.random.default_rng(0)
    kind = np.float16 if half_first else np.float32
    weights = {
        "step": np.array(STEP, kind),
        "zero": np.array(zero, np.int8),
        "step16": np.array(STEP, np.float16),
        "weight": random.standard_normal((4, CHANNELS, 3, 3)).astype(np.float16),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [helper.make_node("Cast", ["image"], ["narrow"], to=TensorProto.FLOAT16)] if half_first else []
    nodes += [
        helper.make_node("QuantizeLinear", ["narrow" if half_first else "image", "step", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "step16", "zero"], ["dq"], "dequantize"),
        helper.make_node("Conv", ["dq", "weight"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["conv", "axes"], ["mean16"], "mean", keepdims=0),
        helper.make_node("Cast", ["mean16"], ["logits"], "widen", to=TensorProto.FLOAT),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 4])]
    if shortcut:
        nodes.append(helper.make_node("ReduceMean", ["image", "axes"], ["brightness"], "brightness", keepdims=0))
        outputs.append(helper.make_tensor_value_info("brightness", TensorProto.FLOAT, ["B", CHANNELS]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["B", CHANNELS, SIDE, SIDE])],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def bound(model: Path, out: Path, kind: InputType, pixels: PicturePreprocess | None = PIXELS) -> InputEncoding | None:
    network = ir.load(model)
    encoding = retype_bindings(network, kind, pixels)
    ir.save(network, out)
    onnx.checker.check_model(str(out), full_check=True)
    return encoding


def pictures(count: int = 5) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels uint8 [N, 3, 8, 8], and what they are prepared to."""
    raw = np.random.default_rng(2).integers(0, 256, (count, SIDE, SIDE, CHANNELS), np.uint8)
    return raw.transpose(0, 3, 1, 2), np.stack([PIXELS.apply(image) for image in raw])


@pytest.mark.parametrize("half_first", [False, True])
@pytest.mark.parametrize("kind", NARROW)
def test_the_graph_computes_what_it_did(tmp_path: Path, kind: InputType, half_first: bool) -> None:
    model = quantised(tmp_path / "model.onnx", half_first=half_first)
    encoding = bound(model, tmp_path / "bound.onnx", kind)
    _, images = pictures()
    before, after = onnx_runner(model), onnx_runner(tmp_path / "bound.onnx")
    (was,), (now,) = before({"image": images}).values(), after({"image": images}).values()
    np.testing.assert_allclose(now, was, atol=0.02, rtol=0.02)
    if kind is InputType.INT8 and not half_first:
        np.testing.assert_allclose(now, was, rtol=2e-3)  # the host rounds as Q does: what differs is the FP16 output
    graph = onnx.load(tmp_path / "bound.onnx").graph
    types = {"fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
    assert graph.input[0].type.tensor_type.elem_type == types[kind.value]
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert [value.name for value in graph.output] == ["logits"]
    assert now.dtype == np.float32
    assert after.encoding == encoding
    kinds = [node.op_type for node in graph.node]
    assert ("QuantizeLinear" in kinds) is (kind is not InputType.INT8)
    assert kinds.count("Cast") == (1 + half_first if kind is InputType.UINT8 else 0)


def test_fp32_changes_nothing(tmp_path: Path) -> None:
    model = quantised(tmp_path / "model.onnx")
    assert bound(model, tmp_path / "bound.onnx", InputType.FP32) is None
    before, after = onnx.load(model).graph, onnx.load(tmp_path / "bound.onnx").graph
    assert (list(before.node), list(before.input), list(before.output)) == (
        list(after.node), list(after.input), list(after.output)
    )  # fmt: skip


def test_what_reads_the_image_unquantised_gets_it_in_fp32_or_refuses_int8(tmp_path: Path) -> None:
    model = quantised(tmp_path / "model.onnx", shortcut=True)
    _, images = pictures()
    before = onnx_runner(model)({"image": images})
    for kind in (InputType.FP16, InputType.UINT8):
        bound(model, tmp_path / "bound.onnx", kind)
        after = onnx_runner(tmp_path / "bound.onnx")({"image": images})
        np.testing.assert_allclose(after["brightness"], before["brightness"], atol=2e-3)
    with pytest.raises(ResvitError, match="brightness, which reads it, stays in FP16") as caught:
        bound(model, tmp_path / "bound.onnx", InputType.INT8)
    assert caught.value.code == ExitCode.IMPOSSIBLE


def test_int8_wants_a_symmetric_scale_and_uint8_pixels_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ResvitError, match="cannot enter in INT8"):
        bound(quantised(tmp_path / "model.onnx", zero=3), tmp_path / "bound.onnx", InputType.INT8)
    with pytest.raises(ResvitError, match="cannot enter as uint8") as caught:
        bound(quantised(tmp_path / "model.onnx"), tmp_path / "bound.onnx", InputType.UINT8, None)
    assert caught.value.code == ExitCode.IMPOSSIBLE


def test_encoded_pictures_are_their_pixels_again() -> None:
    raw, images = pictures(64)
    assert set(np.unique(raw)) == set(range(256))
    encoding = InputEncoding("uint8", tuple(255 * s for s in PIXELS.std), tuple(255 * m for m in PIXELS.mean))
    np.testing.assert_array_equal(encoding.encode(images), raw)
    assert encoding.encode(raw) is raw
    assert InputEncoding.from_json(json.loads(json.dumps(encoding.to_json()))) == encoding
    with pytest.raises(ResvitError, match="channels"):
        encoding.encode(np.zeros((1, 2, 8, 8), np.float32))
    int8 = InputEncoding("int8", (50.0,), (0.0,))
    np.testing.assert_array_equal(int8.encode(np.full((1, 1, 1, 2), [9.0, -9.0], np.float32)).ravel(), [127, -128])


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"dtype": "int4", "factor": [1.0], "offset": [0.0]},
        {"dtype": "int8", "factor": [], "offset": []},
        {"dtype": "int8", "factor": [0.0], "offset": [0.0]},
        {"dtype": "int8", "factor": [1.0, 1.0], "offset": [0.0]},
        {"dtype": "int8", "factor": ["1"], "offset": [0.0]},
        {"dtype": "int8", "factor": [float("inf")], "offset": [0.0]},
        {"dtype": "int8", "factor": [1.0] * 5000, "offset": [0.0] * 5000},
        {"dtype": "int8", "factor": 3, "offset": None},
    ],
)
def test_an_encoding_that_is_none_is_refused(tmp_path: Path, plain: dict[str, Any]) -> None:
    with pytest.raises(ResvitError) as caught:
        InputEncoding.from_json(plain)
    assert caught.value.code == ExitCode.INPUT
    with pytest.raises(ResvitError):
        IoTensor.from_json(Record({"name": "image", "shape": [1, 3, 8, 8], "encoding": plain}, "manifest.json"))
    model = onnx.load(quantised(tmp_path / "model.onnx"))
    model.metadata_props.add(key=ENCODING_KEY, value=json.dumps(plain))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ResvitError):
        onnx_runner(tmp_path / "model.onnx")


def unpacked(folder: Path, kind: InputType) -> Manifest:
    """A bundle's folder with golden files in the type that the model reads, and its manifest."""
    encoding = bound(quantised(folder / "float.onnx"), folder / "model.onnx", kind)
    runner = onnx_runner(folder / "model.onnx")
    _, images = pictures()
    fed = runner.fed({"image": images})
    np.save(folder / "golden_input.npy", fed["image"])
    np.save(folder / "golden_output.npy", runner({"image": images})["logits"])
    image = IoTensor("image", ("B", CHANNELS, SIDE, SIDE), fed["image"].dtype.name, encoding)
    manifest = Manifest(
        input=IoTensor.from_json(Record(image.to_json(), "manifest.json")),
        golden=GoldenFiles("golden_input.npy", "golden_output.npy"),
        build=BuildSettings((1, 2, 4)),
        preprocess=PIXELS.to_json(),
    )
    assert manifest.input == image
    return manifest


@pytest.mark.parametrize("kind", NARROW)
def test_golden_images_and_users_images_reach_the_model_in_its_type(tmp_path: Path, kind: InputType) -> None:
    manifest = unpacked(tmp_path, kind)
    stored = np.load(tmp_path / "golden_input.npy")
    assert stored.dtype.name == {"fp16": "float16", "int8": "int8", "uint8": "uint8"}[kind.value]
    assert golden_check(tmp_path, manifest, "onnxruntime").sqnr_db is None or kind is InputType.FP16
    raw, images = pictures()
    with open_onnx(tmp_path / "model.onnx") as runner:
        outputs_into(tmp_path / "prepared.npy", runner, images, manifest)
        np.testing.assert_allclose(
            np.load(tmp_path / "prepared.npy"), np.load(tmp_path / "golden_output.npy"), atol=1e-2
        )
        if kind is InputType.UINT8:
            outputs_into(tmp_path / "pixels.npy", runner, raw, manifest)
            np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), np.load(tmp_path / "prepared.npy"))


def test_an_engine_of_another_type_is_timed_with_as_many_images(tmp_path: Path) -> None:
    unpacked(tmp_path, InputType.INT8)
    with open_onnx(tmp_path / "float.onnx") as runner:
        feeds = bench_feeds(runner, 3, {"image": np.load(tmp_path / "golden_input.npy")})
    assert (feeds["image"].dtype, feeds["image"].shape) == (np.float32, (3, CHANNELS, SIDE, SIDE))


def test_trtexec_is_told_of_int8() -> None:
    target = find_target("jetson-orin")
    plan = plan_for_device(
        target, BuildSettings((1, 1, 1)), (3, 8, 8), dynamic_batch=False, input_formats=("int8:chw", "int64:chw")
    )
    assert any("--inputIOFormats=int8:chw,int64:chw" in command for command in plan.commands)
    plan = plan_for_device(target, BuildSettings((1, 1, 1)), (3, 8, 8), dynamic_batch=False)
    assert not any("IOFormats" in command for command in plan.commands)


@pytest.mark.parametrize("tensorrt", ["10.3", "10.7", "11.4"])
def test_a_plan_names_the_image_s_tensorrt_and_where_another_comes_from(tensorrt: str) -> None:
    target, image = find_target("jetson-orin"), "10.3"
    if tensorrt == "11.4":
        target, image = find_target("jetson-orin", "7.2"), "10.16"
    target = with_tensorrt(target, tensorrt)
    plan = plan_for_device(target, BuildSettings((1, 1, 1)), (3, 8, 8), dynamic_batch=False)
    words = " ".join(plan.notes)
    assert f"JetPack {target.jetpack} carries TensorRT {image}" in plan.why
    assert ("Use the TensorRT of the JetPack image" in words) == (tensorrt == image)
    assert (f"TensorRT {tensorrt} was chosen in its place" in plan.why) == (tensorrt != image)
    assert plan.commands[-1].startswith("/usr/src/tensorrt/bin/trtexec") == (tensorrt == image)
    if tensorrt == "10.7":
        assert "TensorRT-10.7.*.l4t.aarch64-gnu.cuda-12.6.tar.gz" in words
        assert "nv-tensorrt-local-tegra-repo-ubuntu2204-10.7.*" in words
    if tensorrt == "11.4":
        assert "SBSA" in words
        assert "l4t" not in words


@pytest.mark.whole
@pytest.mark.parametrize("kind", NARROW)
def test_tensorrt_for_rtx_builds_an_engine_that_reads_it(tmp_path: Path, kind: InputType) -> None:
    model = quantised(tmp_path / "model.onnx")
    bound(model, tmp_path / "bound.onnx", kind)
    report = build_engine(tmp_path / "bound.onnx", tmp_path / "engine.plan", find_target("rtx-4090"))
    types = {"fp16": "float16", "int8": "int8", "uint8": "uint8"}
    assert [tensor.dtype for tensor in report.inputs] == [types[kind.value]]
    assert [tensor.dtype for tensor in report.outputs] == ["float16"]


def test_int8_for_an_fp16_network_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["build", "--model", "resvit:embed-nano", "--data", "fashion-mnist", "--target", "jetson-orin"]
    assert run([*line, "--precision", "fp16", "--input-type", "int8"]) == ExitCode.IMPOSSIBLE
    assert "--input-type fp16 or uint8" in capsys.readouterr().err


@pytest.mark.whole
@pytest.mark.usefixtures("workspace")
def test_a_build_for_pixels_is_validated_bundled_and_checked_in_them(
    seeded: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeded("runs/embed-nano", "jetson-orin")
    line = ["build", "--quiet", "--target", "jetson-orin", *shlex.split(DEMO)]
    assert run([*line, "--input-type", "int8"]) == ExitCode.IMPOSSIBLE
    assert "--include 'trunk.stem.0.conv/Conv'" in capsys.readouterr().err
    before = set(Path().glob("runs/embed-nano/bundle-*/*.resvit"))
    assert run([*line, "--input-type", "uint8"]) == ExitCode.OK
    assert "TensorRT 10.3 may answer wrongly here" in capsys.readouterr().err
    (bundle,) = set(Path().glob("runs/embed-nano/bundle-*/*.resvit")) - before
    manifest = read_manifest(bundle)
    zipfile.ZipFile(bundle).extractall(tmp_path)
    assert np.load(tmp_path / "golden_input.npy").dtype == np.uint8
    assert manifest.input is not None
    assert manifest.input.encoding is not None
    assert [tensor.dtype for tensor in manifest.outputs] == ["float16"]
    assert golden_check(tmp_path, manifest, "onnxruntime").sqnr_db is None
    assert "The engine reads uint8" in (tmp_path / "README.txt").read_text()
