from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_bounds import UNIT, bytes_of_tensors, held, norm_slack, outside, with_constants
from kernel_interpreter import run_source
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels import norms
from resvit_engines.kernels.launch import Source
from resvit_engines.kernels.norms import (
    GroupNormConfig,
    LayerNormConfig,
    group_norm_reference,
    group_norm_source,
    layer_norm_reference,
    layer_norm_source,
)
from resvit_engines.kernels.numerics import EIGHT_BIT, stored

SM = 89
OUTPUTS = ("fp16", "bf16", "int8", "fp8", "fp32")
quick = settings(deadline=None, max_examples=20, derandomize=True)


def group_norm_faults(config: GroupNormConfig, x: np.ndarray, rng: np.random.Generator, source: Source) -> int:
    """How many outputs of the kernel are out of bounds."""
    gamma, beta = held(rng, (config.channels,), "fp32"), held(rng, (config.channels,), "fp32")
    (got,) = run_source(source, [x, gamma, beta])
    plain = dataclasses.replace(config, relu=False, out_dtype="fp32", out_scale=1.0)
    z = group_norm_reference(plain, x, np.ones_like(gamma), np.zeros_like(beta))
    real = group_norm_reference(dataclasses.replace(plain, relu=config.relu), x, gamma, beta)
    tile = source.constants["ROWS"] * 8
    size = x[0].size // config.groups
    # A lane's steps, a row of 8, a column of rows; and the distance from the value that all are counted from.
    terms = -(-size // tile) + 8 + tile // 8 + int(np.sqrt(size))
    slack = norm_slack(z, gamma[:, None, None], beta[:, None, None], terms) + 2 * UNIT * np.abs(real)
    return outside(got, real, slack, config.out_dtype, config.out_scale)


def layer_norm_faults(config: LayerNormConfig, terms: list[np.ndarray], rng: np.random.Generator) -> int:
    gamma, beta = held(rng, (config.size,), "fp32"), held(rng, (config.size,), "fp32")
    *sums, got = run_source(layer_norm_source(config, SM), [*terms, gamma, beta])
    assert len(sums) == config.add
    wide = dataclasses.replace(config, dtype="fp32", out_dtype="fp32", out_scale=1.0)
    *real_sums, z = layer_norm_reference(wide, *terms, np.ones_like(gamma), np.zeros_like(beta))
    *_, real = layer_norm_reference(wide, *terms, gamma, beta)
    deviation = np.sqrt(sum(terms).var(-1, keepdims=True) + config.eps)
    # The sum itself is one rounding, whose error the normalisation magnifies.
    magnified = np.abs(gamma) * config.add * UNIT * np.abs(sum(terms)).max(-1, keepdims=True) * 2 / deviation
    slack = norm_slack(z, gamma, beta, config.size) + 2 * UNIT * np.abs(real) + magnified
    faults = outside(got, real, slack, config.out_dtype, config.out_scale)
    return faults + sum(
        outside(one, true, UNIT * np.abs(true), config.dtype) for one, true in zip(sums, real_sums, strict=True)
    )


def scale_for(dtype: str) -> float:
    return 0.037 if dtype in EIGHT_BIT else 1.0


@quick
@given(
    st.integers(1, 3),
    st.sampled_from([(8, 1), (8, 8), (24, 3), (64, 32)]),
    st.tuples(st.integers(1, 9), st.integers(1, 16)),
    st.sampled_from(("fp16", "bf16", "fp32")),
    st.sampled_from(OUTPUTS),
    st.booleans(),
    st.integers(0, 99),
)
def test_group_norm_on_any_map(batch, channels, sides, dtype, out, relu, seed):
    rng = np.random.default_rng(seed)
    config = GroupNormConfig(*channels, sides[0] * sides[1], 1e-5, relu, dtype, out, scale_for(out))
    x = held(rng, (batch, channels[0], *sides), dtype)
    assert group_norm_faults(config, x, rng, group_norm_source(config, SM)) == 0


@pytest.mark.parametrize(
    ("channels", "groups", "side"),
    [(64, 32, 112), (1024, 32, 14), (2048, 32, 7), (1024, 2, 7), (24, 1, 33)],
    ids=["2x112x112", "32x14x14", "64x7x7", "512x7x7 in tiles", "24x33x33 in tiles"],
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_group_norm_of_the_sizes_that_networks_have(channels, groups, side, dtype):
    rng = np.random.default_rng(side)
    config = GroupNormConfig(channels, groups, side * side, relu=True, dtype=dtype, out_dtype="int8", out_scale=0.02)
    x = held(rng, (1, channels, side, side), dtype)
    assert group_norm_faults(config, x, rng, group_norm_source(config, SM)) == 0


@pytest.mark.parametrize("area", [(7, 7), (40, 40)], ids=["one tile", "several tiles"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("constant", "fp16"), ("zero", "fp16"), ("largest", "fp16"), ("offset", "fp32")]
)
def test_group_norm_of_extreme_values(area, name, dtype):
    rng = np.random.default_rng(5)
    shape = (2, 16, *area)
    x = {
        "constant": np.full(shape, 1000.5),
        "zero": np.zeros(shape),
        "largest": 65504.0 * rng.choice([-1.0, 1.0], shape),
        # Twelve bits of it are the mean, and twelve what matters.
        "offset": stored(1e4 + rng.normal(0, 0.01, shape), "fp32"),
    }[name]
    config = GroupNormConfig(16, 2, area[0] * area[1], dtype=dtype, out_dtype="fp32")
    assert group_norm_faults(config, x, rng, group_norm_source(config, SM)) == 0


@pytest.mark.parametrize(
    "wrong", [{"EPS": 0.5}, {"GROUPS": 3}, {"RELU": True}, {"INVERSE": 27.3}, {"AREA": 48}], ids=str
)
def test_a_wrong_constant_of_group_norm_is_noticed(wrong):
    rng = np.random.default_rng(0)
    config = GroupNormConfig(16, 4, 49, out_dtype="int8", out_scale=0.037)
    x = held(rng, (2, 16, 7, 7), "fp16")
    right = group_norm_source(config, SM)
    assert group_norm_faults(config, x, np.random.default_rng(0), right) == 0
    assert group_norm_faults(config, x, np.random.default_rng(0), with_constants(right, **wrong)) > 10


@quick
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([1, 24, 50, 64, 96, 192]),
    st.booleans(),
    st.sampled_from(("fp16", "bf16", "fp32")),
    st.sampled_from(OUTPUTS),
    st.integers(0, 99),
)
def test_layer_norm_of_any_tokens(batch, tokens, size, add, dtype, out, seed):
    rng = np.random.default_rng(seed)
    config = LayerNormConfig(size, 1e-6, add, dtype, out, scale_for(out))
    terms = [held(rng, (batch, tokens, size), dtype) for _ in range(1 + add)]
    assert layer_norm_faults(config, terms, rng) == 0


@pytest.mark.parametrize(("tokens", "size"), [(197, 192), (50, 384), (197, 768), (3, 1024), (2, 3000), (577, 24)])
def test_layer_norm_of_the_sizes_that_networks_have(tokens, size):
    rng = np.random.default_rng(size)
    config = LayerNormConfig(size, add=True, out_dtype="int8", out_scale=0.03)
    assert layer_norm_faults(config, [held(rng, (1, tokens, size), "fp16") for _ in range(2)], rng) == 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("constant", "fp16"), ("zero", "fp16"), ("largest", "fp16"), ("offset", "fp32"), ("one", "fp16")],
)
@pytest.mark.parametrize("size", [24, 768])
def test_layer_norm_of_extreme_values(name, dtype, size):
    rng = np.random.default_rng(6)
    shape = (2, 5, size)
    x = {
        "constant": np.full(shape, 1000.5),
        "zero": np.zeros(shape),
        "largest": 65504.0 * rng.choice([-1.0, 1.0], shape),
        "offset": stored(1e4 + rng.normal(0, 0.01, shape), "fp32"),
        # A single channel far above the rest, as vision transformers have them.
        "one": np.where(np.arange(size) == 7, 30000.0, stored(rng.normal(0, 1, shape), "fp16")),
    }[name]
    assert layer_norm_faults(LayerNormConfig(size, dtype=dtype, out_dtype="fp32"), [x], rng) == 0


