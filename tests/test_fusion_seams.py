"""Norms and the ends of residual blocks, by hand: what joins them, and what is left with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from fusion_graphs import computed, fused, graph_of, half, refusal
from resvit_engines.kernels.norms import GroupNormConfig, LayerNormConfig
from resvit_engines.kernels.residual import ResidualConfig
from resvit_quantize.fusion.fuse import config_of, our_nodes
from resvit_quantize.fusion.match import Config, Kind

ALL = (Kind.GROUP_NORM, Kind.LAYER_NORM, Kind.RESIDUAL)
STEP = np.float16(0.0625)
CONSTANTS: dict[str, Any] = {
    "gamma": half((8,), 1),
    "beta": half((8,), 2),
    "gamma4": half((8,), 1).reshape(8, 1, 1),
    "beta4": half((8,), 2).reshape(8, 1, 1),
    "one": np.ones(2, np.float16),
    "none": np.zeros(2, np.float16),
    "rows": [0, 2, -1],
    "whole": [0, 8, 3, 4],
    "weight": half((8, 8, 1, 1), 3),
    "step": STEP,
    "zero": np.int8(0),
    "moved": np.int8(3),
    "shift": half((1, 8, 1, 1), 4),
}
MAPS, TOKENS = "float16[B,8,3,4]", "float16[B,5,8]"
MAP, OTHER, ROWS, MORE = half((2, 8, 3, 4), 5), half((2, 8, 3, 4), 6), half((2, 5, 8), 7), half((2, 5, 8), 8)
STORED = "s = QuantizeLinear ({0}, step, zero)\ny = DequantizeLinear (s, step, zero)"
GROUPS = {
    20: """
  r = Reshape (x, rows)
  i = InstanceNormalization <epsilon = 1e-5> (r, one, none)
  b = Reshape (i, whole)
  g = Mul (b, gamma4)
  n = Add (g, beta4)
