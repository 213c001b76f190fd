from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.export import Dim, ExportedProgram, export

import resvit_calibrate.runtime.parity as parity
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ResvitError
from resvit_export.loading.program.trace import program_from_module
from resvit_export.loading.source import NetworkSource
from resvit_export.loading.spec import ModelSpec
from resvit_export.models.reference import resvit_model
from resvit_export.to_onnx.canonical import MODULE, pad_in_max_pool, pool_over_all
from resvit_export.to_onnx.export import onnx_from_program
from resvit_export.to_onnx.own_onnx import import_onnx
from resvit_export.to_onnx.packed_heads import split_along_heads
from resvit_export.to_onnx.report import ExportReport
from resvit_quantize.fold.program import fold_program

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(3)
    module = resvit_model("embed-nano")
    config = module.config
    return fold_program(program_from_module(module, (config.in_channels, *config.image_size))[0])[0]


@pytest.fixture(scope="module")
def dynamic(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("dynamic") / "model.onnx"
    return path, onnx_from_program(program, path, opset=20)


def test_dynamic_model_agrees_and_is_readable(dynamic: tuple[Path, ExportReport]) -> None:
    path, report = dynamic
    model = onnx.load(path)
    assert report.parity_max_rel < 1e-5
    assert report.parity_batches == (1, 2)
    assert report.input[0] == "input"
    assert report.input[1][0] == "batch"
    assert report.outputs == (("logits", ("batch", report.outputs[0][1][1])),)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) == report.nodes
    modules = {node.name: entry.value for node in model.graph.node for entry in node.metadata_props}
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert weighted
    assert all(node.name.startswith(f"{modules[node.name]}/{node.op_type}") for node in weighted)
    assert {entry.key for node in model.graph.node for entry in node.metadata_props} == {MODULE}
    assert "BatchNormalization" not in report.operators
    assert report.operators.get("Shape", 0) <= 1  # the class token's batch
    assert "If" not in report.operators


def shapes_known(path: Path) -> bool:
    values = [value for node in ir.load(path).graph for value in node.outputs]
    sizes = [list(value.shape) if value.shape is not None else [None] for value in values]
    return all(isinstance(size, int) or "batch" in str(size) for shape in sizes for size in shape)


def test_every_inner_value_has_a_shape(dynamic: tuple[Path, ExportReport]) -> None:
    assert shapes_known(dynamic[0])


