"""Every operator's torch form against ONNX Runtime, alone and in whole networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from conftest import CHECKPOINT
from quantize_graphs import Graph, hybrid, outputs_of
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program
from resvit_quantize.graph.network import network_from_onnx
from resvit_quantize.torch_graph.graph import TorchGraph, unsupported_operators
from resvit_quantize.torch_graph.operators import OPERATORS

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One node: its first input is fed, the others are constants."""

    op: str
    inputs: Sequence[Array | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 20

    def proto(self) -> bytes:
        names = ["" if x is None else f"input{index or ''}" for index, x in enumerate(self.inputs)]
        outputs = [f"out{index}" for index in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, name="node", **self.attributes)
        first = self.inputs[0]
        assert first is not None
        fed = helper.make_tensor_value_info("input", helper.np_dtype_to_tensor_dtype(first.dtype), first.shape)
        constants = [numpy_helper.from_array(x, n) for x, n in zip(self.inputs[1:], names[1:], strict=True) if n]
        infos = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph([node], "one", [fed], infos, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model).SerializeToString()


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return np.abs(rand(*shape)) + np.float32(0.1)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def bools(*shape: int, seed: int = 0) -> Array:
    return rand(*shape, seed=seed) > 0


IMAGE, WEIGHT, BIAS = rand(2, 4, 9, 7), rand(6, 4, 3, 3, seed=1), rand(6, seed=2)
TOKENS = rand(2, 5, 8)
UNARY = (
    "Abs Ceil Cos Erf Exp Floor Neg Reciprocal Sigmoid Sin Tanh Round Sign Mish Elu Gelu HardSigmoid HardSwish "
    "Identity LeakyRelu Relu Softplus Dropout Shape Size Flatten Transpose Softmax LogSoftmax GlobalAveragePool "
    "GlobalMaxPool ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Clip"
).split()
REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")

CASES = [
    *(Case(op, [IMAGE]) for op in UNARY),
    *(Case(op, [positive(2, 3, 4)]) for op in ("Log", "Sqrt")),
    *(Case(op, [rand(2, 3, 4), rand(3, 1, seed=1)]) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
    *(Case(op, [np.round(rand(3, 4)), np.round(rand(3, 4, seed=1))]) for op in COMPARISONS),
    *(Case(op, [bools(3, 4), bools(3, 4, seed=1)]) for op in ("And", "Or")),
    Case("Not", [bools(3, 4)]),
    Case("Equal", [ints(1, 2, -1), ints(1, 3, -1)]),
    Case("Div", [ints(7, -7, 9), ints(2, 2, -4)]),
    Case("Max", [rand(3, 4)]),
    Case("Min", [rand(3), rand(3, seed=1), rand(2, 3, seed=2)]),
    Case("Sum", [rand(3), rand(3, seed=1), rand(2, 3, seed=2)]),
    Case("Mod", [ints(7, -7, 9, -9), ints(3, 3, -4, -4)]),
    Case("Mod", [rand(3, 4), rand(4, seed=1)], {"fmod": 1}),
    Case("Pow", [positive(3, 4), np.array(2.5, np.float32)]),
    Case("Pow", [rand(3, 4), ints(2)]),
    Case("Where", [bools(2, 1, 4), rand(3, 4), rand(2, 3, 1, seed=1)]),
    Case("Clip", [rand(3, 4), np.array(-0.5, np.float32), np.array(0.3, np.float32)]),
    Case("Clip", [rand(3, 4), None, np.array(0.3, np.float32)]),
    Case("Clip", [rand(3, 4), np.array(-0.1, np.float32)]),
    Case("Cast", [rand(3, 4) * 5], {"to": TensorProto.INT64}),
    Case("Cast", [np.round(rand(3, 4))], {"to": TensorProto.BOOL}),
    Case("Cast", [ints(1, -2)], {"to": TensorProto.FLOAT}),
    Case("Elu", [IMAGE], {"alpha": 0.5}),
    Case("Gelu", [IMAGE], {"approximate": "tanh"}),
    Case("HardSigmoid", [IMAGE], {"alpha": 0.3, "beta": 0.4}),
    Case("LeakyRelu", [IMAGE], {"alpha": 0.2}),
    Case("PRelu", [IMAGE, rand(4, 1, 1, seed=1)]),
    Case("Softmax", [IMAGE], {"axis": 1}),
    Case("LogSoftmax", [IMAGE], {"axis": -3}),
    Case("Swish", [rand(3, 4)], {"alpha": 1.5}, opset=24),
    # products
    Case("Conv", [IMAGE, WEIGHT]),
    Case("Conv", [IMAGE, WEIGHT, BIAS], {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    Case("Conv", [IMAGE, WEIGHT, BIAS], {"pads": [2, 1, 2, 1], "dilations": [2, 1], "strides": [1, 2]}),
    Case("Conv", [IMAGE, WEIGHT, BIAS], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", [IMAGE, WEIGHT, BIAS], {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    Case("Conv", [IMAGE, WEIGHT, BIAS], {"auto_pad": "VALID", "strides": [2, 2]}),
    Case("Conv", [IMAGE, rand(8, 2, 3, 3)], {"group": 2, "pads": [1, 1, 1, 1]}),
    Case("Conv", [IMAGE, rand(4, 1, 3, 3)], {"group": 4}),
    Case("Conv", [rand(2, 4, 9), rand(6, 4, 3)], {"pads": [2, 0]}),
    Case("Conv", [rand(1, 2, 4, 5, 6), rand(3, 2, 2, 2, 2)], {"pads": [1, 0, 1, 0, 1, 0]}),
    Case("ConvTranspose", [IMAGE, rand(4, 3, 3, 3), rand(3, seed=2)]),
    Case("ConvTranspose", [IMAGE, rand(4, 3, 3, 3)], {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
    Case("ConvTranspose", [IMAGE, rand(4, 3, 4, 4)], {"strides": [2, 3], "pads": [0, 1, 2, 1]}),
    Case("ConvTranspose", [IMAGE, rand(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", [IMAGE, rand(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("ConvTranspose", [IMAGE, rand(4, 3, 3, 3)], {"strides": [2, 2], "output_shape": [18, 14]}),
    Case("ConvTranspose", [IMAGE, rand(4, 2, 3, 3)], {"group": 2, "dilations": [2, 1]}),
    Case("ConvTranspose", [rand(2, 4, 6), rand(4, 2, 3)], {"strides": [2]}),
    Case("Gemm", [rand(3, 5), rand(5, 4, seed=1), rand(4, seed=2)]),
    Case("Gemm", [rand(3, 5), rand(4, 5, seed=1), rand(3, 1, seed=2)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [rand(5, 3), rand(4, 5, seed=1)], {"transA": 1, "transB": 1}),
    Case("MatMul", [rand(2, 3, 4, 5), rand(3, 5, 6, seed=1)]),
    Case("MatMul", [rand(2, 3, 5), rand(5, seed=1)]),
    *(
        Case(
            "Attention", [rand(2, 3, 5, 4), rand(2, 3, 6, 4, seed=1), rand(2, 3, 6, 7, seed=2), *more], given, opset=23
        )
        for more, given in (
            ([], {}),
            ([], {"scale": 0.3}),
            ([], {"is_causal": 1}),
            ([rand(5, 6, seed=3)], {}),
            ([rand(2, 1, 5, 6, seed=3)], {"scale": 0.7}),
            ([bools(5, 6, seed=3) | np.eye(5, 6, dtype=bool)], {}),
            ([rand(5, 6, seed=3)], {"is_causal": 1}),
            ([bools(2, 3, 5, 6, seed=3) | np.eye(5, 6, dtype=bool)], {"is_causal": 1}),
        )
    ),
    Case(
        "Attention",
        [TOKENS, rand(2, 6, 8, seed=1), rand(2, 6, 12, seed=2)],
        {"q_num_heads": 4, "kv_num_heads": 4},
        opset=23,
    ),
    Case(
        "Attention",
        [TOKENS, rand(2, 6, 4, seed=1), rand(2, 6, 4, seed=2)],
        {"q_num_heads": 4, "kv_num_heads": 2},
        opset=23,
    ),
    Case("Attention", [rand(2, 6, 5, 4), rand(2, 2, 6, 4, seed=1), rand(2, 2, 6, 4, seed=2)], {}, opset=23),
    # normalisation
    Case(
        "BatchNormalization", [IMAGE, rand(4, seed=1), rand(4, seed=2), rand(4, seed=3), positive(4)], {"epsilon": 1e-3}
    ),
    Case("BatchNormalization", [rand(3, 4), rand(4, seed=1), rand(4, seed=2), rand(4, seed=3), positive(4)]),
    Case("LayerNormalization", [TOKENS, rand(8, seed=1), rand(8, seed=2)]),
    Case("LayerNormalization", [TOKENS, rand(5, 8, seed=1)], {"axis": 1, "epsilon": 1e-2}),
    Case("LayerNormalization", [TOKENS, rand(5, 8, seed=1), rand(8, seed=2)], {"axis": -2}),
    Case("GroupNormalization", [IMAGE, rand(2, seed=1), rand(2, seed=2)], {"num_groups": 2}),
    Case("GroupNormalization", [IMAGE, rand(4, seed=1), rand(4, seed=2)], {"num_groups": 2, "epsilon": 0.1}, opset=21),
    Case("InstanceNormalization", [IMAGE, rand(4, seed=1), rand(4, seed=2)], {"epsilon": 1e-2}),
    Case("InstanceNormalization", [rand(2, 4, 9), rand(4, seed=1), rand(4, seed=2)]),
    Case("RMSNormalization", [TOKENS, rand(8, seed=1)], opset=23),
    Case("RMSNormalization", [TOKENS, rand(5, 8, seed=1)], {"axis": 1, "epsilon": 0.1}, opset=23),
    # pooling
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2]}),
    Case("MaxPool", [-positive(2, 4, 9, 7)], {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "strides": [2, 2]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case(
        "MaxPool", [-positive(2, 4, 9, 7)], {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1] * 4, "ceil_mode": 1}
    ),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    Case("MaxPool", [rand(2, 4, 9)], {"kernel_shape": [3], "strides": [2]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "strides": [2, 2]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "count_include_pad": 1}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case(
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1, "count_include_pad": 1},
    ),
    Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("GlobalAveragePool", [rand(2, 4, 9)]),
    # shapes
    Case("Reshape", [IMAGE, ints(0, -1, 7)]),
    Case("Reshape", [rand(0, 3), ints(3, 0)], {"allowzero": 1}),
    Case("Flatten", [IMAGE], {"axis": -1}),
    Case("Flatten", [IMAGE], {"axis": 0}),
    Case("Squeeze", [rand(1, 3, 1, 4)]),
    Case("Squeeze", [rand(1, 3, 1, 4), ints(-2)]),
    Case("Unsqueeze", [rand(3, 4), ints(-1, 0)]),
    Case("Unsqueeze", [rand(3, 4), ints(2, 1)]),
    Case("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}),
    Case("Concat", [rand(2, 3), rand(2, 4, seed=1), rand(2, 1, seed=2)], {"axis": -1}),
    Case("Slice", [IMAGE, ints(1), ints(6)]),
    Case("Slice", [IMAGE, ints(1, -3), ints(2**62, -1), ints(-2, -1), ints(3, 1)]),
    Case("Slice", [IMAGE, ints(-1, 5), ints(-(2**62), 0), ints(2, 3), ints(-1, -2)]),
    Case("Slice", [IMAGE, ints(5), ints(2), ints(-1), ints(-1)]),
    Case("Slice", [IMAGE, ints(5), ints(2), ints(2)]),
    Case("Split", [rand(2, 7), ints(3, 4)], {"axis": -1}, outputs=2),
    Case("Split", [rand(2, 7)], {"axis": 1, "num_outputs": 3}, outputs=3),
    Case("Gather", [IMAGE, np.array([[0, -1], [2, 1]])], {"axis": -2}),
    Case("Gather", [IMAGE, np.array(-1)], {"axis": 1}),
    Case("Gather", [rand(3, 4), np.array([2, 0], np.int32)]),
    Case("Expand", [rand(3, 1), ints(2, 1, 4)]),
    Case("Expand", [bools(3, 1), ints(3, 2)]),
    Case("Tile", [rand(2, 3), ints(2, 3)]),
    Case("Shape", [IMAGE], {"start": -3, "end": -1}),
    Case("ConstantOfShape", [ints(2, 3)], {"value": numpy_helper.from_array(np.array([7], np.int64))}),
    Case("ConstantOfShape", [ints(2, 3)]),
    Case("Range", [np.array(v, np.float32) for v in (1.0, 2.0, 0.25)]),
    Case("Range", [np.array(5), np.array(-1), np.array(-2)]),
    Case("DepthToSpace", [rand(2, 8, 3, 4)], {"blocksize": 2}),
    Case("DepthToSpace", [rand(2, 8, 3, 4)], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [rand(2, 3, 4, 6)], {"blocksize": 2}),
    Case("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, 0, 3), np.array(1.5, np.float32)]),
    Case("Pad", [IMAGE, ints(1, 0, 0, 2), None, ints(-1, 1)]),
    Case("Pad", [IMAGE, ints(0, 0, -1, 0, 0, 0, 0, -2)]),
    *(Case("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": mode}) for mode in ("edge", "reflect", "wrap")),
    *(Case(op, [IMAGE, ints(-1, 1)], {"keepdims": 0}) for op in REDUCTIONS),
    Case("ReduceMean", [IMAGE], {"noop_with_empty_axes": 1}),
    # resize: by factors that are whole or not, and to sizes
    Case("Resize", [IMAGE, None, np.array([1, 1, 2, 3], np.float32)]),
    Case(
        "Resize",
        [IMAGE, None, np.array([1, 1, 1.5, 2.3], np.float32)],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    Case(
        "Resize",
        [IMAGE, None, None, ints(2, 4, 5, 20)],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    *(
        Case("Resize", [IMAGE, None, *how], {"mode": mode, "coordinate_transformation_mode": coordinates})
        for mode in ("linear", "cubic")
        for coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
        for how in (
            [np.array([1, 1, 1.5, 2.3], np.float32)],
            [np.array([1, 1, 0.7, 0.6], np.float32)],
            [None, ints(2, 4, 5, 20)],
        )
    ),
    *(
        Case("Resize", [IMAGE, None, None, ints(2, 4, 4, 5)], {"antialias": 1, "exclude_outside": 1, **mode})
        for mode in ({"mode": "linear"}, {"mode": "cubic", "cubic_coeff_a": -0.5})
    ),
    Case("Resize", [rand(2, 3, 8), None, np.array([1, 1, 2], np.float32)], {"mode": "linear"}),
    # what deformable attention and the selection of queries are made of
    *(
        Case(
            "GridSample",
            [IMAGE, 1.2 * rand(2, 5, 6, 2)],
            {"mode": mode, "padding_mode": padding, "align_corners": edge},
        )
        for mode in ("linear", "nearest", "cubic")
        for padding in ("zeros", "border", "reflection")
        for edge in (0, 1)
    ),
    Case("TopK", [IMAGE, ints(3)], outputs=2),
    Case("TopK", [IMAGE, ints(2)], {"axis": 1, "largest": 0}, outputs=2),
    Case("GatherElements", [IMAGE, np.zeros((2, 3, 1, 2), np.int64) - 1], {"axis": 2}),
]


def runtime_outputs(case: Case) -> list[Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(case.proto(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"input": case.inputs[0]}))


def torch_outputs(case: Case) -> list[Array]:
    graph = TorchGraph(ir.from_proto(onnx.load_from_string(case.proto())))
    first = case.inputs[0]
    assert first is not None
    return [value.numpy() for value in graph({"input": torch.from_numpy(np.array(first))}).values()]


@pytest.mark.whole
@pytest.mark.parametrize("case", CASES, ids=[f"{c.op}-{i}" for i, c in enumerate(CASES)])
def test_an_operator_gives_what_the_runtime_gives(case: Case) -> None:
    for expected, found in zip(runtime_outputs(case), torch_outputs(case), strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_every_operator_has_a_case() -> None:
    assert {case.op for case in CASES} == set(OPERATORS)


@pytest.mark.parametrize(
    "case",
    [
        Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
        Case("Attention", [rand(2, 3, 5, 4)] * 3, {"softcap": 2.0}, opset=23),
        Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2]}, outputs=2),
        Case("Resize", [IMAGE, None, np.array([1, 1, 1.5, 1.5], np.float32)]),
        Case("Resize", [IMAGE, None, None, ints(2, 4, 4, 4)], {"mode": "cubic", "antialias": 1}),
        Case(
            "Resize",
            [IMAGE, None, None, ints(2, 4, 1, 4)],
            {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
        ),
        Case("Resize", [IMAGE, None, np.array([2, 2], np.float32)], {"mode": "linear", "axes": [2, 3]}),
    ],
    ids=lambda case: case.op,
)
def test_what_has_no_exact_form_is_refused_by_name(case: Case) -> None:
    with pytest.raises(ResvitError, match="node is a") as refused:
        torch_outputs(case)
    assert refused.value.code == ExitCode.IMPOSSIBLE
    assert "brute-force" in refused.value.fix


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path) -> None:
    g = Graph("batch", 3, 4, 4)
    value = g.op("Hardmax", g.op("Det", "input"))
    network = network_from_onnx(g.save(tmp_path / "model.onnx", value))
    assert unsupported_operators(network) == ("Det", "Hardmax")
    with pytest.raises(ResvitError, match="Det, Hardmax"):
        TorchGraph(network)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("opset", [20, pytest.param(23, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["embed-nano", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fpn-nano", "dual-nano"))]
)
def test_whole_hybrids(name: str, opset: int, tmp_path: Path) -> None:
    weights = CHECKPOINT if name == "embed-nano" else None
    program, _ = fold_program(load_network(ModelSpec(model=f"resvit:{name}", checkpoint=weights)).program)
    path = tmp_path / "model.onnx"
    onnx_from_program(program, path, opset=opset, batch=2)
    images = rand(2, 1, 28, 28)
    with torch.no_grad():
        found = TorchGraph(network_from_onnx(path))({"input": torch.from_numpy(images)})
    for output, expected in outputs_of(path, images).items():
        np.testing.assert_allclose(found[output].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_finite_differences(tmp_path: Path) -> None:
    graph = TorchGraph(network_from_onnx(hybrid(tmp_path / "model.onnx"))).double()
    images = torch.from_numpy(rand(1, 3, 16, 16)).double().requires_grad_()
    graph({"input": images})["logits"].sum().backward()
    assert images.grad is not None
    direction = torch.from_numpy(rand(1, 3, 16, 16, seed=1)).double()
    with torch.no_grad():
        ahead, behind = (graph({"input": images + sign * 1e-6 * direction})["logits"].sum() for sign in (1, -1))
    assert (images.grad * direction).sum().item() == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-5)


def test_what_listeners_return_is_used(tmp_path: Path) -> None:
    graph = TorchGraph(network_from_onnx(hybrid(tmp_path / "model.onnx")))
    heard: list[tuple[str, int]] = []

    def reading(node: ir.Node, index: int, value: torch.Tensor) -> torch.Tensor:
        heard.append((str(node.name), index))
        return value * 0 if node.name == "head/Gemm" and index == 0 else value

    written: list[str] = []

    def writing(node: ir.Node, value: torch.Tensor) -> torch.Tensor:
        written.append(str(node.name))
        return value

    with torch.no_grad():
        logits = graph({"input": torch.from_numpy(rand(3, 3, 16, 16))}, reading, writing)["logits"]
    np.testing.assert_array_equal(logits.numpy(), graph.tensor("head.bias").expand(3, -1).numpy())
    assert {("stem/Conv", 0), ("stem/Conv", 1), ("blocks.0/Add1", 0)} <= set(heard)
    assert "stem/Conv" in written
    assert "blocks.0.attn/Softmax" not in written


def test_constants_are_parameters_only_where_asked(tmp_path: Path) -> None:
    network = network_from_onnx(hybrid(tmp_path / "model.onnx"))
    assert not list(TorchGraph(network).parameters())
    trained = TorchGraph(network, trainable=True)
    assert trained.tensor("head.weight").requires_grad
    assert all(parameter.is_floating_point() for parameter in trained.parameters())
