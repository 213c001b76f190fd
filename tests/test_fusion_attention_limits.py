"""Graphs that look like attention and are another function, and rare forms of it: none may change what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from fusion_graphs import computed, fused, graph_of, half, refusal
from resvit_engines.kernels.attention import AttentionConfig, traffic_bytes
from resvit_quantize.fusion.fuse import our_nodes
from resvit_quantize.fusion.match import Kind

HEADS, SIZE, TOKENS = 2, 8, 6
WIDTH = HEADS * SIZE
PARTS = """
five = Reshape (packed, heads)
parts = Transpose <perm = [2, 0, 3, 1, 4]> (five)
q = Gather <axis = 0> (parts, first)
k = Gather <axis = 0> (parts, second)
v = Gather <axis = 0> (parts, third)
"""
KEYS = "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n"
MIX = "mixed = MatMul (p, v)\n"
END = "turned = Transpose <perm = [0, 2, 1, 3]> (mixed)\ny = Reshape (turned, joined)"
CONSTANTS: dict[str, Any] = {
    "heads": [0, TOKENS, 3, HEADS, SIZE],
    "first": np.array(0),
    "second": np.array(1),
    "third": np.array(2),
    "joined": [0, TOKENS, WIDTH],
    "scale": np.float16(0.25),
    "two": np.float16(2.0),
}
PACKED = "float16[B,6,48] packed"


def attention(middle: str, *, end: str = END, inputs: str = PACKED, outputs: str = "float16[B,6,16] y", opset: int = 20,
              **changed: Any) -> ir.Model:  # fmt: skip
    lines = f"{PARTS}{middle}{end}"
    words = set(lines.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {name: value for name, value in {**CONSTANTS, **changed}.items() if name in words}
    return graph_of(lines, inputs, outputs, opset=opset, **constants)


def given(model: ir.Model, batch: int = 3) -> dict[str, np.ndarray]:
    sizes = {str(v.name): [s if isinstance(s, int) else batch for s in v.shape or ()] for v in model.graph.inputs}
    return {name: half(tuple(shape), seed) for seed, (name, shape) in enumerate(sizes.items())}


def same_after(model: ir.Model, batch: int = 3) -> AttentionConfig:
    """Fuse the only attention; what is computed stays, and the configuration is given."""
    inputs = given(model, batch)
    plain = computed(model, **inputs)
    report = fused(model, Kind.ATTENTION)
    assert report.refusals == ()
    (match,) = report.matches
    for right, got in zip(plain, computed(model, **inputs), strict=True):
        assert right.shape == got.shape
        # A few roundings of shares that add up to one, and of logits below 8 (see ``test_fusion_attention``).
        assert np.abs(right - got).max() <= 2.0**-7 * np.abs(right).max()
    assert isinstance(match.config, AttentionConfig)
    return match.config


OTHER_FUNCTIONS = {
    "shares over the queries": (KEYS + "l = MatMul (q, kt)\np = Softmax <axis = -2> (l)\n" + MIX, "over the keys"),
    "shares over the heads": (KEYS + "l = MatMul (q, kt)\np = Softmax <axis = 1> (l)\n" + MIX, "over the keys"),
    "logits turned": (
        KEYS + "l = MatMul (q, kt)\nt = Transpose <perm = [0, 1, 3, 2]> (l)\np = Softmax (t)\n" + MIX,
        "between its products",
    ),
    "shares turned": (
        KEYS + "l = MatMul (q, kt)\nt = Softmax (l)\np = Transpose <perm = [0, 1, 3, 2]> (t)\n" + MIX,
        "between its products",
    ),
    "some of the logits": (
        KEYS + "l = MatMul (q, kt)\nt = Gather <axis = 3> (l, order)\np = Softmax (t)\n" + MIX,
        "between its products",
    ),
    "shares over heads and keys": (
        KEYS + "l = MatMul (q, kt)\na = Reshape (l, wide)\ns = Softmax (a)\np = Reshape (s, back)\n" + MIX,
        "over the keys",
    ),
    "two softmaxes": (KEYS + "l = MatMul (q, kt)\ns = Softmax (l)\np = Softmax (s)\n" + MIX, "more than one softmax"),
    "shares that are scaled": (
        KEYS + "l = MatMul (q, kt)\ns = Softmax (l)\np = Mul (s, two)\n" + MIX,
        "scales its shares",
    ),
    "a bias on the shares": (
        KEYS + "l = MatMul (q, kt)\ns = Softmax (l)\np = Add (s, two)\n" + MIX, "after the softmax"
    ),
    "a reciprocal": (KEYS + "l = MatMul (q, kt)\nr = Div (two, l)\np = Softmax (r)\n" + MIX, "divides by"),
    "a scale by head": (
        KEYS + "l = MatMul (q, kt)\nr = Mul (l, each)\np = Softmax (r)\n" + MIX, "more than one number"
    ),
    "cosines": (
        KEYS + "nq = LpNormalization <axis = -1> (q)\nnk = LpNormalization <axis = -2> (kt)\nl = MatMul (nq, nk)\n"
        "p = Softmax (l)\n" + MIX,
        "no layout",
    ),
    "a masked fill": (
        KEYS + "l = MatMul (q, kt)\nw = Where (seen, l, two)\np = Softmax (w)\n" + MIX, "Where (Where_"
    ),
    "a softmax of whole numbers": (
        KEYS + "l = MatMul (q, kt)\ni = Cast <to = 6> (l)\nf = Cast <to = 10> (i)\np = Softmax (f)\n" + MIX,
        "between its products",
    ),
    "channels attend": (
        "qt = Transpose <perm = [0, 1, 3, 2]> (q)\nvt = Transpose <perm = [0, 1, 3, 2]> (v)\nl = MatMul (qt, k)\n"
        "p = Softmax (l)\nm = MatMul (p, vt)\nmixed = Transpose <perm = [0, 1, 3, 2]> (m)\n",
        "no layout",
    ),
    "values on the left": (
        KEYS + "l = MatMul (q, kt)\np = Softmax (l)\nvt = Transpose <perm = [0, 1, 3, 2]> (v)\nm = MatMul (vt, p)\n"
        "mixed = Transpose <perm = [0, 1, 3, 2]> (m)\n",
        "left operand",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_another_function_stays(name: str) -> None:
    middle, reason = OTHER_FUNCTIONS[name]
    extra = {
        "order": [5, 4, 3, 2, 1, 0],
        "wide": [0, TOKENS, 72 // 6],
        "back": [0, HEADS, TOKENS, TOKENS],
        "each": np.array([[[1.0]], [[0.5]]], np.float16),
        "seen": np.tri(6, dtype=bool),
    }
    assert reason in refusal(attention(middle, **extra), Kind.ATTENTION)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("softcap = 1.0", "softcap"),
        ("softcap = 30.0", "softcap"),
        ("is_causal = 1", "causal"),
        ("softmax_precision = 16", "softmax_precision"),
        ("q_num_heads = 4, kv_num_heads = 2", "fewer heads"),
    ],
)
def test_an_attention_node_that_does_more_stays(attributes: str, reason: str) -> None:
    if "heads" in attributes:
        lines = f"y = Attention <{attributes}> (a, b, c)"
        model = graph_of(
            lines, "float16[B,6,32] a, float16[B,6,16] b, float16[B,6,16] c", "float16[B,6,32] y", opset=23
        )
    else:
        model = attention(f"mixed = Attention <{attributes}> (q, k, v)\n", opset=23)
    assert reason in refusal(model, Kind.ATTENTION)


PLAIN = KEYS + "l0 = MatMul (q, kt)\nl = Mul (l0, scale)\np = Softmax (l)\n" + MIX
HARMLESS = {
    "a softmax in FP32": ("w = Cast <to = 1> (l)\ns = Softmax (w)\np = Cast <to = 10> (s)\n", 1.0),
    "batch and heads joined": ("a = Reshape (l, three)\ns = Softmax (a)\np = Reshape (s, back)\n", 1.0),
    "an identity and a dropout": ("i = Identity (l)\ns = Softmax (i)\np = Dropout (s)\n", 1.0),
    "a negative scale": ("n = Mul (l, minus)\np = Softmax (n)\n", -0.5),
    "the axis from the front": ("p = Softmax <axis = 3> (l)\n", 1.0),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_element_may_stand_between(name: str) -> None:
    between, scale = HARMLESS[name]
    extra = {"three": [-1, 6, 6], "back": [-1, HEADS, 6, 6], "minus": np.float16(-0.5)}
    assert same_after(attention(KEYS + "l = MatMul (q, kt)\n" + between + MIX, **extra)).scale == scale


GUARDED = KEYS + (
    "l0 = MatMul (q, kt)\nl = Mul (l0, scale)\nb = Add (l, mask)\ns = Softmax (b)\nn = IsNaN (s)\n"
    "p = Where (n, nothing, s)\n" + MIX
)


def test_a_softmax_that_is_guarded_against_rows_that_see_nothing() -> None:
    """As PyTorch's exporter writes masked attention at opset 20; the kernel gives zeros there by itself."""
    mask = np.where(np.random.default_rng(0).random((TOKENS, TOKENS)) < 0.4, -np.inf, 0.0).astype(np.float16)
    mask[:, 0], mask[2] = 0.0, -np.inf
    model = attention(GUARDED, mask=mask, nothing=np.float16(0.0))
    inputs = given(model)
    (plain,) = computed(model, **inputs)
    assert np.all(plain[:, 2] == 0.0)
    config = same_after(model)
    assert (config.bias, config.scale) == ((False, False, True), 0.25)
    assert np.all(computed(model, **inputs)[0][:, 2] == 0.0)
    assert [node.op_type for node in model.graph] == ["ResvitAttentionBias"]


