"""No pass of the optimiser changes an answer: constants and inputs of every kind, the passes taken from their list."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_export.to_onnx.canonical import infer_shapes, optimize
from resvit_export.to_onnx.constant_islands import fold_islands
from resvit_export.to_onnx.optimizer import passes
from resvit_export.to_onnx.stand_ins import bound_stand_ins

PASSES = [*passes(), optimize]
EXTREMES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-8,
    -1e-9,
    1e-15,
    1e-38,
    1e-45,
    1.000001,
    0.999999,
    1e9,
    3e38,
    -3.4028234663852886e38,
]
EXTREMES += [np.inf, -np.inf, np.nan, 0.5, 65504.0]
VALUES = st.sampled_from(EXTREMES)
UNARY = ("Relu", "Sqrt", "Abs", "Reciprocal", "Neg", "Log", "Exp", "Identity", "Softmax")
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min")

Step = tuple[Any, ...]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(UNARY)),
        st.tuples(st.sampled_from(BINARY), VALUES, st.booleans(), st.sampled_from([(), (1,), (4,), (3, 4)])),
        st.tuples(st.just("Clip"), VALUES, VALUES),
        st.tuples(st.just("Transpose")),
        st.tuples(st.just("Folded"), st.sampled_from(BINARY), VALUES, VALUES),
    ),
    min_size=1,
    max_size=4,
)


def chain(steps: list[Step]) -> onnx.ModelProto:
    """A graph [3, 4] → [3, 4] of these steps, one behind the other."""
    nodes, constants, at = [], [], "input"

    def constant(value: Any, shape: tuple[int, ...] = ()) -> str:
        name = f"constant_{len(constants)}"
        constants.append(numpy_helper.from_array(np.full(shape, value, np.float32), name))
        return name

    def op(kind: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"value_{len(nodes)}"], f"node_{len(nodes)}", **attributes))
        return str(nodes[-1].output[0])

    for kind, *rest in steps:
        if kind in BINARY:
            value, first, shape = rest
            inputs = [at, constant(value, shape)]
            at = op(kind, inputs[::-1] if first else inputs)
        elif kind == "Clip":
            at = op("Clip", [at, *map(constant, rest)])
        elif kind == "Transpose":
            at = op("Transpose", [op("Transpose", [at], perm=[1, 0])], perm=[1, 0])
        elif kind == "Folded":
            at = op("Add", [at, op(rest[0], [constant(rest[1]), constant(rest[2])])])
        else:
            at = op(kind, [at])
    nodes.append(helper.make_node("Reciprocal", [at], ["output"], "last"))  # tells 0 from -0
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 4]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answer(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    return onnx_runner(model.SerializeToString(), optimize=False)({"input": image})["output"]


def assert_same(before: onnx.ModelProto, image: np.ndarray, which: list[Any] = PASSES) -> list[str]:
    """Apply every pass of ``which`` by itself and hold the answers against the graph's as written."""
    expected, operators = answer(before, image), []
    for one in which:
        model = ir.serde.deserialize_model(before)
        one(model)
        after = ir.serde.serialize_model(model)
        operators = [node.op_type for node in after.graph.node]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_allclose(answer(after, image), expected, rtol=1e-5, atol=0.0, err_msg=str(one))
    return operators


@pytest.mark.whole
@settings(max_examples=60, deadline=None)
@given(STEPS, st.lists(VALUES, min_size=12, max_size=12))
def test_every_pass_keeps_every_answer(steps: list[Step], pixels: list[float]) -> None:
    assert_same(chain(steps), np.array(pixels, np.float32).reshape(3, 4), [optimize])


@pytest.mark.whole
@settings(max_examples=12, deadline=None)
@given(STEPS, st.lists(VALUES, min_size=12, max_size=12))
def test_each_pass_by_itself(steps: list[Step], pixels: list[float]) -> None:
    assert_same(chain(steps), np.array(pixels, np.float32).reshape(3, 4))


@pytest.mark.parametrize(
    ("step", "goes"),
    [
        (("Mul", 1.0, False, ()), True),
        (("Mul", 1.000001, False, ()), False),
        (("Div", 1.0, False, ()), True),
        (("Add", -0.0, True, ()), True),
        (("Sub", 0.0, False, ()), True),
        (("Add", 0.0, False, ()), False),  # -0 + 0 is 0, and 1 / 0 another infinity
        *((("Add", value, False, ()), False) for value in (1e-8, -1e-9, 1e-15, 1e-45)),
        (("Sub", 1e-12, False, ()), False),
        (("Max", 1e-12, False, ()), False),
    ],
)
def test_what_goes_is_exact(step: Step, goes: bool) -> None:
    image = np.array([0.0, -0.0, 1e-8, -1e-20, 1.0, -1.0, np.inf, np.nan, 1e30, -3.0, 5.0, 7.0], np.float32)
    assert (step[0] not in assert_same(chain([step]), image.reshape(3, 4), [optimize])) is goes


def built(nodes: list[Any], constants: dict[str, np.ndarray], shape: list[int], out: list[int]) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in (("input", shape), ("output", out))
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


