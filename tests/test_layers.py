"""Fused layers of toy graphs, with their work counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize_graphs import Graph, basic_block, hybrid
from resvit_engines.targets.costs import layer_times
from resvit_engines.targets.layer_work import LayerKind, LayerWork, MatrixShape, Read
from resvit_engines.targets.table import Precision, find_target
from resvit_quantize.graph.fused_layers import layers_from_graph
from resvit_quantize.graph.network import network_from_onnx


def works(path: Path, batch: int = 1) -> dict[str, LayerWork]:
    found = layers_from_graph(network_from_onnx(path), batch)
    assert len({work.name for work in found}) == len(found)
    assert len({work.writes for work in found}) == len(found)
    return {work.name: work for work in found}


def test_a_residual_block_is_one_layer_per_convolution(tmp_path: Path) -> None:
    g = Graph(1, 8, 4, 4)
    found = works(g.save(tmp_path / "m.onnx", basic_block(g, "input", 8, "block")))
    assert list(found) == ["input (cast)", "block.conv1/Conv", "block.conv2/Conv", "logits (cast)"]
    first, second = found["block.conv1/Conv"], found["block.conv2/Conv"]
    # 8 x 8 x 3 x 3 weights and 8 biases; 128 elements in and out; 128 x 8 x 9 multiply-accumulates.
    assert first == LayerWork(
        "block.conv1/Conv", LayerKind.CONV, (Read("input", 128, follows=True),), "block/Relu1:0", 128, 128 * 72, 584,
        nodes=("block.conv1/Conv",), shape=MatrixShape(16, 8, 72, 8), members=("block.conv1/Conv", "block/Relu1"),
    )  # fmt: skip
    # conv + add + relu: the shortcut is read in the kernel's own precision, as the placement quantises it.
    assert second.reads == (Read("block/Relu1:0", 128, follows=True), Read("input", 128, follows=True))
    assert second.writes == "block/Relu2:0"


def test_the_deeper_convolution_takes_the_add_whichever_comes_first(tmp_path: Path) -> None:
    g = Graph(1, 8, 4, 4)
    found = works(g.save(tmp_path / "m.onnx", basic_block(g, "input", 16, "block", into=8)))
    assert found["block.conv2/Conv"].writes == "block/Relu2:0"
    assert found["block.downsample/Conv"].writes == "block.downsample/Conv:0"
    g = Graph(1, 8, 4, 4)
    shortcut = g.conv("input", 8, 8, 1, name="short/Conv")
    main = g.conv(g.conv("input", 8, 8, name="one/Conv"), 8, 8, name="two/Conv")
    found = works(g.save(tmp_path / "n.onnx", g.op("Add", main, shortcut, name="add")))
    assert found["two/Conv"].writes == "add:0"
    assert Read("short/Conv:0", 128, follows=True) in found["two/Conv"].reads


def test_a_transformer_block(tmp_path: Path) -> None:
    found = works(hybrid(tmp_path / "m.onnx"))
    tokens, width = 16, 64
    qkv, attention = found["blocks.0.attn.qkv/MatMul"], found["blocks.0.attn/Scores"]
    assert (qkv.kind, qkv.written) == (LayerKind.GEMM, 3 * tokens * width)
    assert attention.kind is LayerKind.ATTENTION
    assert attention.nodes == ("blocks.0.attn/Scores", "blocks.0.attn/Mix")
    # Q, K and V lie packed in one tensor: one kernel takes them apart, the next computes 2 x 4 x 16 x 16 x 16.
    assert (attention.reads, attention.kernels) == ((Read(qkv.writes, 3 * tokens * width),), 2)
    assert (attention.moved, attention.written) == (3 * tokens * width, tokens * width)
    assert attention.macs == 2 * 4 * 16 * 16 * 16
    # Linear layers with bias, GELU and residual inside; the residual stays in FP16.
    up, down = found["blocks.0.mlp.fc1/MatMul"], found["blocks.0.mlp.fc2/MatMul"]
    assert (up.writes, up.written) == ("blocks.0.mlp/Gelu:0", 4 * tokens * width)
    assert down.reads == (
        Read("blocks.0.mlp/Gelu:0", 4 * tokens * width, follows=True),
        Read("blocks.0/Add1:0", tokens * width),
    )
    assert down.writes == "blocks.0/Add2:0"
    assert down.weights == 4 * width * width + width
    assert found["blocks.0.norm1/LayerNormalization"].kernels == 1
    products = [node for work in found.values() for node in work.nodes]
    assert len(products) == len(set(products)) == 1 + 2 + 1 + 6 + 1


def test_gelu_from_erf_ends_in_the_linear_layer(tmp_path: Path) -> None:
    g = Graph(1, 16, 32)
    half, root, one = (g.constant(n, np.float32(v)) for n, v in (("half", 0.5), ("root", 2**0.5), ("one", 1.0)))
    hidden = g.linear("input", 32, 64, "fc1")
    inner = g.op("Add", g.op("Erf", g.op("Div", hidden, root)), one)
    gelu = g.op("Mul", g.op("Mul", hidden, inner), half, name="gelu")
    found = works(g.save(tmp_path / "m.onnx", gelu))
    assert [work.writes for work in found.values()] == ["input", "gelu:0", "logits (FP32)"]


def test_a_group_norm_is_its_own_layer_and_its_residual_another(tmp_path: Path) -> None:
    g = Graph(1, 8, 4, 4)
    scale, shift = (g.constant(n, np.ones(2, np.float32)) for n in ("s", "b"))
    flat = g.op("Reshape", g.conv("input", 8, 8, name="conv/Conv"), g.ints(1, 2, -1))
    normed = g.op("Reshape", g.op("InstanceNormalization", flat, scale, shift, name="norm"), g.ints(1, 8, 4, 4))
    weighted = g.op("Mul", normed, g.weight("w", 8, 1, 1), name="scale")
    out = g.op("Relu", g.op("Add", weighted, "input", name="add"), name="relu")
    found = works(g.save(tmp_path / "m.onnx", out))
    assert {name: work.kind.value for name, work in found.items()} == {
        "input (cast)": "pointwise",
        "conv/Conv": "conv",
        "norm": "norm",
        "add": "pointwise",
        "logits (cast)": "pointwise",
    }
    assert (found["norm"].kernels, found["norm"].writes, found["norm"].written) == (2, "scale:0", 128)
    assert found["add"].reads == (Read("scale:0", 128), Read("input", 128))
    assert found["add"].writes == "relu:0"


def test_the_batch_multiplies_activations_and_work_but_not_weights(tmp_path: Path) -> None:
    path = hybrid(tmp_path / "m.onnx")
    one, four = works(path), works(path, 4)
    for name, work in one.items():
        assert four[name].macs == 4 * work.macs
        assert four[name].written == 4 * work.written
        assert four[name].weights == work.weights


@pytest.mark.parametrize("opset", [20, 23])
def test_the_prediction_of_a_hybrid_is_deterministic_and_8_bits_move_less(tmp_path: Path, opset: int) -> None:
    path = hybrid(tmp_path / "m.onnx", opset)
    first, again = (layers_from_graph(network_from_onnx(path)) for _ in range(2))
    assert first == again
    target = find_target("jetson-orin")
    eight = {node: Precision.INT8 for work in first for node in work.nodes}
    fp16, int8 = layer_times(first, {}, target), layer_times(first, eight, target)
    assert int8.activation_bytes < fp16.activation_bytes
    # Every element of every tensor at two bytes, those of the image and of the answer at four.
    elements = sum(w.written + 2 * w.moved + sum(r.elements for r in w.reads) for w in first)
    assert fp16.activation_bytes == 2 * (elements + first[0].written + first[-1].written)
