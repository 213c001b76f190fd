"""Attention as exporters write it, by hand: what the rewrite finds wherever its parts stand, and what it leaves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from fusion_models import values_of
from resvit_engines.builder import builder as build
from resvit_engines.builder.builder import build_engine
from resvit_engines.kernels.attention import AttentionConfig
from resvit_engines.targets.table import find_target
from resvit_quantize.fusion.fuse import Operands, config_of, fuse, our_nodes
from resvit_quantize.fusion.match import Kind
from resvit_quantize.graph.network import network_from_onnx

HEADS, SIZE, TOKENS = 2, 8, 6
WIDTH = HEADS * SIZE

FROM_PACKED = """
  five = Reshape (packed, {0, 6, 3, 2, 8})
  parts = Transpose <perm = [2, 0, 3, 1, 4]> (five)
  q1, k1, v1 = Split <axis = 0, num_outputs = 3> (parts)
  q = Squeeze (q1, {0})
  k = Squeeze (k1, {0})
  v = Squeeze (v1, {0})
"""
JOINED = """
  first = Transpose <perm = [0, 2, 1, 3]> (mixed)
  y = Reshape (first, {0, 6, 16})
"""
PLAIN = """
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  logits = MatMul (q, kt)
  scaled = Mul (logits, {0.5})
  shares = Softmax <axis = -1> (scaled)
  mixed = MatMul (shares, v)
