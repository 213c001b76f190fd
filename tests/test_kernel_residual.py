from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_bounds import UNIT, bytes_of_tensors, held, outside, with_constants
from kernel_interpreter import run_source
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels import residual
from resvit_engines.kernels.launch import Source
from resvit_engines.kernels.numerics import EIGHT_BIT, stored
from resvit_engines.kernels.residual import ResidualConfig, residual_reference, residual_source

SM = 89


def faults(config: ResidualConfig, x: np.ndarray, shortcut: np.ndarray, source: Source) -> int:
    (got,) = run_source(source, [x, shortcut])
    real = residual_reference(dataclasses.replace(config, out_dtype="fp32", out_scale=1.0), x, shortcut)
    # Roundings: the scale, its product, the sum, the reciprocal, its product, and the reference's own.
    slack = 6 * UNIT * (np.abs(x) + np.abs(shortcut * config.shortcut_scale))
    return outside(got, real, slack, config.out_dtype, config.out_scale)


def scale_for(dtype: str) -> float:
    return 0.043 if dtype in EIGHT_BIT else 1.0


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 17), min_size=1, max_size=3),
    st.sampled_from(("fp16", "bf16")),
    st.sampled_from(("fp16", "bf16", "int8", "fp8")),
    st.sampled_from(("fp16", "bf16", "int8", "fp8")),
    st.booleans(),
    st.integers(0, 99),
)
def test_residual_of_any_shape(batch, shape, dtype, shortcut, out, relu, seed):
    rng = np.random.default_rng(seed)
    config = ResidualConfig(tuple(shape), dtype, shortcut, scale_for(shortcut), out, scale_for(out), relu)
    x, other = (held(rng, (batch, *shape), kind, 0.043) for kind in (dtype, shortcut))
    assert faults(config, x, other, residual_source(config, SM)) == 0


@pytest.mark.parametrize("out", ["int8", "fp8", "fp16"])
def test_residual_of_the_largest_numbers_saturates_or_overflows(out):
    x = np.full((2, 8, 7, 7), 65504.0)
    x[:, ::2] = -65504.0
    config = ResidualConfig((8, 7, 7), out_dtype=out, out_scale=scale_for(out), relu=False)
    (got,) = run_source(residual_source(config, SM), [x, x])
    largest = {"int8": 127.0, "fp8": 448.0, "fp16": np.inf}[out]
    assert np.all(got[:, 1::2] == largest)
    assert np.all(got[:, ::2] == (-128.0 if out == "int8" else -largest))


def test_a_nan_is_not_hidden_by_the_relu():
    x = np.array([[1.0, np.nan, -1.0, 2.0]])
    (got,) = run_source(residual_source(ResidualConfig((4,)), SM), [x, np.zeros_like(x)])
    assert np.array_equal(got, [[1.0, np.nan, 0.0, 2.0]], equal_nan=True)


def test_ties_go_to_even():
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5]])
    config = ResidualConfig((8,), out_dtype="int8", relu=False)
    (got,) = run_source(residual_source(config, SM), [x, np.zeros_like(x)])
    assert got.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


def test_fp8_takes_every_number_of_its_own_and_half_way_goes_to_even():
    config = ResidualConfig((16,), out_dtype="fp8", relu=False)
    numbers = np.unique(stored(np.linspace(-448, 448, 1 << 14), "fp8"))
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.resize(np.concatenate([numbers, middles]), (64, 16))
    (got,) = run_source(residual_source(config, SM), [stored(x, "fp16"), np.zeros_like(x)])
    assert np.array_equal(got, stored(x, "fp8"))


@pytest.mark.parametrize("wrong", [{"SCALE": 0.05}, {"RELU": True}, {"INVERSE": 23.0}, {"SIZE": 391}], ids=str)
def test_a_wrong_constant_is_noticed(wrong):
    rng = np.random.default_rng(0)
    config = ResidualConfig((8, 7, 7), "fp16", "int8", 0.043, "int8", 0.043, relu=False)
    x, shortcut = held(rng, (2, 8, 7, 7), "fp16"), held(rng, (2, 8, 7, 7), "int8", 0.043)
    right = residual_source(config, SM)
    assert faults(config, x, shortcut, right) == 0
    assert faults(config, x, shortcut, with_constants(right, **wrong)) > 0


def test_the_stated_traffic_is_every_tensor_once():
    config = ResidualConfig((64, 7, 7), shortcut_dtype="int8", out_dtype="int8")
    shapes = [(3, 64, 7, 7)] * 2
    assert residual.traffic_bytes(config, shapes) == bytes_of_tensors(residual_source(config, SM), shapes)
    assert residual.operations(config, shapes) == 3 * 64 * 49 * 4


@pytest.mark.parametrize(
    ("config", "sm", "reason"),
    [
        (ResidualConfig(()), 87, "empty"),
        (ResidualConfig((64, 0, 7)), 87, "empty"),
        (ResidualConfig((2**15, 2**15)), 87, "2^30"),
        (ResidualConfig((64,), dtype="int8"), 87, "not to int8"),
        (ResidualConfig((64,), shortcut_dtype="fp32"), 87, "the shortcut cannot be fp32"),
        (ResidualConfig((64,), shortcut_dtype="fp8"), 86, "FP8 needs SM 8.9"),
        (ResidualConfig((64,), shortcut_dtype="int8", shortcut_scale=-1.0), 87, "no positive scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_why(config, sm, reason):
    with pytest.raises(ResvitError, match="There is no fused residual kernel") as caught:
        residual_source(config, sm)
    assert reason in str(caught.value)
    assert caught.value.code is ExitCode.IMPOSSIBLE
