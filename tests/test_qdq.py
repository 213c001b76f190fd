from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from quantize_graphs import Graph, basic_block, hybrid, outputs_of, ranges_from_extremes, ranges_of, sqnr
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.runtime.runner import scorable_opset
from resvit_engines.builder.builder import build_engine
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision, find_target
from resvit_quantize.placement.grid import is_beyond_half, quantise_weight, scale_from_amax
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

INT8 = QuantizeSettings(Precision.INT8, Estimator.MAX)
FP8 = QuantizeSettings(Precision.FP8, Estimator.MAX)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def node(path: Path, name: str) -> ir.Node:
    return ir.load(path).graph.node(name)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_scales_are_exact_in_fp16_and_never_too_small(precision: Precision) -> None:
    amax = np.concatenate([10.0 ** np.random.default_rng(0).uniform(-3, 5, 2000), [0.0, 1e-30]])
    scale = scale_from_amax(amax, precision)
    largest = 127 if precision is Precision.INT8 else 448
    assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    plain = (amax > 1e-3) & (amax < 1e6)
    assert (scale[plain] * np.float64(largest) >= amax[plain]).all()
    assert (scale[plain] * np.float64(largest) <= amax[plain] * 1.07 + 1e-9).all()


@given(st.floats(1e-25, 1e30), st.sampled_from([Precision.INT8, Precision.FP8]))
def test_a_scale_alone_serves_its_tensor_whatever_its_size(amax: float, precision: Precision) -> None:
    scale = float(scale_from_amax(amax, precision))
    largest = 127 if precision is Precision.INT8 else 448
    assert amax <= scale * largest * (1 + 1e-7)
    # FP8 keeps its relative steps beneath a range that is too wide.
    assert scale * largest <= (2 if precision is Precision.INT8 else 5.2) * amax


def test_weak_channels_beside_strong_ones_keep_the_scales_in_fp16() -> None:
    assert not is_beyond_half(scale_from_amax(np.array([1.0, 1e-7, 0.5]), Precision.INT8))
    alone = scale_from_amax(np.array([1e-6, 1e-7, 0.0]), Precision.INT8)
    assert is_beyond_half(alone)
    assert np.allclose(alone[:2] * 127, [1e-6, 1e-7], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-9, 3e-7, 2e-5, 8e-5, 1e-3, 1.0, 1e5, 1e8])
def test_activations_of_any_size_are_quantised(tmp_path: Path, size: float) -> None:
    """What FP16 cannot scale is scaled in FP32, and nothing stands between Q, DQ and the layer."""
    g = Graph(2, 4, 8, 8)
    random = np.random.default_rng(0)
    small = g.op("Mul", "input", g.constant("size", np.array(size, np.float32)), name="small")
    weight = g.constant("w", (random.standard_normal((6, 4, 3, 3)) / size / 10).astype(np.float32))
    path = g.save(tmp_path / "float.onnx", g.op("Conv", small, weight, name="conv"))
    images = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    reach = float(np.abs(images).max())
    ranges = ranges_from_extremes({"input": (-reach, reach), small: (-size * reach, size * reach)})
    out = tmp_path / "int8.onnx"
    report = quantize_model(path, ranges, replace(INT8, include=("conv",)), out)
    assert report.macs_share == 1.0
    conv = node(out, "conv")
    assert all(value.producer().op_type == "DequantizeLinear" for value in conv.inputs[:2])
    (expected,), (found,) = outputs_of(path, images).values(), outputs_of(out, images).values()
    assert sqnr(expected, found) > 33


def test_one_reader_in_fp32_keeps_the_8_bit_values_of_the_others(tmp_path: Path) -> None:
    """Weights that FP16 cannot scale (a LayerScale of 1e-6 in them) read the same bytes as their neighbours."""
    g = Graph(2, 4, 8, 8)
    random = np.random.default_rng(0)
    weights = [random.standard_normal((4, 4, 1, 1)).astype(np.float32) * size for size in (1.0, 1e-8)]
    convs = [g.op("Conv", "input", g.constant(f"w{i}", w), name=f"conv{i}") for i, w in enumerate(weights)]
    scaled = g.op("Mul", convs[1], g.constant("back", np.array(1e8, np.float32)), name="back")
    path = g.save(tmp_path / "float.onnx", g.op("Concat", convs[0], scaled, axis=1, name="both"))
    images = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    reach = float(np.abs(images).max())
    out = tmp_path / "int8.onnx"
    settings = replace(INT8, include=("conv*",))
    quantize_model(path, ranges_from_extremes({"input": (-reach, reach)}), settings, out)
    inputs = [node(out, f"conv{i}").inputs[0] for i in (0, 1)]
    assert [value.dtype for value in inputs] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert len({value.producer().inputs[0].name for value in inputs}) == 1
    (expected,), (found,) = outputs_of(path, images).values(), outputs_of(out, images).values()
    assert sqnr(expected, found) > 33


