from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from quantize_graphs import Graph, outputs_of
from resvit_quantize.graph.network import network_from_onnx, onnx_from_network
from resvit_quantize.qdq import rtx_norms as norms
from resvit_quantize.qdq.half import half_from_network

FORMS = pytest.mark.parametrize("form", ["GroupNormalization", "InstanceNormalization"])


def group_norm(g: Graph, value: str, channels: int, size: int, groups: int, form: str) -> str:
    weight, bias = g.random.uniform(0.5, 2, channels), g.random.standard_normal(channels)
    weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    if form == "GroupNormalization":
        names = g.constant("weight", weight), g.constant("bias", bias)
        return g.op(form, value, *names, name="norm/Group", num_groups=groups, epsilon=1e-3)
    ones, zeros = g.constant("ones", np.ones(groups, np.float32)), g.constant("zeros", np.zeros(groups, np.float32))
    rows = g.op("Reshape", value, g.ints(0, groups, -1))
    rows = g.op(form, rows, ones, zeros, name="norm/Norm", epsilon=1e-3)
    maps = g.op("Reshape", rows, g.ints(0, channels, size, size))
    maps = g.op("Mul", maps, g.constant("weight", weight.reshape(-1, 1, 1)))
    return g.op("Add", maps, g.constant("bias", bias.reshape(-1, 1, 1)))


def graph(path: Path, form: str, *, residual: bool = False, scaled: bool = False, batch: int | str = 2) -> Path:
    """12 channels in 4 groups on 6x6 maps: rows of 108, channels of 36."""
    g = Graph(batch, 12, 6, 6, opset=21)
    value = "input"
    if scaled:
        factors = np.linspace(0.25, 4, 12, dtype=np.float32).reshape(1, 12, 1, 1)
        value = g.op("Mul", value, g.constant("factors", factors), name="scale/Mul")
    value = group_norm(g, value, 12, 6, 4, form)
    if residual:
        value = g.op("Add", value, "input", name="residual")
    return save(g, path, g.op("Relu", value))


def save(g: Graph, path: Path, output: str) -> Path:
    """``Graph.save`` with the type of a GroupNormalization stated, which ONNX does not infer."""
    sizes = [size.dim_param or size.dim_value for size in g.input.type.tensor_type.shape.dim]
    typed = [helper.make_tensor_value_info("norm/Group:0", TensorProto.FLOAT, sizes)]
    g.nodes.append(helper.make_node("Identity", [output], ["logits"], name="out"))
    info = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    graph = helper.make_graph(g.nodes, "toy", [g.input], info, g.constants, value_info=typed)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", g.opset)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), path)
    return path


def images(batch: int = 2, mean: float = 0.0) -> np.ndarray:
    array = np.random.default_rng(0).standard_normal((batch, 12, 6, 6)) + mean
    return array.astype(np.float32)


def written_out(source: Path, out: Path) -> int:
    network = network_from_onnx(source)
    count = norms.write_out_group_norms(network)
    onnx_from_network(network, out)
    return count


def operators(path: Path) -> set[str]:
    return {node.op_type for node in ir.load(path).graph}


@FORMS
@pytest.mark.parametrize(("longest", "options"), [(108, {}), (36, {"residual": True}), (36, {"scaled": True})])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_the_written_out_norm_is_the_same_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, longest: int, options: dict[str, bool], mean: float
) -> None:
    monkeypatch.setattr(norms, "LONGEST_ROW", longest)
    source = graph(tmp_path / "model.onnx", form, **options)
    assert written_out(source, tmp_path / "out.onnx") == 1
    assert form not in operators(tmp_path / "out.onnx")
    before, after = (outputs_of(path, images(mean=mean))["logits"] for path in (source, tmp_path / "out.onnx"))
    # With a mean of 30 deviations FP32 itself loses two digits.
    assert np.abs(after - before).max() / np.abs(before).max() < (2e-6 if mean == 0 else 1e-4)


@FORMS
def test_a_free_batch_stays_free(tmp_path: Path, form: str) -> None:
    source = graph(tmp_path / "model.onnx", form, batch="batch")
    assert written_out(source, tmp_path / "out.onnx") == 1
    for batch in (1, 3):
        before, after = (outputs_of(p, images(batch))["logits"] for p in (source, tmp_path / "out.onnx"))
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@FORMS
def test_a_long_norm_that_nothing_is_saved_by_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source = graph(tmp_path / "model.onnx", form)
    monkeypatch.setattr(norms, "LONGEST_ROW", 107)
    assert written_out(source, tmp_path / "out.onnx") == 0
    # Nor one whose single channel is too long.
    monkeypatch.setattr(norms, "LONGEST_ROW", 35)
    assert written_out(graph(tmp_path / "model.onnx", form, residual=True), tmp_path / "out.onnx") == 0


def test_statistics_stay_fp32_in_an_fp16_graph(tmp_path: Path) -> None:
    network = network_from_onnx(graph(tmp_path / "model.onnx", "GroupNormalization", residual=True))
    half_from_network(network, {})
    norms.write_out_group_norms(network)
    types = {node.op_type: node.outputs[0].dtype for node in network.graph}
    assert types["ReduceMean"] == ir.DataType.FLOAT
    assert types["Relu"] == ir.DataType.FLOAT16
    onnx_from_network(network, tmp_path / "out.onnx")
    exact = outputs_of(graph(tmp_path / "model.onnx", "GroupNormalization", residual=True), images())["logits"]
    assert np.abs(outputs_of(tmp_path / "out.onnx", images())["logits"] - exact).max() < 0.02


def test_an_instance_norm_that_is_no_group_norm_stays(tmp_path: Path) -> None:
    g = Graph(1, 12, 6, 6)
    value = g.op("InstanceNormalization", "input", g.weight("w", 12), g.weight("b", 12))
    assert written_out(g.save(tmp_path / "model.onnx", value), tmp_path / "out.onnx") == 0
