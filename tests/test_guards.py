"""Epsilons and stand-ins for infinity in FP16: a black image is answered as the float network answers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize_graphs import Graph, outputs_of, ranges_of
from resvit_engines.targets.table import Precision
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

EPSILONS = st.sampled_from([1e-15, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5])


def epsilon(g: Graph, value: float) -> str:
    return g.constant(f"epsilon_{len(g.constants)}", np.array(value, np.float32))


def by_the_sum(g: Graph, x: str, value: float) -> str:
    total = g.op("ReduceSum", g.op("Abs", x), g.ints(-1), keepdims=1)
    return g.op("Div", x, g.op("Add", total, epsilon(g, value)))


def by_the_norm(g: Graph, x: str, value: float) -> str:
    norm = g.op("ReduceL2", x, g.ints(-1), keepdims=1)
    return g.op("Div", x, g.op("Expand", g.op("Clip", norm, epsilon(g, value)), g.ints(1, 8, 16)))


def by_the_largest(g: Graph, x: str, value: float) -> str:
    norm = g.op("ReduceL1", x, g.ints(-1), keepdims=1)
    return g.op("Div", x, g.op("Max", epsilon(g, value), norm))


def by_the_root(g: Graph, x: str, value: float) -> str:
    squares = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", squares, epsilon(g, value)))
    return g.op("Mul", x, g.op("Reciprocal", root))


def by_a_power(g: Graph, x: str, value: float) -> str:
    squares = g.op("ReduceMean", g.op("Pow", x, epsilon(g, 2.0)), g.ints(-1), keepdims=1)
    return g.op("Mul", x, g.op("Pow", g.op("Add", squares, epsilon(g, value)), epsilon(g, -0.5)))


FORMS = st.sampled_from([by_the_sum, by_the_norm, by_the_largest, by_the_root, by_a_power])


@pytest.mark.whole
@settings(max_examples=25, deadline=None)
@given(FORMS, EPSILONS, st.sampled_from([0.0, 1e-4, 1.0]))
def test_what_an_epsilon_guards_is_answered_as_in_float(
    tmp_path_factory: pytest.TempPathFactory, form: Callable[[Graph, str, float], str], value: float, scale: float
) -> None:
    folder = tmp_path_factory.mktemp("guards")
    g = Graph(1, 8, 16)
    normal = form(g, g.op("Relu", "input"), value)
    path = g.save(folder / "float.onnx", g.op("MatMul", normal, g.weight("head", 16, 4)))
    seen = np.random.default_rng(0).standard_normal((1, 8, 16)).astype(np.float32)
    ranges = ranges_of(path, seen)
    quantize_model(path, ranges, QuantizeSettings(Precision.FP16), folder / "half.onnx")
    image = seen * np.float32(scale)
    expected, found = (outputs_of(folder / name, image)["logits"] for name in ("float.onnx", "half.onnx"))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * float(np.abs(expected).max()) + 1e-6)


@pytest.mark.parametrize("stand_in", [-3.4028234663852886e38, -1e9])
def test_a_row_that_is_masked_wholly_stays_uniform(tmp_path: Path, stand_in: float) -> None:
    g = Graph(1, 4, 4)
    mask = np.zeros((4, 4), np.float32)
    mask[:, 2:], mask[3] = stand_in, stand_in
    scores = g.op("Add", g.op("Sin", "input", name="sine"), g.constant("mask", mask), name="mask")
    path = g.save(tmp_path / "float.onnx", g.op("Softmax", scores, name="softmax"))
    image = np.random.default_rng(0).standard_normal((1, 4, 4)).astype(np.float32)
    ranges = ranges_of(path, np.where(image > 9, image, image))
    report = quantize_model(path, ranges, QuantizeSettings(Precision.FP16), tmp_path / "half.onnx")
    found = outputs_of(tmp_path / "half.onnx", image)["logits"]
    np.testing.assert_allclose(found, outputs_of(path, image)["logits"], atol=2e-3)
    reasons = {node.name: node.reason for node in report.fp32}
    assert {"mask", "softmax"} <= set(reasons)


def test_norms_that_lose_their_epsilon_and_divisors_that_become_zero(tmp_path: Path) -> None:
    g = Graph(1, 4, 8, 8)
    ones, zeros = g.constant("ones", np.ones(4, np.float32)), g.constant("zeros", np.zeros(4, np.float32))
    value = g.op("InstanceNormalization", g.op("Relu", "input"), ones, zeros, name="lost", epsilon=1e-12)
    value = g.op("InstanceNormalization", value, ones, zeros, name="held", epsilon=1e-5)
    divisor = np.array([1.0, 1e-9, 2.0, 3.0], np.float32).reshape(4, 1, 1)
    value = g.op("Div", value, g.constant("divisor", divisor), name="divided")
    path = g.save(tmp_path / "float.onnx", value)
    report = quantize_model(
        path,
        ranges_of(path, np.ones((1, 4, 8, 8), np.float32)),
        QuantizeSettings(Precision.FP16),
        tmp_path / "half.onnx",
    )
    reasons = {node.name: node.reason for node in report.fp32}
    assert "epsilon of 1e-12" in reasons["lost"]
    assert "held" not in reasons
    assert "0 in FP16" in reasons["divided"]


def test_a_bias_with_small_entries_guards_nothing(tmp_path: Path) -> None:
    g = Graph(1, 8, 16)
    bias = g.constant("bias", np.full(16, 1e-6, np.float32))
    value = g.op("Add", g.op("MatMul", "input", g.weight("weight", 16, 16), name="product"), bias, name="bias")
    path = g.save(tmp_path / "float.onnx", g.op("Relu", value, name="relu"))
    image = np.random.default_rng(0).standard_normal((1, 8, 16)).astype(np.float32)
    report = quantize_model(path, ranges_of(path, image), QuantizeSettings(Precision.FP16), tmp_path / "half.onnx")
    assert report.fp32 == ()
    half = ir.load(tmp_path / "half.onnx")
    assert half.graph.node("relu").outputs[0].dtype is ir.DataType.FLOAT16
