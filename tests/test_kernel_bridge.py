from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_bounds import UNIT, bytes_of_tensors, held, norm_slack, outside, with_constants
from kernel_interpreter import run_source
from pairs import all_pairs
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels import bridge
from resvit_engines.kernels.bridge import BridgeConfig, bridge_reference, bridge_refusal, bridge_source, layer_norm
from resvit_engines.kernels.launch import Source
from resvit_engines.kernels.numerics import EIGHT_BIT, stored

pytestmark = pytest.mark.whole  # Kernels run in Triton's interpreter.

SM = 89
DTYPES = ("fp16", "bf16", "int8", "fp8")


def config_of(
    channels: int, sides: tuple[int, int], embed: int, dtype: str, norm: bool = False, out: str = "fp16", **more: object
) -> BridgeConfig:
    return BridgeConfig(
        channels, *sides, embed, dtype=dtype, in_scale=0.03 if dtype in EIGHT_BIT else 1.0,
        norm=norm, out_dtype=out, out_scale=0.037 if out in EIGHT_BIT else 1.0, **more,
    )  # fmt: skip


def inputs_of(config: BridgeConfig, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    scale = stored(rng.uniform(0.01, 0.02, config.embed), "fp32")
    return [
        held(rng, (batch, config.channels, config.height, config.width), config.dtype, config.in_scale),
        held(rng, (config.embed, config.channels), config.dtype, 0.015),
        *([scale] if config.dtype in EIGHT_BIT else []),
        held(rng, (config.tokens, config.embed), "fp32"),
        *([held(rng, (config.embed,), "fp32") for _ in range(2)] if config.norm else []),
    ]


def faults(config: BridgeConfig, inputs: list[np.ndarray], source: Source) -> int:
    """How many outputs of the kernel are out of bounds: tokens against the inputs, their norm against these tokens."""
    tokens, *normal = run_source(source, inputs)
    exact = dataclasses.replace(config, token_dtype="fp32", norm=False)
    count = len(inputs) - 2 * config.norm
    real, *_ = bridge_reference(exact, *inputs[:count])
    table = np.abs(inputs[count - 1])
    sizes, *_ = bridge_reference(exact, *(np.abs(value) for value in inputs[:count]))
    # Products of 8 and 16 bits are exact in FP32; a sum of n errs by n u times the magnitudes, in any order, and
    # tensor cores may cut off instead of rounding: twice that. INT8 sums are exact. Then scales and the addition.
    terms = 1 if config.dtype == "int8" else 2 * config.channels
    slack = UNIT * ((terms + 6) * (sizes - table) + 3 * sizes)
    found = outside(tokens, real, slack, config.token_dtype)
    if config.norm:
        gamma, beta = inputs[-2:]
        z = layer_norm(tokens, np.ones_like(gamma), np.zeros_like(beta), config.eps)
        real = layer_norm(tokens, gamma, beta, config.eps)
        slack = norm_slack(z, gamma, beta, config.embed) + 2 * UNIT * np.abs(real)
        found += outside(normal[0], real, slack, config.out_dtype, config.out_scale)
    return found


PAIRS = all_pairs(
    (1, 3),
    (16, 40, 96),
    ((1, 1), (3, 7), (9, 9)),
    (24, 130, 192),
    (0, 1, 2),
    DTYPES,
    (None, "fp16", "int8", "fp8"),
    ("fp16", "bf16"),
    (1, 1000),
)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("batch", "channels", "sides", "embed", "prefix", "dtype", "out", "tokens", "tiled_for"), PAIRS
)
def test_bridge_of_all_pairs_of_options(batch, channels, sides, embed, prefix, dtype, out, tokens, tiled_for):
    more = {"prefix": prefix, "token_dtype": tokens, "batch": tiled_for}
    config = config_of(channels, sides, embed, dtype, out is not None, out or "fp16", **more)
    assert faults(config, inputs_of(config, batch, np.random.default_rng(0)), bridge_source(config, SM)) == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(1, 3),
    st.sampled_from([16, 24, 40, 64, 96]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([24, 64, 130, 192]),
    st.integers(0, 2),
    st.sampled_from(DTYPES),
    st.sampled_from([None, "fp16", "int8", "fp8"]),
    st.sampled_from(("fp16", "bf16")),
    st.sampled_from([1, 1000]),
    st.integers(0, 99),
)
def test_bridge_of_any_shape(batch, channels, sides, embed, prefix, dtype, out, tokens, tiled_for, seed):
    rng = np.random.default_rng(seed)
    more = {"prefix": prefix, "token_dtype": tokens, "batch": tiled_for}
    config = config_of(channels, sides, embed, dtype, out is not None, out or "fp16", **more)
    assert faults(config, inputs_of(config, batch, rng), bridge_source(config, SM)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "side", "embed"),
    [(1024, 14, 768), (2048, 7, 384), (64, 24, 192), (128, 3, 1024), (48, 5, 2100)],
    ids=["197 tokens", "50 tokens", "577 tokens", "wide", "wider"],
)
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_bridge_of_the_sizes_that_networks_have(channels, side, embed, dtype):
    rng = np.random.default_rng(side)
    config = config_of(channels, (side, side), embed, dtype, norm=True, out="int8")
    assert faults(config, inputs_of(config, 1, rng), bridge_source(config, SM)) == 0