def gated(path: Path) -> Path:
    """A gated unit (as SwiGLU) whose gate has values above FP16's."""
    g = Graph("N", 16, 32)
    random = np.random.default_rng(0)
    names = ("gate", "value")
    drawn = [random.standard_normal((32, 64)).astype(np.float32) * size for size in (5e4, 0.2)]
    weights = [g.constant(name, weight) for name, weight in zip(names, drawn, strict=True)]
    gate, value = (
        g.op("MatMul", "input", weight, name=f"{n}/MatMul") for weight, n in zip(weights, names, strict=True)
    )
    small = g.op("Mul", gate, g.constant("size", np.array(1e-5, np.float32)), name="small")
    product = g.op("Mul", g.op("Sigmoid", value, name="act"), small, name="product")
    return g.save(path, g.op("MatMul", product, g.weight("down", 64, 10), name="down/MatMul"))


@pytest.mark.whole
def test_linear_layers_of_one_tensor_are_of_one_type(tmp_path: Path) -> None:
    """Builders make one product of them; TensorRT for RTX fails where it would write two types."""
    path, out = gated(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    images = np.random.default_rng(1).standard_normal((2, 16, 32)).astype(np.float32)
    report = quantize_model(path, ranges_of(path, images), INT8, out)
    reasons = {item.name: item.reason for item in report.fp32}
    assert "FP16 ends at 65504" in reasons["gate/MatMul"]
    assert reasons["value/MatMul"] == "it is one product with 'gate/MatMul', which stays FP32"
    assert len({node(out, name).inputs[0].dtype for name in ("gate/MatMul", "value/MatMul")}) == 1
    build_engine(out, tmp_path / "engine.plan", find_target("rtx-4090"))


def test_int8_weights_by_hand() -> None:
    weight = np.array([[127.0, -63.5, 1.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.1]], np.float32)
    stored, scale = quantise_weight(weight, 0, Precision.INT8)
    # 0.5/127 is 1032.06 of FP16's steps there (2^-18); 1033 are taken.
    assert scale[0] == 1.0
    assert scale[2] == 1033 * 2.0**-18
    assert stored.tolist() == [[127, -64, 1], [0, 0, 0], [-127, 63, 25]]
    columns, scale = quantise_weight(weight.T, 1, Precision.INT8)
    assert columns.T.tolist() == stored.tolist()
    assert scale.shape == (3,)


def test_fp8_weights_by_hand() -> None:
    stored, scale = quantise_weight(np.array([[448.0, -17.0, 0.3]], np.float32), 0, Precision.FP8)
    assert scale.tolist() == [1.0]
    # E4M3 has steps of 2 above 16 (ties go to even) and of 1/32 above 1/4.
    assert stored.astype(np.float32).tolist() == [[448.0, -16.0, 0.3125]]
    assert stored.dtype == ml_dtypes.float8_e4m3fn


def test_one_convolution_by_hand(tmp_path: Path) -> None:
    g = Graph(1, 1, 1, 2)
    weight = g.constant("w", np.array([2.0, -0.5], np.float32).reshape(2, 1, 1, 1))
    bias = g.constant("b", np.array([0.5, 0.0], np.float32))
    path = g.save(tmp_path / "float.onnx", g.op("Conv", "input", weight, bias, name="conv"))
    out = tmp_path / "int8.onnx"
    report = quantize_model(path, ranges_from_extremes({"input": (-1.0, 12.7)}), INT8, out)
    kept = initializers(out)
    assert kept["w/int8"].ravel().tolist() == [127, -127]
    assert kept["w/int8"].dtype == np.int8
    # 12.7/127 is 1638.4 FP16 steps of 2^-14, 2/127 is 1032.06 of 2^-16: each rounds up.
    assert float(kept["input/scale"]) == 0.10003662109375
    assert kept["w/int8/scale"].tolist() == [0.0157623291015625, 0.003940582275390625]
    assert kept["w/int8/scale"].dtype == np.float16
    dequantise = node(out, "conv/weight/DequantizeLinear")
    assert dequantise.attributes["axis"].as_int() == 0
    assert set(dequantise.attributes) == {"axis"}
    image = np.array([1.26, 20.0], np.float32).reshape(1, 1, 1, 2)
    result = outputs_of(out, image)["logits"].ravel()
    # 1.26 is step 13; 20 is clipped at step 127. The products are rounded to FP16.
    x = np.array([13, 127]) * 0.10003662109375
    w = np.array([127, -127]) * kept["w/int8/scale"].astype(np.float64)
    assert result == pytest.approx([*(x * w[0] + 0.5), *(x * w[1])], rel=1e-3)
    assert report.macs_share == 1.0
    assert report.nodes[0].precision == "int8"


def test_a_tensor_has_one_pair_for_all_of_its_quantised_readers(tmp_path: Path) -> None:
    g = Graph(1, 32, 8, 8)
    value = g.op("Relu", "input")
    path = g.save(tmp_path / "float.onnx", basic_block(g, value, 32, "block"), g.op("Sigmoid", value, name="sigmoid"))
    images = np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)
    quantize_model(path, ranges_of(path, images), INT8, tmp_path / "int8.onnx")
    model = ir.load(tmp_path / "int8.onnx")
    pairs = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert sorted(str(n.inputs[0].name) for n in pairs) == ["Relu_0:0", "block/Relu1:0"]
    dequantised = model.graph.node("Relu_0:0/DequantizeLinear").outputs[0]
    assert {use.node.name for use in dequantised.uses()} == {"block.conv1/Conv", "block/Add"}
    assert model.graph.node("sigmoid").inputs[0].name == "Relu_0:0"


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    g = Graph(1, 32, 8, 8)
    weight = g.weight("shared", 32, 32, 3, 3)
    value = g.op("Conv", g.op("Relu", g.op("Conv", "input", weight, name="a")), weight, name="b")
    path = g.save(tmp_path / "float.onnx", g.op("Relu", value))
    images = np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)
    quantize_model(path, ranges_of(path, images), INT8, tmp_path / "int8.onnx")
    kept = initializers(tmp_path / "int8.onnx")
    assert [n for n, a in kept.items() if a.shape == (32, 32, 3, 3)] == ["shared/int8"]


