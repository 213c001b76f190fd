"""Operands in 8 bits: what the tensors and the three scales say together is what the graph multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from fusion_graphs import computed, fused, graph_of, half, refusal
from quantize_graphs import sqnr
from resvit_engines.kernels.attention import AttentionConfig, attention_refusal, parts_of
from resvit_engines.kernels.numerics import spacing
from resvit_quantize.fusion.fuse import Operands, our_nodes
from resvit_quantize.fusion.match import Kind

HEADS, SIZE, TOKENS = 2, 8, 6
WIDTH = HEADS * SIZE
FOUR = "Reshape ({0}, four)\n{1} = Transpose <perm = [0, 2, 1, 3]> ({1}4)\n"
REST = """kt = Transpose <perm = [0, 1, 3, 2]> (k)
l0 = MatMul (q, kt)
l = Mul (l0, scale)
p = Softmax (l)
mixed = MatMul (p, v)
"""
JOINED = "turned = Transpose <perm = [0, 2, 1, 3]> (mixed)\ny = Reshape (turned, joined)"
OUT = "float16[B,6,16] y"
FORMS: dict[str, tuple[str, str, str]] = {
    "packed": (
        "a, b, c = Split <axis = 2, num_outputs = 3> (x)\n"
        + "".join(f"{one}4 = {FOUR.format(other, one)}" for one, other in zip("qkv", "abc", strict=True)),
        "float16[B,6,48] x",
        OUT,
    ),
    "per_head": (
        "heads = Reshape (x, per_head)\nturn = Transpose <perm = [0, 2, 1, 3]> (heads)\n"
        "q, k, v = Split <axis = 3, num_outputs = 3> (turn)\n",
        "float16[B,6,48] x",
        OUT,
    ),
    "split": (
        "".join(f"{one}4 = {FOUR.format(other, one)}" for one, other in zip("qkv", "abc", strict=True)),
        "float16[B,6,16] a, float16[B,6,16] b, float16[B,6,16] c",
        OUT,
    ),
    "q_kv": (
        f"q4 = {FOUR.format('a', 'q')}both = Reshape (b, two)\nturn = Transpose <perm = [0, 2, 1, 3]> (both)\n"
        "k, v = Split <axis = 3, num_outputs = 2> (turn)\n",
        "float16[B,6,16] a, float16[B,6,32] b",
        OUT,
    ),
    "channels": (
        "a, b, c = Split <axis = 1, num_outputs = 3> (x)\n"
        + "".join(
            f"{one}4 = Reshape ({other}, maps)\n{one} = Transpose <perm = [0, 1, 3, 2]> ({one}4)\n"
            for one, other in zip("qkv", "abc", strict=True)
        ),
        "float16[B,48,2,3] x",
        "float16[B,16,2,3] y",
    ),
    "tokens first": (
        "x0 = Transpose <perm = [1, 0, 2]> (x)\nx1 = Add (x0, nothing)\n"
        "a, b, c = Split <axis = 2, num_outputs = 3> (x1)\n"
        + "".join(
            f"{one}4 = Reshape ({other}, first)\n{one} = Transpose <perm = [1, 2, 0, 3]> ({one}4)\n"
            for one, other in zip("qkv", "abc", strict=True)
        ),
        "float16[B,6,48] x",
        OUT,
    ),
}  # fmt: skip
SIZES = {"q": 1.0, "k": 4.0, "v": 0.15}
"""By how much the parts differ."""


def model_of(form: str) -> ir.Model:
    lines, inputs, output = FORMS[form]
    joined = JOINED
    if form == "channels":
        joined = "turned = Transpose <perm = [0, 1, 3, 2]> (mixed)\ny = Reshape (turned, joined)"
    text = lines + REST + joined
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants: dict[str, Any] = {
        "four": [0, TOKENS, HEADS, SIZE],
        "per_head": [0, TOKENS, HEADS, 3 * SIZE],
        "two": [0, TOKENS, HEADS, 2 * SIZE],
        "first": [TOKENS, -1, HEADS, SIZE],
        "maps": [0, HEADS, SIZE, TOKENS],
        "nothing": np.zeros(1, np.float16),
        "scale": np.float16(0.35),
        "joined": [0, WIDTH, 2, 3] if form == "channels" else [0, TOKENS, WIDTH],
    }
    return graph_of(text, inputs, output, **{name: value for name, value in constants.items() if name in words})


def inputs_of(form: str, sizes: dict[str, float]) -> dict[str, np.ndarray]:
    """Random operands, the parts of different size."""
    q, k, v = (half((3, TOKENS, WIDTH), seed, size) for seed, size in enumerate(sizes.values()))
    if form == "split":
        return {"a": q, "b": k, "c": v}
    heads = [part.reshape(3, TOKENS, HEADS, SIZE) for part in (q, k, v)]
    if form == "q_kv":
        return {"a": q, "b": np.concatenate(heads[1:], 3).reshape(3, TOKENS, -1)}
    if form == "per_head":
        return {"x": np.concatenate(heads, 3).reshape(3, TOKENS, -1)}
    x = np.concatenate([q, k, v], 2)
    if form == "channels":
        return {"x": np.ascontiguousarray(x.swapaxes(1, 2).reshape(3, -1, 2, 3))}
    return {"x": x}


def clips_of(model: ir.Model, given: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest magnitudes of Q, K and V."""
    more = model.clone()
    by_name = {str(o.name): o for node in more.graph for o in node.outputs}
    names = ("q", "kt", "v")
    more.graph.outputs.extend(by_name[name] for name in names)
    arrays = computed(more, **given)[-3:]
    return {name: float(np.abs(array).max()) for name, array in zip(names, arrays, strict=True)}


