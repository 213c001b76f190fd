"""Einsum becomes matrix products that compute the same, whatever the equation."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_export.to_onnx.canonical import infer_shapes
from resvit_export.to_onnx.einsums import spell_out_einsums

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 1, "f": 3}


def model_of(equation: str, shapes: list[list[int | str]], constants: dict[int, np.ndarray]) -> onnx.ModelProto:
    """One Einsum of opset 20; operands in ``constants`` are initializers, the others inputs ``x0``, ``x1``…."""
    names = [f"x{index}" for index in range(len(shapes))]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
        if index not in constants
    ]
    weights = [numpy_helper.from_array(array, f"x{index}") for index, array in constants.items()]
    node = helper.make_node("Einsum", names, ["y"], name="product", equation=equation)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def spelled(proto: onnx.ModelProto) -> tuple[int, ir.Model]:
    model = ir.serde.deserialize_model(proto)
    infer_shapes(model)
    count = spell_out_einsums(model)
    infer_shapes(model)
    return count, model


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[list[str]]]:
    """An equation without diagonals, and the labels of each operand; an ellipsis stands for the first axes."""
    labels = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)
    operands = draw(st.lists(labels, min_size=1, max_size=3))
    every = sorted({label for operand in operands for label in operand})
    result = draw(st.permutations(every))[: draw(st.integers(0, len(every)))]
    left = ",".join("".join(operand) for operand in operands)
    spaced = draw(st.sampled_from(["{}->{}", "{} -> {}"]))
    return spaced.format(left, "".join(result)), operands


@pytest.mark.whole
@settings(max_examples=150, deadline=None)
@given(equations(), st.sets(st.integers(0, 2)), st.booleans())
def test_any_equation_computes_the_same(
    drawn: tuple[str, list[list[str]]], constant: set[int], free_batch: bool
) -> None:
    equation, operands = drawn
    random = np.random.default_rng(0)
    arrays = [random.standard_normal([SIZES[label] for label in labels], dtype=np.float32) for labels in operands]
    constants = {index: arrays[index] for index in constant if index < len(arrays)}
    if len(constants) == len(arrays):
        constants.pop(0)
    shapes = [["batch" if free_batch and label == "a" else SIZES[label] for label in labels] for labels in operands]
    proto = model_of(equation, shapes, constants)
    feeds = {f"x{index}": array for index, array in enumerate(arrays) if index not in constants}
    expected = onnx_runner(proto.SerializeToString()).session.run(None, feeds)[0]
    count, model = spelled(proto)
    assert count == 1 or free_batch
    result = onnx_runner(ir.serde.serialize_model(model).SerializeToString()).session.run(None, feeds)[0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...ij,...jk->...ik", [["n", 2, 3, 4], [4, 5]]),
        ("...ij,...jk", [["n", 2, 3, 4], ["n", 2, 4, 5]]),
        ("b...d,de->b...e", [["n", 2, 3, 4], [4, 5]]),
        ("...d,dhe->...he", [["n", 7, 4], [4, 2, 3]]),
        ("ij,jk", [["n", 3], [3, 4]]),
        ("...i,...i->...", [["n", 2, 3], [2, 3]]),
        ("i...->...", [[3, 2, 4]]),
    ],
)
def test_ellipses(equation: str, shapes: list[list[int | str]]) -> None:
    proto = model_of(equation, shapes, {})
    random = np.random.default_rng(0)
    feeds = {
        f"x{index}": random.standard_normal([3 if size == "n" else size for size in shape], dtype=np.float32)
        for index, shape in enumerate(shapes)
    }
    count, model = spelled(proto)
    assert count == 1
    result = onnx_runner(ir.serde.serialize_model(model).SerializeToString()).session.run(None, feeds)[0]
    np.testing.assert_allclose(result, np.einsum(equation, *feeds.values()), rtol=1e-5, atol=1e-5)


def test_a_projection_becomes_one_matrix_product_with_a_weight_of_two_axes() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 2, 4), dtype=np.float32)
    for equation, shapes in (("bnd,dhe->bhne", ["batch", 5, 8]), ("dhe,bnd->bhne", ["batch", 5, 8])):
        index = 1 if equation.startswith("bnd") else 0
        operands = [shapes, list(weight.shape)]
        proto = model_of(equation, operands if index else operands[::-1], {index: weight})
        _, model = spelled(proto)
        product = next(node for node in model.graph if node.op_type == "MatMul")
        assert product.name == "product"
        assert product.inputs[1] is not None
        assert product.inputs[1].shape == [8, 8]
        assert product.inputs[1].is_initializer()
        assert [node.op_type for node in model.graph] == ["MatMul", "Reshape", "Transpose"]


@pytest.mark.parametrize("equation", ["ii->i", "iij,jk->ik"])
def test_diagonals_stay(equation: str) -> None:
    shapes: list[list[int | str]] = [[3] * len(side) for side in equation.partition("->")[0].split(",")]
    assert spelled(model_of(equation, shapes, {}))[0] == 0