""",
    23: "n = GroupNormalization <num_groups = 2, epsilon = 1e-5> (x, gamma, beta)",
}
LAYER = "n = LayerNormalization <epsilon = 1e-5> (x, gamma, beta)"


def model_of(lines: str, inputs: str, outputs: str = "y", opset: int = 20) -> ir.Model:
    """A model with those of the constants that it reads."""
    words = set(lines.replace("(", " ").replace(")", " ").replace(",", " ").split())
    given = {name: value for name, value in CONSTANTS.items() if name in words}
    shape = "B,C,H,W" if "8,3,4" in inputs else "B,N,C"
    stated = ", ".join(f"float16[{shape}] {name}" for name in outputs.split())
    return graph_of(lines, inputs, stated, opset=opset, **given)


def only(model: ir.Model, op_type: str, *kinds: Kind, steps: float = 0.0, **given: np.ndarray) -> Config:
    """Fuse what there is into the one node of ours, hold its results to the plain graph's, and give its configuration.

    The plain graph rounds to FP16 at each of its few steps, ours once; and a value at the edge between two steps of a
    quantisation may fall to either side.
    """
    right = computed(model, **given)
    report = fused(model, *(kinds or ALL))
    (match,), (node,) = report.matches, tuple(our_nodes(model))
    assert (node.op_type, match.op_type, config_of(node)) == (op_type, op_type, match.config)
    for got, expected in zip(computed(model, **given), right, strict=True):
        assert np.abs(got - expected).max() <= 8 * 2.0**-11 * np.abs(expected).max() + steps
    return match.config


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("opset", GROUPS)
def test_a_group_norm_takes_in_the_relu_and_the_quantisation(opset: int, narrow: bool, relu: bool) -> None:
    lines, last = GROUPS[opset], "n"
    if relu:
        lines, last = f"{lines}\na = Relu (n)", "a"
    if narrow:
        lines, last = f"{lines}\n{STORED.format(last)}", "y"
    model = model_of(lines, f"{MAPS} x", last, opset)
    config = only(model, "ResvitGroupNormQ" if narrow else "ResvitGroupNorm", steps=STEP * narrow, x=MAP)
    assert config == GroupNormConfig(
        8, 2, 12, config.eps, relu, "fp16", "int8" if narrow else "fp16", float(STEP) if narrow else 1.0
    )
    assert config.eps == pytest.approx(1e-5)
    assert {node.op_type for node in model.graph} == {f"ResvitGroupNorm{'Q' * narrow}"} | (
        {"DequantizeLinear"} if narrow else set()
    )


@pytest.mark.parametrize("narrow", [False, True])
def test_a_layer_norm_takes_in_the_quantisation(narrow: bool) -> None:
    lines = f"{LAYER}\n{STORED.format('n')}" if narrow else LAYER
    model = model_of(lines, f"{TOKENS} x", "y" if narrow else "n")
    config = only(model, f"ResvitLayerNorm{'Q' * narrow}", steps=STEP * narrow, x=ROWS)
    assert isinstance(config, LayerNormConfig)
    assert (config.size, config.add, config.out_dtype) == (8, False, "int8" if narrow else "fp16")


@pytest.mark.parametrize("narrow", [False, True])
def test_a_layer_norm_takes_in_the_addition_whose_sum_others_read_too(narrow: bool) -> None:
    lines = f"t = Add (u, v)\n{LAYER.replace('(x', '(t')}\n" + (STORED.format("n") if narrow else "")
    model = model_of(lines, f"{TOKENS} u, {TOKENS} v", "t y" if narrow else "t n")
    config = only(model, f"ResvitLayerNormAdd{'Q' * narrow}", steps=STEP * narrow, u=ROWS, v=MORE)
    assert isinstance(config, LayerNormConfig)
    assert config.add


def test_a_quantisation_that_shares_the_norm_with_others_stays_apart() -> None:
    model = model_of(f"{LAYER}\n{STORED.format('n')}", f"{TOKENS} x", "n y")
    assert only(model, "ResvitLayerNorm", steps=STEP, x=ROWS).out_dtype == "fp16"


def test_a_zero_point_that_is_not_zero_is_no_kernels() -> None:
    moved = STORED.replace("zero", "moved")
    model = model_of(f"{LAYER}\n{moved.format('n')}", f"{TOKENS} x")
    assert only(model, "ResvitLayerNorm", steps=STEP, x=ROWS).out_dtype == "fp16"
    shortcut = moved.format("z").replace("y =", "q =")
    model = model_of(f"{shortcut}\nt = Add (x, q)\na = Relu (t)", f"{MAPS} x, {MAPS} z", "a")
    config = only(model, "ResvitResidual", x=MAP, z=OTHER)
    assert isinstance(config, ResidualConfig)
    assert config.shortcut_dtype == "fp16"


def test_an_addition_of_a_constant_is_no_residual() -> None:
    lines = f"t = Add (x, beta)\n{LAYER.replace('(x', '(t')}"
    assert not only(model_of(lines, f"{TOKENS} x", "n"), "ResvitLayerNorm", x=ROWS).add


TAILS = {
    "both in 16 bits": ("t = Add (x, z)\na = Relu (t)", "a", "fp16", "fp16"),
    "requantised": (f"t = Add (x, z)\na = Relu (t)\n{STORED.format('a')}", "y", "fp16", "int8"),
    "a shortcut in 8 bits": (
        "p = QuantizeLinear (z, step, zero)\nq = DequantizeLinear (p, step, zero)\nt = Add (x, q)\na = Relu (t)",
        "a", "int8", "fp16",
    ),
    "the shortcut first": (
        "p = QuantizeLinear (z, step, zero)\nq = DequantizeLinear (p, step, zero)\nt = Add (q, x)\na = Relu (t)",
        "a", "int8", "fp16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
def test_the_end_of_a_residual_block(tail: str) -> None:
    lines, last, shortcut, out = TAILS[tail]
    model = model_of(lines, f"{MAPS} x, {MAPS} z", last)
    config = only(model, f"ResvitResidual{'Q' * (out == 'int8')}", steps=STEP * (out == "int8"), x=MAP, z=OTHER)
    assert isinstance(config, ResidualConfig)
    assert (config.shape, config.dtype, config.shortcut_dtype, config.out_dtype) == ((8, 3, 4), "fp16", shortcut, out)
    assert config.shortcut_scale == (STEP if shortcut == "int8" else 1.0)


@pytest.mark.parametrize(
    ("kind", "lines", "inputs", "reason"),
    [
        (Kind.LAYER_NORM, "n = LayerNormalization (x, x)", "float16[8] x", "it does not normalise the last of three"),
        (Kind.LAYER_NORM, "n = LayerNormalization (x, w, beta)", f"{TOKENS} x, float16[8] w", "its parameters are"),
        (Kind.RESIDUAL, "t = Add (x, w)\nn = Relu (t)", f"{MAPS} x, float16[1,8,1,1] w", "its operands differ"),
        (Kind.RESIDUAL, "c = Conv (x, weight)\nt = Add (z, c)\nn = Relu (t)", f"{MAPS} x, {MAPS} z", "a convolution"),
        (Kind.RESIDUAL, "t = Add (x, z)\nn = Relu (t)", f"{TOKENS} x, {TOKENS} z", "its shortcut is FP16 of 3"),
    ],
)  # fmt: skip
def test_what_no_kernel_serves_stays_and_says_why(kind: Kind, lines: str, inputs: str, reason: str) -> None:
    words = set(lines.replace("(", " ").replace(")", " ").replace(",", " ").split())
    given = {name: value for name, value in CONSTANTS.items() if name in words}
    rank = {Kind.LAYER_NORM: "B,N,C", Kind.RESIDUAL: "B,C,H,W"}[kind]
    rank = "C" if inputs == "float16[8] x" else "B,N,C" if TOKENS in inputs else rank
    assert refusal(graph_of(lines, inputs, f"float16[{rank}] n", **given), kind).startswith(reason)


def test_only_the_kinds_that_are_asked_for_are_touched() -> None:
    lines = f"{GROUPS[20]}\nt = Add (n, z)\na = Relu (t)"
    model = model_of(lines, f"{MAPS} x, {MAPS} z", "a")
    assert isinstance(only(model, "ResvitResidual", Kind.RESIDUAL, x=MAP, z=OTHER), ResidualConfig)
    report = fused(model, Kind.GROUP_NORM)
    assert [match.op_type for match in report.matches] == ["ResvitGroupNorm"]
    assert {name for _, name, _ in model.functions} == {"ResvitResidual", "ResvitGroupNorm"}
