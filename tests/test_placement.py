from __future__ import annotations

from pathlib import Path

import pytest

from quantize_graphs import Graph, basic_block, hybrid
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysis import Analysis, analyse
from resvit_quantize.graph.network import network_from_onnx
from resvit_quantize.placement.placement import Placement, Shortcuts, place


def analysed(path: Path) -> Analysis:
    return analyse(network_from_onnx(path))


def edges(placement: Placement) -> set[tuple[str, str]]:
    """(node, tensor) of every quantised activation edge."""
    return {(str(e.node.name), str(e.node.inputs[e.index].name)) for e in placement.edges}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return analysed(hybrid(tmp_path_factory.mktemp("hybrid") / "model.onnx"))


def test_groups_and_macs_by_hand(parts: Analysis) -> None:
    found = {p.name: (p.part.value, p.macs) for p in parts.products}
    assert found == {
        "stem/Conv": ("stem", 16 * 16 * 32 * 3 * 9),
        "trunk.0.conv1/Conv": ("trunk", 8 * 8 * 32 * 32 * 9),
        "trunk.0.conv2/Conv": ("trunk", 8 * 8 * 32 * 32 * 9),
        "proj/Conv": ("bridge", 4 * 4 * 64 * 32 * 4),
        "blocks.0.attn.qkv/MatMul": ("transformer", 16 * 64 * 192),
        "blocks.0.attn/Scores": ("transformer", 4 * 16 * 16 * 16),
        "blocks.0.attn/Mix": ("transformer", 4 * 16 * 16 * 16),
        "blocks.0.attn.proj/MatMul": ("transformer", 16 * 64 * 64),
        "blocks.0.mlp.fc1/MatMul": ("transformer", 16 * 64 * 256),
        "blocks.0.mlp.fc2/MatMul": ("transformer", 16 * 256 * 64),
        "head/Gemm": ("head", 64 * 10),
    }


def test_attention_operator_counts_both_products(tmp_path: Path) -> None:
    g = Graph("batch", 16, 96, opset=23)
    parts = [g.linear("input", 96, 96, f"to_{name}") for name in "qkv"]
    mixed = g.op("Attention", *parts, name="attn/Attention", q_num_heads=3, kv_num_heads=3)
    analysis = analysed(g.save(tmp_path / "model.onnx", g.linear(mixed, 96, 96, "out")))
    assert {p.name: p.macs for p in analysis.products}["attn/Attention"] == 2 * 16 * 16 * 96
    assert {p.part.value for p in analysis.products if p.name != "out/MatMul"} == {"transformer"}


def test_every_weighted_input_and_nothing_else(parts: Analysis) -> None:
    placement = place(parts, Precision.INT8)
    weighted = {p.name for p in parts.products if p.weight is not None} - {"head/Gemm"}
    assert {node for node, _ in edges(placement)} - {"trunk.0/Add"} == weighted
    assert {str(w.node.name) for w in placement.weights} == weighted
    assert "attention" in placement.reasons["blocks.0.attn/Scores"]
    assert "attention" in placement.reasons["blocks.0.attn/Mix"]
    assert "head" in placement.reasons["head/Gemm"]


def test_shortcut_of_a_residual_is_quantised_and_not_the_convolution(parts: Analysis) -> None:
    placement = place(parts, Precision.INT8)
    # The block's input: the same tensor that its first convolution reads.
    assert {e for e in edges(placement) if "Add" in e[0]} == {("trunk.0/Add", "MaxPool_2:0")}
    assert ("trunk.0.conv1/Conv", "MaxPool_2:0") in edges(placement)


def test_of_two_convolutions_the_projection_is_the_shortcut(tmp_path: Path) -> None:
    g = Graph(1, 16, 8, 8)
    value = basic_block(g, g.op("Relu", "input"), 32, "block", into=16)
    placement = place(analysed(g.save(tmp_path / "model.onnx", value)), Precision.INT8)
    assert ("block/Add", "block.downsample/Conv:0") in edges(placement)
    assert ("block/Add", "block.conv2/Conv:0") not in edges(placement)


def test_a_norm_between_convolution_and_add_shares_what_is_quantised_anyway(tmp_path: Path) -> None:
    g = Graph(1, 32, 8, 8)
    value = g.op("Relu", "input")
    scale, bias = g.weight("norm.weight", 32), g.weight("norm.bias", 32)
    main = g.op("InstanceNormalization", g.conv(value, 32, 32, name="conv/Conv"), scale, bias)
    analysis = analysed(g.save(tmp_path / "model.onnx", g.op("Relu", g.op("Add", main, value, name="add"))))
    weighted = {("conv/Conv", "Relu_0:0")}
    assert edges(place(analysis, Precision.INT8)) == {*weighted, ("add", "Relu_0:0")}
    assert edges(place(analysis, Precision.INT8, shortcuts=Shortcuts.CONV)) == weighted
    assert edges(place(analysis, Precision.INT8, exclude=["conv/Conv"])) == set()


def test_no_tensor_is_quantised_for_a_norms_shortcut_alone(tmp_path: Path) -> None:
    g = Graph(1, 32, 8, 8)
    scale, bias = g.weight("norm.weight", 32), g.weight("norm.bias", 32)
    value = g.op("Relu", "input")
    main = g.op("InstanceNormalization", g.conv(value, 32, 32, name="conv/Conv"), scale, bias)
    other = g.op("Sigmoid", value)
    path = g.save(tmp_path / "model.onnx", g.op("Relu", g.op("Add", main, other, name="add")))
    assert edges(place(analysed(path), Precision.INT8)) == {("conv/Conv", "Relu_0:0")}


