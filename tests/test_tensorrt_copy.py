from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deformable_graphs import given, graph
from fusion_graphs import computed
from resvit_engines.builder.builder import build_engine
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import find_target
from resvit_export.to_tensorrt.copy import onnx_for_tensorrt


def attention_model(path: Path, opset: int) -> Path:
    """Attention over [1, 2 heads, 5 tokens, 16] in FP32, which no fused kernel of TensorRT serves; or an Add."""
    shape = [1, 2, 5, 16]
    # Three tensors: TensorRT for RTX 1.7 crashes on an Attention that gets one tensor thrice.
    op, inputs = ("Attention", ["q", "k", "v"]) if opset >= 23 else ("Add", ["q", "k"])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, ["y"], name="attention")],
        "graph",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in inputs],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10), path)
    return path


@pytest.mark.whole
def test_attention_that_no_kernel_serves_builds_from_the_copy_only(tmp_path: Path) -> None:
    model = attention_model(tmp_path / "model.onnx", 23)
    with pytest.raises(ResvitError) as caught:
        build_engine(model, tmp_path / "plain.plan", find_target("rtx-4090"))
    assert caught.value.code == ExitCode.BUILD
    assert onnx_for_tensorrt(model, tmp_path / "copy.onnx")
    build_engine(tmp_path / "copy.onnx", tmp_path / "copy.plan", find_target("rtx-4090"))
    assert (tmp_path / "copy.plan").stat().st_size > 1000


def test_the_copy_differs_in_that_attribute_only(tmp_path: Path) -> None:
    model = attention_model(tmp_path / "model.onnx", 23)
    onnx_for_tensorrt(model, tmp_path / "copy.onnx")
    copied = ir.load(tmp_path / "copy.onnx")
    (node,) = copied.graph
    assert node.attributes.pop("TRT_decomposable").as_int() == 1
    ir.save(copied, tmp_path / "back.onnx")
    assert onnx.load(tmp_path / "back.onnx").graph.node == onnx.load(model).graph.node


def test_without_attention_there_is_no_copy(tmp_path: Path) -> None:
    model = attention_model(tmp_path / "model.onnx", 20)
    assert not onnx_for_tensorrt(model, tmp_path / "copy.onnx")
    assert not (tmp_path / "copy.onnx").exists()


def sampling_model(path: Path, mode: str) -> Path:
    """GridSample of [1, 4, 8, 8] at [1, 5, 5] places, in the words of opset 20."""
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 4, 8, 8]), ("grid", [1, 5, 5, 2]), ("y", [1, 4, 5, 5]))
    ]
    node = onnx.helper.make_node("GridSample", ["x", "grid"], ["y"], name="sample", mode=mode)
    graph = onnx.helper.make_graph([node], "graph", infos[:2], infos[2:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(("mode", "said"), [("linear", "bilinear"), ("cubic", "bicubic"), ("nearest", "nearest")])
def test_tensorrt_reads_the_words_that_it_samples_by(tmp_path: Path, mode: str, said: str) -> None:
    model = sampling_model(tmp_path / "model.onnx", mode)
    assert onnx_for_tensorrt(model, tmp_path / "copy.onnx", find_target("jetson-orin")) is (mode != said)
    if mode != said:
        (node,) = ir.load(tmp_path / "copy.onnx").graph
        assert node.attributes.get_string("mode") == said
    assert not onnx_for_tensorrt(model, tmp_path / "none.onnx", find_target("rtx-4090"))  # of TensorRT for RTX


@pytest.mark.whole
@pytest.mark.parametrize(
    ("target", "gathers"),
    [("jetson-orin", False), ("jetson-thor", False), ("jetson-thor@7.2", True), ("l4", False), ("rtx-4090", False)],
)
def test_deformable_attention_is_gathered_where_tensorrt_samples_it_wrongly(
    tmp_path: Path, target: str, gathers: bool
) -> None:
    model, copy = tmp_path / "model.onnx", tmp_path / "copy.onnx"
    ir.save(graph(), model)
    assert onnx_for_tensorrt(model, copy, find_target(target)) is (target != "rtx-4090")
    if target == "rtx-4090":  # of TensorRT for RTX
        return
    network = ir.load(copy)
    kinds = {node.op_type for node in network.graph}
    assert ("GridSample" in kinds, "GatherND" in kinds) == (not gathers, gathers)
    assert not network.functions
    assert not any(node.domain for node in network.graph)
    if gathers:
        (right,), (got,) = computed(graph(), **given()), computed(network, **given())
        np.testing.assert_allclose(got, right, rtol=0.02, atol=0.02)
        build_engine(copy, tmp_path / "copy.plan", find_target("rtx-4090"))


def test_a_sampling_that_is_no_deformable_attention_is_said_in_old_words_there_too(tmp_path: Path) -> None:
    model = sampling_model(tmp_path / "model.onnx", "linear")
    assert onnx_for_tensorrt(model, tmp_path / "copy.onnx", find_target("jetson-thor@7.2"))
    (node,) = ir.load(tmp_path / "copy.onnx").graph
    assert (node.op_type, node.attributes.get_string("mode")) == ("GridSample", "bilinear")