@pytest.mark.parametrize(
    ("change", "by"),
    [
        ("n, nothing, s", "n, two, s"),
        ("n, nothing, s", "n, s, nothing"),
        ("IsNaN (s)", "IsInf (s)"),
        ("IsNaN (s)", "IsNaN (b)"),
    ],
)
def test_what_is_no_such_guard_stays(change: str, by: str) -> None:
    model = attention(GUARDED.replace(change, by), mask=np.zeros((6, 6), np.float16), nothing=np.float16(0.0))
    report = fused(model, Kind.ATTENTION)
    assert report.matches == ()


ENDS = {
    "one token of the result": (END.replace("y =", "j =") + "\ny = Gather <axis = 1> (j, first)", "float16[B,16] y"),
    "half of the images": (END.replace("y =", "j =") + "\ny = Slice (j, [0], [1])", "float16[P,6,16] y"),
    "cast behind": (END.replace("y =", "j =") + "\ny = Cast <to = 1> (j)", "float[B,6,16] y"),
    "rows and columns": (END.replace("joined", "window"), "float16[B,2,3,16] y"),
    "tokens joined with the batch": (END.replace("joined", "rows"), "float16[T,16] y"),
}


@pytest.mark.parametrize("name", ENDS)
def test_whatever_follows_gets_the_same_numbers(name: str) -> None:
    end, outputs = ENDS[name]
    end = end.replace("[0], [1]", "at0, at1")
    model = attention(PLAIN, end=end, outputs=outputs, window=[0, 2, 3, 16], rows=[-1, 16], at0=[0], at1=[1])
    same_after(model)