def test_a_transposed_weight_is_folded_first(tmp_path: Path) -> None:
    g = Graph(1, 32, 64)
    turned = g.op("Transpose", g.weight("w", 48, 64), name="turn", perm=[1, 0])
    path = g.save(tmp_path / "float.onnx", g.op("Relu", g.op("MatMul", "input", turned, name="fc")))
    images = np.random.default_rng(0).standard_normal((1, 32, 64)).astype(np.float32)
    report = quantize_model(path, ranges_of(path, images), INT8, tmp_path / "int8.onnx")
    assert [n.precision for n in report.nodes] == ["int8"]
    assert initializers(tmp_path / "int8.onnx")["turn:0/int8"].shape == (64, 48)
    assert node(tmp_path / "int8.onnx", "fc/weight/DequantizeLinear").attributes["axis"].as_int() == 1
    float_logits, logits = (outputs_of(p, images)["logits"] for p in (path, tmp_path / "int8.onnx"))
    assert sqnr(float_logits, logits) > 35


def test_gemm_axis_follows_its_transpose(tmp_path: Path) -> None:
    g = Graph(32, 64)
    value = g.op("Gemm", "input", g.weight("w1", 48, 64), name="turned", transB=1)
    value = g.op("Gemm", g.op("Relu", value), g.weight("w2", 48, 64), name="straight")
    path = g.save(tmp_path / "float.onnx", g.op("Add", value, "input"))
    images = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    quantize_model(path, ranges_of(path, images), INT8, tmp_path / "int8.onnx")
    assert node(tmp_path / "int8.onnx", "turned/weight/DequantizeLinear").attributes["axis"].as_int() == 0
    assert node(tmp_path / "int8.onnx", "straight/weight/DequantizeLinear").attributes["axis"].as_int() == 1


