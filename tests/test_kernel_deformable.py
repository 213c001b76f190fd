from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_bounds import bytes_of_tensors, deformable_outside, held, with_constants
from kernel_interpreter import run_source
from pairs import all_pairs
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.deformable import (
    DeformableConfig,
    deformable_reference,
    deformable_refusal,
    deformable_source,
    operations,
    traffic_bytes,
)
from resvit_engines.kernels.launch import Source
from resvit_engines.kernels.numerics import EIGHT_BIT, stored

SM = 89
VALUES = ("fp16", "bf16", "int8", "fp8")
WIDE = ("fp32", "fp16", "bf16")
PYRAMIDS = (((5,), (7,), (1,)), ((6, 3, 1), (4, 2, 1), (4, 4, 4)), ((9, 2), (1, 3), (3, 6)))
"""Heights, widths and points of every level."""


def config_of(
    heads: int = 3,
    size: int = 16,
    pyramid: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = PYRAMIDS[1],
    queries: int = 11,
    **more: object,
) -> DeformableConfig:
    """Scales where there are 8 bits, the two different, so that neither stands for the other unseen."""
    scales = {"value_scale": 0.03} if more.get("dtype") in EIGHT_BIT else {}
    if more.get("out_dtype") in EIGHT_BIT:
        scales["out_scale"] = 0.023
    return DeformableConfig(heads, size, *pyramid, queries, **{**scales, **more})


def inputs_of(config: DeformableConfig, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Places in and around every level, some on its edges and on pixels; weights that add up to about 1."""
    shape = (batch, config.queries, config.heads, config.samples)
    value = held(rng, (batch, config.positions, config.heads * config.head_size), config.dtype, 0.03)
    places = rng.uniform(-0.3, 1.3, (*shape, 2))
    sizes = [np.repeat(side, config.points) for side in (config.widths, config.heights)]
    # Half pixels, of which every other is a pixel itself, from one before the border to one behind.
    exact = (np.rint(places * 2 * np.stack(sizes, -1)) + rng.choice([0, 1], places.shape)) / (2 * np.stack(sizes, -1))
    places = np.where(rng.random(places.shape) < 0.3, exact, places)
    weights = rng.dirichlet(np.ones(config.samples), shape[:-1])
    return [
        value,
        stored(places if config.unit else 2 * places - 1, config.place_dtype),
        stored(weights, config.weight_dtype),
    ]


def faults(config: DeformableConfig, inputs: list[np.ndarray], source: Source | None = None) -> int:
    (got,) = run_source(source or deformable_source(config, SM), inputs)
    return deformable_outside(config, inputs, got)


def through_torch(config: DeformableConfig, value: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same of ``grid_sample``, as the models compose it, in float64."""
    import torch

    batch, queries, heads, size = len(value), places.shape[1], config.heads, config.head_size
    values = torch.from_numpy(value).reshape(batch, -1, heads, size)
    grids = torch.from_numpy(2 * places - 1 if config.unit else places)
    samples = []
    for level, grid in enumerate(grids.split(config.points, -2)):
        height, width = config.heights[level], config.widths[level]
        own = values[:, config.starts[level] :][:, : height * width]
        image = own.permute(0, 2, 3, 1).reshape(batch * heads, size, height, width)
        there = grid.transpose(1, 2).flatten(0, 1)
        samples.append(
            torch.nn.functional.grid_sample(image, there, mode="bilinear", padding_mode="zeros", align_corners=False)
        )
    shares = torch.from_numpy(weights).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    summed = (torch.cat(samples, -1) * shares).sum(-1)
    return summed.view(batch, heads * size, queries).transpose(1, 2).numpy() * config.value_scale


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_the_reference_is_the_composition_of_grid_sample(
    pyramid: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], unit: bool
) -> None:
    config = config_of(pyramid=pyramid, unit=unit, out_dtype="fp32")
    inputs = inputs_of(config, 2, np.random.default_rng(0))
    # Both in float64; but for the rounding to FP32 of what the reference gives.
    np.testing.assert_allclose(
        deformable_reference(config, *inputs), through_torch(config, *inputs), rtol=2.0**-23, atol=1e-12
    )


