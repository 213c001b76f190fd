"""The bridge from maps to tokens, by hand: every form of what follows it, and what is left with its reason."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from fusion_graphs import computed, fused, graph_of, half, refusal
from resvit_engines.kernels.bridge import BridgeConfig, bridge_reference, bridge_refusal
from resvit_engines.kernels.numerics import spacing
from resvit_engines.plugins.names import OP_TYPES
from resvit_quantize.fusion.fuse import config_of, our_nodes
from resvit_quantize.fusion.match import Kind

CHANNELS, HEIGHT, WIDTH, EMBED = 24, 3, 4, 16
AREA = HEIGHT * WIDTH
INPUT = f"float16[B,{CHANNELS},{HEIGHT},{WIDTH}] x"
IMAGE = half((3, CHANNELS, HEIGHT, WIDTH), 1)

CONV = "m = Conv (x, weight, bias)"
TOKENS = "r = Reshape (m, flat)\nt = Transpose <perm = [0, 2, 1]> (r)"
NORM = "n = LayerNormalization <epsilon = 1e-5> ({0}, gamma, beta)"
CONSTANTS: dict[str, Any] = {
    "weight": half((EMBED, CHANNELS, 1, 1), 2, 0.2),
    "bias": half((EMBED,), 3),
    "flat": [0, EMBED, AREA],
    "gamma": half((EMBED,), 4),
    "beta": half((EMBED,), 5),
    "position": half((1, AREA, EMBED), 6),
    "longer": half((1, AREA + 1, EMBED), 7),
    "longest": half((1, AREA + 2, EMBED), 10),
    "token": half((1, 1, EMBED), 8),
    "level": half((EMBED,), 9),
    "front": [0, 1, 0, 0, 0, 0],
    "batch_of": [0],
    "rest": [1, EMBED],
}
CLASS = "s = Shape (x)\nb = Gather (s, batch_of)\ne = Concat <axis = 0> (b, rest)\nclass = Expand (token, e)\n"


def bridge(*lines: str, outputs: str = "t", opset: int = 20, **changed: Any) -> ir.Model:
    """A model of an image ``x``, with those of the constants that it reads."""
    text = "\n".join(lines)
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {name: value for name, value in {**CONSTANTS, **changed}.items() if name in words}
    given = ", ".join(f"float16[B,N{i},C{i}] {name}" for i, name in enumerate(outputs.split()))
    return graph_of(text, INPUT, given, opset=opset, **constants)


def table(*rows: np.ndarray) -> np.ndarray:
    return np.concatenate([row.reshape(-1, EMBED).astype(np.float64) for row in rows])


FLAT = np.tile(CONSTANTS["bias"].astype(np.float64), (AREA, 1))
FORMS: dict[str, tuple[list[str], str, np.ndarray]] = {
    "nothing": ([CONV, TOKENS], "t", FLAT),
    "no bias": ([CONV.replace(", bias", ""), TOKENS], "t", 0.0 * FLAT),
    "flattened": ([CONV, TOKENS.replace("Reshape (m, flat)", "Reshape (m, open)")], "t", FLAT),
    "maps last": ([CONV, "r = Transpose <perm = [0, 2, 3, 1]> (m)\nt = Reshape (r, rows)"], "t", FLAT),
    "position": ([CONV, TOKENS, "u = Add (t, position)"], "u", FLAT + table(CONSTANTS["position"])),
    "position first": ([CONV, TOKENS, "u = Add (position, t)"], "u", FLAT + table(CONSTANTS["position"])),
    "position and level": (
        [CONV, TOKENS, "u = Add (t, position)\nw = Add (u, level)"],
        "w",
        FLAT + table(CONSTANTS["position"]) + CONSTANTS["level"],
    ),
    "zeros in front": (
        [CONV, TOKENS, "u = Pad (t, front)\nw = Add (u, longer)"],
        "w",
        np.concatenate([np.zeros((1, EMBED)), FLAT]) + table(CONSTANTS["longer"]),
    ),
    "class token": (
        [CONV, TOKENS, CLASS + "u = Concat <axis = 1> (class, t)\nw = Add (u, longer)"],
        "w",
        np.concatenate([table(CONSTANTS["token"]), FLAT]) + table(CONSTANTS["longer"]),
    ),
    "position, then class token": (
        [CONV, TOKENS, CLASS + "u = Add (t, position)\nw = Concat <axis = -2> (class, u)"],
        "w",
        np.concatenate([table(CONSTANTS["token"]), FLAT + table(CONSTANTS["position"])]),
    ),
    "two tokens, one after the other": (
        [CONV, TOKENS, CLASS + "u = Concat <axis = 1> (class, t)\nv = Pad (u, front)\nw = Add (v, longest)"],
        "w",
        np.concatenate([np.zeros((1, EMBED)), table(CONSTANTS["token"]), FLAT]) + table(CONSTANTS["longest"]),
    ),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("form", FORMS)
def test_what_adds_constants_joins(form: str, opset: int, norm: bool) -> None:
    lines, last, expected = FORMS[form]
    # The tokens are read twice: by the norm, and by what it stands beside.
    more = [NORM.format(last)] if norm else []
    outputs = f"{last} n" if norm else last
    extra = {"open": [0, EMBED, -1], "rows": [0, AREA, EMBED]}
    model = bridge(*lines, *more, outputs=outputs, opset=opset, **extra)
    plain = computed(model, x=IMAGE)
    absorbed = ("Conv", "Add", "Pad", "Concat", "LayerNormalization")
    taken = [n.name for n in model.graph if n.op_type in absorbed and n.inputs[0].dtype == ir.DataType.FLOAT16]
    report = fused(model)
    got = computed(model, x=IMAGE)

    (match,) = report.matches
    (node,) = our_nodes(model)
    assert report.refusals == ()
    assert [other.op_type for other in model.graph] == [node.op_type]
    assert match.op_type == node.op_type == ("ResvitBridgeNorm" if norm else "ResvitBridge")
    assert node.name == match.name
    config = config_of(node)
    assert isinstance(config, BridgeConfig)
    assert config == match.config
    assert dataclasses.replace(config, eps=0.0) == BridgeConfig(
        CHANNELS, HEIGHT, WIDTH, EMBED, len(expected) - AREA, norm=norm, eps=0.0
    )
    assert not norm or config.eps == pytest.approx(1e-5)
    assert bridge_refusal(config, 87) is None
    assert list(match.nodes) == taken
    arrays = [value.const_value.numpy().astype(np.float64) for value in node.inputs[1:] if value.const_value]
    assert len(node.inputs) == len(OP_TYPES[node.op_type].inputs)
    assert [array.shape for array in arrays] == [tuple(shape) for shape in match.shapes[1:]]
    assert np.abs(arrays[1] - expected).max() <= 2.0**-24 * np.abs(expected).max()

    right = bridge_reference(dataclasses.replace(config, norm=False), IMAGE, arrays[0], arrays[1])[0]
    assert np.all(np.abs(got[0] - right) <= spacing(right, "fp16"))
    # The plain graph rounds at each of its steps, of which none is larger than the sum of what is added.
    size = np.abs(plain[0]).max() + np.abs(expected).max()
    assert np.abs(got[0] - plain[0]).max() <= 4 * 2.0**-11 * size
    if norm:
        gamma, beta = CONSTANTS["gamma"].astype(np.float64), CONSTANTS["beta"].astype(np.float64)
        whole = (got[0] - got[0].mean(-1, keepdims=True)) / np.sqrt(got[0].var(-1, keepdims=True) + 1e-5) * gamma + beta
        assert np.abs(got[1] - whole).max() <= 2.0**-11 * np.abs(whole).max()


def eight_bits(dtype: str) -> dict[str, Any]:
    kind = np.dtype(np.int8 if dtype == "int8" else ml_dtypes.float8_e4m3fn)
    stored = half((EMBED, CHANNELS, 1, 1), 2, 40.0).astype(np.float32).clip(-127, 127)
    return {
        "weight": (np.rint(stored) if dtype == "int8" else stored).astype(kind),
        "w_scale": np.linspace(0.001, 0.004, EMBED).astype(np.float16),
        "x_scale": np.float16(0.023),
        "o_scale": np.float16(0.019),
        "zero": np.zeros((), kind),
        "zeros": np.zeros(EMBED, kind),
    }


EIGHT = """q = QuantizeLinear (x, x_scale, zero)
d = DequantizeLinear (q, x_scale, zero)
w = DequantizeLinear <axis = 0> (weight, w_scale, zeros)
m = Conv (d, w, bias)"""
NORM_8 = NORM.format("u") + "\nn8 = QuantizeLinear (n, o_scale, zero)\nnd = DequantizeLinear (n8, o_scale, zero)"


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("norm", [False, True])
def test_8_bits_of_map_and_weight_go_in_and_the_quantised_norm_comes_out(dtype: str, norm: bool) -> None:
    lines = [EIGHT, TOKENS, "u = Add (t, position)", *([NORM_8] if norm else [])]
    model = bridge(*lines, outputs="u nd" if norm else "u", **eight_bits(dtype))
    plain = computed(model, x=IMAGE)
    report = fused(model)
    got = computed(model, x=IMAGE)
    (match,) = report.matches
    (node,) = our_nodes(model)
    assert node.op_type == ("ResvitBridgeW8NormQ" if norm else "ResvitBridgeW8")
    config = match.config
    assert isinstance(config, BridgeConfig)
    assert (config.dtype, config.in_scale) == (dtype, float(np.float16(0.023)))
    assert bridge_refusal(config, 89) is None
    assert [other.op_type for other in model.graph] == [
        "QuantizeLinear", node.op_type, *(["DequantizeLinear"] if norm else [])
    ]  # fmt: skip
    weight, scales, rows = (value.const_value.numpy().astype(np.float64) for value in node.inputs[1:4])
    assert np.array_equal(weight, eight_bits(dtype)["weight"].astype(np.float64)[:, :, 0, 0])
    assert np.array_equal(scales, eight_bits(dtype)["w_scale"].astype(np.float64))
    read = model.clone()
    read.graph.outputs.append(next(node.outputs[0] for node in read.graph if node.op_type == "QuantizeLinear"))
    stored = computed(read, x=IMAGE)[-1] if dtype == "int8" else IMAGE / np.float64(np.float16(0.023))
    if dtype == "fp8":
        stored = stored.astype(np.float16).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    right = bridge_reference(dataclasses.replace(config, norm=False), stored, weight, scales, rows)[0]
    away = np.abs(got[0] - right)
    # Where FP8 is quantised twice, one image's few values may fall to the other side of a rounding.
    assert np.all(away <= spacing(right, "fp16")) if dtype == "int8" else np.median(away) == 0.0
    assert np.abs(got[0] - plain[0]).max() <= 8 * 2.0**-11 * np.abs(plain[0]).max()
    if norm:
        assert (config.out_dtype, config.out_scale) == (dtype, float(np.float16(0.019)))
        # The plain norm is rounded to FP16 in front of the step, and reads tokens that are: a step up or down.
        steps = np.abs(got[1] - plain[1]) / (0.019 if dtype == "int8" else spacing(plain[1] / 0.019, "fp8") * 0.019)
        assert steps.max() <= 1.1  # DequantizeLinear rounds the step to FP16
        assert np.mean(steps > 0.5) < 0.05


REFUSED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "its filter is 2x2, and the kernel's is 1x1": (
        ["m = Conv <strides = [1, 1], pads = [0, 0, 1, 1]> (x, weight, bias)", TOKENS],
        {"weight": half((EMBED, CHANNELS, 2, 2))},
    ),
    "its convolution has a stride or a padding": (
        ["m = Conv <strides = [1, 2]> (x, weight, bias)", TOKENS], {"flat": [0, EMBED, 6]}
    ),
    "its convolution is grouped": (
        ["m = Conv <group = 2> (x, weight, bias)", TOKENS], {"weight": half((EMBED, CHANNELS // 2, 1, 1))}
    ),
    "its weight is computed": (["w2 = Mul (w1, weight)", "m = Conv (x, w2, bias)", TOKENS], {}),
    "its bias is computed": (["b2 = Mul (b1, bias)", "m = Conv (x, weight, b2)", TOKENS], {}),
    "its weight has 8 bits and its map has not": (
        [EIGHT.replace("Conv (d", "Conv (x"), TOKENS], eight_bits("int8")
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_kernel_serves_stays_and_says_why(reason: str) -> None:
    lines, changed = REFUSED[reason]
    inputs = {
        "its weight is computed": f", float16[{EMBED},{CHANNELS},1,1] w1",
        "its bias is computed": f", float16[{EMBED}] b1",
    }.get(reason, "")
    words = set("\n".join(lines).replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {name: value for name, value in {**CONSTANTS, **changed}.items() if name in words}
    model = graph_of("\n".join(lines), INPUT + inputs, "float16[B,N,C] t", **constants)
    assert refusal(model) == reason


def test_a_map_in_fp32_is_refused() -> None:
    constants = {name: CONSTANTS[name].astype(np.float32) for name in ("weight", "bias")}
    model = graph_of(
        f"{CONV}\n{TOKENS}", INPUT.replace("float16", "float"), "float[B,N,C] t",
        flat=CONSTANTS["flat"], **constants,
    )  # fmt: skip
    assert refusal(model) == "its map is FP32, and the kernel reads FP16, BF16 or 8 bits"


def test_the_caller_may_have_a_reason() -> None:
    model = bridge(CONV, TOKENS)
    assert refusal(model, decide=lambda match: f"{match.op_type}: no") == "ResvitBridge: no"


NO_BRIDGE = {
    "an activation between": (["m0 = Conv (x, weight, bias)\nm = Relu (m0)", TOKENS], "t"),
    "a map that others read": ([CONV, TOKENS, "z = Relu (m)\na = Reshape (z, flat)"], "t a"),
    "no tokens": ([CONV, "t = Reshape (m, flat)"], "t"),
    "channels and positions mixed up": ([CONV, "t = Reshape (m, rows)"], "t"),
}


@pytest.mark.parametrize("form", NO_BRIDGE)
def test_a_convolution_that_makes_no_tokens_is_none(form: str) -> None:
    lines, outputs = NO_BRIDGE[form]
    report = fused(bridge(*lines, outputs=outputs, rows=[0, AREA, EMBED]))
    assert (report.matches, report.refusals) == ((), ())


STOPS = {
    "an added image": "y = Reshape (x, ends)\nu = Add (t, y)",
    "a factor": "u = Mul (t, level)",
    "ones in front": "u = Pad (t, front, one)",
    "zeros behind": "u = Pad (t, behind)",
    "zeros on the second axis that is named": "u = Pad (t, few, , axes)",
    "a row of another batch": "u = Add (t, whole)",
    "the class token behind": CLASS + "u = Concat <axis = 1> (t, class)",
    "a cut": "u = Pad (t, cut)",
    "another end": "u = Relu (t)\nv = Add (t, level)\nw = Add (u, v)",
}


@pytest.mark.parametrize("form", STOPS)
def test_a_bridge_ends_before_what_is_no_constant_row(form: str) -> None:
    extra: dict[str, Any] = {
        "one": np.float16(1.0),
        "behind": [0, 0, 0, 0, 1, 0],
        "few": [1, 0],
        "axes": [1],
        "cut": [0, -1, 0, 0, 0, 0],
        "ends": [0, AREA, CHANNELS],
        "whole": half((3, AREA, EMBED), 12),
    }
    if form == "an added image":  # of as many channels as the tokens have
        weight = half((CHANNELS, CHANNELS, 1, 1), 2, 0.2)
        extra |= {"weight": weight, "bias": half((CHANNELS,)), "flat": [0, CHANNELS, AREA]}
    last = "w" if form == "another end" else "u"
    model = bridge(CONV, TOKENS, STOPS[form], outputs=last, **extra)
    plain = computed(model, x=IMAGE)
    report = fused(model)
    (match,) = report.matches
    assert len(match.nodes) == 1
    # Nothing behind is touched, so only the product's own rounding can differ.
    assert np.abs(computed(model, x=IMAGE)[0] - plain[0]).max() <= 4 * 2.0**-11 * np.abs(plain[0]).max()


def test_two_convolutions_of_one_module_have_names_of_their_own() -> None:
    second = "r2 = Reshape (m2, flat)\nt2 = Transpose <perm = [0, 2, 1]> (r2)"
    model = bridge(CONV, TOKENS, CONV.replace("m =", "m2 ="), second, outputs="t t2")
    for index, node in enumerate(node for node in model.graph if node.op_type == "Conv"):
        node.name = f"proj/Conv{index or ''}"
    report = fused(model)
    names = [node.name for node in our_nodes(model)]
    assert len(report.matches) == 2
    assert len(set(names)) == 2


def test_the_configuration_stands_on_the_node() -> None:
    model = bridge(CONV, TOKENS, NORM.format("t"), outputs="t n")
    (match,) = fused(model, Kind.BRIDGE).matches
    (node,) = our_nodes(model)
    assert json.loads(node.attributes.get_string("config", "")) == dataclasses.asdict(match.config)
    assert json.loads(json.dumps(match.to_json()))["op_type"] == node.op_type


ENDS = {
    "tokens": ("t", []),
    "normalised": ("n", [NORM.format("t")]),
    "both": ("t n", [NORM.format("t")]),
}


@pytest.mark.parametrize("end", ENDS)
def test_outputs_of_the_model_keep_their_names(end: str) -> None:
    outputs, more = ENDS[end]
    model = bridge(CONV, TOKENS, *more, outputs=outputs)
    right = computed(model, x=IMAGE)
    fused(model)
    assert [str(value.name) for value in model.graph.outputs] == outputs.split()
    for expected, got in zip(right, computed(model, x=IMAGE), strict=True):
        assert np.abs(expected - got).max() <= 2.0**-9 * np.abs(expected).max()


def test_zero_points_other_than_zero_are_no_kernels() -> None:
    shifted = {**eight_bits("int8"), "zero": np.int8(3)}
    model = bridge(EIGHT, TOKENS, **shifted)
    assert refusal(model) == "its weight has 8 bits and its map has not"
    del shifted["weight"]
    model = bridge(CONV, TOKENS, NORM_8.replace("(u,", "(t,"), outputs="nd", **shifted)
    assert [match.op_type for match in fused(model).matches] == ["ResvitBridgeNorm"]
