from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_bounds import UNIT, attention_outside, attention_slack, bytes_of_tensors, held, with_constants
from kernel_interpreter import run_source
from pairs import all_pairs, parametrize_by_pairs
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels import attention
from resvit_engines.kernels.attention import (
    LAYOUTS,
    THREE_TENSORS,
    AttentionConfig,
    attention_reference,
    attention_refusal,
    attention_shares,
    attention_source,
    parts_of,
)
from resvit_engines.kernels.launch import Source
from resvit_engines.kernels.numerics import EIGHT_BIT, stored

pytestmark = pytest.mark.whole  # Kernels run in Triton's interpreter.

SM = 89
FP8_UNIT = UNIT
"""The unit roundoff of sums of FP8 products: the interpreter adds in FP32."""
OPERANDS = (("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8"), ("int8", "fp16"), ("fp8", "fp8"), ("fp8", "fp16"))
"""What is multiplied, and what shares are rounded to."""
OUTPUTS = ("fp16", "bf16", "int8", "fp8")
BROADCASTS = tuple(itertools.product((False, True), repeat=3))


def config_of(
    queries: int, keys: int | None = None, size: int = 16, dtype: str = "fp16", pv: str = "fp16", **more: object
) -> AttentionConfig:
    """Two heads; scales where there are 8 bits, each another, so that none stands for another unseen."""
    eight = dtype in EIGHT_BIT
    scales = {"q_scale": 0.03, "k_scale": 0.034, "v_scale": 0.027} if eight else {}
    if more.get("out_dtype") in EIGHT_BIT:
        scales["out_scale"] = 0.023
    if more.get("layout") == "channels":
        scales["area"] = next((a, queries // a) for a in range(math.isqrt(queries), 0, -1) if queries % a == 0)
    options = {"heads": 2, "value_size": size, "scale": size**-0.5, "dtype": dtype, "pv": pv, **scales, **more}
    return AttentionConfig(head_size=size, queries=queries, keys=keys or queries, **options)


def shapes_of(config: AttentionConfig, batch: int) -> list[tuple[int, ...]]:
    heads, dk, dv, nq, nk = config.heads, config.head_size, config.value_size, config.queries, config.keys
    shapes: list[tuple[int, ...]] = {
        "split": [(batch, nq, heads * dk), (batch, nk, heads * dk), (batch, nk, heads * dv)],
        "q_kv": [(batch, nq, heads * dk), *[(batch, nk, heads * (dk + dv))] * 2],
        "channels": [(batch, config.width, *(config.area or (1, 1)))],
    }.get(config.layout, [(batch, nq, config.width)])
    if config.bias is not None:
        batches, by_head, by_row = config.bias
        shapes.append((batch if batches else 1, heads if by_head else 1, nq if by_row else 1, nk))
    return shapes


def inputs_of(config: AttentionConfig, batch: int, rng: np.random.Generator, closed: float = 0.0) -> list[np.ndarray]:
    """Numbers of a few units; ``closed`` is the part of the bias that is minus infinity."""
    count = 3 if config.layout in THREE_TENSORS else 1
    shapes = shapes_of(config, batch)
    inputs = [held(rng, shape, config.dtype, 0.03) for shape in shapes[:count]]
    if config.layout == "q_kv":
        inputs[2] = inputs[1]
    if config.bias is not None:
        bias = stored(rng.normal(0, 2, shapes[count]), config.bias_dtype)
        inputs.append(np.where(rng.random(shapes[count]) < closed, -np.inf, bias))
    return inputs


def faults(config: AttentionConfig, inputs: list[np.ndarray], source: Source | None = None) -> int:
    (got,) = run_source(source or attention_source(config, SM), inputs)
    return attention_outside(config, inputs, got, FP8_UNIT)


PAIRS = all_pairs(
    LAYOUTS,
    OPERANDS,
    OUTPUTS,
    (None, *BROADCASTS),
    ("fp16", "bf16", "fp32"),
    ((1, 1), (17, 40), (40, 33), (70, 9)),
    ((8, 8), (16, 24), (40, 16), (64, 64)),
    (1, 3),
    (None, 20, 1000),
)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("layout", "operands", "out", "bias", "bias_dtype", "lengths", "sizes", "heads", "tiled"), PAIRS
)
def test_attention_of_all_pairs_of_options(layout, operands, out, bias, bias_dtype, lengths, sizes, heads, tiled):
    queries, keys = lengths if layout in THREE_TENSORS else lengths[:1] * 2
    more = {"layout": layout, "out_dtype": out, "bias": bias, "bias_dtype": bias_dtype, "value_size": sizes[1]}
    config = config_of(queries, keys, sizes[0], *operands, heads=heads, **more)
    inputs = inputs_of(config, 2, np.random.default_rng(0), closed=0.2)
    source = attention_source(tiled_for(config, tiled), SM)
    assert faults(config, inputs, source) == 0


def tiled_for(config: AttentionConfig, tokens: int | None) -> AttentionConfig:
    """The configuration whose tiles are those for as many tokens, where its layout does not fix how many there are."""
    if tokens is None or config.layout == "channels":
        return config
    return dataclasses.replace(config, queries=tokens, keys=tokens)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(OPERANDS),
    st.sampled_from(OUTPUTS),
    st.integers(1, 3),
    st.sampled_from([8, 16, 24, 32, 40, 64, 80, 128]),
    st.sampled_from([8, 16, 24, 32, 40, 64, 80, 128]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 2),
    st.sampled_from([None, *BROADCASTS]),
    st.sampled_from(["fp16", "bf16", "fp32"]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([None, 1, 20, 1000]),
    st.integers(0, 99),
)
def test_attention_of_any_shape(
    layout, operands, out, heads, size, value_size, queries, keys, batch, bias, bias_dtype, closed, tiled, seed
):
    keys = keys if layout in THREE_TENSORS else queries
    more = {"layout": layout, "out_dtype": out, "bias": bias, "bias_dtype": bias_dtype, "value_size": value_size}
    config = config_of(queries, keys, size, *operands, heads=heads, **more)
    inputs = inputs_of(config, batch, np.random.default_rng(seed), closed)
    assert faults(config, inputs, attention_source(tiled_for(config, tiled), SM)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "size", "heads"),
    [(1, 64, 3), (17, 64, 3), (50, 64, 2), (197, 64, 1), (64, 36, 2), (196, 16, 1)],
)
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_attention_of_the_lengths_that_networks_have(tokens, size, heads, operands):
    config = config_of(tokens, None, size, *operands, heads=heads, out_dtype=operands[0])
    assert faults(config, inputs_of(config, 1, np.random.default_rng(tokens))) == 0