def test_a_sum_that_fp16_cannot_hold_is_infinite_and_still_normalised():
    x = np.full((1, 2, 24), 60000.0)
    x[..., 0] = -60000.0
    config = LayerNormConfig(24, add=True)
    total, y = run_source(layer_norm_source(config, SM), [x, x, np.ones(24), np.zeros(24)])
    assert np.isinf(total).all()
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (GroupNormConfig(64, 32, 49, out_dtype="int8"), [(3, 64, 7, 7), (64,), (64,)]),
        (LayerNormConfig(192), [(3, 50, 192), (192,), (192,)]),
        (LayerNormConfig(192, add=True, out_dtype="int8"), [(3, 50, 192), (3, 50, 192), (192,), (192,)]),
    ],
    ids=["group", "layer", "layer with addition"],
)
def test_the_stated_traffic_is_every_tensor_once(config, shapes):
    make = group_norm_source if isinstance(config, GroupNormConfig) else layer_norm_source
    assert norms.traffic_bytes(config, shapes) == bytes_of_tensors(make(config, SM), shapes)
    assert norms.operations(config, shapes) >= 8 * 3


@pytest.mark.parametrize(
    ("config", "sm", "reason"),
    [
        (GroupNormConfig(64, 5, 49), 87, "64 channels do not fall into 5 groups"),
        (GroupNormConfig(64, 32, 49, out_dtype="fp8"), 87, "FP8 needs SM 8.9"),
        (GroupNormConfig(64, 32, 49, eps=0.0), 87, "eps is 0.0"),
        (GroupNormConfig(64, 32, 49, out_dtype="fp16", out_scale=0.5), 87, "a scale is for 8-bit tensors"),
        (GroupNormConfig(64, 32, 49, dtype="int8"), 87, "not int8"),
        (LayerNormConfig(5000), 87, "tokens of 5000 values"),
        (LayerNormConfig(64, out_dtype="int8", out_scale=float("nan")), 87, "no positive scale"),
        (LayerNormConfig(64, out_dtype="bool"), 87, "cannot be bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_why(config, sm, reason):
    assert reason in norms.refusal(config, sm)
    with pytest.raises(ResvitError) as caught:
        (group_norm_source if isinstance(config, GroupNormConfig) else layer_norm_source)(config, sm)
    assert reason in str(caught.value)
    assert caught.value.code is ExitCode.IMPOSSIBLE