@pytest.mark.slow
def test_same_program_same_bytes_and_no_traces(
    program: ExportedProgram, dynamic: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    again = tmp_path / "elsewhere.onnx"
    onnx_from_program(program, again, opset=20)
    content = again.read_bytes()
    assert content == dynamic[0].read_bytes()
    for trace in (b".py", b"site-packages", str(Path.home()).encode() + b"/", b"torch"):
        assert trace not in content


@pytest.mark.slow
def test_fixed_batch_leaves_no_arithmetic_on_shapes(program: ExportedProgram, tmp_path: Path) -> None:
    report = onnx_from_program(program, tmp_path / "model.onnx", opset=20, batch=3)
    assert report.input[1][0] == 3
    assert report.parity_batches == (3,)
    assert shapes_known(tmp_path / "model.onnx")
    assert not {"Shape", "Expand", "Gather", "If", "Cast"} & set(report.operators) - {"Gather"}


@pytest.mark.slow
def test_opset_23_keeps_attention_whole(program: ExportedProgram, tmp_path: Path) -> None:
    report = onnx_from_program(program, tmp_path / "model.onnx", opset=23)
    assert report.operators["Attention"] > 0
    assert "Softmax" not in report.operators
    with pytest.raises(ResvitError, match="Opset 19 is not written"):
        onnx_from_program(program, tmp_path / "model.onnx", opset=19)


@pytest.mark.slow
def test_large_weights_go_beside_the_model(
    program: ExportedProgram, dynamic: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    report = onnx_from_program(program, path, opset=20, external_above=1000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < dynamic[0].stat().st_size
    images = {"input": np.ones((2, *map(int, report.input[1][1:])), np.float32)}
    assert np.array_equal(onnx_runner(path)(images)["logits"], onnx_runner(dynamic[0])(images)["logits"])
    imported = tmp_path / "imported.onnx"
    import_onnx(path, imported)
    assert imported.read_bytes() == dynamic[0].read_bytes()


@pytest.mark.slow
def test_group_norm_and_masked_attention(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.qkv = nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(2, 8), nn.Linear(8, 24)
            self.register_buffer("mask", torch.tril(torch.ones(4, 4, dtype=torch.bool)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)  # [B, 4, 8]
            q, k, v = self.qkv(x).reshape(x.shape[0], 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=0.3)
            w = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask.float())
            return (y + z + w).sum((1, 3))

    program, _ = fold_program(program_from_module(Block(), (3, 8, 8))[0])
    for opset in (20, 23):
        report = onnx_from_program(program, tmp_path / f"{opset}.onnx", opset=opset)
        assert report.parity_max_rel < 1e-5
        assert "Shape" not in report.operators or opset == 23


@pytest.mark.parametrize("batch", [None, 1])
def test_zero_padding_goes_into_the_convolution(batch: int | None, tmp_path: Path) -> None:
    class Same(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    program, _ = fold_program(program_from_module(Same(nn.Conv2d(2, 3, 3, 2), nn.GroupNorm(1, 3)), (2, 8, 8))[0])
    report = onnx_from_program(program, tmp_path / "model.onnx", batch=batch)
    assert "Pad" not in report.operators
    assert shapes_known(tmp_path / "model.onnx")


def test_one_batch_only(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    program = export(module, (torch.zeros(2, 1, 4, 4),))
    report = onnx_from_program(program, tmp_path / "model.onnx")
    assert report.input[1] == (2, 1, 4, 4)
    assert "fixed to 2" in report.notes[0]
    with pytest.raises(ResvitError, match="batch 2 only, and batch 5"):
        onnx_from_program(program, tmp_path / "model.onnx", batch=5)


def test_disagreement_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    program = export(module, (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: Dim.AUTO},))
    monkeypatch.setattr(parity, "PARITY_TOLERANCE", -1.0)
    monkeypatch.setattr(parity, "_ROUNDINGS", -1.0)
    with pytest.raises(ResvitError, match="ONNX against PyTorch: output logits differs by"):
        onnx_from_program(program, tmp_path / "model.onnx")


def toy(opset: int = 20, **changes: object) -> onnx.ModelProto:
    """Conv, Relu, Flatten, Gemm on [N, 3, 6, 6], as another exporter may have written it."""
    random = np.random.default_rng(0)
    weights = {
        "conv.weight": random.standard_normal((4, 3, 3, 3), dtype=np.float32),
        "fc.weight": random.standard_normal((5, 64), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], name="/conv/Conv", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["a"], ["b"], name="/blocks/blocks.0/act/Relu"),
        helper.make_node("Identity", ["b"], ["b2"], name="/drop/Identity"),
        helper.make_node("Flatten", ["b2"], ["c"], name="/Flatten"),
        helper.make_node("Gemm", ["c", "fc.weight"], ["y"], name="/fc/Gemm", transB=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, changes.get("input", ["N", 3, 6, 6]))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])]
    nodes += changes.get("nodes", [])  # type: ignore[operator]
    inputs += changes.get("inputs", [])  # type: ignore[operator]
    weights |= changes.get("weights", {})  # type: ignore[operator]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.mark.whole
def test_scores_that_tie_in_front_of_a_selection_are_named(tmp_path: Path) -> None:
    class Untrained(nn.Module):
        """A detector whose head answers the same score everywhere, as before any training."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 1)
            nn.init.zeros_(self.head.weight)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(images).flatten(2).transpose(1, 2)
            best = self.head(tokens).squeeze(-1).topk(5, dim=1).indices
            return tokens.gather(1, best[..., None].expand(-1, -1, 4))

    program, _ = program_from_module(Untrained().eval(), (3, 64, 64))
    with pytest.raises(ResvitError, match=r"scores in front of a selection \(topk\) are equal") as refused:
        onnx_from_program(program, tmp_path / "model.onnx", opset=20)
    assert "trained ones" in refused.value.fix


def test_import_brings_a_foreign_model_into_our_form(tmp_path: Path) -> None:
    source, out = tmp_path / "theirs.onnx", tmp_path / "model.onnx"
    onnx.save(toy(11), source)
    network, report = import_onnx(source, out)
    assert network.input_shape == (3, 6, 6)
    assert (network.num_classes, network.dynamic_batch, network.preprocess) == (5, True, None)
    assert network.notes == ("converted from opset 11 to 20",)
    assert report.opset == 20
    assert report.parity_max_abs == 0
    assert shapes_known(out)
    model = onnx.load(out)
    assert [node.name for node in model.graph.node] == ["conv/Conv", "blocks.0.act/Relu", "Reshape", "fc/Gemm"]
    assert {"conv.weight", "fc.weight"} <= {tensor.name for tensor in model.graph.initializer}
    assert report.input == ("input", ("batch", 3, 6, 6))
    again = tmp_path / "again.onnx"
    import_onnx(out, again)
    assert again.read_bytes() == out.read_bytes()


def quantised() -> list[onnx.NodeProto]:
    return [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q")]


M = helper.make_tensor_value_info("m", TensorProto.FLOAT, [1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (toy(nodes=quantised(), weights={"s": np.float32(1), "z": np.int8(0)}), "is quantised already.*QuantizeLinear"),
        (
            toy(inputs=[M], nodes=[helper.make_node("Add", ["x", "m"], ["g"], name="g")]),
            r"different batches \(x: N, m: 1\)",
        ),
        (toy(input=["N", 3, "H", "W"]), "all sizes but the batch must be fixed"),
        (toy(weights={"conv.weight": np.full((4, 3, 3, 3), np.nan, np.float32)}), "conv.weight holds NaN"),
        (toy(weights={"half": np.zeros((2, 2), np.float16)}), "half precision already"),
        (toy(nodes=[helper.make_node("Gelu", ["a"], ["g"], domain="com.microsoft", name="g")]), "com.microsoft.Gelu"),
        (toy(nodes=[helper.make_node("NoSuchOp", ["a"], ["g"], name="g")]), "NoSuchOp.*no standard ONNX operator"),
        (toy(99), "uses ONNX opset 99; up to 23 can be read"),
    ],
)
def test_models_that_cannot_be_imported(model: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ResvitError, match=message):
        import_onnx(path, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_damaged_files(tmp_path: Path) -> None:
    content = toy().SerializeToString()
    for name, data in {"half": content[: len(content) // 2], "empty": b"", "text": b"hello, model"}.items():
        (tmp_path / f"{name}.onnx").write_bytes(data)
        with pytest.raises(ResvitError, match="not a readable ONNX model"):
            import_onnx(tmp_path / f"{name}.onnx", tmp_path / "model.onnx")
    with pytest.raises(ResvitError, match=r"The model .* does not exist"):
        import_onnx(tmp_path / "missing.onnx", tmp_path / "model.onnx")


def test_external_data_stays_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "theirs.onnx"
    onnx.save(toy(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    import_onnx(path, tmp_path / "fine.onnx")
    (tmp_path / "w.bin").write_bytes((folder / "w.bin").read_bytes())
    original = path.read_bytes()
    for location in ("../w.bin", str(tmp_path / "w.bin"), "link"):
        proto = onnx.load(path, load_external_data=False)
        if location == "link":
            (folder / "link").symlink_to(tmp_path / "w.bin")
        for tensor in proto.graph.initializer:
            tensor.external_data[0].value = location
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ResvitError, match="lie outside the model's folder"):
            import_onnx(path, tmp_path / "model.onnx")
        path.write_bytes(original)
    (folder / "w.bin").write_bytes(b"short")
    with pytest.raises(ResvitError, match="missing or too short"):
        import_onnx(path, tmp_path / "model.onnx")


def test_every_file_that_a_model_names_for_its_weights_is_part_of_what_it_is(tmp_path: Path) -> None:
    path, inner = tmp_path / "theirs.onnx", helper.make_tensor("v", TensorProto.FLOAT, [1], [3.0])
    onnx.save(toy(), path, save_as_external_data=True, location="sub-w.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "other"
    inner.ClearField("float_data")
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="constant.bin")
    proto.graph.node.append(helper.make_node("Constant", [], ["v"], value=inner))
    path.write_bytes(proto.SerializeToString())
    seen = set()
    for name in ("", "sub-w.bin", "other", "constant.bin"):
        if name:
            (tmp_path / name).write_bytes(f"edited {name}".encode())
        seen.add(NetworkSource(ModelSpec(str(path))).digest)
    assert len(seen) == 4
    (tmp_path / "theirs.onnx.data").write_bytes(b"of nobody")
    assert NetworkSource(ModelSpec(str(path))).digest in seen


def test_control_flow_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 4, 4, 4])
    branches = [helper.make_graph([helper.make_node(op, ["b"], ["r"])], op, [], [value]) for op in ("Neg", "Abs")]
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["branch"], name="choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    model = toy()
    for node in nodes:
        model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("branch", TensorProto.FLOAT, ["N", 4, 4, 4]))
    path = tmp_path / "theirs.onnx"
    onnx.save(model, path)
    with pytest.raises(ResvitError, match="control flow that depends on values: If 'choice'"):
        import_onnx(path, tmp_path / "model.onnx")


def test_pad_with_infinity_goes_into_the_pool() -> None:
    nodes = [
        helper.make_node("Pad", ["x", "pads", "low"], ["p"]),
        helper.make_node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
    ]
    weights = [
        numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 1]), "pads"),
        numpy_helper.from_array(np.float32(-np.inf), "low"),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4, 4])
    graph = helper.make_graph(nodes, "g", [image], [result], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    model = ir.serde.deserialize_model(proto)
    assert pad_in_max_pool(model) == 1
    assert [node.op_type for node in model.graph] == ["MaxPool"]
    assert list(model.graph[0].attributes.get_ints("pads")) == [0, 0, 1, 1]
    images = {"x": -np.random.default_rng(0).random((1, 2, 8, 8), dtype=np.float32)}
    before = onnx_runner(proto.SerializeToString())(images)["y"]
    after = onnx_runner(ir.serde.serialize_model(model).SerializeToString())(images)["y"]
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("pool", "becomes"),
    [
        ("AveragePool <kernel_shape = [40, 40], strides = [40, 40], ceil_mode = 1, count_include_pad = 1>", "Global"),
        ("AveragePool <kernel_shape = [6, 8], strides = [2, 2]>", "Global"),
        ("MaxPool <kernel_shape = [6, 8], ceil_mode = 1>", "Global"),
        ("AveragePool <kernel_shape = [6, 7], strides = [2, 2]>", ""),
        ("AveragePool <kernel_shape = [8, 8], pads = [1, 0, 1, 0], count_include_pad = 1>", ""),
        ("MaxPool <kernel_shape = [3, 4], dilations = [2, 2], strides = [9, 9]>", ""),
    ],
)
def test_a_pool_over_the_whole_map_is_written_so(pool: str, becomes: str) -> None:
    size = "g (float[2, 3, 6, 8] x) => (float[2, 3, 1, 1] y) { y = %s (x) }"
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> {size % pool}')
    model = ir.serde.deserialize_model(proto)
    pool_over_all(model)
    assert model.graph[0].op_type == becomes + pool.split(maxsplit=1)[0]
    images = {"x": np.random.default_rng(0).random((2, 3, 6, 8), dtype=np.float32)}
    before = onnx_runner(proto.SerializeToString())(images)["y"]
    after = onnx_runner(ir.serde.serialize_model(model).SerializeToString())(images)["y"]
    np.testing.assert_allclose(after, before, rtol=1e-6)


def packed_attention(path: Path, select: str, order: tuple[int, int, int] = (0, 1, 2), shared: bool = False) -> Path:
    """[batch, 5, 36] as packed queries, keys and values of 2 heads of 6, selected in three ways and multiplied."""
    ints = {"shape": [-1, 5, 3, 2, 6], "zero": [0], **{f"at{i}": [i] for i in range(4)}}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in ints.items()]
    constants += [numpy_helper.from_array(np.array(i, np.int64), f"index{i}") for i in range(3)]
    nodes = [
        helper.make_node("Reshape", ["input", "shape"], ["packed"], name="attn/Reshape"),
        helper.make_node("Transpose", ["packed"], ["moved"], name="attn/Transpose", perm=[2, 0, 3, 1, 4]),
    ]
    if select == "Split":
        nodes.append(helper.make_node("Split", ["moved"], ["s0", "s1", "s2"], name="split", axis=0, num_outputs=3))
    for i in order:
        if select == "Gather":
            nodes.append(helper.make_node("Gather", ["moved", f"index{i}"], [f"p{i}"], name=f"gather{i}", axis=0))
            continue
        if select == "Slice":
            bounds = ["moved", f"at{i}", f"at{i + 1}", "zero"]
            nodes.append(helper.make_node("Slice", bounds, [f"s{i}"], name=f"slice{i}"))
        nodes.append(helper.make_node("Squeeze", [f"s{i}", "zero"], [f"p{i}"], name=f"squeeze{i}"))
    nodes += [
        helper.make_node("Transpose", ["p1"], ["keys"], name="keys", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["p0", "keys"], ["scores"], name="scores"),
        helper.make_node("MatMul", ["scores", "p2"], ["logits"], name="mix"),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, 5, 6])]
    if shared:
        nodes.append(helper.make_node("Relu", ["moved"], ["also"], name="also"))
        outputs.append(helper.make_tensor_value_info("also", TensorProto.FLOAT, None))
    entry = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 5, 36])]
    graph = helper.make_graph(nodes, "attention", entry, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), path)
    return path


@pytest.mark.parametrize("select", ["Slice", "Split", "Gather"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_packed_attention_is_split_along_the_heads(tmp_path: Path, select: str, order: tuple[int, int, int]) -> None:
    source = packed_attention(tmp_path / "model.onnx", select, order)
    model = ir.load(source)
    assert split_along_heads(model) == 1
    ir.save(model, tmp_path / "out.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    assert [n.op_type for n in model.graph] == ["Reshape", "Transpose", "Split", "Transpose", "MatMul", "MatMul"]
    images = np.random.default_rng(0).standard_normal((2, 5, 36)).astype(np.float32)
    before, after = (onnx_runner(p)({"input": images})["logits"] for p in (source, tmp_path / "out.onnx"))
    np.testing.assert_array_equal(before, after)


def test_a_packed_tensor_that_is_read_whole_stays(tmp_path: Path) -> None:
    model = ir.load(packed_attention(tmp_path / "model.onnx", "Slice", shared=True))
    assert split_along_heads(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "padding", "stride"),
    [
        ((12, 8), (2, 2), (1, 1), (0, 0), (2, 2)),  # side by side: MobileViTv2
        ((12, 8), (2, 4), (1, 1), (0, 0), (2, 4)),
        ((13, 9), (3, 3), (1, 1), (1, 1), (2, 2)),  # over each other: VOLO
        ((11, 14), (3, 2), (2, 1), (1, 0), (1, 3)),
        ((9, 9), (2, 2), (1, 1), (0, 0), (2, 2)),  # a rest that no patch covers
    ],
)
def test_unfold_and_fold_are_shapes_or_convolutions(
    size: tuple, kernel: tuple, dilation: tuple, padding: tuple, stride: tuple, tmp_path: Path
) -> None:
    class Patches(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            patches = nn.functional.unfold(x, kernel, dilation, padding, stride)
            return nn.functional.fold(patches * patches, size, kernel, dilation, padding, stride), patches

    program, _ = fold_program(program_from_module(Patches(), (3, *size))[0])
    for opset in (20, 23):
        report = onnx_from_program(
            program, tmp_path / f"{opset}.onnx", opset=opset
        )  # it holds the outputs to PyTorch's
        assert set(report.operators) <= {"Mul", "Reshape", "Transpose", "Conv", "ConvTranspose"}
        assert ("Conv" in report.operators) == (kernel != stride or bool(size[0] % kernel[0]))


@pytest.mark.slow
def test_a_group_norm_of_one_channel_stays_finite_on_a_flat_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.GroupNorm(64, 64))
    program, _ = fold_program(program_from_module(network, (3, 32, 32))[0])
    for opset in (20, 23):
        onnx_from_program(program, tmp_path / "model.onnx", opset=opset)
        flat = np.full((1, 3, 32, 32), 100.0, np.float32)
        assert np.isfinite(onnx_runner(tmp_path / "model.onnx")({"input": flat})["output"]).all()
