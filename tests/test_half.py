from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize_graphs import Graph, hybrid, outputs_of, ranges_from_extremes, ranges_of, sqnr
from resvit_calibrate.ranges.ranges import Ranges
from resvit_engines.targets.table import Precision
from resvit_quantize.qdq.report import QuantizeReport
from resvit_quantize.quantize import quantize_model
from resvit_quantize.settings import QuantizeSettings

FP16 = QuantizeSettings(Precision.FP16)
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def halved(
    path: Path, ranges: Ranges | None = None, settings: QuantizeSettings = FP16
) -> tuple[ir.Model, QuantizeReport]:
    """Convert, check in full (the writer does), and read the graph back."""
    out = path.with_name("half.onnx")
    report = quantize_model(path, ranges or ranges_from_extremes({}), settings, out)
    return ir.load(out), report


def kept(report: QuantizeReport) -> dict[str, str]:
    return {node.name: node.reason for node in report.fp32}


def reads(model: ir.Model, name: str) -> list[ir.DataType | None]:
    return [v.dtype for v in model.graph.node(name).inputs if v is not None]


@pytest.mark.parametrize("opset", [20, 23])
def test_the_whole_hybrid_turns_half_with_float_ends(tmp_path: Path, opset: int) -> None:
    path = hybrid(tmp_path / "float.onnx", opset)
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    model, report = halved(path, ranges_of(path, images))
    assert report.fp32 == ()
    assert report.macs_share == 0.0
    assert [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)] == [
        ("input", FLOAT),
        ("logits", FLOAT),
    ]
    casts = [n for n in model.graph if n.op_type == "Cast"]
    assert len(casts) == 2
    assert all(v.dtype != FLOAT for v in model.graph.initializers.values())
    assert sqnr(outputs_of(path, images)["logits"], outputs_of(path.with_name("half.onnx"), images)["logits"]) > 50


def test_slots_that_the_schema_fixes_stay_float(tmp_path: Path) -> None:
    g = Graph("batch", 4, 8, 8)
    scales = g.constant("scales", np.array([1, 1, 2, 2], np.float32))
    value = g.op("Resize", g.op("Relu", "input"), "", scales, name="resize")
    ones = g.constant("ones", np.ones(16, np.float32))
    g.op("LayerNormalization", value, ones, name="norm", outputs=3)
    path = g.save(tmp_path / "float.onnx", "norm:0", "norm:1")
    model, report = halved(path)
    assert report.fp32 == ()
    assert reads(model, "resize") == [HALF, FLOAT]
    assert [o.dtype for o in model.graph.node("norm").outputs] == [HALF, FLOAT, FLOAT]
    outputs_of(path.with_name("half.onnx"), np.ones((2, 4, 8, 8), np.float32))


def test_a_constant_shared_by_half_and_float_nodes_is_copied(tmp_path: Path) -> None:
    g = Graph(1, 4)
    shared = g.constant("shared", np.array([1, 2, 3, 4], np.float32))
    limited = g.op("Add", g.op("Mul", "input", shared, name="mul"), shared, name="add")
    big = g.op("Mul", limited, g.constant("big", np.full(4, 1e6, np.float32)), name="big")
    path = g.save(tmp_path / "float.onnx", g.op("Add", big, shared, name="late"), limited)
    images = np.ones((1, 4), np.float32)
    model, report = halved(path, ranges_of(path, images))
    assert set(kept(report)) == {"big", "late", "out0"}
    assert "big" in kept(report)["big"]
    assert "1e+06" in kept(report)["big"]
    assert reads(model, "mul") == [HALF, HALF]
    assert reads(model, "late") == [FLOAT, FLOAT]
    assert {n: v.dtype for n, v in model.graph.initializers.items()} == {
        "shared": FLOAT,
        "shared/fp16": HALF,
        "big": FLOAT,
    }
    assert outputs_of(path.with_name("half.onnx"), images)["logits"].tolist() == [[2e6 + 1, 4e6 + 2, 6e6 + 3, 8e6 + 4]]


def test_activations_that_fp16_cannot_hold_keep_their_nodes_float(tmp_path: Path) -> None:
    g = Graph(1, 4)
    value = g.op("Add", g.op("Relu", "input", name="first"), g.op("Neg", "input", name="other"), name="sum")
    path = g.save(tmp_path / "float.onnx", g.op("Sigmoid", g.op("Tanh", value, name="reader"), name="last"))
    _, report = halved(path, ranges_from_extremes({"first:0": (0, 10), "sum:0": (-40000.0, 3.0)}))
    assert set(kept(report)) == {"sum", "reader"}
    assert "40000" in " ".join(kept(report).values()).replace("4e+04", "40000")
    _, report = halved(path, ranges_from_extremes({"reader:0": (0.0, 1e-6)}))
    assert set(kept(report)) == {"reader", "last"}
    assert "loses digits" in kept(report)["last"]
    _, report = halved(path, ranges_from_extremes({"sum:0": (-30000.0, 0.0), "reader:0": (0.0, 0.0)}))
    assert kept(report) == {}