NODE = helper.make_node
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((6, 4, 3, 3)).astype(np.float32)
NORM = {name: (RANDOM.random(6) + 0.5).astype(np.float32) for name in ("gamma", "beta", "mean", "variance")}
ROWS = {"rows": np.arange(3, dtype=np.int64)[:, None], "new": np.full((3, 4), 2.0, np.float32)}
SLICES = {"a": [0], "b": [2], "c": [5], "axis": [1]}


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (
            built(
                [
                    NODE("Slice", ["input", "a", "b", "axis"], ["left"]),
                    NODE("Slice", ["input", "b", "c", "axis"], ["right"]),
                    NODE("Concat", ["right", "left"], ["output"], axis=1),
                ],
                {name: np.array(value, np.int64) for name, value in SLICES.items()},
                [3, 5],
                [3, 5],
            ),
            "Slice",
        ),
        (
            built(
                [NODE("ScatterND", ["input", "rows", "new"], ["s"], reduction="add"), NODE("Abs", ["s"], ["output"])],
                ROWS,
                [3, 4],
                [3, 4],
            ),
            "ScatterND",
        ),
        (
            built(
                [NODE("ScatterND", ["input", "rows", "new"], ["s"]), NODE("Abs", ["s"], ["output"])],
                ROWS,
                [3, 4],
                [3, 4],
            ),
            "Abs",
        ),
        (
            built(
                [NODE("Conv", ["input", "weight"], ["output"], auto_pad="SAME_UPPER", strides=[2, 2])],
                {"weight": WEIGHT},
                [2, 4, 9, 9],
                [2, 6, 5, 5],
            ),
            "Conv",
        ),
        (
            built(
                [
                    NODE("ConvTranspose", ["input", "weight"], ["map"], group=2),
                    NODE("BatchNormalization", ["map", "gamma", "beta", "mean", "variance"], ["output"]),
                ],
                {"weight": RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32), **NORM},
                [2, 4, 5, 5],
                [2, 6, 7, 7],
            ),
            "ConvTranspose",
        ),
        (
            built(
                [
                    NODE("Gemm", ["input", "weight", "beta"], ["rows"], beta=0.5, alpha=2.0),
                    NODE("BatchNormalization", ["rows", "gamma", "beta", "mean", "variance"], ["output"]),
                ],
                {"weight": RANDOM.standard_normal((4, 6)).astype(np.float32), **NORM},
                [3, 4],
                [3, 6],
            ),
            "Gemm",
        ),
        (
            built(
                [
                    NODE("Conv", ["input", "weight"], ["map"]),
                    NODE("BatchNormalization", ["map", "gamma", "beta", "mean", "none"], ["output"], epsilon=0.0),
                ],
                {"weight": WEIGHT, **NORM, "none": np.zeros(6, np.float32)},
                [2, 4, 5, 5],
                [2, 6, 3, 3],
            ),
            "BatchNormalization",
        ),
    ],
    ids=["odd halves", "scatter adds", "scatter replaces", "padded by itself", "transposed", "gemm", "no variance"],
)
def test_graphs_that_rules_have_got_wrong(model: onnx.ModelProto, kept: str) -> None:
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    image = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    before = answer(model, image)
    network = ir.serde.deserialize_model(model)
    optimize(network)
    after = ir.serde.serialize_model(network)
    np.testing.assert_allclose(answer(after, image), before, rtol=1e-4, atol=1e-5)
    assert kept in [node.op_type for node in after.graph.node]


def masked(mask: np.ndarray) -> onnx.ModelProto:
    nodes = [NODE("Add", ["input", "mask"], ["masked"]), NODE("Softmax", ["masked"], ["output"])]
    return built(nodes, {"mask": mask}, [3, 4], [3, 4])


@pytest.mark.whole
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from([-3.4028234663852886e38, -1e9, -1e30, -np.inf]),
    st.floats(-5000, 5000, width=32),
)
def test_stand_ins_for_infinity_are_bounded_only_where_that_is_the_same(
    hidden: list[bool], stand_in: float, scale: float
) -> None:
    mask = np.where(np.array(hidden).reshape(3, 4), stand_in, 0.0).astype(np.float32)
    model = masked(mask)
    image = (np.random.default_rng(0).random((3, 4)) * scale).astype(np.float32)
    expected = answer(model, image)
    network = ir.serde.deserialize_model(model)
    infer_shapes(network)
    count = bound_stand_ins(network)
    np.testing.assert_allclose(answer(ir.serde.serialize_model(network), image), expected, rtol=1e-6, atol=1e-30)
    whole = bool((mask != 0).all(axis=1).any())
    assert count == (0 if whole or not np.isfinite(stand_in) or not mask.any() else 1)


def test_islands_are_evaluated_by_onnx_runtime() -> None:
    model = chain([("Folded", "Div", 1e-38, 3e38), ("Folded", "Mul", np.nan, 0.0)])
    assert_same(model, np.zeros((3, 4), np.float32), [fold_islands])
