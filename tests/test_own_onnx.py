"""ONNX files that users bring: what is taken, what is refused and in which words, and that nothing goes uncounted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.table import find_target
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.preprocessing import preprocess_from
from resvit_export.to_onnx.foreign.measured_shapes import measure_shapes
from resvit_export.to_onnx.own_onnx import import_onnx
from resvit_export.to_tensorrt.parser import UNREAD_BY_RTX, require_readable
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.placement.placement import _impossible

CONV = helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1] * 4, strides=[2, 2])
TAIL = [
    helper.make_node("GlobalAveragePool", ["a"], ["p"], name="pool"),
    helper.make_node("Flatten", ["p"], ["f"], name="flat"),
    helper.make_node("MatMul", ["f", "fc"], ["y"], name="head"),
]


def model_of(
    nodes: list[onnx.NodeProto] | None = None,
    *,
    image: tuple[int, list[int | str]] = (TensorProto.FLOAT, ["batch", 3, 8, 8]),
    weights: dict[str, np.ndarray] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    opset: int = 20,
    ir_version: int = 10,
) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    every = {
        "w": random.standard_normal((16, 3, 3, 3), dtype=np.float32),
        "fc": random.standard_normal((16, 5), dtype=np.float32),
        **(weights or {}),
    }
    inputs = [helper.make_tensor_value_info("x", *image)]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in every.items()]
    graph = helper.make_graph(
        nodes or [CONV, *TAIL],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array, name) for name, array in every.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions or [], ir_version=ir_version)


def taken(proto: onnx.ModelProto | bytes, folder: Path) -> tuple[NetworkRecord, Path]:
    source, out = folder / "theirs.onnx", folder / "model.onnx"
    source.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return import_onnx(source, out)[0], out


def test_weights_among_the_inputs(tmp_path: Path) -> None:
    record, out = taken(model_of(opset=11, ir_version=3), tmp_path)
    assert record.input_shape == (3, 8, 8)
    assert [value.name for value in onnx.load(out).graph.input] == ["input"]


def branches(depth: int) -> onnx.NodeProto:
    """An If inside the taken branch of an If, ``depth`` of them, over a test of a size."""
    value = helper.make_tensor_value_info("i", TensorProto.FLOAT, None)
    inner = branches(depth - 1) if depth > 1 else helper.make_node("Relu", ["a"], ["i"])
    if depth > 1:
        inner.output[0] = "i"
    then = helper.make_graph([inner], "then", [], [value])
    other = helper.make_graph([helper.make_node("Neg", ["a"], ["i"])], "else", [], [value])
    return helper.make_node("If", ["is"], ["r"], name="choice", then_branch=then, else_branch=other)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_branch_over_a_size_is_taken(depth: int, tmp_path: Path) -> None:
    nodes = [
        CONV,
        helper.make_node("Shape", ["a"], ["s"]),
        helper.make_node("Gather", ["s", "two"], ["d"]),
        helper.make_node("Equal", ["d", "four"], ["is"]),
        branches(depth),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        *TAIL[1:],
    ]
    _, out = taken(model_of(nodes, weights={"two": np.array(2), "four": np.array(4)}), tmp_path)
    operators = {node.op_type for node in onnx.load(out).graph.node}
    assert "Relu" in operators
    assert not {"If", "Neg"} & operators


def test_a_loop_of_known_length_is_written_out(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["state", "step"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["turns", "", "a"], ["r"], name="loop", body=body)
    nodes = [CONV, loop, helper.make_node("GlobalAveragePool", ["r"], ["p"]), *TAIL[1:]]
    weights = {"turns": np.array(3), "step": np.array([0.5], np.float32)}
    _, out = taken(model_of(nodes, weights=weights), tmp_path)
    assert [node.op_type for node in onnx.load(out).graph.node].count("Add") == 3


def test_channels_last(tmp_path: Path) -> None:
    turn = helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])
    conv = helper.make_node("Conv", ["t", "w"], ["a"], pads=[1] * 4, strides=[2, 2])
    record, out = taken(model_of([turn, conv, *TAIL], image=(TensorProto.FLOAT, ["batch", 8, 6, 3])), tmp_path)
    assert record.input_shape == (3, 8, 6)
    assert "Transpose" not in {node.op_type for node in onnx.load(out).graph.node}
    image = np.random.default_rng(0).standard_normal((2, 8, 6, 3), dtype=np.float32)
    theirs = onnx_runner(tmp_path / "theirs.onnx")({"x": image})["y"]
    ours = onnx_runner(out)({"input": np.ascontiguousarray(image.transpose(0, 3, 1, 2))})["logits"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def dequantised(*moved: str, kind: int = TensorProto.UINT8, **weights: np.ndarray) -> onnx.ModelProto:
    """A network that begins with a DequantizeLinear of its pictures, behind nodes of the types ``moved``."""
    names = ["x", *(f"m{at}" for at in range(len(moved)))]
    nodes = [helper.make_node(op, [one], [other]) for op, one, other in zip(moved, names, names[1:], strict=False)]
    constants = ["s", *(["z"] if "z" in weights else [])]
    nodes.append(helper.make_node("DequantizeLinear", [names[-1], *constants], ["d"], name="norm", axis=1))
    conv = helper.make_node("Conv", ["d", "w"], ["a"], name="conv")
    return model_of([*nodes, conv, *TAIL], image=(kind, ["batch", 3, 8, 8]), weights=weights)


@pytest.mark.parametrize(
    "proto",
    [
        dequantised(s=np.float32(1 / 255)),
        dequantised("Identity", s=np.float32(1 / 64), z=np.uint8(128)),
        dequantised(s=np.float32([0.01, 0.02, 0.03]), z=np.uint8([1, 2, 3])),
        dequantised(s=np.float32(0.02), z=np.int8(-3), kind=TensorProto.INT8),
    ],
)
def test_pictures_that_a_dequantisation_normalises_are_no_quantised_network(
    proto: onnx.ModelProto, tmp_path: Path
) -> None:
    record, out = taken(proto, tmp_path)
    assert not {node.op_type for node in onnx.load(out).graph.node} & {"DequantizeLinear", "Cast", "Identity"}
    kind = np.uint8 if proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8 else np.int8
    limits = np.iinfo(kind)
    pixels = np.random.default_rng(0).integers(limits.min, limits.max + 1, (2, 3, 8, 8)).astype(kind)
    theirs = onnxruntime.InferenceSession(tmp_path / "theirs.onnx").run(None, {"x": pixels})[0]
    ours = onnx_runner(out)({"input": pixels.astype(np.float32)})["logits"]
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert record.input_shape == (3, 8, 8)


def test_a_dequantisation_of_weights_or_behind_a_quantisation_is_a_quantised_network(tmp_path: Path) -> None:
    weights = {"s": np.float32(0.1), "z": np.int8(0), "q": np.ones((16, 3, 3, 3), np.int8)}
    of_weights = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["v"], name="stored")
    conv = helper.make_node("Conv", ["x", "v"], ["a"], name="conv")
    inside = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["i"], name="down"),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["b"], name="up"),
        helper.make_node("Conv", ["b", "w"], ["a"], name="conv"),
    ]
    for nodes, named in (([of_weights, conv, *TAIL], "stored"), ([*inside, *TAIL], "down")):
        with pytest.raises(ResvitError, match=f"quantised already.*{named}"):
            taken(model_of(nodes, weights=weights), tmp_path)
    second = model_of([*dequantised(s=np.float32(0.1)).graph.node][1:], weights={"s": np.float32(0.1)})
    second.graph.node.insert(0, helper.make_node("DequantizeLinear", ["flags", "s"], ["c"], name="flags"))
    second.graph.node.insert(1, helper.make_node("Add", ["x", "c"], ["d"], name="add"))
    second.graph.input.append(helper.make_tensor_value_info("flags", TensorProto.UINT8, ["batch", 3, 8, 8]))
    with pytest.raises(ResvitError, match=r"quantised already.*flags"):
        taken(second, tmp_path)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16])
def test_pixels_as_whole_numbers(kind: int, tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT)
    divide = helper.make_node("Div", ["c", "full"], ["d"])
    conv = helper.make_node("Conv", ["d", "w"], ["a"], pads=[1] * 4, strides=[2, 2])
    weights = {"full": np.array(255, np.float32)}
    record, out = taken(
        model_of([cast, divide, conv, *TAIL], image=(kind, ["batch", 3, 8, 8]), weights=weights), tmp_path
    )
    info = np.iinfo(helper.tensor_dtype_to_np_dtype(kind))
    assert record.image_range == (info.min, info.max)
    assert NetworkRecord.from_json(record.to_json()) == record
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    ready = preprocess_from(record, {}, None).apply(pixels)
    expected = info.min + pixels.transpose(2, 0, 1).astype(np.float64) / 255 * (int(info.max) - int(info.min))
    np.testing.assert_allclose(ready, expected, rtol=1e-5, atol=1e-3)
    theirs = onnx_runner(tmp_path / "theirs.onnx")({"x": np.rint(ready)[None].astype(info.dtype)})["y"]
    np.testing.assert_allclose(onnx_runner(out)({"input": ready[None]})["logits"], theirs, rtol=1e-4, atol=1e-3)
    with pytest.raises(ResvitError, match="normalises them itself") as refusal:
        preprocess_from(record, {"mean": [0.5], "std": [0.5]}, None)
    assert "Leave mean and std out" in refusal.value.fix


WAYS_TO_FLOATS = {
    "channels gathered": [
        helper.make_node("Gather", ["x", "bgr"], ["u_g"], axis=1),
        helper.make_node("Cast", ["u_g"], ["u_f"], to=TensorProto.FLOAT),
    ],
    "split and joined": [
        helper.make_node("Split", ["x"], ["u_r", "u_g", "u_b"], axis=1, num_outputs=3),
        helper.make_node("Concat", ["u_b", "u_g", "u_r"], ["u_j"], axis=1),
        helper.make_node("Cast", ["u_j"], ["u_f"], to=TensorProto.FLOAT),
    ],
    "as another": [helper.make_node("CastLike", ["x", "full"], ["u_f"])],
    "through half": [
        helper.make_node("Cast", ["x"], ["u_h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["u_h"], ["u_f"], to=TensorProto.FLOAT),
    ],
}


@pytest.mark.parametrize("way", WAYS_TO_FLOATS)
def test_bytes_on_other_ways_to_floats(way: str, tmp_path: Path) -> None:
    divide = helper.make_node("Div", ["u_f", "full"], ["u_d"])
    conv = helper.make_node("Conv", ["u_d", "w"], ["a"], pads=[1] * 4, strides=[2, 2])
    weights = {"full": np.array(255, np.float32), "bgr": np.array([2, 1, 0])}
    image = (TensorProto.UINT8, ["batch", 3, 8, 8])
    record, out = taken(model_of([*WAYS_TO_FLOATS[way], divide, conv, *TAIL], image=image, weights=weights), tmp_path)
    assert record.image_range == (0, 255)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    theirs = onnx_runner(tmp_path / "theirs.onnx")({"x": pixels})["y"]
    ours = onnx_runner(out)({"input": pixels.astype(np.float32)})["logits"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_bytes_beside_something_else_are_refused(tmp_path: Path) -> None:
    join = helper.make_node("Concat", ["x", "plane"], ["j"], axis=1, name="beside")
    cast = helper.make_node("Cast", ["j"], ["c"], to=TensorProto.FLOAT)
    conv = helper.make_node("Conv", ["c", "w4"], ["a"], pads=[1] * 4)
    weights = {"plane": np.zeros((1, 1, 8, 8), np.uint8), "w4": np.zeros((16, 4, 3, 3), np.float32)}
    proto = model_of([join, cast, conv, *TAIL], image=(TensorProto.UINT8, [1, 3, 8, 8]), weights=weights)
    with pytest.raises(ResvitError, match="Concat 'beside' reads it as such"):
        taken(proto, tmp_path)


def test_an_image_that_is_computed_with_in_whole_numbers(tmp_path: Path) -> None:
    halve = helper.make_node("Div", ["x", "two"], ["h"], name="halve")
    cast = helper.make_node("Cast", ["h"], ["c"], to=TensorProto.FLOAT)
    conv = helper.make_node("Conv", ["c", "w"], ["a"], pads=[1] * 4)
    proto = model_of(
        [halve, cast, conv, *TAIL], image=(TensorProto.UINT8, ["batch", 3, 8, 8]), weights={"two": np.uint8(2)}
    )
    with pytest.raises(ResvitError, match="Div 'halve' reads it as such"):
        taken(proto, tmp_path)


@pytest.mark.parametrize("way", ["initializer", "constant", "cast", "function"])
def test_half_precision_wherever_it_stands(way: str, tmp_path: Path) -> None:
    half = np.zeros((16, 3, 3, 3), np.float16)
    constant = helper.make_node("Constant", [], ["h"], value=numpy_helper.from_array(half))
    up = helper.make_node("Cast", ["h"], ["hf"], to=TensorProto.FLOAT)
    conv = helper.make_node("Conv", ["x", "hf"], ["a"], pads=[1] * 4, strides=[2, 2])
    functions, weights = [], {}
    nodes = [constant, up, conv, *TAIL]
    if way == "initializer":
        nodes, weights = [up, conv, *TAIL], {"h": half}
    elif way == "cast":
        down = [helper.make_node("Cast", [name], [f"{name}16"], to=TensorProto.FLOAT16) for name in ("x", "w")]
        low = helper.make_node("Conv", ["x16", "w16"], ["a16"], pads=[1] * 4, strides=[2, 2])
        nodes = [*down, low, helper.make_node("Cast", ["a16"], ["a"], to=TensorProto.FLOAT), *TAIL]
    elif way == "function":
        imports = [helper.make_opsetid("", 20)]
        functions = [helper.make_function("own", "F", ["x"], ["a"], [constant, up, conv], imports)]
        nodes = [helper.make_node("F", ["x"], ["a"], domain="own"), *TAIL]
    with pytest.raises(ResvitError, match="half precision already"):
        taken(model_of(nodes, weights=weights, functions=functions), tmp_path)


def test_functions_that_double_at_every_call(tmp_path: Path) -> None:
    imports = [helper.make_opsetid("own", 1), helper.make_opsetid("", 20)]
    functions = [
        helper.make_function("own", f"F{i}", ["a"], ["b"], [
            helper.make_node(f"F{i + 1}", ["a"], ["t"], domain="own"),
            helper.make_node(f"F{i + 1}", ["t"], ["b"], domain="own"),
        ], imports)
        for i in range(24)
    ]  # fmt: skip
    functions.append(
        helper.make_function("own", "F24", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], imports)
    )
    nodes = [CONV, helper.make_node("F0", ["a"], ["r"], domain="own"),
             helper.make_node("GlobalAveragePool", ["r"], ["p"]), *TAIL[1:]]  # fmt: skip
    with pytest.raises(ResvitError, match="written out, its functions are"):
        taken(model_of(nodes, functions=functions), tmp_path)


def test_every_product_is_counted(tmp_path: Path) -> None:
    """A projection as Einsum, a weight on the left, and a head behind a shape that no inference tells."""
    nodes = [
        CONV,
        helper.make_node("Reshape", ["a", "rows"], ["t"]),
        helper.make_node("MatMul", ["left", "t"], ["l"], name="left"),
        helper.make_node("Einsum", ["l", "e"], ["h"], name="project", equation="bnd,dhe->bhne"),
        helper.make_node("ReduceMean", ["h", "last"], ["m"], keepdims=0),
        helper.make_node("Flatten", ["m"], ["f"]),
        TAIL[-1],
    ]
    random = np.random.default_rng(0)
    weights = {
        "rows": np.array([0, 16, -1]),
        "left": random.standard_normal((8, 16), dtype=np.float32),
        "e": random.standard_normal((16, 2, 4), dtype=np.float32),
        "last": np.array([3]),
    }
    _, out = taken(model_of(nodes, weights=weights), tmp_path)
    macs = sorted(p.macs for p in graph_from_onnx(out).analysis.products if p.weight is not None)
    assert macs == sorted([16 * 16 * 27, 8 * 16 * 16, 8 * 16 * 8, 16 * 5])


def compared(folder: Path, out: Path, image: np.ndarray) -> float:
    """The largest difference of what was written from the file as it came, over the largest answer."""
    theirs = onnx_runner(folder / "theirs.onnx")({"x": image})["y"]
    ours = onnx_runner(out)({"input": image})["logits"]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("opset", "values"), [(18, 4), (20, 4), (21, 16), (23, 16)])
def test_behind_a_group_norm_layers_have_shapes(opset: int, values: int, tmp_path: Path) -> None:
    """ONNX infers no shape behind one: nothing was counted, and calibration failed."""
    nodes = [
        CONV,
        helper.make_node("GroupNormalization", ["a", "s", "b"], ["n"], name="norm", num_groups=4, epsilon=0.01),
        helper.make_node("Conv", ["n", "w2"], ["c"], name="second", pads=[1] * 4),
        helper.make_node("GroupNormalization", ["c", "s", "b"], ["m"], num_groups=4),
        helper.make_node("GlobalAveragePool", ["m"], ["p"]),
        *TAIL[1:],
    ]
    random = np.random.default_rng(0)
    weights = {
        "w2": random.standard_normal((16, 16, 3, 3), dtype=np.float32),
        "s": random.standard_normal(values, dtype=np.float32),
        "b": random.standard_normal(values, dtype=np.float32),
    }
    _, out = taken(model_of(nodes, weights=weights, opset=opset), tmp_path)
    macs = sorted(p.macs for p in graph_from_onnx(out).analysis.products)
    assert macs == sorted([16 * 16 * 27, 16 * 16 * 144, 16 * 5])
    assert compared(tmp_path, out, random.standard_normal((2, 3, 8, 8), dtype=np.float32)) < 1e-5
    assert np.isfinite(onnx_runner(out)({"input": np.zeros((1, 3, 8, 8), np.float32)})["logits"]).all()


@pytest.mark.parametrize("opset", [7, 9, 13, 24, 25])
def test_opsets_of_others(opset: int, tmp_path: Path) -> None:
    nodes = TAIL
    if opset < 13:  # Flatten of the first axes, Gemm with its bias
        head = helper.make_node("Gemm", ["f", "fc", "zero"], ["y"])
        nodes = [*TAIL[:2], head]
    proto = model_of([CONV, *nodes], opset=opset, weights={"zero": np.zeros(5, np.float32)})
    _, out = taken(proto, tmp_path)
    image = np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)
    assert compared(tmp_path, out, image) < 1e-5


def test_what_a_newer_opset_alone_has_is_named(tmp_path: Path) -> None:
    swish = helper.make_node("Swish", ["a"], ["r"])
    nodes = [CONV, swish, helper.make_node("GlobalAveragePool", ["r"], ["p"]), *TAIL[1:]]
    with pytest.raises(ResvitError, match="uses ONNX opset 24") as refusal:
        taken(model_of(nodes, opset=24), tmp_path)
    assert "opset_version=23" in refusal.value.fix


def test_a_size_of_minus_one_is_open(tmp_path: Path) -> None:
    proto = model_of(image=(TensorProto.FLOAT, [-1, 3, 8, 8]))
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    _, out = taken(proto, tmp_path)
    graph = onnx.load(out).graph
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_an_output_without_a_shape(tmp_path: Path) -> None:
    """What people add to see a layer: a name, or a name and a type."""
    proto = model_of()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.output.append(onnx.ValueInfoProto(name="a"))
    _, out = taken(proto, tmp_path)
    shapes = [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
              for value in onnx.load(out).graph.output]  # fmt: skip
    assert shapes == [["batch", 5], ["batch", 16, 4, 4]]


@pytest.mark.parametrize("opset", [9, 14, 20])
def test_a_network_as_it_trains(opset: int, tmp_path: Path) -> None:
    old = opset < 14
    outputs = ["n", "m2", "v2", *(["m3", "v3"] if old else [])]
    norm = helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], outputs, name="norm")
    if not old:
        norm.attribute.append(helper.make_attribute("training_mode", 1))
    weights = {name: np.ones(16, np.float32) for name in "sbmv"}
    nodes = [CONV, norm, helper.make_node("GlobalAveragePool", ["n"], ["p"]), *TAIL[1:]]
    with pytest.raises(ResvitError, match="as in training: BatchNormalization 'norm'") as refusal:
        taken(model_of(nodes, opset=opset, weights=weights), tmp_path)
    assert "model.eval()" in refusal.value.fix


@pytest.mark.parametrize("trains", [True, False])
def test_dropout(trains: bool, tmp_path: Path) -> None:
    drop = helper.make_node("Dropout", ["a", "share", "trains"], ["d"], name="drop")
    nodes = [CONV, drop, helper.make_node("GlobalAveragePool", ["d"], ["p"]), *TAIL[1:]]
    proto = model_of(nodes, weights={"share": np.array(0.5, np.float32), "trains": np.array(trains)})
    if trains:
        with pytest.raises(ResvitError, match="as in training: Dropout 'drop'"):
            taken(proto, tmp_path)
        return
    _, out = taken(proto, tmp_path)
    assert "Dropout" not in {node.op_type for node in onnx.load(out).graph.node}


@pytest.mark.parametrize("shape", [["batch", 2], []])
def test_inputs_that_nothing_reads(shape: list[int | str], tmp_path: Path) -> None:
    """``orig_size`` of detectors, ``keep_prob`` of frozen graphs: the data would have to give them."""
    proto = model_of()
    proto.graph.input.append(helper.make_tensor_value_info("idle", TensorProto.INT64, shape))
    record, out = taken(proto, tmp_path)
    assert record.notes == ("nothing reads the input idle; it is left out",)
    assert [value.name for value in onnx.load(out).graph.input] == ["input"]


@pytest.mark.parametrize("batch", [1, "batch"])
def test_as_many_rows_as_an_image_gives(batch: int | str, tmp_path: Path) -> None:
    """A batch of one was no exception: the first row was taken for the only one."""
    nodes = [
        CONV,
        helper.make_node("Greater", ["a", "zero"], ["g"]),
        helper.make_node("NonZero", ["g"], ["z"]),
        helper.make_node("Transpose", ["z"], ["t"], perm=[1, 0]),
        helper.make_node("GatherND", ["a", "t"], ["y"]),
    ]
    proto = model_of(nodes, image=(TensorProto.FLOAT, [batch, 3, 8, 8]), weights={"zero": np.array(0, np.float32)})
    proto.graph.output[0].type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
    proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "n"
    with pytest.raises(ResvitError, match=r"its output y is \[\d+\] for 1 image and") as refusal:
        taken(proto, tmp_path)
    assert "TopK" in refusal.value.fix


def test_sequences_that_are_decided(tmp_path: Path) -> None:
    """What the TorchScript exporter writes for ``split`` and ``cat`` of a list."""
    nodes = [
        CONV,
        helper.make_node("SplitToSequence", ["a", "eight"], ["q"], axis=1),
        helper.make_node("SequenceAt", ["q", "first"], ["a0"]),
        helper.make_node("SequenceAt", ["q", "second"], ["a1"]),
        helper.make_node("SequenceConstruct", ["a1", "a0"], ["r"]),
        helper.make_node("ConcatFromSequence", ["r"], ["c"], axis=1),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        *TAIL[1:],
    ]
    weights = {"eight": np.array(8), "first": np.array(0), "second": np.array(1)}
    _, out = taken(model_of(nodes, weights=weights), tmp_path)
    assert not any("Sequence" in node.op_type for node in onnx.load(out).graph.node)
    assert compared(tmp_path, out, np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)) < 1e-5


def test_a_sequence_that_an_image_decides_is_refused(tmp_path: Path) -> None:
    nodes = [
        CONV,
        helper.make_node("SplitToSequence", ["a", "eight"], ["q"], axis=1),
        helper.make_node("ReduceMax", ["a"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["g"]),
        helper.make_node("Cast", ["g"], ["i"], to=TensorProto.INT64),
        helper.make_node("SequenceAt", ["q", "i"], ["a0"]),
        helper.make_node("Concat", ["a0", "a0"], ["c"], axis=1),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        *TAIL[1:],
    ]
    with pytest.raises(ResvitError, match=r"holds a list of tensors .*no engine"):
        taken(model_of(nodes, weights={"eight": np.array(8), "zero": np.array(0, np.float32)}), tmp_path)


@pytest.mark.parametrize(
    ("domain", "what", "fix"),
    [
        ("", "BatchedNMS_TRT", "in front of them"),
        ("mmdeploy", "mmdeploy.BatchedNMS_TRT", "in front of them"),
        ("com.microsoft", "com.microsoft.BatchedNMS_TRT", "ONNX Runtime's optimiser"),
        ("ai.onnx.ml", "ai.onnx.ml.BatchedNMS_TRT", "what a network's numbers are called"),
    ],
)
def test_operators_of_others(domain: str, what: str, fix: str, tmp_path: Path) -> None:
    nodes = [CONV, *TAIL, helper.make_node("BatchedNMS_TRT", ["y"], ["z"], domain=domain, name="last")]
    with pytest.raises(ResvitError, match=f"holds {what} .'last'., which is no standard ONNX operator") as refusal:
        taken(model_of(nodes), tmp_path)
    assert fix in refusal.value.fix


@pytest.mark.parametrize(
    ("kind", "shape", "problem", "fix"),
    [
        (TensorProto.UINT8, [8, 8, 3], "is uint8", "with its batch"),
        (TensorProto.FLOAT, [], "is a single number", "its first axis"),
        (TensorProto.FLOAT, ["batch", 5, "n"], "must be fixed", "--shape other=1x5x224"),
    ],
)
def test_inputs_that_no_engine_reads(kind: int, shape: list[int | str], problem: str, fix: str, tmp_path: Path) -> None:
    """Each is told what is wrong with it, and a remedy that fits."""
    read = helper.make_node("Shape", ["other"], ["s"])
    add = helper.make_node("ReduceMax", ["s"], ["r"], keepdims=0)
    cast = helper.make_node("Cast", ["r"], ["c"], to=TensorProto.FLOAT)
    nodes = [read, add, cast, CONV, helper.make_node("Mul", ["a", "c"], ["m"]),
             helper.make_node("GlobalAveragePool", ["m"], ["p"]), *TAIL[1:]]  # fmt: skip
    proto = model_of(nodes)
    proto.graph.input.append(helper.make_tensor_value_info("other", kind, shape))
    with pytest.raises(ResvitError, match=f"input other .*{problem}") as refusal:
        taken(proto, tmp_path)
    assert fix in refusal.value.fix


def test_calibration_behind_what_no_shape_is_inferred_of(tmp_path: Path) -> None:
    """A tensor of unknown rank was measured in one row and read as one a batch long."""
    nodes = [
        CONV,
        helper.make_node("MeanVarianceNormalization", ["a"], ["n"], axes=[2, 3]),
        helper.make_node("Conv", ["n", "w2"], ["c"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        *TAIL[1:],
    ]
    random = np.random.default_rng(0)
    _, out = taken(model_of(nodes, weights={"w2": random.standard_normal((16, 16, 3, 3), dtype=np.float32)}), tmp_path)
    images = random.standard_normal((6, 3, 8, 8), dtype=np.float32)
    statistics = collect_statistics(out, [{"input": images[:4]}, {"input": images[4:]}])
    assert statistics.images == 6
    second = next(node for node in onnx.load(out).graph.node if node.op_type == "Conv" and node.input[0] != "input")
    assert second.input[0] in statistics.tensors


def sizes_computed(source: str, parts: list[str | None]) -> list[onnx.NodeProto]:
    """``sizes`` [4] of a Reshape, as the old exporter writes them: two computed, by Shape, Gather and Div."""
    nodes = [helper.make_node("Shape", [source], ["shape"])]
    for index, part in enumerate(parts):
        if part is not None:
            nodes += [
                helper.make_node("Gather", ["shape", part], [f"g{index}"]),
                helper.make_node("Mul", [f"g{index}", "two"], [f"m{index}"]),
                helper.make_node("Div", [f"m{index}", "two"], [f"d{index}"]),
                helper.make_node("Unsqueeze", [f"d{index}", "first"], [f"u{index}"]),
            ]
    names = [f"u{index}" if part is not None else "minus" for index, part in enumerate(parts)]
    return [*nodes, helper.make_node("Concat", names, ["sizes"], axis=0)]


COMPUTED = {
    "zero": np.array(0), "one": np.array(1), "two": np.array(2), "three": np.array(3),
    "first": np.array([0]), "minus": np.array([-1]), "axis": np.array([3]), "last": np.array([2]),
}  # fmt: skip


def test_a_test_of_a_size_behind_computed_sizes_is_decided(tmp_path: Path) -> None:
    """``squeeze`` behind a view by sizes of a tensor, as in torch's local_response_norm: it was "values decide"."""
    then = helper.make_graph([helper.make_node("Squeeze", ["r", "axis"], ["t"])], "then", [], [
        helper.make_tensor_value_info("t", TensorProto.FLOAT, None)])  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", ["r"], ["e"])], "else", [], [
        helper.make_tensor_value_info("e", TensorProto.FLOAT, None)])  # fmt: skip
    nodes = [
        CONV,
        helper.make_node("ReduceMean", ["a", "axis"], ["v"], keepdims=1),
        *sizes_computed("v", ["zero", "one", None, "three"]),
        helper.make_node("Reshape", ["v", "sizes"], ["r"]),
        helper.make_node("Shape", ["r"], ["rs"]),
        helper.make_node("Gather", ["rs", "three"], ["rg"]),
        helper.make_node("Equal", ["rg", "one"], ["is"]),
        helper.make_node("If", ["is"], ["s"], name="choice", then_branch=then, else_branch=other),
        helper.make_node("ReduceMean", ["s", "last"], ["f"], keepdims=0),
        TAIL[-1],
    ]
    _, out = taken(model_of(nodes, weights=COMPUTED), tmp_path)
    operators = [node.op_type for node in onnx.load(out).graph.node]
    assert not {"If", "Shape", "Gather", "Div"} & set(operators)
    assert compared(tmp_path, out, np.random.default_rng(1).standard_normal((3, 3, 8, 8), dtype=np.float32)) < 1e-5


