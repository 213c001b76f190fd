"""The plain computation of each node of ours, in ONNX Runtime, against what the kernel is held to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from kernel_bounds import UNIT, attention_outside, deformable_outside, held, norm_slack, outside
from resvit_engines.kernels.attention import LAYOUTS, THREE_TENSORS, AttentionConfig, attention_reference, parts_of
from resvit_engines.kernels.bridge import BridgeConfig, bridge_reference, layer_norm
from resvit_engines.kernels.deformable import DeformableConfig
from resvit_engines.kernels.numerics import EIGHT_BIT, stored
from resvit_engines.plugins.names import DOMAIN, OP_TYPES
from resvit_quantize.fusion import attention_node, bridge, deformable
from resvit_quantize.fusion.functions import function_of
from resvit_quantize.fusion.match import ONNX_TYPES

OUTPUTS = ("fp16", "bf16", "int8", "fp8")


def computed(
    op_type: str, attributes: dict[str, Any], inputs: list[np.ndarray], dtypes: list[str], opset: int = 20
) -> list[np.ndarray]:
    """One node with its function in ONNX Runtime. Inputs and outputs are the stored numbers."""
    import onnxruntime

    names, outputs = OP_TYPES[op_type].inputs, OP_TYPES[op_type].outputs
    rank = 3 if op_type.startswith("ResvitBridge") else inputs[0].ndim
    nodes = [
        helper.make_node("Cast", [f"{name}32"], [name], to=ONNX_TYPES[dtype])
        for name, dtype in zip(names, dtypes, strict=True)
    ]
    nodes.append(helper.make_node(op_type, names, outputs, domain=DOMAIN, **attributes))
    nodes += [helper.make_node("Cast", [name], [f"{name}32"], to=TensorProto.FLOAT) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "one",
        [
            helper.make_tensor_value_info(f"{n}32", TensorProto.FLOAT, a.shape)
            for n, a in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info(f"{name}32", TensorProto.FLOAT, [None] * rank) for name in outputs],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    function = ir.serde.serialize_function(function_of(op_type, opset))
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {f"{name}32": array.astype(np.float32) for name, array in zip(names, inputs, strict=True)}
    return [array.astype(np.float64) for array in session.run(None, given)]


def attention_config(layout: str, dtype: str, pv: str, out: str, bias: tuple[bool, ...] | None) -> AttentionConfig:
    """Two heads of 8 and 12 (QK and V), 3 x 2 tokens, each scale another."""
    eight = dtype in EIGHT_BIT
    scales = {"q_scale": 0.03, "k_scale": 0.034, "v_scale": 0.027} if eight else {}
    options = {"area": (3, 2)} if layout == "channels" else {}
    keys = 9 if layout in THREE_TENSORS else 6
    return AttentionConfig(
        2, 8, 12, 0.3, 6, keys, layout, dtype, out, pv, **scales, out_scale=0.023 if out in EIGHT_BIT else 1.0,
        bias=bias, bias_dtype="fp32" if eight else dtype, **options,
    )  # fmt: skip


def attention_inputs(config: AttentionConfig, batch: int) -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(0)
    heads, dk, dv, nq, nk = config.heads, config.head_size, config.value_size, config.queries, config.keys
    shapes: list[tuple[int, ...]] = {
        "split": [(batch, nq, heads * dk), (batch, nk, heads * dk), (batch, nk, heads * dv)],
        "q_kv": [(batch, nq, heads * dk), *[(batch, nk, heads * (dk + dv))] * 2],
        "channels": [(batch, config.width, 3, 2)],
    }.get(config.layout, [(batch, nq, config.width)])
    inputs = [held(rng, shape, config.dtype, 0.03) for shape in shapes]
    if config.layout == "q_kv":
        inputs[2] = inputs[1]
    dtypes = [config.dtype] * len(inputs)
    if config.bias is not None:
        whole = (batch, heads, nq)
        shape = (*(size if differs else 1 for size, differs in zip(whole, config.bias, strict=True)), nk)
        bias = stored(rng.normal(0, 2, shape), config.bias_dtype)
        bias[rng.random(shape) < 0.2] = -np.inf
        bias[0, 0, 0] = -np.inf
        inputs.append(bias)
        dtypes.append(config.bias_dtype)
    return inputs, dtypes


@pytest.mark.whole
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "pv"), [("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8"), ("int8", "fp16"), ("fp8", "fp8")]
)
@pytest.mark.parametrize("bias", [None, (False, True, True), (True, False, False)])
def test_attention(layout: str, dtype: str, pv: str, bias: tuple[bool, ...] | None) -> None:
    for out in OUTPUTS:
        config = attention_config(layout, dtype, pv, out, bias)
        inputs, dtypes = attention_inputs(config, 3)
        op_type = attention_node.op_type_of(config)
        (got,) = computed(op_type, attention_node.attributes_of(config), inputs, dtypes)
        assert attention_outside(config, inputs, got) == 0
        if bias is not None:  # the first query of the first image and head sees nothing
            first = got[0, :, 0, 0] if layout == "channels" else got[0, 0]
            assert np.all(first[: config.value_size] == 0.0)


def test_the_bound_on_attention_is_not_too_wide() -> None:
    config = attention_config("packed", "fp16", "fp16", "fp16", None)
    inputs, dtypes = attention_inputs(config, 3)
    wrong = dataclasses.replace(config, scale=config.scale * 1.01)
    (got,) = computed("ResvitAttention", attention_node.attributes_of(wrong), inputs, dtypes)
    assert attention_outside(config, inputs, got) > got.size // 4


@pytest.mark.parametrize("pv", ["int8", "fp8"])
def test_shares_in_8_bits_are_rounded_as_the_kernel_rounds_them(pv: str) -> None:
    config = attention_config("packed", pv, pv, "fp16", None)
    inputs, dtypes = attention_inputs(config, 2)
    (got,) = computed("ResvitAttention", attention_node.attributes_of(config), inputs, dtypes)
    q, k, values = parts_of(config, *inputs)
    logits = q @ k.swapaxes(-1, -2) * (config.scale * config.q_scale * config.k_scale)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    factor = {"int8": 127.0, "fp8": 256.0}[pv]
    shares = stored(weights * factor, pv)
    expected = shares @ values / shares.sum(-1, keepdims=True) * config.v_scale
    joined = expected.swapaxes(1, 2).reshape(got.shape)
    # One rounding to FP16; a share on the edge between two steps may fall to either side, but none here does.
    assert np.all(np.abs(got - joined) <= 2.0**-11 * np.abs(joined) + 2.0**-24)
    exact = attention_reference(config, *inputs)
    assert np.abs(got - exact).max() > 8 * 2.0**-11 * np.abs(exact).max()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("out", [None, *OUTPUTS])
def test_bridge(prefix: int, dtype: str, out: str | None) -> None:
    rng = np.random.default_rng(0)
    eight = dtype in EIGHT_BIT
    tokens_in = "fp16" if eight else dtype
    config = BridgeConfig(
        24, 3, 2, 16, prefix, dtype, 0.03 if eight else 1.0, tokens_in, out is not None, 1e-5, out or tokens_in,
        0.037 if out in EIGHT_BIT else 1.0,
    )  # fmt: skip
    scale = [stored(rng.uniform(0.01, 0.02, 16), "fp32")] if eight else []
    image, weight = held(rng, (2, 24, 3, 2), dtype, 0.03), held(rng, (16, 24), dtype, 0.015)
    inputs = [image, weight, *scale, held(rng, (6 + prefix, 16), "fp32")]
    affine = [held(rng, (16,), "fp32"), held(rng, (16,), "fp32")] if out else []
    dtypes = [dtype, dtype, *["fp32"] * (len(inputs) - 2 + len(affine))]
    attributes = bridge.attributes_of(config)
    tokens, *normal = computed(bridge.op_type_of(config), attributes, [*inputs, *affine], dtypes)

    (real,) = bridge_reference(dataclasses.replace(config, token_dtype="fp32", norm=False), *inputs)
    (size,) = bridge_reference(
        dataclasses.replace(config, token_dtype="fp32", norm=False), *(np.abs(value) for value in inputs)
    )
    # A sum of n products errs by n roundings of their magnitudes; then two scales and the addition.
    assert outside(tokens, real, (24 + 4) * UNIT * size, tokens_in) == 0
    if out:
        assert norm_faults(tokens, normal[0], affine, out, config.out_scale) == 0


def norm_faults(x: np.ndarray, got: np.ndarray, affine: list[np.ndarray], out: str, scale: float) -> int:
    """LayerNorm over the last dimension, epsilon 1e-5."""
    gamma, beta = affine
    z = layer_norm(x, np.ones_like(gamma), np.zeros_like(beta), 1e-5)
    real = layer_norm(x, gamma, beta, 1e-5)
    # ONNX Runtime takes the variance as the mean of squares less the square of the mean: its error is relative to
    # the square of what is normalised, and half of it that of the root.
    square = (x**2).mean(-1, keepdims=True) / x.var(-1, keepdims=True)
    slack = norm_slack(z, gamma, beta, x.shape[-1]) + np.abs(gamma * z) * x.shape[-1] * UNIT * square
    return outside(got, real, slack + 2 * UNIT * np.abs(real), out, scale)


@pytest.mark.whole
@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("unit", [True, False])
def test_deformable_attention(dtype: str, out: str, unit: bool) -> None:
    rng = np.random.default_rng(0)
    config = DeformableConfig(
        3, 8, (5, 1, 3), (4, 6, 1), (1, 4, 2), 9, unit, dtype, "fp32", "fp16", out,
        0.03 if dtype in EIGHT_BIT else 1.0, 0.023 if out in EIGHT_BIT else 1.0,
    )  # fmt: skip
    # Whole pixels, half ones and any others, inside and outside.
    places = np.where(rng.random((2, 9, 3, 7, 2)) < 0.4, rng.integers(-5, 45, (2, 9, 3, 7, 2)) / 40, 0)
    places = np.where(places == 0, rng.uniform(-0.3, 1.3, places.shape), places)
    inputs = [
        held(rng, (2, config.positions, 24), dtype, 0.03),
        stored(places if unit else 2 * places - 1, "fp32"),
        stored(rng.dirichlet(np.ones(7), (2, 9, 3)), "fp16"),
    ]
    op_type = deformable.op_type_of(config)
    (got,) = computed(op_type, deformable.attributes_of(config), inputs, [dtype, "fp32", "fp16"])
    assert deformable_outside(config, inputs, got) == 0
    wrong = deformable.attributes_of(dataclasses.replace(config, widths=(4, 5, 1), heights=(5, 1, 4)))
    (got,) = computed(op_type, wrong, inputs, [dtype, "fp32", "fp16"])
    assert deformable_outside(config, inputs, got) > got.size // 4


@pytest.mark.parametrize("opset", [20, 23])
def test_every_op_type_has_a_function_whose_tensors_have_names_of_their_own(opset: int) -> None:
    seen: dict[str, str] = {}
    for op_type, known in OP_TYPES.items():
        function = ir.serde.serialize_function(function_of(op_type, opset))
        onnx.checker.check_function(function)
        assert (function.name, function.domain) == (op_type, DOMAIN)
        assert tuple(function.output) == known.outputs
        assert len(function.input) == len(known.inputs)
        for name in (name for node in function.node for name in node.output if name not in function.output):
            assert seen.setdefault(name, op_type) == op_type
            assert name.startswith(f"{op_type}/")