@pytest.mark.whole
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(("settings", "least"), [(INT8, 28.0), (FP8, 22.0)])
def test_the_quantised_hybrid_agrees_with_the_float_one(
    tmp_path: Path, opset: int, settings: QuantizeSettings, least: float
) -> None:
    if opset > scorable_opset():
        pytest.skip("this ONNX Runtime has no QuantizeLinear of opset 23")
    path = hybrid(tmp_path / "float.onnx", opset)
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    out = tmp_path / "quantised.onnx"
    report = quantize_model(path, ranges_of(path, images), settings, out)
    logits = outputs_of(out, images)["logits"]
    assert logits.dtype == np.float32
    assert sqnr(outputs_of(path, images)["logits"], logits) > least
    macs = {n.name: n.macs for n in report.nodes if n.weighted}
    left = {"head/Gemm"} | ({"stem/Conv"} if settings is FP8 else set())
    attention = {"blocks.0.attn/Scores", "blocks.0.attn/Mix"}
    assert {n.name for n in report.nodes if n.precision == "fp16"} == left | attention
    assert {n.name for n in report.nodes if not n.weighted} == attention
    assert {n.precision for n in report.nodes} == {"fp16", settings.precision.value}
    assert report.macs_share == pytest.approx(1 - sum(macs[n] for n in left) / sum(macs.values()))
    assert report.fp32 == ()
    assert report.bytes_after < 0.4 * report.bytes_before
    assert json.loads(json.dumps(report.to_json()))["groups"]["trunk"] == {
        "nodes": 2,
        "quantized_nodes": 2,
        "macs": 2 * 589824,
        "quantized_macs": 2 * 589824,
    }


def test_same_input_same_bytes(tmp_path: Path) -> None:
    path = hybrid(tmp_path / "float.onnx")
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    ranges = ranges_of(path, images)
    for name in ("a.onnx", "b.onnx"):
        quantize_model(path, ranges, INT8, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_missing_range_and_a_broken_weight_are_named(tmp_path: Path) -> None:
    g = Graph(1, 32, 8, 8)
    path = g.save(tmp_path / "float.onnx", g.op("Relu", g.conv("input", 32, 32, name="conv")))
    with pytest.raises(ResvitError, match="input"):
        quantize_model(path, ranges_from_extremes({"other": (0.0, 1.0)}), INT8, tmp_path / "int8.onnx")
    g.constants[0].CopyFrom(numpy_helper.from_array(np.full((32, 32, 3, 3), np.nan, np.float32), "conv.weight"))
    path = g.save(tmp_path / "nan.onnx", g.nodes[-1].output[0])
    with pytest.raises(ResvitError, match=r"conv\.weight"):
        quantize_model(path, ranges_from_extremes({"input": (0.0, 1.0)}), INT8, tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_file_that_is_no_model_is_an_error_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(ResvitError):
        quantize_model(tmp_path / "x.onnx", ranges_from_extremes({}), INT8, tmp_path / "out.onnx")
    with pytest.raises(ResvitError):
        quantize_model(tmp_path / "absent.onnx", ranges_from_extremes({}), INT8, tmp_path / "out.onnx")


@pytest.mark.parametrize("opset", [20, 21, 23])
@pytest.mark.parametrize("batch", [1, "batch"])
def test_what_ships_opens_in_onnx_runtime_as_users_open_it(opset: int, batch: int | str, tmp_path: Path) -> None:
    """With all of its usual optimisation, which validation leaves out."""
    import onnxruntime

    graph = Graph(batch, 3, 8, 8, opset=opset)
    maps = graph.op("Relu", graph.conv("input", 16, 3))
    rows = graph.op("Reshape", maps, graph.ints(-1, 16, 64))
    tokens = graph.op("Transpose", rows, perm=[0, 2, 1])
    once = graph.linear(tokens, 16, 32, "fc1")
    model = graph.save(tmp_path / "float.onnx", graph.linear(graph.op("Relu", once), 32, 16, "fc2"))
    out = tmp_path / "model.onnx"
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)
    quantize_model(model, ranges_of(model, image), INT8, out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"input": image})
    (expected,) = outputs_of(model, image).values()
    assert sqnr(expected, answer) > 25
    shapes = {name: array.shape for name, array in initializers(out).items() if "fc1.bias" in name or "wide" in name}
    assert any(len(shape) == 3 for shape in shapes.values()) is (opset > 20)


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_with_a_vector_goes_through(tmp_path: Path, turned: bool) -> None:
    g = Graph(2, 4, 8, 8)
    random = np.random.default_rng(0)
    vector = g.constant("w", random.standard_normal(8).astype(np.float32))
    product = g.op("MatMul", *([vector, "input"] if turned else ["input", vector]), name="product")
    path = g.save(tmp_path / "float.onnx", product)
    images = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    reach = float(np.abs(images).max())
    out = tmp_path / "int8.onnx"
    quantize_model(path, ranges_from_extremes({"input": (-reach, reach)}), replace(INT8, include=("*",)), out)
    (expected,), (found,) = outputs_of(path, images).values(), outputs_of(out, images).values()
    assert sqnr(expected, found) > 33