def test_outputs_of_computed_sizes_say_them(tmp_path: Path) -> None:
    nodes = [CONV, *sizes_computed("a", ["zero", None, "two"]), helper.make_node("Reshape", ["a", "sizes"], ["y"])]
    proto = model_of(nodes, weights=COMPUTED)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    for name in ("batch", "many", "width"):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = name
    _, out = taken(proto, tmp_path)
    dims = onnx.load(out).graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 64, 4]


def test_a_size_that_an_image_decides_is_not_measured(tmp_path: Path) -> None:
    """Of noise every run gives as many; of a picture not."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["z"]),
        helper.make_node("Shape", ["z"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["n"], keepdims=0),
        helper.make_node("Cast", ["n"], ["share"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "share"], ["m"]),
        helper.make_node("Conv", ["m", "w"], ["a"], pads=[1] * 4, strides=[2, 2]),
        *TAIL,
    ]
    path = tmp_path / "net.onnx"
    onnx.save(model_of(nodes, image=(TensorProto.FLOAT, [1, 3, 8, 8])), path)
    model = ir.load(path)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    measure_shapes(model)
    known = {str(value.name): value.shape for node in model.graph for value in node.outputs}
    assert known["z"] is None
    assert known["m"] is not None
    assert "NonZero" in {node.op_type for node in model.graph}
    _, out = taken(model_of(nodes, image=(TensorProto.FLOAT, [1, 3, 8, 8])), tmp_path)
    half = np.random.default_rng(1).standard_normal((1, 3, 8, 8), dtype=np.float32)
    half[:, 0] = 0
    theirs = onnx_runner(tmp_path / "theirs.onnx")({"x": half})["y"]
    np.testing.assert_allclose(onnx_runner(out)({"input": half})["logits"], theirs, rtol=1e-4)


def test_a_scan_is_called_a_loop(tmp_path: Path) -> None:
    state = helper.make_tensor_value_info("s", TensorProto.FLOAT, None)
    one = helper.make_tensor_value_info("i", TensorProto.FLOAT, None)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("n", "o")]
    steps = [helper.make_node("Add", ["s", "i"], ["n"]), helper.make_node("Identity", ["n"], ["o"])]
    body = helper.make_graph(steps, "body", [state, one], ends)
    nodes = [
        CONV,
        helper.make_node("ReduceMean", ["a", "axis"], ["start"], keepdims=0),
        helper.make_node("Transpose", ["a"], ["rows"], perm=[2, 0, 1, 3]),
        helper.make_node("Scan", ["start", "rows"], ["end", "sums"], name="scan", body=body, num_scan_inputs=1),
        helper.make_node("Unsqueeze", ["end", "axis"], ["u"]),
        helper.make_node("GlobalAveragePool", ["u"], ["p"]),
        *TAIL[1:],
    ]
    with pytest.raises(ResvitError, match="a loop over one of its axes: Scan 'scan'"):
        taken(model_of(nodes, weights={"axis": np.array([2])}), tmp_path)


def test_a_convolution_whose_weight_an_image_makes_is_no_attention(tmp_path: Path) -> None:
    nodes = [
        CONV,
        helper.make_node("ReduceMean", ["a", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "kernels"], ["k"]),
        helper.make_node("Reshape", ["k", "sizes"], ["kernel"]),
        helper.make_node("Conv", ["a", "kernel"], ["y"], pads=[1] * 4),
    ]
    random = np.random.default_rng(0)
    weights = {
        "axes": np.array([2, 3]),
        "kernels": random.standard_normal((16, 16 * 9), dtype=np.float32),
        "sizes": np.array([1, 16, 3, 3]),
    }
    proto = model_of(nodes, image=(TensorProto.FLOAT, [1, 3, 8, 8]), weights=weights)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    for size in (1, 1, 4, 4):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = size
    _, out = taken(proto, tmp_path)
    network = graph_from_onnx(out)
    last = next(product for product in network.analysis.products if product.weight is None)
    assert _impossible(last) == "its weight is computed from the image"


def test_texts_are_refused_as_texts(tmp_path: Path) -> None:
    names = numpy_helper.from_array(np.array(["cat", "dog"], object), "names")
    proto = model_of()
    proto.graph.initializer.append(names)
    with pytest.raises(ResvitError, match=r"holds texts .'names'.*no engine"):
        taken(proto, tmp_path)


def test_what_the_target_cannot_read_is_said_at_export() -> None:
    orin = find_target("jetson-orin")
    with pytest.raises(ResvitError, match="holds DFT") as refusal:
        require_readable(["Conv", "DFT"], orin)
    assert refusal.value.code is ExitCode.IMPOSSIBLE
    require_readable(["Conv", "Einsum", "DeformConv"], orin)


def test_the_list_of_unread_operators_is_the_parsers_own() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {name for name in names if not parser.supports_operator(name)} == UNREAD_BY_RTX & names


ORIGINAL = model_of().SerializeToString()


@pytest.mark.whole
@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(ORIGINAL) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.one_of(st.none(), st.integers(0, len(ORIGINAL))),
)
def test_damaged_bytes_are_refused_in_one_way(
    changes: list[tuple[int, int]], end: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(ORIGINAL)
    for at, byte in changes:
        data[at] = byte
    try:
        taken(bytes(data[:end]), tmp_path_factory.mktemp("damaged"))
    except ResvitError as error:
        assert error.code in (ExitCode.INPUT, ExitCode.IMPOSSIBLE)  # noqa: PT017


def unknown(proto: onnx.ModelProto, value: str, *axes: int) -> onnx.ModelProto:
    """With sizes of -1, as exporters write them that know no names for what is free."""
    for each in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for axis in axes if each.name == value else ():
            each.type.tensor_type.shape.dim[axis].dim_value = -1
    return proto


def test_sizes_of_minus_one_are_free(tmp_path: Path) -> None:
    proto = unknown(unknown(model_of(), "x", 0), "y", 0, 1)
    network, out = taken(proto, tmp_path)
    assert network.input_shape == (3, 8, 8)
    images = np.random.default_rng(1).standard_normal((3, 3, 8, 8), dtype=np.float32)
    before = onnx_runner(tmp_path / "theirs.onnx")({"x": images})["y"]
    np.testing.assert_allclose(onnx_runner(out)({"input": images})["logits"], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "sizes"), [((0, 2, 3), "3x224x224"), ((0, 3), "3x8x224"), ((3,), "3x8x224"), ((2,), "3x224x8")]
)
def test_free_sizes_are_asked_for_beside_those_that_are_known(
    axes: tuple[int, ...], sizes: str, tmp_path: Path
) -> None:
    with pytest.raises(ResvitError, match=f"--input-shape {sizes}, or") as raised:
        taken(unknown(model_of(), "x", *axes), tmp_path)
    assert raised.value.code is ExitCode.INPUT
    for size in (0, -2):
        with pytest.raises(ResvitError, match=f"has a size of {size}"):
            taken(model_of(image=(TensorProto.FLOAT, ["batch", 3, size, 8])), tmp_path)


SEQUENCE = [
    helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1] * 4, strides=[8, 1]),
    helper.make_node("Squeeze", ["a", "height"], ["s"], name="lines"),
    helper.make_node("Transpose", ["s"], ["t"], name="steps", perm=[2, 0, 1]),
    helper.make_node("MatMul", ["t", "fc"], ["y"], name="head"),
]
"""A recogniser of text as many are written: a step, an image, a character [T, B, K]."""


@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_a_batch_behind_the_steps_is_brought_to_the_front(batch: str | int, tmp_path: Path) -> None:
    proto = model_of(SEQUENCE, image=(TensorProto.FLOAT, [batch, 3, 8, 8]), weights={"height": np.array([2], np.int64)})
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, batch, 5]))
    network, out = taken(proto, tmp_path)
    assert "output output: its batch stood elsewhere and was brought to the front" in network.notes
    count = 4 if batch == "batch" else batch
    images = np.random.default_rng(1).standard_normal((count, 3, 8, 8), dtype=np.float32)
    theirs = onnxruntime.InferenceSession(tmp_path / "theirs.onnx", providers=["CPUExecutionProvider"])
    (before,) = theirs.run(None, {"x": images})
    assert before.shape == (8, count, 5)
    after = onnx_runner(out)({"input": images})["output"]
    np.testing.assert_allclose(after, before.transpose(1, 0, 2), rtol=1e-5, atol=1e-6)


def test_an_output_without_a_batch_is_refused(tmp_path: Path) -> None:
    proto = model_of([*SEQUENCE[:3], helper.make_node("ReduceSum", ["t", "one"], ["r"], keepdims=0),
                      helper.make_node("MatMul", ["r", "fc"], ["y"], name="head")],
                     weights={"height": np.array([2], np.int64), "one": np.array([1], np.int64)})  # fmt: skip
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 5]))
    with pytest.raises(ResvitError, match="not one entry for each image"):
        taken(proto, tmp_path)