@pytest.mark.whole
@pytest.mark.parametrize("place", [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e9, -3e9])
def test_places_that_are_none_or_far_away_give_what_grid_sample_gives(place: float) -> None:
    config = config_of(out_dtype="fp16")
    inputs = inputs_of(config, 1, np.random.default_rng(1))
    inputs[1][0, 4, 1, 2, 0] = place
    expected = through_torch(config, *inputs)
    (got,) = run_source(deformable_source(config, SM), inputs)
    for result in (deformable_reference(config, *inputs), got):
        assert np.array_equal(np.isnan(result), np.isnan(expected))
        assert np.isnan(result).sum() == (0 if np.isfinite(place) else config.head_size)
        np.testing.assert_allclose(result, expected, rtol=2.0**-10, atol=1e-5)


PAIRS = all_pairs(VALUES, VALUES, WIDE, WIDE, (True, False), PYRAMIDS, (1, 3, 8), (8, 16, 24, 80), (1, 19), (1, 64))


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    ("dtype", "out", "place", "weight", "unit", "pyramid", "heads", "size", "queries", "batch"), PAIRS
)
def test_deformable_attention_of_all_pairs_of_options(
    dtype, out, place, weight, unit, pyramid, heads, size, queries, batch
):
    options = {"dtype": dtype, "out_dtype": out, "place_dtype": place, "weight_dtype": weight, "unit": unit}
    config = config_of(heads, size, pyramid, queries, **options)
    inputs = inputs_of(config, 2, np.random.default_rng(0))
    # The batch that tiles are chosen for.
    source = deformable_source(dataclasses.replace(config, batch=batch), SM)
    assert faults(config, inputs, source) == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(VALUES),
    st.sampled_from(VALUES),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([1, 1000]),
    st.integers(0, 99),
)
def test_deformable_attention_of_any_shape(dtype, out, unit, levels, heads, size, queries, batch, tiled, seed):
    config = config_of(heads, size, tuple(zip(*levels, strict=True)), queries, dtype=dtype, out_dtype=out, unit=unit)
    inputs = inputs_of(config, batch, np.random.default_rng(seed))
    assert faults(config, inputs, deformable_source(dataclasses.replace(config, batch=tiled), SM)) == 0


@pytest.mark.whole
@pytest.mark.parametrize("dtype", VALUES)
def test_values_at_their_largest_stay_themselves(dtype: str) -> None:
    """All points within, and weights that add up to 1: the mean of equal values is the value."""
    largest = {"fp16": 65504.0, "bf16": 2.0**100, "int8": -128.0, "fp8": 448.0}[dtype]
    config = config_of(dtype=dtype, out_dtype="bf16", pyramid=((6, 3), (4, 2), (4, 4)))
    inputs = inputs_of(config, 1, np.random.default_rng(2))
    inputs[0] = np.full_like(inputs[0], largest)
    inputs[1] = np.clip(inputs[1], 0.25, 0.75)  # half a pixel from the border, with levels of 2 and more
    inputs[2] = np.full_like(inputs[2], 0.125)
    (got,) = run_source(deformable_source(config, SM), inputs)
    assert np.array_equal(got, np.broadcast_to(stored(largest * np.float32(config.value_scale), "bf16"), got.shape))


@pytest.mark.whole
@pytest.mark.parametrize(("out", "low", "high"), [("int8", -128, 127), ("fp8", -448, 448)])
def test_outputs_saturate(out: str, low: int, high: int) -> None:
    config = config_of(out_dtype=out, out_scale=0.0001)
    inputs = inputs_of(config, 2, np.random.default_rng(3))
    (got,) = run_source(deformable_source(config, SM), inputs)
    assert deformable_outside(config, inputs, got) == 0
    assert (got.min(), got.max()) == (low, high)


