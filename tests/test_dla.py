"""Which layers a DLA would run: by the table, on convolutions with and without what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run
from resvit_export.to_tensorrt.dla import dla_fit_of
from test_cpu_target import residual_and_linear


def graph(path: Path, node: onnx.NodeProto, *constants: tuple[str, tuple[int, ...]], shape=(1, 8, 16, 16)) -> Path:
    """A convolution, and a node that reads it."""
    random = np.random.default_rng(0)
    weights = [("w", (8, shape[1], 3, 3)), *constants]
    values = [numpy_helper.from_array(random.standard_normal(size).astype(np.float32), name) for name, size in weights]
    nodes = [helper.make_node("Conv", ["input", "w"], ["x"], name="first", pads=[1] * 4), node]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, values),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


@pytest.mark.parametrize(
    ("op", "attributes", "why"),
    [
        ("Relu", {}, ""),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}, ""),
        ("MaxPool", {"kernel_shape": [9, 9]}, "a kernel of 9, and 1 to 8 are taken"),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, "rounded up"),
        ("GlobalAveragePool", {}, "a window of 16x16, above 8"),
        ("Softmax", {"axis": 1}, ""),
        ("Erf", {}, "no such layer"),
        ("Transpose", {"perm": [0, 2, 3, 1]}, "no such layer"),
        ("Flatten", {}, "no such layer"),
    ],
)
def test_what_one_layer_needs(tmp_path: Path, op: str, attributes: dict, why: str) -> None:
    fit = dla_fit_of(graph(tmp_path / "m.onnx", helper.make_node(op, ["x"], ["y"], name="second", **attributes)))
    first, second = fit.layers
    assert first.why_not == ""
    assert (second.why_not == "") == (why == "")
    assert why in second.why_not
    assert fit.loadables == 1


@pytest.mark.parametrize(
    ("op", "attributes", "size", "why"),
    [
        ("Conv", {"strides": [9, 9]}, (4, 8, 3, 3), "a stride of 9"),
        ("Conv", {"dilations": [2, 2], "group": 8}, (8, 1, 3, 3), ""),
        ("ConvTranspose", {"strides": [2, 2]}, (8, 4, 2, 2), ""),
        ("ConvTranspose", {"strides": [2, 2], "pads": [1] * 4}, (8, 4, 4, 4), "a pad of 1"),
    ],
)
def test_what_a_convolution_needs(tmp_path: Path, op: str, attributes: dict, size, why: str) -> None:
    node = helper.make_node(op, ["x", "v"], ["y"], name="second", kernel_shape=list(size[2:]), **attributes)
    (_, second) = dla_fit_of(graph(tmp_path / "m.onnx", node, ("v", size))).layers
    assert (second.why_not == "") == (why == "")
    assert why in second.why_not


@pytest.mark.parametrize("quantised", [False, True])
def test_a_trunk_fits_and_what_is_behind_it_does_not(tmp_path: Path, quantised: bool) -> None:
    from test_cpu_target import quantised as quantise

    path = tmp_path / "float.onnx"
    residual_and_linear(path)
    if quantised:
        path = quantise(tmp_path, np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32))
    fit = dla_fit_of(path)
    assert fit.trunk_fits
    assert {layer.op for layer in fit.trunk} == {"Conv", "Relu", "Add"}
    assert {layer.op for layer in fit.layers if layer.why_not} >= {"Reshape", "Transpose", "MatMul"}
    assert 0.9 < fit.share < 1.0
    assert "trunk fits in one piece" in fit.sentence


def test_a_trunk_with_a_norm_of_groups_does_not(tmp_path: Path) -> None:
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["n"], name="norm")
    path = graph(tmp_path / "m.onnx", node, ("s", (8,)), ("b", (8,)), ("v", (8, 8, 3, 3)))
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Conv", ["n", "v"], ["y"], name="last"))
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    fit = dla_fit_of(path)
    assert not fit.trunk_fits
    assert "InstanceNormalization: no such layer" in fit.sentence
    assert fit.loadables == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    residual_and_linear(tmp_path / "float.onnx")
    assert run(["inspect", str(tmp_path / "float.onnx"), "--dla"]) == 0
    told = capsys.readouterr().out
    assert "of the products would run on the DLA, in 1 piece. " in " ".join(told.split())
    assert "JetPack 7.2.2 or later" in told
    assert "'build' puts nothing there" in told
    assert run(["inspect", str(tmp_path / "float.onnx"), "--dla", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trunk_fits"] is True
    (tmp_path / "no.onnx").write_bytes(b"nothing of the kind")
    assert run(["inspect", str(tmp_path / "no.onnx"), "--dla"]) == ExitCode.INPUT
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "none.onnx"), "--dla"]) == ExitCode.INPUT
    assert f"There is no file {tmp_path / 'none.onnx'}." in " ".join(capsys.readouterr().err.split())