LEAST = {"int8": 35.0, "fp8": 22.0}
"""dB. A value is uniform within a step of 1/127 of the largest, of about 3 deviations: 10 log 12 + 20 log (127 / 3)
= 43 dB for each of three parts; FP8's step is 1/8 of a power of two: 10 log 12 + 20 log (8 * 0.7) = 26 to 31 dB. Logits
of a few units make of the error of one a relative error of a share."""


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("form", FORMS)
def test_scales_and_tensors_are_true_together(form: str, dtype: str) -> None:
    model, given = model_of(form), inputs_of(form, SIZES)
    clips = clips_of(model, given)
    (right,) = computed(model, **given)
    (match,) = fused(model, Kind.ATTENTION, operands=Operands(dtype, clips.__getitem__)).matches
    config = match.config
    assert isinstance(config, AttentionConfig)
    assert (config.dtype, config.pv, config.out_dtype) == (dtype, "fp16", "fp16")
    assert attention_refusal(config, 89) is None
    (node,) = our_nodes(model)
    assert all(value.dtype.name == {"int8": "INT8", "fp8": "FLOAT8E4M3FN"}[dtype] for value in node.inputs)

    stored, plain = read_of(model, given)
    floats = parts_of(config, *plain)
    scales = (config.q_scale, config.k_scale, config.v_scale)
    for part, real, scale, clip in zip(parts_of(config, *stored), floats, scales, clips.values(), strict=True):
        # Half a step of the stored number, and what the factor's product rounds away: 2^-11 of a value.
        reached = np.abs(part) * scale
        step = spacing(np.maximum(np.abs(part), np.abs(real / scale)), dtype) * scale
        assert np.all(np.abs(part * scale - real) <= 0.5 * step + 2.0**-11 * np.abs(real))
        # Its full range is used, whatever the others reach to.
        largest = {"int8": 127.0, "fp8": 448.0}[dtype]
        assert reached.max() >= clip * (1 - 0.6 / 127 if dtype == "int8" else 1 - 1 / 16)
        assert scale == pytest.approx(clip / largest, rel=2.0**-10)
    assert sqnr(right, computed(model, **given)[0]) >= LEAST[dtype]


