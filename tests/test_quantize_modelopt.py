from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import Graph, hybrid, outputs_of, sqnr
from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.estimators import Estimator
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import Precision
from resvit_quantize.modelopt.quantizer import quantize_with_modelopt
from resvit_quantize.settings import QuantizeSettings

INT8 = QuantizeSettings(Precision.INT8, Estimator.MAX)


class Heard:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def track(self, items, what, total, weight=1, before=0):
        yield from items


def batches() -> list[Batch]:
    random = np.random.default_rng(0)
    return [Batch(random.standard_normal((4, 3, 16, 16)).astype(np.float32), None) for _ in range(2)]


@pytest.fixture
def modelopt() -> None:
    pytest.importorskip("modelopt.onnx.quantization")


@pytest.mark.whole
@pytest.mark.usefixtures("modelopt")
@pytest.mark.parametrize(("precision", "least"), [("int8", 18.0), ("fp8", 18.0), ("fp16", 50.0)])
def test_modelopt_quantises_and_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], precision: str, least: float
) -> None:
    path, out, heard = hybrid(tmp_path / "float.onnx"), tmp_path / "quantised.onnx", Heard()
    settings = QuantizeSettings(Precision(precision), Estimator.MSE, exclude=("blocks.0.mlp",))
    handlers = logging.getLogger().handlers[:]
    report = quantize_with_modelopt(path, iter(batches()), settings, out, heard)
    captured = capfd.readouterr()
    assert "modelopt" not in (captured.out + captured.err).lower()
    assert logging.getLogger().handlers == handlers
    assert len(heard.warnings) == (precision != "fp16")
    assert all("'mse'" in text for text in heard.warnings)
    images = batches()[0].images
    logits = outputs_of(out, images)["logits"]
    assert logits.dtype == np.float32
    assert sqnr(outputs_of(path, images)["logits"], logits) > least
    found = {n.name: n.precision for n in report.nodes}
    assert found["trunk.0.conv1/Conv"] == found["blocks.0.attn.qkv/MatMul"] == precision
    assert {p for n, p in found.items() if ".mlp." in n} <= {"fp16", "fp32"}
    assert report.quantizer == "modelopt"
    assert (report.macs_share > 0.5) == (precision != "fp16")
    assert report.bytes_after < 0.75 * report.bytes_before


@pytest.mark.whole
@pytest.mark.usefixtures("modelopt")
def test_infinite_padding_does_not_become_a_range(tmp_path: Path) -> None:
    g = Graph("batch", 3, 16, 16)
    value = g.op("Relu", g.conv("input", 32, 3, name="a"))
    low = g.constant("low", np.array(-np.inf, np.float32))
    value = g.op("Pad", value, g.ints(0, 0, 0, 0, 0, 0, 1, 1), low, name="pad")
    value = g.op("MaxPool", value, name="pool", kernel_shape=[3, 3], strides=[2, 2])
    path = g.save(tmp_path / "float.onnx", g.op("Relu", g.conv(value, 32, 32, name="b")))
    quantize_with_modelopt(path, batches(), INT8, tmp_path / "int8.onnx")
    images = batches()[0].images
    assert sqnr(outputs_of(path, images)["logits"], outputs_of(tmp_path / "int8.onnx", images)["logits"]) > 25


@pytest.mark.usefixtures("modelopt")
def test_its_failures_keep_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modelopt.onnx.quantization as theirs

    def fail(*_: object, **__: object) -> None:
        raise KeyError("/If_1_output")

    monkeypatch.setattr(theirs, "quantize", fail)
    with pytest.raises(ResvitError, match=r"KeyError: '/If_1_output'"):
        quantize_with_modelopt(hybrid(tmp_path / "float.onnx"), batches(), INT8, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_missing_modelopt_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("modelopt")] or ["modelopt"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(ResvitError) as caught:
        quantize_with_modelopt(hybrid(tmp_path / "float.onnx"), batches(), INT8, tmp_path / "out.onnx")
    assert caught.value.code is ExitCode.MISSING
    assert "resvit-export[modelopt]" in caught.value.fix


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    path = hybrid(tmp_path / "float.onnx")
    with pytest.raises(ResvitError, match="include"):
        quantize_with_modelopt(
            path, batches(), QuantizeSettings(Precision.INT8, include=("head",)), tmp_path / "o.onnx"
        )
    with pytest.raises(ResvitError, match="no calibration image"):
        quantize_with_modelopt(path, [], INT8, tmp_path / "o.onnx")