@pytest.mark.whole
@pytest.mark.parametrize(
    "wrong",
    [
        {"VALUE_SCALE": 1.02},
        {"INVERSE": 1.02},
        {"UNIT": False},
        {"WIDTHS": (4, 2, 2)},
        {"HEIGHTS": (6, 2, 1)},
        {"STARTS": (0, 24, 29)},
        {"FIRSTS": (0, 4, 7)},
        {"POINTS": (4, 4, 3)},
        {"POSITIONS": 30},
        {"SAMPLES": 11},
        {"SIZE": 15},
        {"HEADS": 2},
        {"TOGETHER": 1},
    ],
    ids=str,
)
def test_a_wrong_constant_is_noticed(wrong: dict[str, object]) -> None:
    config = config_of(out_dtype="int8")
    inputs = inputs_of(config, 2, np.random.default_rng(4))
    assert faults(config, inputs, with_constants(deformable_source(config, SM), **wrong)) > 0


def test_the_bound_is_narrow() -> None:
    """A pixel that is off by a thousandth of itself is seen, and so is half a step of the output."""
    config = config_of(queries=40)
    inputs = inputs_of(config, 2, np.random.default_rng(5))
    moved = [inputs[0], inputs[1] + 0.001, inputs[2]]
    assert deformable_outside(config, inputs, deformable_reference(config, *moved)) > 1000
    right = deformable_reference(config, *inputs)
    assert deformable_outside(config, inputs, right) == 0
    assert deformable_outside(config, inputs, right * (1 + 2.0**-9)) > right.size // 2


def test_bytes_are_those_of_all_tensors() -> None:
    for dtype in VALUES:
        config = config_of(dtype=dtype, out_dtype=dtype)
        shapes = [array.shape for array in inputs_of(config, 3, np.random.default_rng(0))]
        assert traffic_bytes(config, shapes) == bytes_of_tensors(deformable_source(config, SM), shapes)
        corners = 4 * math.prod(shapes[2]) * config.head_size
        assert operations(config, shapes) == 2 * corners


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"heights": (), "widths": (), "points": ()}, "0 levels"),
        ({"heights": (1,) * 9, "widths": (1,) * 9, "points": (1,) * 9}, "9 levels"),
        ({"points": (4, 4)}, "3 levels"),
        ({"points": (4, 0, 4)}, "below 1"),
        ({"queries": 0}, "below 1"),
        ({"points": (30, 30, 5)}, "65 points"),
        ({"heads": 65}, "65 heads of 16"),
        ({"head_size": 257}, "3 heads of 257"),
        ({"heights": (2**13,) * 3, "widths": (2**13,) * 3}, "2\\^31 elements"),
        ({"dtype": "fp32"}, "values are FP32"),
        ({"out_dtype": "fp32"}, "output FP32"),
        ({"place_dtype": "int8"}, "places are INT8"),
        ({"weight_dtype": "int8"}, "weights INT8"),
        ({"dtype": "int8", "value_scale": 0.0}, "scale of the values is 0.0"),
        ({"value_scale": 0.5}, "a scale is for 8-bit tensors"),
        ({"out_dtype": "int8", "out_scale": math.inf}, "output's scale is inf"),
    ],
)
def test_what_no_kernel_serves_is_refused_with_the_reason(changed: dict[str, object], reason: str) -> None:
    config = dataclasses.replace(config_of(), **changed)
    assert deformable_refusal(config_of(), SM) is None
    with pytest.raises(ResvitError, match=reason) as error:
        deformable_source(config, SM)
    assert error.value.code is ExitCode.IMPOSSIBLE


def test_fp8_needs_a_gpu_that_has_it() -> None:
    assert "FP8 needs SM 8.9" in str(deformable_refusal(config_of(dtype="fp8"), 87))
    assert deformable_refusal(config_of(dtype="fp8"), 89) is None