def test_constants_that_would_flush_keep_their_nodes_float(tmp_path: Path) -> None:
    g = Graph(1, 4)
    value = g.op("Add", g.op("Relu", "input", name="r"), g.constant("eps", np.array(1e-6, np.float32)), name="eps")
    value = g.op("Mul", value, g.constant("mixed", np.float32([1e-3, 1e-6, 2e-7, 3e-7])), name="fine")
    value = g.op("Mul", value, g.constant("lossy", np.full(4, 7.3e-5, np.float32) / 900), name="lossy")
    bias = g.constant("bias", np.full(4, 1e-6, np.float32))
    path = g.save(tmp_path / "float.onnx", g.op("Add", g.op("Relu", value, name="s"), bias, name="biased"))
    _, report = halved(path)
    assert set(kept(report)) == {"eps", "lossy"}


def test_infinite_padding_is_exact_in_fp16(tmp_path: Path) -> None:
    g = Graph(1, 2, 4, 4)
    pads, low = g.ints(0, 0, 1, 1, 0, 0, 1, 1), g.constant("low", np.array(-np.inf, np.float32))
    value = g.op("MaxPool", g.op("Pad", "input", pads, low, name="pad"), name="pool", kernel_shape=[2, 2])
    path = g.save(tmp_path / "float.onnx", value)
    model, report = halved(path)
    assert report.fp32 == ()
    assert model.graph.node("pad").inputs[2].dtype == HALF


def test_arithmetic_on_shapes_stays_float_and_casts_of_data_do_not(tmp_path: Path) -> None:
    g = Graph("batch", 4)
    size = g.op("Cast", g.op("Shape", "input", name="shape"), name="count", to=TensorProto.FLOAT)
    total = g.op("ReduceProd", size, name="total", keepdims=0)
    positive = g.op("Greater", "input", g.constant("zero", np.array(0, np.float32)), name="greater")
    value = g.op("Mul", g.op("Cast", positive, name="mask", to=TensorProto.FLOAT), "input", name="masked")
    filled = g.op("ConstantOfShape", g.op("Shape", "input", name="shape2"), name="filled")
    path = g.save(tmp_path / "float.onnx", g.op("Div", g.op("Add", value, filled, name="sum"), total, name="mean"))
    model, report = halved(path)
    assert set(kept(report)) == {"total"}
    assert "shapes" in kept(report)["total"]
    assert model.graph.node("count").outputs[0].dtype == FLOAT
    assert model.graph.node("mask").outputs[0].dtype == HALF
    assert model.graph.node("filled").outputs[0].dtype == HALF
    assert reads(model, "mean") == [HALF, HALF]
    images = np.array([[1.0, -2.0, 3.0, 4.0]] * 3, np.float32)
    assert outputs_of(path.with_name("half.onnx"), images)["logits"][0] == pytest.approx(
        np.array([1, 0, 3, 4]) / 12, rel=1e-3
    )


def test_control_flow_stays_float_with_what_it_captures(tmp_path: Path) -> None:
    float_info = helper.make_tensor_value_info
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["hidden"], [f"{op}_out"], name=f"inner_{op}")],
            op,
            [],
            [float_info(f"{op}_out", TensorProto.FLOAT, ["batch", 4])],
        )
        for op in ("Exp", "Neg")
    ]
    nodes = [
        helper.make_node("Relu", ["input"], ["hidden"], name="relu"),
        helper.make_node("ReduceMax", ["hidden"], ["top"], name="top", keepdims=0),
        helper.make_node("Greater", ["top", "one"], ["flag"], name="flag"),
        helper.make_node("If", ["flag"], ["chosen"], name="choose", then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Mul", ["chosen", "hidden"], ["logits"], name="mul"),
    ]
    graph = helper.make_graph(
        nodes,
        "control",
        [float_info("input", TensorProto.FLOAT, ["batch", 4])],
        [float_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.array(1, np.float32), "one")],
    )
    path = tmp_path / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    model, report = halved(path)
    assert set(kept(report)) == {"choose", "inner_Exp", "inner_Neg"}
    assert "subgraph" in kept(report)["choose"]
    assert reads(model, "mul") == [HALF, HALF]
    for images in (np.full((2, 4), 2, np.float32), np.full((2, 4), 0.5, np.float32)):
        expected, found = (outputs_of(p, images)["logits"] for p in (path, path.with_name("half.onnx")))
        assert found == pytest.approx(expected, rel=2e-3)


def test_q_reads_floats_as_they_come_and_dq_gives_what_is_read(tmp_path: Path) -> None:
    g = Graph(1, 32, 8, 8)
    value = g.conv("input", 32, 32, name="first")
    path = g.save(tmp_path / "float.onnx", g.op("Relu", g.conv(g.op("Relu", value), 32, 32, name="second")))
    ranges = ranges_from_extremes({"input": (-4, 4), "first:0": (-70000, 70000), "Relu_1:0": (0, 9)})
    model, report = halved(path, ranges, QuantizeSettings(Precision.INT8))
    # The first convolution writes values beyond FP16: it and its reader stay FP32, its operands in INT8.
    assert {"first", "Relu_1"} <= set(kept(report))
    assert {n.name: n.precision for n in report.nodes} == {"first": "int8", "second": "int8"}
    assert reads(model, "first") == [FLOAT, FLOAT, FLOAT]
    assert reads(model, "input/QuantizeLinear")[:2] == [FLOAT, FLOAT]
    assert reads(model, "second") == [HALF, HALF, HALF]
    outputs_of(path.with_name("half.onnx"), np.ones((1, 32, 8, 8), np.float32))