ZERO = {"o": np.float16(0.02), "i8": np.zeros((), np.int8), "shifted": np.int8(3), "u8": np.zeros((), np.uint8)}


@pytest.mark.parametrize(
    ("zero", "taken"), [("i8", True), ("shifted", False), ("u8", False)], ids=["symmetric", "shifted", "unsigned"]
)
def test_only_a_symmetric_quantiser_of_signed_numbers_joins(zero: str, taken: bool) -> None:
    end = END.replace("y =", "j =") + f"\nz = QuantizeLinear (j, o, {zero})\ny = DequantizeLinear (z, o, {zero})"
    model = attention(PLAIN, end=end, **ZERO)
    inputs = given(model)
    (right,) = computed(model, **inputs)
    (match,) = fused(model, Kind.ATTENTION).matches
    assert match.op_type == ("ResvitAttentionQ" if taken else "ResvitAttention")
    assert np.abs(computed(model, **inputs)[0] - right).max() <= 1.05 * 0.02


BIAS = KEYS + "l = MatMul (q, kt)\nb = Add (l, bias)\np = Softmax (b)\n" + MIX


@pytest.mark.parametrize("shape", [(1, HEADS, TOKENS, TOKENS), (HEADS, TOKENS, TOKENS), (TOKENS, TOKENS), (TOKENS,)])
@pytest.mark.parametrize("wide", [False, True])
def test_a_match_says_the_shapes_that_the_kernel_reads(shape: tuple[int, ...], wide: bool) -> None:
    middle = BIAS
    bias = half(shape, 7)
    if wide:
        middle = middle.replace("b =", "lw = Cast <to = 1> (l)\nbw =").replace("(l, bias)", "(lw, bias)")
        middle = middle.replace("p = Softmax (b)", "pw = Softmax (bw)\np = Cast <to = 10> (pw)")
    model = attention(middle, bias=bias.astype(np.float32) if wide else bias)
    inputs = given(model)
    (right,) = computed(model, **inputs)
    (match,) = fused(model, Kind.ATTENTION).matches
    (node,) = our_nodes(model)
    config = match.config
    assert isinstance(config, AttentionConfig)
    assert config.bias_dtype == ("fp32" if wide else "fp16")
    whole = (1,) * (4 - len(shape)) + shape
    assert match.shapes == ((1, TOKENS, 3 * WIDTH), whole)
    assert tuple(node.inputs[1].shape.numpy()) == whole
    assert traffic_bytes(config, match.shapes) == 2 * TOKENS * 4 * WIDTH + bias.size * (4 if wide else 2)
    assert np.abs(computed(model, **inputs)[0] - right).max() <= 2.0**-7 * np.abs(right).max()