"""
WHOLE = "mixed = Attention (q, k, v)"


def graph(
    folder: Path,
    *parts: str,
    inputs: str = "float16[B,6,48] packed",
    output: str = "float16[B,6,16] y",
    opset: int = 20,
) -> ir.Model:
    """A model of lines in ONNX's text format, in which {1, 2} is a constant of whole numbers and {0.5} an FP16 one."""
    constants: list[str] = []

    def named(match: re.Match[str]) -> str:
        name, inside = f"c{len(constants)}", match.group(1)
        if "." in inside:
            constants.append(f"{name}_ = Constant <value_floats = [{inside}]> ()\n{name} = Cast <to = 10> ({name}_)")
        else:
            constants.append(f"{name} = Constant <value_ints = [{inside}]> ()")
        return name

    lines = re.sub("{(.*?)}", named, "\n".join(parts))
    start = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({output}) {{'
    text = "\n".join([start, *constants, lines, "}"])
    path = folder / "graph.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return network_from_onnx(path)


def feeds(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {}
    for value in model.graph.inputs:
        shape = [3 if not isinstance(size, int) else size for size in value.shape]
        if value.dtype == ir.DataType.BOOL:
            found[str(value.name)] = random.random(shape) < 0.6
        else:
            found[str(value.name)] = random.standard_normal(shape).astype(value.dtype.numpy())
    return found


def run(model: ir.Model, given: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, given)[0]).astype(np.float64)


def fused(model: ir.Model, *, rows: slice | np.ndarray = np.s_[:], near: float = 2.0**-8) -> AttentionConfig:
    """Fuse the only attention of a model, hold the result to the plain graph's, and give its configuration.

    Both round to FP16, the plain graph at each of its steps. The shares add up to one, so each of a few roundings is
    2^-11 of the largest value; that of a logit is an error of a share, magnified by the logit, which is below 4 here.
    """
    given = feeds(model)
    right = run(model, given)
    report = fuse(model, frozenset({Kind.ATTENTION}))
    assert report.refusals == ()
    assert len(report.matches) == 1
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    got = run(model, given)
    assert got.shape == right.shape
    assert np.abs(got - right)[rows].max() <= near * np.abs(right[rows]).max()
    (node,) = our_nodes(model)
    config = config_of(node)
    assert config == report.matches[0].config
    assert isinstance(config, AttentionConfig)
    return config


def refusal(model: ir.Model) -> str:
    """Why the only attention stays; the graph is as it was."""
    before = [node.name for node in model.graph]
    report = fuse(model, frozenset({Kind.ATTENTION}))
    assert report.matches == ()
    assert [node.name for node in model.graph] == before
    assert not model.functions
    (only,) = report.refusals
    return only.reason


SCALES = {
    "behind": PLAIN,
    "behind, divided": PLAIN.replace("Mul (logits, {0.5})", "Div (logits, {2.0})"),
    "on q": """
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  q_ = Mul (q, {0.5})
  logits = MatMul (q_, kt)
  shares = Softmax <axis = -1> (logits)
  mixed = MatMul (shares, v)
""",
    "on k, turned": """
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  k_ = Mul (kt, {0.5})
  logits = MatMul (q, k_)
  shares = Softmax <axis = -1> (logits)
  mixed = MatMul (shares, v)
""",
    "on both": """
  q_ = Mul (q, {0.70710678})
  k_ = Mul (k, {0.70710678})
  kt = Transpose <perm = [0, 1, 3, 2]> (k_)
  logits = MatMul (q_, kt)
  shares = Softmax (logits)
  mixed = MatMul (shares, v)
""",
    "on q and behind": """
  q_ = Div (q, {4.0})
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  logits = MatMul (q_, kt)
  scaled = Mul (logits, {2.0})
  shares = Softmax <axis = 3> (scaled)
  mixed = MatMul (shares, v)
""",
}


@pytest.mark.parametrize("place", SCALES)
def test_the_scale_may_stand_anywhere(tmp_path: Path, place: str) -> None:
    config = fused(graph(tmp_path, FROM_PACKED, SCALES[place], JOINED))
    # The root of a half is rounded to FP16, twice.
    assert config.scale == pytest.approx(0.5, rel=2.0**-10)
    assert (config.layout, config.heads, config.head_size) == ("packed", HEADS, SIZE)
    assert (config.value_size, config.queries, config.keys, config.bias) == (SIZE, TOKENS, TOKENS, None)


def test_an_attention_node_has_its_own_scale(tmp_path: Path) -> None:
    plain = graph(tmp_path, FROM_PACKED, WHOLE, JOINED, opset=23)
    assert fused(plain).scale == pytest.approx(SIZE**-0.5)
    told = graph(tmp_path, FROM_PACKED, "mixed = Attention <scale = 0.25> (q, k, v)", JOINED, opset=23)
    assert fused(told).scale == 0.25


def test_an_attention_node_of_three_dimensions_says_how_many_heads(tmp_path: Path) -> None:
    lines = """
  q, k, v = Split <axis = 2, num_outputs = 3> (packed)
  y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)
"""
    config = fused(graph(tmp_path, lines, opset=23))
    assert (config.layout, config.heads, config.head_size) == ("packed", HEADS, SIZE)


LAYOUTS = {
    "packed, by slices": (
        "packed",
        """
  q0 = Slice (packed, {0}, {16}, {2})
  k0 = Slice (packed, {16}, {32}, {-1})
  v0 = Slice (packed, {-16}, {99}, {2})
  q4 = Reshape (q0, {0, -1, 2, 8})
  k4 = Reshape (k0, {0, -1, 2, 8})
  v4 = Reshape (v0, {0, -1, 2, 8})
  q = Transpose <perm = [0, 2, 1, 3]> (q4)
  k = Transpose <perm = [0, 2, 1, 3]> (k4)
  v = Transpose <perm = [0, 2, 1, 3]> (v4)
""",
        "float16[B,6,48] packed",
    ),
    "each head's three together": (
        "per_head",
        """
  heads = Reshape (packed, {0, 6, 2, 24})
  turned = Transpose <perm = [0, 2, 1, 3]> (heads)
  q, k, v = Split <axis = 3, num_outputs = 3> (turned)
""",
        "float16[B,6,48] packed",
    ),
    "three tensors": (
        "split",
        """
  q4 = Reshape (a, {0, 6, 2, 8})
  k4 = Reshape (b, {0, 6, 2, 8})
  v4 = Reshape (c, {0, 6, 2, 8})
  q = Transpose <perm = [0, 2, 1, 3]> (q4)
  k = Transpose <perm = [0, 2, 1, 3]> (k4)
  v = Transpose <perm = [0, 2, 1, 3]> (v4)
""",
        "float16[B,6,16] a, float16[B,6,16] b, float16[B,6,16] c",
    ),
    "other keys, with values behind each head's": (
        "q_kv",
        """
  q4 = Reshape (a, {0, 6, 2, 8})
  q = Transpose <perm = [0, 2, 1, 3]> (q4)
  both = Reshape (b, {0, 5, 2, 20})
  turned = Transpose <perm = [0, 2, 1, 3]> (both)
  k, v0 = Split <axis = 3> (turned, {8, 12})
  v = Slice (v0, {0}, {12}, {3})
""",
        "float16[B,6,16] a, float16[B,5,40] b",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_operands_are_found_by_where_their_elements_lie(tmp_path: Path, name: str) -> None:
    layout, lines, inputs = LAYOUTS[name]
    wide = "20" in lines
    joined = JOINED.replace("16}", "24}") if wide else JOINED
    model = graph(tmp_path, lines, PLAIN, joined, inputs=inputs, output=f"float16[B,6,{24 if wide else 16}] y")
    config = fused(model)
    assert config.layout == layout
    assert (config.keys, config.value_size) == ((5, 12) if wide else (TOKENS, SIZE))


def test_three_values_that_the_model_has_apart_stay_apart(tmp_path: Path) -> None:
    """Keys of more tokens than queries, from three tensors."""
    _, lines, inputs = LAYOUTS["three tensors"]
    inputs = inputs.replace("6,16] b", "9,16] b").replace("6,16] c", "9,16] c")
    model = graph(tmp_path, lines.replace("{0, 6", "{0, -1"), PLAIN, JOINED, inputs=inputs)
    config = fused(model)
    assert (config.layout, config.queries, config.keys) == ("split", 6, 9)


BIASED = PLAIN.replace("shares = Softmax <axis = -1> (scaled)", "sum = Add (scaled, bias)\nshares = Softmax (sum)")


@pytest.mark.parametrize(
    ("shape", "by"),
    [
        ("1,2,6,6", (False, True, True)),
        ("B,1,1,6", (True, False, False)),
        ("2,6,6", (False, True, True)),
        ("6,6", (False, False, True)),
        ("6", (False, False, False)),
        ("B,2,6,6", (True, True, True)),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_bias_may_have_any_shape(tmp_path: Path, shape: str, by: tuple[bool, ...], whole: bool) -> None:
    inputs = f"float16[B,6,48] packed, float16[{shape}] bias"
    if whole and shape in ("6", "B,1,1,6"):
        pytest.skip("an Attention node takes no such bias, or ONNX Runtime does not")
    lines = "mixed = Attention <scale = 0.5> (q, k, v, bias)" if whole else BIASED
    config = fused(graph(tmp_path, FROM_PACKED, lines, JOINED, inputs=inputs, opset=23 if whole else 20))
    assert (config.bias, config.bias_dtype, config.scale) == (by, "fp16", 0.5)


def test_a_mask_becomes_a_bias_and_a_row_that_sees_nothing_gives_zeros(tmp_path: Path) -> None:
    model = graph(
        tmp_path, FROM_PACKED, "mixed = Attention (q, k, v, seen)", JOINED, opset=23,
        inputs="float16[B,6,48] packed, bool[B,1,6,6] seen",
    )  # fmt: skip
    given = feeds(model)
    given["seen"][:, :, :, 0] = True
    given["seen"][1, 0, 2] = False
    right = run(model, given)
    assert fuse(model, frozenset({Kind.ATTENTION})).matches[0].config.bias == (True, False, True)
    got = run(model, given)
    assert np.all(got[1, 2] == 0.0)
    right[1, 2] = 0.0
    assert np.abs(got - right).max() <= 2.0**-8 * np.abs(right).max()


def test_a_mask_may_be_written_out(tmp_path: Path) -> None:
    hidden = "low0 = Constant <value_floats = [-60000.0]> ()\nlow = Cast <to = 10> (low0)\n"
    lines = PLAIN.replace("(scaled)", "(masked)").replace("shares =", "masked = Where (seen, scaled, low)\nshares =")
    shape = {"inputs": "float16[B,6,48] packed, bool[B,1,6,6] seen"}
    model = graph(tmp_path, hidden, FROM_PACKED, lines, JOINED, **shape)
    given = feeds(model)
    given["seen"][:, :, :, 0] = True
    right = run(model, given)
    assert fuse(model, frozenset({Kind.ATTENTION})).matches[0].config.bias == (True, False, True)
    assert np.abs(run(model, given) - right).max() <= 2.0**-8 * np.abs(right).max()


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_that_hides_nothing_is_none(tmp_path: Path, whole: bool) -> None:
    """As HuggingFace's ViT and DPT have it: a constant that is expanded to the batch."""
    mask = """
  ones = Constant <value_ints = [1, 1, 1, 1, 1, 1]> ()
  true = Cast <to = 9> (ones)
  row = Reshape (true, {1, 1, 6, 1})
  size = Shape <end = 1> (packed)
  rest = Concat <axis = 0> (size, {1, 6, 6})
  seen = Expand (row, rest)
"""
    lines = PLAIN.replace("(scaled)", "(masked)").replace(
        "shares =", "low0 = Constant <value_floats = [-60000.0]> ()\nlow = Cast <to = 10> (low0)\n"
        "masked = Where (seen, scaled, low)\nshares ="
    )  # fmt: skip
    if whole:
        lines = "mixed = Attention <scale = 0.5> (q, k, v, seen)"
    config = fused(graph(tmp_path, mask, FROM_PACKED, lines, JOINED, opset=23 if whole else 20))
    assert config.bias is None


NO = {
    "it sets softcap": "mixed = Attention <softcap = 30.0> (q, k, v)",
    "it is causal": "mixed = Attention <is_causal = 1> (q, k, v)",
    "it does not read three tensors": "mixed = Attention (q, k, k)",
    "Tanh (": PLAIN.replace("(scaled)", "(bent)").replace("shares =", "bent = Tanh (scaled)\nshares ="),
    "in an order that no layout": PLAIN.replace("(k)", "(v)").replace("shares, v)", "shares, k)"),
    "its bias is scaled": PLAIN.replace("(logits, ", "(moved, ").replace(
        "scaled =", "moved = Add (logits, {0.5, 1.0, 1.5, 2.0, 2.5, 3.0})\nscaled ="
    ),
    "scales by more than one number": PLAIN.replace("{0.5}", "{0.5, 0.25, 0.5, 0.25, 0.5, 1.0}"),
    "its bias or mask has the shape [6, 1]": PLAIN.replace("(scaled)", "(sum)").replace(
        "shares =", "column = Reshape ({0.5, 1.0, 1.5, 2.0, 2.5, 3.0}, {6, 1})\nsum = Add (scaled, column)\nshares ="
    ),
}


@pytest.mark.parametrize("reason", NO)
def test_what_no_kernel_serves_stays_and_says_why(tmp_path: Path, reason: str) -> None:
    lines = NO[reason]
    model = graph(tmp_path, FROM_PACKED, lines, JOINED, opset=23 if "Attention" in lines else 20)
    assert reason in refusal(model)


def test_shares_on_the_right_are_refused(tmp_path: Path) -> None:
    parts = FROM_PACKED.replace("{0, 6, 3", "{0, 8, 3")
    lines = PLAIN.replace("MatMul (shares, v)", "MatMul (v, shares)")
    shape = {"inputs": "float16[B,8,48] packed", "output": "float16[B,8,16] y"}
    model = graph(tmp_path, parts, lines, JOINED.replace("6,", "8,"), **shape)
    assert refusal(model) == "the shares are not the left operand of the second product"


def test_heads_that_nobody_joins_are_refused(tmp_path: Path) -> None:
    model = graph(tmp_path, FROM_PACKED, PLAIN, "y = Reshape (mixed, {0, 6, 16})")
    assert refusal(model).startswith("its heads are not joined")


def test_fp32_is_refused(tmp_path: Path) -> None:
    half, lines = "f = Constant <value_float = 0.5> ()", PLAIN.replace("{0.5}", "f")
    shape = {"inputs": "float[B,6,48] packed", "output": "float[B,6,16] y"}
    model = graph(tmp_path, half, FROM_PACKED, lines, JOINED, **shape)
    assert refusal(model) == "its operands are FP32, and the kernel multiplies FP16 or BF16"


def test_a_length_that_depends_on_data_is_refused(tmp_path: Path) -> None:
    lines, end = FROM_PACKED.replace("{0, 6, 3", "{0, -1, 3"), JOINED.replace("6,", "-1,")
    model = graph(tmp_path, lines, PLAIN, end, inputs="float16[B,N,48] packed", output="float16[B,M,16] y")
    assert refusal(model) == "a length depends on data"


def test_a_cast_is_no_view(tmp_path: Path) -> None:
    """The projection is in FP32, its parts in FP16; the result is in FP32 again, and an output of the model."""
    after = JOINED.replace("y =", "narrow =") + "y = Cast <to = 1> (narrow)"
    shape = {"inputs": "float[B,6,48] wide", "output": "float[B,6,16] y"}
    model = graph(tmp_path, "packed = Cast <to = 10> (wide)", FROM_PACKED, PLAIN, after, **shape)
    assert fused(model).layout == "packed"
    (node,) = our_nodes(model)
    assert [value.dtype for value in (node.inputs[0], node.outputs[0])] == [ir.DataType.FLOAT16] * 2


@pytest.mark.parametrize(
    ("view", "output"), [("{-1, 16}", "float16[M,16] y"), ("{-1, 2, 3, 16}", "float16[B,2,3,16] y")]
)
def test_tokens_may_be_seen_in_other_rows_behind_it(tmp_path: Path, view: str, output: str) -> None:
    fused(graph(tmp_path, FROM_PACKED, PLAIN, JOINED.replace("{0, 6, 16}", view), output=output))


@pytest.mark.parametrize(("view", "output"), [("{0, 6, 16}", "float16[B,6,16] y"), ("{-1, 16}", "float16[M,16] y")])
def test_a_quantisation_behind_it_joins(tmp_path: Path, view: str, output: str) -> None:
    end = """
  zero = Constant <value_int = 0> ()
  none = Cast <to = 3> (zero)
  step0 = Constant <value_float = 0.0625> ()
  step = Cast <to = 10> (step0)
  stored = QuantizeLinear (flat, step, none)
  y = DequantizeLinear (stored, step, none)
"""
    lines = JOINED.replace("y =", "flat =").replace("{0, 6, 16}", view) + end
    # A value at the edge between two steps may fall to either side.
    config = fused(graph(tmp_path, FROM_PACKED, PLAIN, lines, output=output), near=2.0**-4)
    assert (config.out_dtype, config.out_scale) == ("int8", 0.0625)


def test_the_caller_may_have_a_reason_too(tmp_path: Path) -> None:
    model = graph(tmp_path, FROM_PACKED, PLAIN, JOINED)
    report = fuse(model, frozenset({Kind.ATTENTION}), lambda match: f"no kernel for {match.shapes[0]}")
    assert report.matches == ()
    assert [refusal.reason for refusal in report.refusals] == ["no kernel for (1, 6, 48)"]
    assert report.to_json()["refusals"][0]["kind"] == "attention"


def test_shares_that_are_an_output_keep_the_block_as_it_is(tmp_path: Path) -> None:
    model = graph(tmp_path, FROM_PACKED, PLAIN, JOINED, output="float16[B,6,16] y, float16[B,2,6,6] shares")
    assert refusal(model) == "its logits or shares are an output of the model"


def test_each_operand_in_8_bits_has_its_own_full_range(tmp_path: Path) -> None:
    model = graph(tmp_path, FROM_PACKED, PLAIN, JOINED)
    given = feeds(model)
    given["packed"] *= np.repeat([1.0, 5.0, 0.1], WIDTH).astype(np.float16)
    right = run(model, given)
    thirds = np.split(np.abs(given["packed"].astype(np.float64)), 3, axis=2)
    clips = dict(zip(("q", "kt", "v"), (third.max() for third in thirds), strict=True))
    report = fuse(model, operands=Operands("int8", clips.__getitem__))
    (match,) = report.matches
    config = match.config
    # The factors are FP16, so the scales differ from clip / 127 by a rounding of the clip's and one of the factor's.
    for scale, clip in zip((config.q_scale, config.k_scale, config.v_scale), clips.values(), strict=True):
        assert scale == pytest.approx(clip / 127, rel=2.0**-9)
    (node,) = our_nodes(model)
    name = str(node.inputs[0].name)
    stored = values_of(model, given["packed"], [name])[name]
    assert all(126 <= np.abs(third).max() <= 128 for third in np.split(stored, 3, axis=2))
    # Three tensors of steps of 1/127 of the largest: an error of a logit up to 8 x 0.5 x 2 steps, halved.
    assert np.abs(run(model, given) - right).max() <= 0.2 * np.abs(right).max()


def test_operands_whose_range_nobody_knows_are_refused(tmp_path: Path) -> None:
    def unknown(name: str) -> float:
        raise KeyError(name)

    model = graph(tmp_path, FROM_PACKED, PLAIN, JOINED)
    report = fuse(model, operands=Operands("int8", unknown))
    assert "was not calibrated" in report.refusals[0].reason
    report = fuse(model, operands=Operands("int8", lambda _: 0.0))
    assert "its operands reach to 0" in report.refusals[0].reason


@pytest.mark.whole
@pytest.mark.skipif(not build._installed("tensorrt_rtx_bindings"), reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("opset", [20, 23])
def test_tensorrt_compiles_the_body_where_there_is_no_plugin(tmp_path: Path, opset: int) -> None:
    shape = {"inputs": "float16[1,6,48] packed", "output": "float16[1,6,16] y"}
    model = graph(tmp_path, FROM_PACKED, PLAIN, JOINED, opset=opset, **shape)
    assert len(fuse(model).matches) == 1
    ir.save(model, tmp_path / "fused.onnx")
    build_engine(tmp_path / "fused.onnx", tmp_path / "engine.plan", find_target("rtx-4090"))
    assert (tmp_path / "engine.plan").stat().st_size > 1000
