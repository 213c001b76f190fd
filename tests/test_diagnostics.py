"""Doubtful calibration data is told of once, clearly; good data raises no doubt."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.ranges.clipping import clipped_shares, shares_from_statistics
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.diagnostics import (
    Diagnostic,
    DiagnosticKind,
    clipping_diagnostics,
    diagnostics_from_statistics,
    tell,
)
from resvit_calibrate.ranges.estimators import PRECISIONS, Estimator, amax_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Silent
from resvit_engines.targets.table import Precision
from resvit_quantize.placement.grid import is_beyond_half, scale_from_amax
from test_estimators import seen


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def two_layers(path: Path, weight: np.ndarray | None = None) -> Path:
    """Conv, Relu, Conv on 4 channels of 8 x 8."""
    first = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1) if weight is None else weight
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w1"], ["c"]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "w2"], ["y"]),
        ],
        "two",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(first, "w1"),
            numpy_helper.from_array(np.ones((2, 4, 1, 1), np.float32), "w2"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def images(count: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, 8, 8)).astype(np.float32)


def diagnostics(model: Path, x: np.ndarray) -> dict[DiagnosticKind, Diagnostic]:
    batches = [{"input": x[start : start + 16]} for start in range(0, len(x), 16)]
    return {
        diagnostic.kind: diagnostic for diagnostic in diagnostics_from_statistics(collect_statistics(model, batches))
    }


def test_good_images_raise_no_doubt(tmp_path):
    assert diagnostics(two_layers(tmp_path / "m.onnx"), images()) == {}


def test_few_images_are_told_of(tmp_path):
    model = two_layers(tmp_path / "m.onnx")
    found = diagnostics(model, images(31))
    assert list(found) == [DiagnosticKind.FEW_IMAGES]
    assert "31 images" in found[DiagnosticKind.FEW_IMAGES].text
    assert "1 image;" in diagnostics(model, images(1))[DiagnosticKind.FEW_IMAGES].text


def test_dead_channels_are_counted(tmp_path):
    weight = np.eye(4, dtype=np.float32)
    weight[1], weight[2] = 0, 0
    found = diagnostics(two_layers(tmp_path / "m.onnx", weight.reshape(4, 4, 1, 1)), images())
    assert list(found) == [DiagnosticKind.DEAD_CHANNELS]
    assert found[DiagnosticKind.DEAD_CHANNELS].tensor == "r"
    assert "2 channels in 1 tensor" in found[DiagnosticKind.DEAD_CHANNELS].text
    assert "'r' (2 of 4)" in found[DiagnosticKind.DEAD_CHANNELS].text


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constants_are_named(tmp_path, value):
    found = diagnostics(two_layers(tmp_path / "m.onnx"), np.full((40, 4, 8, 8), value, np.float32))
    assert list(found) == [DiagnosticKind.CONSTANT]
    assert "2 tensors" in found[DiagnosticKind.CONSTANT].text
    assert f"{value:g} everywhere" in found[DiagnosticKind.CONSTANT].text


def test_an_image_that_sets_the_ranges_alone_is_named(tmp_path):
    x = images()
    x[21, 2, 3, 3] = 90.0
    found = diagnostics(two_layers(tmp_path / "m.onnx"), x)
    assert list(found) == [DiagnosticKind.ONE_IMAGE]
    assert "image 21 alone sets the range of 'r' and of 1 more: it reaches 90" in found[DiagnosticKind.ONE_IMAGE].text
    x[22, 2, 3, 3] = -60.0  # two such images are a part of the data
    # The Relu drops the second: behind that, one image stands alone still.
    assert "range of 'r': it" in diagnostics(two_layers(tmp_path / "m.onnx"), x)[DiagnosticKind.ONE_IMAGE].text
    x[22, 2, 3, 3] = 60.0
    assert diagnostics(two_layers(tmp_path / "m.onnx"), x) == {}


def test_a_handful_is_said_and_the_rest_counted():
    listener = Listener()
    many = [Diagnostic(DiagnosticKind.ONE_IMAGE, "x", f"remark {i}") for i in range(8)]
    tell(many, listener)
    assert listener.warnings[:5] == [f"remark {i}" for i in range(5)]
    assert len(listener.warnings) == 6
    assert "3 more" in listener.warnings[5]
    assert many[0].to_json() == {"kind": "range of one image", "tensor": "x", "text": "remark 0"}


def test_clipped_shares_are_those_of_the_values(tmp_path):
    model, x = two_layers(tmp_path / "m.onnx"), images(32)
    amax = {"input": 1.0, "r": 0.5, "y": 1.0, "absent": 1.0}
    found = clipped_shares(model, amax, [{"input": x[:16]}, {"input": x[16:]}])
    assert set(found) == {"input", "r"}  # nothing quantises y
    assert found["input"] == pytest.approx((np.abs(x) > 1).mean(), abs=0.004)
    relu = x[x > 0]
    assert found["r"] == pytest.approx((relu > 0.5).mean(), abs=0.004)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(ResvitError, match="Validation image 3 "):
        clipped_shares(model, amax, [{"input": x}])


def test_validation_unlike_calibration_is_told_of_and_the_same_kind_is_not(tmp_path):
    model = two_layers(tmp_path / "m.onnx")
    statistics = collect_statistics(model, [{"input": images(40)}])
    amax = {name: amax_from(statistics.tensors[name], Estimator.MSE, "int8") for name in ("input", "r")}
    known = shares_from_statistics(statistics, amax)
    assert clipping_diagnostics(clipped_shares(model, amax, [{"input": images(40, 1)}]), known) == ()
    (diagnostic,) = clipping_diagnostics(clipped_shares(model, amax, [{"input": 3 * images(40, 1)}]), known)
    assert diagnostic.kind is DiagnosticKind.CLIPPED
    assert "2 of 2 quantised tensors" in diagnostic.text
    # What clips as much on calibration was chosen so.
    assert clipping_diagnostics({"x": 0.05}, {"x": 0.04}) == ()
    assert clipping_diagnostics({"x": 0.05}, {"x": 0.01})[0].tensor == "x"


strange = st.one_of(
    st.just(0.0),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-(2.0**-126), 2.0**-126, width=32),
    st.sampled_from([2.0**127, -(2.0**127), 2.0**-149, -(2.0**-149), 65504.0, 2.0**-20]),
)


@pytest.mark.whole
@settings(deadline=None, max_examples=200)
@given(
    st.lists(strange, min_size=1, max_size=20), st.booleans(), st.sampled_from(PRECISIONS), st.sampled_from(Estimator)
)
def test_a_scale_is_always_finite_and_positive(values, constant, precision, estimator):
    statistics = seen(values[:1] * 50 if constant else values)
    amax = amax_from(statistics, estimator, precision)
    assert math.isfinite(amax)
    assert amax > 0
    scale = scale_from_amax(amax, Precision(precision))
    assert scale.dtype == np.float32
    assert np.isfinite(scale)
    if not is_beyond_half(scale):
        assert np.isfinite(scale.astype(np.float16))
        assert scale.astype(np.float16) > 0
    diagnostics_from_statistics(Statistics({"x": statistics}, 1))