def read_of(model: ir.Model, given: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the node reads, as stored, and what that was before its factor and its step."""
    more = model.clone()
    (other,) = our_nodes(more)
    wanted: list[ir.Value] = []
    for value in other.inputs:
        assert value is not None
        quantizer = value.producer()
        assert quantizer is not None
        plain = quantizer.inputs[0]
        assert plain is not None
        producer = plain.producer()
        if producer is not None and producer.op_type == "Mul":
            plain = producer.inputs[0]
            assert plain is not None
        wanted += [value, plain]
    names = [str(value.name) for value in wanted]
    for value in dict.fromkeys(wanted):
        if value in more.graph.inputs:
            continue
        wide = ir.node("Cast", [value], {"to": 1}, name=f"read/{value.name}")
        wide.outputs[0].name, wide.outputs[0].type = f"{value.name}/read", ir.TensorType(ir.DataType.FLOAT)
        more.graph.insert_after(value.producer(), wide)
        more.graph.outputs.append(wide.outputs[0])
    arrays = dict(zip([str(o.name) for o in more.graph.outputs], computed(more, **given), strict=True))
    arrays |= {f"{name}/read": array.astype(np.float64) for name, array in given.items()}
    found = [arrays[f"{name}/read"] for name in names]
    return found[::2], found[1::2]


@pytest.mark.parametrize("form", FORMS)
def test_only_parts_that_are_smaller_than_the_largest_beside_them_are_multiplied(form: str) -> None:
    model, given = model_of(form), inputs_of(form, SIZES)
    fused(model, Kind.ATTENTION, operands=Operands("int8", clips_of(model, given).__getitem__))
    kinds = [node.op_type for node in model.graph if node.op_type in ("Mul", "QuantizeLinear")]
    assert kinds.count("Mul") == {"split": 0}.get(form, 1)
    assert kinds.count("QuantizeLinear") == {"split": 3, "q_kv": 2}.get(form, 1)


@pytest.mark.parametrize(
    ("clips", "reason"),
    [
        ((1.0, 0.0, 1.0), "its operands reach to 1, 0, 1"),
        ((1.0, float("nan"), 1.0), "reach to 1, nan, 1"),
        ((1.0, 1.0, 70000.0), "reach to 1, 1, 7e+04"),
        ((1e-5, 1e-5, 1e-5), "one scale in FP16 does not serve that"),
        ((50000.0, 1.0, 1.0), "one scale in FP16 does not serve that"),
    ],
)
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_ranges_that_no_scale_serves_are_refused(clips: tuple[float, ...], reason: str, dtype: str) -> None:
    known = dict(zip(("q", "kt", "v"), clips, strict=True))
    assert reason in refusal(model_of("packed"), Kind.ATTENTION, operands=Operands(dtype, known.__getitem__))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("clip", [3e-3, 8e-3, 2.0**-9 * 1.03, 400.0, 50000.0])
def test_scales_at_the_ends_of_fp16_are_true(dtype: str, clip: float) -> None:
    """Below 2^-14, FP16 has fewer digits: the scale is then a little larger, and no value is cut off."""
    known = {"q": clip, "kt": clip, "v": clip / 3}
    model = model_of("packed")
    (match,) = fused(model, Kind.ATTENTION, operands=Operands(dtype, known.__getitem__)).matches
    config = match.config
    assert isinstance(config, AttentionConfig)
    largest = {"int8": 127.0, "fp8": 448.0}[dtype]
    assert clip / (largest + 0.5) <= config.q_scale <= clip / largest * 1.02
    given = {"x": np.full((1, TOKENS, 3 * WIDTH), clip, np.float16)}
    given["x"][..., 2 * WIDTH :] = clip / 3
    (got,) = computed(model, **given)
    assert np.abs(got / (clip / 3) - 1).max() <= (0.6 / 127 if dtype == "int8" else 1 / 16)


def test_two_blocks_of_one_tensor_each_have_their_own() -> None:
    lines, inputs, output = FORMS["packed"]
    second = (
        "kt2 = Transpose <perm = [0, 1, 3, 2]> (k)\nm0 = MatMul (q, kt2)\nm = Mul (m0, scale)\np2 = Softmax (m)\n"
        "mixed2 = MatMul (p2, v)\n"
        "turned2 = Transpose <perm = [0, 2, 1, 3]> (mixed2)\ny2 = Reshape (turned2, joined)"
    )
    model = graph_of(
        f"{lines}{REST}{JOINED}\n{second}",
        inputs,
        f"{output}, {output}2",
        four=[0, TOKENS, HEADS, SIZE],
        scale=np.float16(0.35),
        joined=[0, TOKENS, WIDTH],
    )
    given = inputs_of("packed", SIZES)
    right = computed(model, **given)
    clips = clips_of(model, given)
    report = fused(model, Kind.ATTENTION, operands=Operands("int8", {**clips, "kt2": clips["kt"]}.__getitem__))
    assert len(report.matches) == 2
    for expected, got in zip(right, computed(model, **given), strict=True):
        assert sqnr(expected, got) >= LEAST["int8"]


def test_what_is_not_fp16_is_not_quantised() -> None:
    lines, inputs, output = FORMS["packed"]
    to: Callable[[str], str] = lambda text: text.replace("float16", "bfloat16")  # noqa: E731
    model = graph_of(
        lines + REST + JOINED, to(inputs), to(output), four=[0, TOKENS, HEADS, SIZE],
        scale=np.array(0.35, ml_dtypes.bfloat16), joined=[0, TOKENS, WIDTH],
    )  # fmt: skip
    reason = refusal(model, Kind.ATTENTION, operands=Operands("int8", lambda _: 1.0))
    assert reason == "its operands are BF16, and only FP16 is quantised for it"
    assert len(fused(model, Kind.ATTENTION).matches) == 1
