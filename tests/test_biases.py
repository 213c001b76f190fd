"""A layer's outputs rise by exactly its correction, wherever the bias is put, and outputs keep their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from quantize_graphs import Graph, outputs_of
from resvit_quantize.equalize.biases import add_biases
from resvit_quantize.graph.network import network_from_onnx, onnx_from_network

CORRECTION = np.linspace(-3, 4, 8, dtype=np.float32)


def image(g: Graph) -> str:
    return g.op("Identity", "input", name="image")


def rows(g: Graph) -> str:
    return g.op("Reshape", g.op("Flatten", "input"), g.ints(-1, 6))


def conv(g: Graph) -> str:
    return g.conv(image(g), 8, 6, name="layer")


def conv_without(g: Graph) -> str:
    return g.op("Conv", image(g), g.weight("w", 8, 6, 1, 1), name="layer")


def conv_computed(g: Graph) -> str:
    """A bias that the graph computes from the image."""
    value = image(g)
    bias = g.op("ReduceMean", g.op("Concat", value, "input", axis=1), g.ints(0, 2, 3), keepdims=0)
    return g.op("Conv", value, g.weight("w", 8, 6, 1, 1), g.op("Slice", bias, g.ints(0), g.ints(8)), name="layer")


def gemm(g: Graph) -> str:
    return g.op("Gemm", rows(g), g.weight("w", 8, 6), g.weight("b", 8), name="layer", transB=1)


def gemm_without(g: Graph) -> str:
    return g.op("Gemm", rows(g), g.weight("w", 6, 8), name="layer", alpha=2.0)


def gemm_beta(g: Graph) -> str:
    return g.op("Gemm", rows(g), g.weight("w", 6, 8), g.weight("b", 1, 8), name="layer", beta=0.5)


def gemm_scalar(g: Graph) -> str:
    return g.op(
        "Gemm", rows(g), g.weight("w", 6, 8), g.constant("b", np.array(0.5, np.float32)), name="layer", beta=2.0
    )


def gemm_deaf(g: Graph) -> str:
    """beta = 0: what stands in the bias is not heard."""
    return g.op("Gemm", rows(g), g.weight("w", 6, 8), g.weight("b", 8), name="layer", beta=0.0)


def matmul(g: Graph) -> str:
    return g.op("MatMul", rows(g), g.weight("w", 6, 8), name="layer")


def matmul_add(g: Graph) -> str:
    return g.op("Add", matmul(g), g.weight("b", 8), name="add")


def matmul_add_left(g: Graph) -> str:
    return g.op("Add", g.weight("b", 1, 8), matmul(g), name="add")


def matmul_shared_bias(g: Graph) -> str:
    """The other reader of the bias must not see the correction: both differ by the layer's alone."""
    bias = g.weight("b", 8)
    one = g.op("Add", matmul(g), bias, name="add")
    return g.op("Sub", one, g.op("Add", g.op("MatMul", rows(g), g.weight("v", 6, 8), name="other"), bias))


def matmul_positions(g: Graph) -> str:
    """The Add behind it is no bias: it has a value for each row."""
    return g.op("Add", matmul(g), g.weight("p", 32, 8), name="add")


def matmul_two_readers(g: Graph) -> str:
    product = matmul(g)
    return g.op("Sub", g.op("Add", product, g.weight("b", 8)), g.op("Mul", product, g.constant("zero", np.float32(0))))


CASES = [
    conv, conv_without, conv_computed, gemm, gemm_without, gemm_beta, gemm_scalar, gemm_deaf, matmul, matmul_add,
    matmul_add_left, matmul_shared_bias, matmul_positions, matmul_two_readers,
]  # fmt: skip


@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("correction", [CORRECTION, np.zeros(8, np.float32)])
def test_outputs_rise_by_the_correction(tmp_path: Path, build: Callable[[Graph], str], correction: np.ndarray) -> None:
    g = Graph(2, 6, 4, 4)
    path = g.save(tmp_path / "float.onnx", build(g))
    images = np.random.default_rng(0).standard_normal((2, 6, 4, 4)).astype(np.float32)
    before = outputs_of(path, images)
    network = network_from_onnx(path)
    add_biases(network, {"layer": correction})
    onnx_from_network(network, tmp_path / "out.onnx")
    after = outputs_of(tmp_path / "out.onnx", images)
    assert list(after) == list(before)
    risen = correction.reshape(-1, 1, 1) if build.__name__.startswith("conv") else correction
    np.testing.assert_allclose(
        after["logits"] - before["logits"], np.broadcast_to(risen, before["logits"].shape), atol=1e-5
    )
    assert all(value.uses() for value in network.graph.initializers.values())


@pytest.mark.parametrize("build", [matmul_add, matmul_add_left, matmul_shared_bias, conv, gemm_beta])
def test_a_bias_that_is_there_takes_it(tmp_path: Path, build: Callable[[Graph], str]) -> None:
    g = Graph(2, 6, 4, 4)
    network = network_from_onnx(g.save(tmp_path / "float.onnx", build(g)))
    count = len(network.graph)
    add_biases(network, {"layer": CORRECTION, "nowhere": CORRECTION})
    assert len(network.graph) == count


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("op_type", ["MatMul", "Conv"])
def test_a_layer_that_is_the_graphs_output_keeps_its_name(tmp_path: Path, read: bool, op_type: str) -> None:
    """The output is the layer's own, read by an Add as well or not; the Add sees the correction too."""
    weight = np.random.default_rng(0).standard_normal((8, 6, 1, 1) if op_type == "Conv" else (6, 8)).astype(np.float32)
    shape = [2, 6, 4, 4] if op_type == "Conv" else [2, 6]
    nodes = [helper.make_node(op_type, ["input", "w"], ["scores"], name="layer")]
    names = ["scores"]
    constants = [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")]
    if read:
        nodes.append(helper.make_node("Add", ["scores", "one"], ["more"], name="add"))
        names.append("more")
    else:
        constants.pop()
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, constants)
    path = tmp_path / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    network = network_from_onnx(path)
    add_biases(network, {"layer": CORRECTION})
    onnx_from_network(network, tmp_path / "out.onnx")
    assert [value.name for value in ir.load(tmp_path / "out.onnx").graph.outputs] == names
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before, after = outputs_of(path, images), outputs_of(tmp_path / "out.onnx", images)
    risen = CORRECTION.reshape(-1, 1, 1) if op_type == "Conv" else CORRECTION
    for name in names:
        np.testing.assert_allclose(after[name] - before[name], np.broadcast_to(risen, before[name].shape), atol=1e-5)