@pytest.mark.whole
@pytest.mark.parametrize(("tokens", "size"), [(577, 64), pytest.param(1025, 32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operands", [("fp16", "fp16"), ("int8", "int8")], ids="-".join)
def test_attention_of_many_tokens(tokens, size, operands):
    config = config_of(tokens, None, size, *operands, heads=1, out_dtype=operands[0])
    assert faults(config, inputs_of(config, 1, np.random.default_rng(tokens))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_attention_of_every_layout_and_type(layout, operands):
    queries, keys = (40, 35) if layout in THREE_TENSORS else (35, 35)
    out = OUTPUTS[(LAYOUTS.index(layout) + OPERANDS.index(operands)) % 4]
    config = config_of(queries, keys, 32, *operands, layout=layout, out_dtype=out, value_size=24)
    assert faults(config, inputs_of(config, 2, np.random.default_rng(1))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("bias", BROADCASTS, ids=str)
@pytest.mark.parametrize(("layout", "bias_dtype"), [("packed", "fp16"), ("channels", "fp32"), ("split", "bf16")])
def test_attention_with_a_bias(bias, bias_dtype, layout):
    config = config_of(40, 33 if layout == "split" else 40, layout=layout, bias=bias, bias_dtype=bias_dtype)
    assert faults(config, inputs_of(config, 2, np.random.default_rng(2), closed=0.2)) == 0


@pytest.mark.whole
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_rows_that_may_attend_to_nothing_are_zeros(operands):
    config = config_of(90, 150, 16, *operands, layout="split", bias=(True, True, True))
    inputs = inputs_of(config, 2, np.random.default_rng(3))
    inputs[-1][:, :, 5:8] = -np.inf
    inputs[-1][1, 1] = -np.inf
    (got,) = run_source(attention_source(config, SM), inputs)
    assert attention_outside(config, inputs, got, FP8_UNIT) == 0
    assert not got[:, 5:8].any()
    assert not got[1, :, 16:].any()
    assert np.abs(got[0]).max(-1).astype(bool).sum() == 87


@pytest.mark.whole
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_keys_that_a_bias_closes_do_not_count(operands):
    """The first tiles whole, then all but the last key: nothing but that one's value is left."""
    config = config_of(20, 150, 16, *operands, layout="split", bias=(False, False, False), out_dtype="bf16")
    inputs = inputs_of(config, 1, np.random.default_rng(4))
    inputs[-1][..., :-1] = -np.inf
    (got,) = run_source(attention_source(config, SM), inputs)
    value = inputs[2][0, -1] * np.float32(config.v_scale)
    assert np.array_equal(got[0], np.broadcast_to(stored(value, "bf16"), got[0].shape))


@pytest.mark.whole
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
@pytest.mark.parametrize("rising", [False, True])
def test_vast_logits_stay_finite_and_right(operands, rising):
    """Logits of ten thousand, falling and rising along the keys, so that every tile is or is not the largest yet."""
    config = config_of(40, 197, 32, *operands, layout="split")
    inputs = inputs_of(config, 1, np.random.default_rng(5))
    inputs[1] *= np.linspace(0.1, 1.0, 197)[:: 1 if rising else -1, None]
    inputs[1] = stored(inputs[1], config.dtype)
    q, k, _ = parts_of(config, *inputs)
    largest = np.abs(q @ k.swapaxes(-1, -2)).max() * config.q_scale * config.k_scale
    config = dataclasses.replace(config, scale=1e4 / largest)
    (got,) = run_source(attention_source(config, SM), inputs)
    assert np.isfinite(got).all()
    assert attention_outside(config, inputs, got, FP8_UNIT) == 0
    assert np.median(attention_shares(config, *inputs)[0].max(-1)) > 0.999


@pytest.mark.whole
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_operands_do_not_overflow(operands, sign):
    """Every logit is the largest that there is, and equal: the mean of all values comes out."""
    largest = {"fp16": 65504.0, "bf16": 2.0**60, "int8": -128.0, "fp8": 448.0}[operands[0]]
    config = config_of(20, 150, 128, *operands, layout="split", out_dtype="fp8", heads=1, scale=1.0)
    inputs = inputs_of(config, 1, np.random.default_rng(6))
    inputs[0], inputs[1] = np.full_like(inputs[0], largest), np.full_like(inputs[1], sign * largest)
    (got,) = run_source(attention_source(config, SM), inputs)
    mean = inputs[2].mean(1, keepdims=True) * config.v_scale / config.out_scale
    step = np.maximum(np.abs(mean) * 2.0**-4, 2.0**-10)  # half a step of FP8
    assert (np.abs(got - mean) <= step * (1 + 2.0**-8)).all()
    assert np.array_equal(got[:, :1].repeat(20, 1), got)


@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_values_at_their_largest_stay_themselves(operands):
    largest = {"fp16": 65504.0, "bf16": 3.0e38, "int8": -128.0, "fp8": -448.0}[operands[0]]
    config = config_of(20, 577, 16, *operands, layout="split", heads=1, out_dtype="bf16")
    inputs = inputs_of(config, 1, np.random.default_rng(7))
    inputs[2] = stored(np.full_like(inputs[2], largest / (4096 if operands[0] == "bf16" else 1)), config.dtype)
    (got,) = run_source(attention_source(config, SM), inputs)
    assert attention_outside(config, inputs, got, FP8_UNIT) == 0
    # Shares are divided by their own sum, as they were rounded: equal values come out as they are.
    assert np.array_equal(got, np.broadcast_to(stored(inputs[2][0, 0, 0] * config.v_scale, "bf16"), got.shape))


@pytest.mark.whole
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
@pytest.mark.parametrize(("out", "low", "high"), [("int8", -128, 127), ("fp8", -448, 448)])
def test_outputs_saturate(operands, out, low, high):
    config = config_of(33, None, 32, *operands, out_dtype=out, out_scale=0.0003)
    inputs = inputs_of(config, 2, np.random.default_rng(8))
    (got,) = run_source(attention_source(config, SM), inputs)
    assert attention_outside(config, inputs, got, FP8_UNIT) == 0
    assert (got.min(), got.max()) == (low, high)
    assert np.mean((got == low) | (got == high)) > 0.3


def only_value(out: str, values: np.ndarray) -> np.ndarray:
    """What attention writes as ``out`` for FP16 ``values``, each that of the only key: nothing but their rounding."""
    config = config_of(1, 1, len(values), layout="split", heads=1, out_dtype=out, out_scale=1.0)
    inputs = [np.ones((1, 1, len(values))), np.ones((1, 1, len(values))), stored(values, "fp16")[None, None]]
    (got,) = run_source(attention_source(config, SM), inputs)
    return got[0, 0]


def test_ties_go_to_even():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5])
    assert only_value("int8", values).tolist() == [0, 2, 2, 0, -2, -2, 126, 127]


def test_fp8_takes_every_number_of_its_own_and_half_way_goes_to_even():
    numbers = np.unique(stored(np.linspace(-448, 448, 1 << 14), "fp8"))
    middles = (numbers[1:] + numbers[:-1]) / 2
    for values in np.resize(np.concatenate([numbers, middles]), (4, 128)):
        assert np.array_equal(only_value("fp8", values), stored(values, "fp8"))


@pytest.mark.parametrize("operands", [("fp16", "fp16"), ("bf16", "bf16")], ids="-".join)
def test_what_is_no_number_stays_seen(operands):
    """A broken engine shall look broken, in the rows that are, and only there."""
    config = config_of(40, 150, 16, *operands, layout="split")
    inputs = inputs_of(config, 1, np.random.default_rng(9))
    inputs[0][0, 3, :16] = np.nan
    inputs[2][0, 140, 20] = np.nan
    (got,) = run_source(attention_source(config, SM), inputs)
    broken = np.zeros((1, 40, 32), bool)
    broken[0, 3, :16] = broken[0, :, 20] = True
    assert np.array_equal(np.isnan(got), broken)


WRONG = [
    *[({}, wrong) for wrong in ({"SCALE": 0.001}, {"V_SCALE": 0.0271}, {"INVERSE": 43.0}, {"PV": "int8"})],
    *[({}, {name: size}) for name, size in (("K_START", 0), ("V_START", 48), ("Q_ROW", 143), ("K_ROW", 143))],
    *[({}, {name: size}) for name, size in (("V_ROW", 143), ("Q_HEAD", 23), ("K_HEAD", 0), ("V_HEAD", 0))],
    *[({}, {name: 23}) for name in ("HEAD", "VALUE")],
    *[({"layout": "channels"}, wrong) for wrong in ({"HEADS": 3}, {"AREA": 34}, {"CHANNELS": False})],
    *[({"layout": "q_kv"}, wrong) for wrong in ({"V_START": 0}, {"K_HEAD": 24})],
    *[({"bias": (True, True, True)}, {name: False}) for name in ("BIAS_BATCH", "BIAS_HEADS", "BIAS_ROWS")],
]


@pytest.mark.whole
@pytest.mark.parametrize(("more", "wrong"), WRONG, ids=lambda value: "-".join(map(str, value.values())) or "packed")
def test_a_wrong_constant_is_noticed(more, wrong):
    config = config_of(35, None, 24, "int8", "fp16", out_dtype="int8", **more)
    inputs = inputs_of(config, 2, np.random.default_rng(0))
    right = attention_source(config, SM)
    assert faults(config, inputs, right) == 0
    assert faults(config, inputs, with_constants(right, **wrong)) > 10


@pytest.mark.whole
@pytest.mark.parametrize("operands", [("fp16", "fp16"), ("int8", "fp16")], ids="-".join)
def test_one_key_of_many_that_is_left_out_is_noticed(operands):
    """The bound must not be so wide that an error in the loop hides in it."""
    config = config_of(20, 577, 64, *operands, layout="split")
    inputs = inputs_of(config, 1, np.random.default_rng(0))
    (got,) = run_source(attention_source(config, SM), inputs)
    assert attention_outside(config, inputs, got, FP8_UNIT) == 0
    fewer = dataclasses.replace(config, keys=576)
    assert attention_outside(fewer, [inputs[0], *(x[:, :-1] for x in inputs[1:])], got, FP8_UNIT) > got.size // 8


@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_the_bound_is_of_the_order_of_what_a_kernel_errs_by(operands):
    config = config_of(40, 50, 64, *operands, layout="split", out_dtype="fp32")
    inputs = inputs_of(config, 1, np.random.default_rng(0))
    slack = attention_slack(config, inputs)
    scale = np.abs(attention_reference(config, *inputs)).mean()
    most = {"fp16": 2.0**-9, "bf16": 2.0**-6, "int8": 2.0**-2, "fp8": 2.0**-2}[operands[1]]
    assert np.median(slack) < most * scale


@parametrize_by_pairs(
    ("layout", "operands", "bias", "out"),
    LAYOUTS, OPERANDS, [None, (False, True, True), (True, False, False)], ["fp16", "int8"],
)  # fmt: skip
def test_the_stated_traffic_is_every_tensor_once(layout, operands, bias, out):
    keys = 49 if layout in THREE_TENSORS else 70
    more = {"layout": layout, "bias": bias, "bias_dtype": "fp32", "out_dtype": out, "value_size": 32}
    config = config_of(70, keys, 16, *operands, **more)
    shapes = shapes_of(config, 3)
    source = attention_source(config, SM)
    tensors = bytes_of_tensors(source, shapes)
    if layout == "q_kv":
        tensors -= 3 * 49 * 2 * 48 * (2 if operands[0] in ("fp16", "bf16") else 1)
    assert attention.traffic_bytes(config, shapes) == tensors
    assert attention.operations(config, shapes) == 2 * 3 * 2 * 70 * keys * (16 + 32)


@pytest.mark.parametrize(
    ("changes", "sm", "reason"),
    [
        ({"layout": "rows"}, 87, "the layout 'rows' is not one of packed"),
        ({"heads": 0}, 87, "a head of 64 and 64"),
        ({"head_size": 4}, 87, "a head of 4 and 64, not of 8 to 128"),
        ({"value_size": 129}, 87, "a head of 64 and 129"),
        ({"queries": 0, "keys": 0}, 87, "0 queries and 0 keys"),
        ({"layout": "split", "keys": 4097}, 87, "50 queries and 4097 keys, not 1 to 4096"),
        ({"keys": 49}, 87, "equally many"),
        ({"layout": "channels"}, 87, "the map of None does not hold 50"),
        ({"layout": "channels", "area": (7, 7)}, 87, "the map of (7, 7) does not hold 50"),
        ({"dtype": "fp32"}, 87, "it multiplies fp32 and writes fp16"),
        ({"out_dtype": "int32"}, 87, "it multiplies fp16 and writes int32"),
        ({"pv": "int8"}, 87, "shares in int8 do not go with values in fp16"),
        ({"dtype": "bf16"}, 87, "shares in fp16 do not go with values in bf16"),
        ({"dtype": "int8", "pv": "fp8"}, 89, "shares in fp8 do not go with values in int8"),
        ({"bias": (False, False, False), "bias_dtype": "int8"}, 87, "a bias in int8"),
        ({"dtype": "fp8"}, 87, "FP8 needs SM 8.9"),
        ({"out_dtype": "fp8"}, 80, "FP8 needs SM 8.9"),
        ({"q_scale": 0.5}, 87, "the scale of the queries is 0.5, and a scale is for 8-bit tensors"),
        ({"dtype": "int8", "k_scale": 0.0}, 87, "the scale of the keys is 0.0, which is no positive"),
        ({"dtype": "int8", "v_scale": math.inf}, 87, "the scale of the values is inf"),
        ({"out_dtype": "int8", "out_scale": math.nan}, 87, "the output's scale is nan"),
        ({"scale": 0.0}, 87, "the factor of the logits is 0.0"),
        ({"scale": math.inf}, 87, "the factor of the logits is inf"),
        ({"scale": math.nan}, 87, "the factor of the logits is nan"),
        ({"dtype": "int8", "q_scale": 2.0**-80, "k_scale": 2.0**-80}, 87, "the factor of the logits is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_why(changes, sm, reason):
    config = dataclasses.replace(AttentionConfig(3, 64, 64, 0.125, 50, 50), **changes)
    assert reason in str(attention_refusal(config, sm))
    with pytest.raises(ResvitError, match="There is no fused attention kernel") as caught:
        attention_source(config, sm)
    assert caught.value.code is ExitCode.IMPOSSIBLE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_refused_has_a_kernel_with_these_types(layout):
    area = (5, 10) if layout == "channels" else None
    config = AttentionConfig(3, 64, 64, 0.125, 50, 50, layout=layout, area=area, bias=(False, True, True))
    assert attention_refusal(config, 80) is None
    launch = attention_source(config, 80).launch
    assert launch.inputs == ("fp16",) * (4 if layout in THREE_TENSORS else 2)
    shapes = shapes_of(config, 7)
    assert [extent.at(shapes) for extent in launch.outputs[0].shape] == (
        [7, 192, 5, 10] if layout == "channels" else [7, 50, 192]
    )