def test_excluded_modules_nodes_and_operators_stay(parts: Analysis) -> None:
    everything = edges(place(parts, Precision.INT8))
    mlp = edges(place(parts, Precision.INT8, exclude=("blocks.0.mlp",)))
    assert everything - mlp == {e for e in everything if ".mlp." in e[0]}
    linear = edges(place(parts, Precision.INT8, exclude=("Conv",)))
    assert {node for node, _ in linear} == {
        "blocks.0.attn.qkv/MatMul",
        "blocks.0.attn.proj/MatMul",
        "blocks.0.mlp.fc1/MatMul",
        "blocks.0.mlp.fc2/MatMul",
    }
    one = place(parts, Precision.INT8, exclude=("stem/Conv",))
    assert one.reasons["stem/Conv"] == "excluded by the recipe"
    only_add = edges(place(parts, Precision.INT8, exclude=("Add",)))
    assert everything - only_add == {("trunk.0/Add", "MaxPool_2:0")}


def test_module_patterns_match_whole_names(tmp_path: Path) -> None:
    g = Graph(1, 32, 64)
    value = g.linear(g.linear("input", 64, 64, "blocks.1.fc"), 64, 64, "blocks.10.fc")
    analysis = analysed(g.save(tmp_path / "m.onnx", g.op("Add", value, "input")))
    assert {node for node, _ in edges(place(analysis, Precision.INT8, exclude=("blocks.1",)))} == {
        "blocks.10.fc/MatMul"
    }


def test_include_overrides_advice_but_exclude_wins(parts: Analysis) -> None:
    assert ("head/Gemm", "pool/ReduceMean:0") in edges(place(parts, Precision.INT8, include=("head",)))
    both = place(parts, Precision.INT8, include=("head",), exclude=("head",))
    assert "head/Gemm" not in {node for node, _ in edges(both)}
    attention = place(parts, Precision.INT8, include=("blocks.0.attn",))
    assert "attention" in attention.reasons["blocks.0.attn/Scores"]


def test_a_pattern_without_match_names_its_neighbours(parts: Analysis) -> None:
    with pytest.raises(ResvitError) as caught:
        place(parts, Precision.INT8, exclude=("blocks.0.mpl.fc1",))
    assert "blocks.0.mpl.fc1" in caught.value.problem
    assert "'blocks.0.mlp.fc1'" in caught.value.fix


def test_fp8_leaves_thin_and_wide_convolutions(tmp_path: Path) -> None:
    g = Graph(1, 3, 16, 16)
    value = g.conv("input", 32, 3, name="thin")
    value = g.conv(value, 32, 32, size=7, name="wide")
    value = g.conv(value, 32, 32, name="fits")
    path = g.save(tmp_path / "model.onnx", g.op("Relu", value))
    assert {n for n, _ in edges(place(analysed(path), Precision.FP8))} == {"fits"}
    assert {n for n, _ in edges(place(analysed(path), Precision.INT8))} == {"thin", "wide", "fits"}


def test_small_products_stay(tmp_path: Path) -> None:
    g = Graph("batch", 49, 64)
    value = g.linear(g.linear("input", 64, 8, "narrow"), 8, 64, "back")
    pooled = g.op("ReduceMean", value, g.ints(1), keepdims=0)
    value = g.linear(g.op("Relu", g.linear(pooled, 64, 64, "vector")), 64, 10, "head")
    reasons = place(analysed(g.save(tmp_path / "m.onnx", value)), Precision.INT8).reasons
    assert "8 is under 16" in reasons["narrow/MatMul"]
    assert "8 is under 16" in reasons["back/MatMul"]
    assert "vector" in reasons["vector/MatMul"]
    assert "head" in reasons["head/MatMul"]


@pytest.mark.parametrize(("classes", "large"), [(16, False), (4096, True)])
def test_what_a_large_head_takes_in_fp16_is_said(tmp_path: Path, classes: int, large: bool) -> None:
    g = Graph("batch", 3, 16, 16)
    pooled = g.op("GlobalAveragePool", g.op("Relu", g.conv("input", 32, 3, 3, "stem")))
    value = g.linear(g.op("Flatten", pooled), 32, classes, "head")
    reason = place(analysed(g.save(tmp_path / "m.onnx", value)), Precision.INT8).reasons["head/MatMul"]
    if not large:
        assert reason == "the head costs nothing in FP16 and often hurts in 8 bits"
        return
    stem, head = 16 * 16 * 32 * 3 * 9, 32 * classes
    assert f"{head / (stem + head):.1%} of the multiply-accumulates" in reason
    assert "and 0.2 MiB of weights, 0.1 in 8 bits" in reason


def test_the_gate_of_a_map_stays_and_the_map_does_not(tmp_path: Path) -> None:
    g = Graph("batch", 3, 8, 8)
    maps = g.conv("input", 32, 3, 3, "body")
    reduced = g.op("Relu", g.conv(g.op("GlobalAveragePool", maps), 8, 32, 1, "reduce"))
    gate = g.op("HardSigmoid", g.conv(reduced, 32, 8, 1, "expand"))
    project = g.conv(g.op("Mul", maps, gate), 16, 32, 1, "project")
    analysis = analysed(g.save(tmp_path / "m.onnx", g.conv(project, 10, 16, 1, "head")))
    placement = place(analysis, Precision.INT8)
    assert {name for name, _ in edges(placement)} == {"body", "project"}
    assert placement.reasons["reduce"] == placement.reasons["expand"]
    assert "bound by memory" in placement.reasons["expand"]
    wanted = place(analysis, Precision.INT8, include=["expand"])
    assert {name for name, _ in edges(wanted)} == {"body", "expand", "project"}


def test_fp16_quantises_nothing(parts: Analysis) -> None:
    placement = place(parts, Precision.FP16)
    assert not placement.edges
    assert not placement.weights