@pytest.mark.whole
def test_the_first_tokens_are_the_table_and_every_image_has_them():
    rng = np.random.default_rng(0)
    config = config_of(16, (3, 3), 24, "fp16", prefix=2)
    inputs = inputs_of(config, 3, rng)
    (tokens,) = run_source(bridge_source(config, SM), inputs)
    assert np.array_equal(tokens[:, :2], np.broadcast_to(stored(inputs[-1][:2], "fp16"), (3, 2, 24)))
    # A map of its own gives each image tokens of its own.
    assert not np.array_equal(tokens[0, 2:], tokens[1, 2:])


@pytest.mark.whole
@pytest.mark.parametrize("offset", [0.0, 1000.5, 30000.0])
@pytest.mark.parametrize("embed", [24, 200])
def test_tokens_that_are_constant_normalise_to_beta(offset, embed):
    """A variance of zero, at a mean that FP16 barely holds: nothing but beta may come out."""
    config = config_of(16, (3, 3), embed, "fp16", norm=True)
    inputs = inputs_of(config, 1, np.random.default_rng(0))
    inputs[1] = np.zeros_like(inputs[1])
    inputs[2] = np.full_like(inputs[2], offset)
    assert faults(config, inputs, bridge_source(config, SM)) == 0
    _, normal = run_source(bridge_source(config, SM), inputs)
    assert np.array_equal(normal, np.broadcast_to(stored(inputs[-1], "fp16"), normal.shape))


def test_a_large_mean_does_not_swallow_small_distances():
    rng = np.random.default_rng(1)
    config = config_of(16, (4, 4), 300, "fp16", norm=True)
    inputs = inputs_of(config, 2, rng)
    inputs[2] = stored(10000.0 + inputs[2], "fp32")
    assert faults(config, inputs, bridge_source(config, SM)) == 0


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_largest_8_bit_numbers_do_not_overflow_the_sum(dtype):
    config = config_of(2048, (2, 2), 24, dtype, norm=True, out=dtype)
    inputs = inputs_of(config, 1, np.random.default_rng(2))
    largest = {"int8": -128.0, "fp8": 448.0}[dtype]
    inputs[0], inputs[1] = np.full_like(inputs[0], largest), np.full_like(inputs[1], largest)
    inputs[2] = stored(inputs[2] * 1e-4, "fp32")
    assert faults(config, inputs, bridge_source(config, SM)) == 0


@pytest.mark.whole
@pytest.mark.parametrize(
    "wrong",
    [{"IN_SCALE": 0.031}, {"CHANNELS": 39}, {"AREA": 20}, {"EPS": 0.5}, {"INVERSE": 28.0}, {"PREFIX": 0}],
    ids=str,
)
def test_a_wrong_constant_is_noticed(wrong):
    config = config_of(40, (3, 7), 24, "int8", norm=True, out="int8")
    inputs = inputs_of(config, 2, np.random.default_rng(0))
    right = bridge_source(config, SM)
    assert faults(config, inputs, right) == 0
    assert faults(config, inputs, with_constants(right, **wrong)) > 10


@pytest.mark.whole
def test_one_channel_of_many_that_is_left_out_is_noticed():
    """The bound on a long sum must not be so wide that an error in the loop hides in it."""
    config = config_of(1024, (7, 7), 64, "fp16")
    inputs = inputs_of(config, 1, np.random.default_rng(0))
    source = bridge_source(config, SM)
    assert faults(config, inputs, source) == 0
    (tokens,) = run_source(source, inputs)
    less = [inputs[0].copy(), *inputs[1:]]
    less[0][:, -1] = 0.0
    real, *_ = bridge_reference(dataclasses.replace(config, token_dtype="fp32"), *less)
    sizes, *_ = bridge_reference(dataclasses.replace(config, token_dtype="fp32"), *(np.abs(value) for value in less))
    assert outside(tokens, real, UNIT * (2 * 1024 + 9) * sizes, "fp16") > tokens.size // 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, "fp16", "int8"])
def test_the_stated_traffic_is_every_tensor_once(dtype, out):
    config = config_of(64, (7, 7), 192, dtype, out is not None, out or "fp16")
    shapes = [value.shape for value in inputs_of(config, 3, np.random.default_rng(0))]
    assert bridge.traffic_bytes(config, shapes) == bytes_of_tensors(bridge_source(config, SM), shapes)
    assert bridge.operations(config, shapes) == 2 * 3 * 49 * 64 * 192


@pytest.mark.parametrize(
    ("changes", "sm", "reason"),
    [
        ({"channels": 0}, 87, "a size is below 1"),
        ({"prefix": -1}, 87, "a size is below 1"),
        ({"height": 30000, "width": 30000}, 87, "2^30"),
        ({"embed": 5000, "norm": True}, 87, "tokens of 5000 values"),
        ({"dtype": "fp32"}, 87, "the map cannot be fp32"),
        ({"token_dtype": "int8"}, 87, "not int8"),
        ({"norm": True, "out_dtype": "int32"}, 87, "cannot be int32"),
        ({"dtype": "fp8"}, 87, "FP8 needs SM 8.9"),
        ({"norm": True, "out_dtype": "fp8"}, 80, "FP8 needs SM 8.9"),
        ({"in_scale": 0.5}, 87, "a scale is for 8-bit tensors"),
        ({"dtype": "int8", "in_scale": 0.0}, 87, "no positive scale"),
        ({"norm": True, "eps": 0.0}, 87, "eps is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_why(changes, sm, reason):
    config = dataclasses.replace(BridgeConfig(64, 7, 7, 192), **changes)
    assert reason in str(bridge_refusal(config, sm))
    with pytest.raises(ResvitError, match="There is no bridge kernel") as caught:
        bridge_source(config, sm)
    assert caught.value.code is ExitCode.IMPOSSIBLE
