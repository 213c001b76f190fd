from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from quantize_graphs import Graph, outputs_of, ranges_of
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.network import constant, network_from_onnx, onnx_from_network
from resvit_quantize.qdq.rtx_scales import move_channel_scales
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

IMAGES = np.random.default_rng(1).standard_normal((2, 24, 8, 8)).astype(np.float32)


def quantised(folder: Path, precision: Precision = Precision.INT8, spread: float = 1.0) -> Path:
    """Two convolutions with a residual, whose channels' weights differ in size up to ``spread``."""
    g = Graph(2, 24, 8, 8)
    value = g.op("Relu", g.conv("input", 24, 24, name="a/Conv"))
    weight = g.random.standard_normal((24, 24, 3, 3)) * np.geomspace(0.05 / spread, 0.05, 24).reshape(-1, 1, 1, 1)
    value = g.op("Conv", value, g.constant("b.weight", weight.astype(np.float32)), name="b/Conv", pads=[1] * 4)
    path = g.save(folder / "float.onnx", g.op("Relu", g.op("Add", value, "input")))
    quantize_model(path, ranges_of(path, IMAGES), QuantizeSettings(precision), folder / "model.onnx")
    return folder / "model.onnx"


def moved(path: Path, out: Path) -> tuple[int, ir.Model]:
    network = ir.load(path)
    count = move_channel_scales(network)
    onnx_from_network(network, out)
    return count, network


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_the_product_of_both_scales_is_the_channels_own(tmp_path: Path, precision: Precision) -> None:
    source = quantised(tmp_path, precision, spread=8)
    before = ir.load(source)
    count, after = moved(source, tmp_path / "out.onnx")
    assert count == 2
    assert all(list(value.uses()) for value in after.graph.initializers.values())
    own = {str(n.name): constant(n.inputs[1]) for n in before.graph if n.op_type == "DequantizeLinear"}
    for node in after.graph:
        if node.op_type != "Conv":
            continue
        scale = constant(node.inputs[1].producer().inputs[1])
        factor = constant(next(use.node for use in node.outputs[0].uses()).inputs[1])
        assert scale.shape == ()
        assert float(np.log2(scale)).is_integer()
        product = factor.astype(np.float64).reshape(-1) * float(scale)
        np.testing.assert_array_equal(product, own[f"{node.name}/weight/DequantizeLinear"].astype(np.float64))


def test_outputs_differ_by_fp16_rounding_alone(tmp_path: Path) -> None:
    source = quantised(tmp_path)
    moved(source, tmp_path / "out.onnx")
    before, after = (outputs_of(path, IMAGES)["logits"] for path in (source, tmp_path / "out.onnx"))
    # One step of the second convolution's INT8 input is as large as FP16 gets it across an edge of the grid.
    assert np.abs(after - before).max() < 0.02 * np.abs(before).max()
    assert np.linalg.norm(after - before) < 1e-3 * np.linalg.norm(before)


def test_sums_that_could_leave_fp16_stay_as_they_were(tmp_path: Path) -> None:
    source = quantised(tmp_path)
    network = ir.load(source)
    for node in network.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].producer() is not None:
            name = str(node.inputs[1].name)
            network.graph.initializers[name].const_value = ir.tensor(np.array(60000, np.float16), name=name)
    ir.save(network, source)
    assert moved(source, tmp_path / "out.onnx")[0] == 0


def test_fp16_and_fp32_convolutions_are_left_alone(tmp_path: Path) -> None:
    assert moved(quantised(tmp_path, Precision.FP16), tmp_path / "out.onnx")[0] == 0
    assert move_channel_scales(network_from_onnx(tmp_path / "float.onnx")) == 0