def test_tokens_before_the_batch_are_said_as_the_kernel_reads_them() -> None:
    """As ``nn.MultiheadAttention`` has it: [N, B, 3 C], heads joined with the batch."""
    lines = """
    s, t, u = Split <axis = 2, num_outputs = 3> (packed)
    a = Reshape (s, flat)
    b = Reshape (t, flat)
    c = Reshape (u, flat)
    q = Transpose <perm = [1, 0, 2]> (a)
    k = Transpose <perm = [1, 2, 0]> (b)
    v = Transpose <perm = [1, 0, 2]> (c)
    l0 = MatMul (q, k)
    l = Mul (l0, scale)
    l4 = Reshape (l, four)
    m4 = Add (l4, mask)
    m = Reshape (m4, three)
    p = Softmax (m)
    w = MatMul (p, v)
    x = Transpose <perm = [1, 0, 2]> (w)
    y = Reshape (x, out)
    """
    model = graph_of(
        lines, "float16[6,B,48] packed, float16[B,1,1,6] mask", "float16[6,B,16] y",
        flat=[TOKENS, -1, SIZE], scale=np.float16(0.25), four=[-1, HEADS, TOKENS, TOKENS],
        three=[-1, TOKENS, TOKENS], out=[TOKENS, -1, WIDTH],
    )  # fmt: skip
    inputs = given(model)
    (right,) = computed(model, **inputs)
    (match,) = fused(model, Kind.ATTENTION).matches
    assert match.shapes == ((1, TOKENS, 3 * WIDTH), (1, 1, 1, TOKENS))
    assert (match.config.layout, match.config.bias) == ("packed", (True, False, False))
    assert np.abs(computed(model, **inputs)[0] - right).max() <= 2.0**-7 * np.abs(right).max()


def test_two_blocks_that_read_the_same_tensor_are_two_nodes() -> None:
    second = KEYS.replace("kt", "kt2") + (
        "m0 = MatMul (q, kt2)\nm = Mul (m0, two)\np2 = Softmax (m)\nmixed2 = MatMul (p2, v)\n"
        "turned2 = Transpose <perm = [0, 2, 1, 3]> (mixed2)\ny2 = Reshape (turned2, joined)\n"
    )
    model = attention(PLAIN + second, outputs="float16[B,6,16] y, float16[B,6,16] y2")
    for index, node in enumerate(node for node in model.graph if node.op_type == "Softmax"):
        node.name = f"block.attn/Softmax{index or ''}"
    inputs = given(model)
    right = computed(model, **inputs)
    report = fused(model, Kind.ATTENTION)
    assert [match.config.scale for match in report.matches] == [0.25, 2.0]
    names = [str(node.name) for node in our_nodes(model)]
    assert set(names) == {"block.attn/ResvitAttention", "block.attn/ResvitAttention_1"}
    assert set(names) == {match.name for match in report.matches}
    for before, after in zip(right, computed(model, **inputs), strict=True):
        assert np.abs(before - after).max() <= 2.0**-6 * np.abs(before).max()


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_of_a_fixed_batch(batch: int) -> None:
    model = attention(PLAIN, inputs=PACKED.replace("B", str(batch)), outputs=f"float16[{batch},6,16] y")
    same_after(model, batch)
    (node,) = our_nodes(model)
    assert node.op_type == "ResvitAttention"
