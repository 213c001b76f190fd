"""The runtime computes Q/DQ as ONNX defines it, or is made to, or is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.runtime import runner as runtime
from resvit_calibrate.runtime import selftest
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_calibrate.runtime.selftest import runtime_note, self_test
from resvit_calibrate.runtime.sessions import (
    onnxruntime_module,
    open_session,
    run_session,
    session_options,
)
from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError


def qdq_model(real=np.float16, grid=np.int8, scale=0.037, batch=None):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(real))
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "qdq",
        [helper.make_tensor_value_info("x", kind, [batch, 5])],
        [helper.make_tensor_value_info("y", kind, [batch, 5])],
        [
            numpy_helper.from_array(np.array(scale, real), "s"),
            numpy_helper.from_array(np.zeros((), grid), "z"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_this_runtime_can_score():
    assert self_test().exact_with_casts
    assert self_test().version in runtime_note()


@pytest.mark.parametrize("real", [np.float16, np.float32])
@pytest.mark.parametrize("grid", [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantizes_like_numpy(real, grid):
    x = np.random.default_rng(1).uniform(-4, 4, (400, 5)).astype(real)
    y = onnx_runner(qdq_model(real, grid).SerializeToString())({"x": x})["y"]
    scale = np.array(0.037, real).astype(np.float32)
    steps = x.astype(np.float32) / scale
    codes = np.clip(np.rint(steps), -128, 127) if grid is np.int8 else steps.astype(grid).astype(np.float32)
    assert y.dtype == real
    np.testing.assert_allclose(y.astype(np.float32), codes * scale, rtol=1e-3)


def test_weights_in_int8_stay_exact_through_a_convolution():
    rng = np.random.default_rng(0)
    weight, x = rng.integers(-127, 128, (4, 3, 1, 1)).astype(np.int8), rng.standard_normal((2, 3, 6, 6))
    scales = np.array([0.01, 0.02, 0.03, 0.5], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "xs", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
            helper.make_node("Conv", ["xq", "wf"], ["y"]),
        ],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.float32(0.05), "xs"),
            numpy_helper.from_array(np.int8(0), "z"),
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(scales, "ws"),
            numpy_helper.from_array(np.zeros(4, np.int8), "wz"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = x.astype(np.float32)
    y = onnx_runner(model.SerializeToString())({"x": x})["y"]
    rounded = np.clip(np.rint(x / np.float32(0.05)), -128, 127) * 0.05
    expected = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0] * scales[:, None], rounded)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def truncating(source, target, *, casts):
    return casts or (source, target) != ("FP16", "INT8")


def test_a_truncating_runtime_gets_casts(monkeypatch):
    monkeypatch.setattr(selftest, "_rounds_correctly", truncating)
    health = selftest.self_test.__wrapped__()
    assert health.wrong == ("FP16 to INT8",)
    assert not health.exact
    assert health.exact_with_casts
    monkeypatch.setattr(selftest, "self_test", lambda: health)
    monkeypatch.setattr(runtime, "self_test", lambda: health)
    assert "FP16 to INT8" in selftest.runtime_note()
    model = qdq_model().SerializeToString()
    cast = onnx.load_model_from_string(selftest.with_float32_quantizers(model))
    onnx.checker.check_model(cast, full_check=True)
    assert [node.op_type for node in cast.graph.node] == ["Cast", "Cast", "QuantizeLinear", "DequantizeLinear"]
    x = np.random.default_rng(1).uniform(-4, 4, (64, 5)).astype(np.float16)
    scale = np.float32(np.float16(0.037))
    expected = np.rint(x.astype(np.float32) / scale) * scale
    np.testing.assert_allclose(onnx_runner(model)({"x": x})["y"], expected, rtol=1e-3)


def test_a_hopeless_runtime_is_refused_for_quantised_models_only(monkeypatch, tmp_path):
    monkeypatch.setattr(selftest, "_rounds_correctly", lambda *_, **__: False)
    health = selftest.self_test.__wrapped__()
    monkeypatch.setattr(runtime, "self_test", lambda: health)
    with pytest.raises(ResvitError, match="cannot score") as caught:
        onnx_runner(qdq_model().SerializeToString())
    assert caught.value.code is ExitCode.MISSING
    path = tmp_path / "float.onnx"
    onnx.save(scaled_model(), path)
    assert onnx_runner(path)({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[3.0, 3.0]]


def scaled_model(batch: int | None = None):
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(np.full(2, 3.0, np.float32), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("images", [1, 4, 6, 8])
def test_a_fixed_batch_takes_any_number_of_images(images):
    x = np.arange(images * 2, dtype=np.float32).reshape(images, 2)
    runner = onnx_runner(scaled_model(4).SerializeToString())
    assert runner.batch == 4
    np.testing.assert_array_equal(runner({"x": x})["y"], 3 * x)


def test_external_data_is_found_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "model.onnx"
    onnx.save(scaled_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    assert onnx_runner(Path("deep/model.onnx"))({"x": np.ones((1, 2))})["y"].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(("error", "words"), [(0.1, ""), (0.6, "without optimisation"), (np.nan, "without")])
def test_an_optimiser_that_breaks_the_graph_is_not_used(tmp_path, monkeypatch, error, words):
    path = tmp_path / "model.onnx"
    onnx.save(scaled_model(), path)
    arrays = {"x": np.ones((1, 2), np.float32)}
    honest = runtime.OnnxRunner.__call__
    made = []
    open_runner = runtime.onnx_runner

    def opened(model, *, optimize=True, folder=None):
        made.append((open_runner(model, optimize=optimize, folder=folder), optimize))
        return made[-1][0]

    def call(self, arrays):
        optimized = next(flag for runner, flag in made if runner is self)
        return {name: value * (1 + error if optimized else 1) for name, value in honest(self, arrays).items()}

    monkeypatch.setattr(runtime, "onnx_runner", opened)
    monkeypatch.setattr(runtime.OnnxRunner, "__call__", call)
    runner, remark = runtime.checked_runner(path, arrays)
    assert words in remark
    assert bool(remark) == bool(words)
    assert next(flag for made_runner, flag in made if made_runner is runner) == (not words)


def test_failures_say_what_to_do(tmp_path):
    with pytest.raises(ResvitError, match="no model file"):
        onnx_runner(tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(scaled_model().SerializeToString()[:60])
    with pytest.raises(ResvitError, match=r"cannot (load|be read)"):
        onnx_runner(broken)
    runner = onnx_runner(scaled_model().SerializeToString())
    with pytest.raises(ResvitError, match="needs the input 'x'"):
        runner({"image": np.ones((1, 2), np.float32)})
    with pytest.raises(ResvitError, match=r"float32\[1, 3\]"):
        runner({"x": np.ones((1, 3), np.float32)})


class Full:
    """A session whose activations do not fit."""

    def run(self, outputs, feeds, options):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 4096")


@pytest.mark.parametrize(("images", "fix"), [(1, "Close what"), (4, "Use a smaller batch size, close what")])
def test_memory_that_runs_out_is_said_in_few_words(images, fix):
    feeds = {"input": np.zeros((images, 3, 8, 8), np.float32)}
    feeds |= {f"block.{number}/scale": np.zeros((), np.float32) for number in range(99)}
    with pytest.raises(OutOfMemoryError, match=r"ran on input float32\[\d, 3, 8, 8\]\.\n") as raised:
        run_session(Full(), ["logits"], feeds, frugal=True)
    assert raised.value.fix.startswith(fix)
    assert raised.value.code == ExitCode.SYSTEM
    feeds = {f"input.{number}": np.zeros(1, np.float32) for number in range(99)}
    with pytest.raises(OutOfMemoryError, match=r"input\.7 float32\[1\], …\.\n"):
        run_session(Full(), ["logits"], feeds)


def test_memory_that_runs_out_while_a_model_is_loaded_is_no_fault_of_its_file(monkeypatch, tmp_path):
    def full(*arguments, **named):
        raise RuntimeError(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"
        )

    monkeypatch.setattr(onnxruntime_module(), "InferenceSession", full)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(OutOfMemoryError, match=r"ran out while ONNX Runtime loaded .*model\.onnx") as raised:
        open_session(tmp_path / "model.onnx", session_options())
    assert raised.value.code == ExitCode.SYSTEM
