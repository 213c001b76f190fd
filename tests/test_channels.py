"""Statistics by channel: found through reshapes and transposes, and good for judging a range channel by channel."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.observe.histogram import GrowingChannels
from resvit_calibrate.observe.layouts import channel_map, plain_layout, reshaped, transposed
from resvit_calibrate.ranges.channels import amax_for_output, channel_error
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import DEAD_AMAX
from resvit_calibrate.ranges.statistics import save_statistics, statistics_from_npz
from test_estimators import quantized


def seen(x: np.ndarray, parts: int = 1):
    """Channel statistics of values [N, C]."""
    counter = GrowingChannels(x.shape[1])
    largest = 0.0
    for number, part in enumerate(np.array_split(np.asarray(x, np.float32), parts)):
        largest = max(largest, float(np.abs(part).max(initial=0.0)))
        channel = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), part.shape)
        counter.add(part.ravel(), channel.ravel(), largest, np.full(part.size, number))
    return counter.statistics()


@pytest.mark.whole
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_channel_is_found_behind_any_reshape_and_transpose(data):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    values = np.arange(math.prod(shape)).reshape(shape)
    layout = plain_layout(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            perm = tuple(data.draw(st.permutations(range(values.ndim))))
            values, layout = values.transpose(perm), transposed(layout, perm)
        else:
            left, new = values.size, []
            while left > 1:
                new.append(data.draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0])))
                left //= new[-1]
            new.insert(data.draw(st.integers(0, len(new))), 1)
            found = reshaped(layout, new)
            if found is None:
                return
            values, layout = values.reshape(new), found
    for axis in range(values.ndim):
        mapping = channel_map(layout, axis)
        assert mapping.channels == values.shape[axis]
        expected = np.broadcast_to(
            np.arange(values.shape[axis]).reshape([-1 if i == axis else 1 for i in range(values.ndim)]), values.shape
        )
        assert np.array_equal(mapping.of(values.ravel()), expected.ravel())


def test_an_axis_that_cuts_through_a_transposed_one_is_not_guessed():
    turned = transposed(plain_layout((2, 6, 5)), (0, 2, 1))
    assert reshaped(turned, (2, 5, 2, 3)) is not None
    assert reshaped(turned, (2, 15, 2)) is not None
    assert reshaped(turned, (4, 15)) is None


def model_of_channels(path: Path, batch=None) -> Path:
    """Relu, convolution, tokens by Transpose and by Reshape, Flatten: channels of known, different ranges."""
    weights = [("w1", 8, 8, 1, 1), ("w2", 8, 4), ("w3", 8 * 30, 4), ("w4", 30, 4)]
    constants = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, *shape in weights]
    constants.append(numpy_helper.from_array(np.array([0, 8, 30]), "tokens"))
    constants.append(numpy_helper.from_array(np.array([0, -1, 2]), "odd"))
    constants.append(numpy_helper.from_array(np.ones((2, 4), np.float32), "w5"))
    nodes = [
        helper.make_node("Relu", ["input"], ["relu"]),
        helper.make_node("Conv", ["relu", "w1"], ["conv"]),
        helper.make_node("Reshape", ["relu", "tokens"], ["t0"]),
        helper.make_node("Transpose", ["t0"], ["t1"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t1", "w2"], ["y1"]),
        helper.make_node("MatMul", ["t0", "w4"], ["y4"]),
        helper.make_node("Flatten", ["relu"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3"], ["y2"]),
        helper.make_node("Add", ["conv", "relu"], ["y3"]),
        helper.make_node("Reshape", ["t1", "odd"], ["t2"]),
        helper.make_node("MatMul", ["t2", "w5"], ["y5"]),
        helper.make_node("MatMul", ["t0", "t1"], ["y6"]),
    ]
    graph = helper.make_graph(
        nodes,
        "channels",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 8, 5, 6])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(1, 7)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", [None, 4])
def test_channels_are_those_of_the_tensor_that_is_read(tmp_path, batch):
    path = model_of_channels(tmp_path / "m.onnx", batch)
    x = np.random.default_rng(0).standard_normal((10, 8, 5, 6)) * 2.0 ** np.arange(8)[:, None, None]
    x[:, 3] = -np.abs(x[:, 3])  # dead behind the Relu
    x = x.astype(np.float32)
    statistics = collect_statistics(path, [{"input": x[:4]}, {"input": x[4:8]}, {"input": x[8:]}])
    relu = np.maximum(x, 0)
    tokens = relu.reshape(10, 8, 30).transpose(0, 2, 1)
    truth = {
        "relu": relu.transpose(0, 2, 3, 1),
        "t1": tokens,
        "t0": relu.reshape(10, 8, 30),
        "flat": relu.reshape(10, -1),
        "t2": tokens.reshape(10, -1, 2),
        "conv": np.repeat(relu.sum(axis=1, dtype=np.float32)[..., None], 8, axis=3),
    }
    # Nothing weighs the channels of the input, and nothing else reads a product's result.
    assert {name for name, entry in statistics.tensors.items() if entry.channels is not None} == set(truth)
    for name, values in truth.items():
        channels, entry = statistics.tensors[name].channels, values.reshape(-1, values.shape[-1])
        assert (channels.count == len(entry)).all(), name  # small tensors are sampled whole
        assert np.allclose(channels.mean, entry.mean(axis=0), rtol=1e-5), name
        assert np.allclose(channels.mean_square, np.square(entry).mean(axis=0), rtol=1e-5), name
        assert np.allclose(channels.absmax, np.abs(entry).max(axis=0), rtol=1e-6), name
        assert (channels.log_histogram.sum(axis=1) == np.count_nonzero(entry, axis=0)).all(), name
    assert statistics.tensors["relu"].channels.absmax[3] == 0
    for name in ("relu", "t1", "input", "flat"):
        expected = np.abs(x if name == "input" else relu).max(axis=(1, 2, 3))
        found = statistics.tensors[name].image_absmax
        assert found is None if name == "input" else np.array_equal(found, expected), name


def test_channels_and_images_survive_the_file(tmp_path):
    x = np.random.default_rng(1).standard_normal((6, 8, 5, 6)).astype(np.float32)
    statistics = collect_statistics(model_of_channels(tmp_path / "m.onnx"), [{"input": x}])
    save_statistics(statistics, tmp_path / "s.npz")
    loaded = statistics_from_npz((tmp_path / "s.npz").read_bytes(), "s.npz")
    for name, entry in statistics.tensors.items():
        twin = loaded.tensors[name]
        assert (twin.channels is None) == (entry.channels is None)
        assert (twin.image_absmax is None) == (entry.image_absmax is None)
        if entry.image_absmax is not None:
            assert np.array_equal(twin.image_absmax, entry.image_absmax)
        if entry.channels is not None:
            assert twin.channels.anchor == entry.channels.anchor
            for field in ("count", "mean", "mean_square", "absmax", "log_histogram"):
                first, second = getattr(entry.channels, field), getattr(twin.channels, field)
                assert first.dtype == second.dtype
                assert np.array_equal(first, second)


def test_the_histogram_is_what_its_edges_say_and_grows_in_any_order():
    x = np.random.default_rng(0).lognormal(sigma=4, size=(3000, 4)).astype(np.float32)
    x[:50] = 0
    whole, grown, backwards = seen(x), seen(np.sort(x, axis=0), 30), seen(np.sort(x, axis=0)[::-1], 30)
    assert whole.edges[-1] == 2.0**whole.anchor > x.max()
    assert whole.edges[1] <= 2.0**-16 * x.max()
    for channel in range(4):
        expected = np.histogram(x[50:, channel], whole.edges)[0]
        for other in (whole, grown, backwards):
            assert np.array_equal(other.log_histogram[channel], expected)
            assert other.count[channel] == 3000
            assert other.mean[channel] == pytest.approx(x[:, channel].mean(dtype=np.float64))


def laws(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    normal = rng.standard_normal(count)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "gelu": normal / (1 + np.exp(-1.702 * normal)),
        "laplace": rng.laplace(size=count),
        "lognormal": rng.lognormal(size=count) * rng.choice([-1, 1], count),
        "uniform": rng.uniform(-1, 1, count),
    }


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int8", 5), ("fp8", 8)])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_judged_error_is_that_of_quantising_the_values(precision, bits, share):
    x = np.stack([*laws(np.random.default_rng(2), 40_000).values()], axis=1)
    x = (x / np.abs(x).max(axis=0) * 2.0 ** -np.arange(6)).astype(np.float32)
    scale = np.abs(x).max(axis=0).astype(np.float64) * np.linspace(1.0, 1.3, 6)
    judged = channel_error(seen(x), share, precision, scale, bits)
    unscaled = channel_error(seen(x), [share * s for s in scale], precision, bits=bits)
    assert judged.shape == (1, 6)
    assert np.allclose(np.diag(unscaled), judged[0])
    for channel in range(6):
        steps = x[:, channel] / scale[channel]
        levels = 2 ** (bits - 1) - 1
        back = (
            np.clip(np.rint(steps / share * levels), -levels, levels) * share / levels
            if precision == "int8"
            else quantized(steps, share, precision)
        )
        true = np.mean((back * scale[channel] - x[:, channel]) ** 2)
        assert judged[0, channel] == pytest.approx(true, rel=0.15), channel


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int8", 5), ("fp8", 8)])
def test_the_range_for_the_output_is_that_of_an_exhaustive_search(precision, bits):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((30_000, 6)) * [1, 1, 1, 1, 0.2, 9]).astype(np.float32)
    energy = np.array([1, 1, 1, 1, 40, 0.001])
    channels, absmax = seen(x), float(np.abs(x).max())
    amax = amax_for_output(channels, energy, precision, absmax, bits)

    def damage(clip: float) -> float:
        # What is cut off counts twice.
        step = clip / (2 ** (bits - 1) - 1)
        coarse = np.clip(np.rint(x / step) * step, -clip, clip)
        back = coarse if precision == "int8" else quantized(x, clip, precision)
        errors = np.square(x - back) * np.where(np.abs(x) > clip, 2.0, 1.0)
        return float(errors.mean(axis=0) @ energy)

    assert damage(amax) <= min(map(damage, np.geomspace(absmax / 100, absmax, 100))) * 1.02
    # The wide channel hardly matters to the output, so it is the one that is clipped.
    if precision == "int8":
        assert amax < 0.5 * absmax
    assert amax_for_output(channels, np.eye(6)[5], precision, absmax, bits) > amax


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.whole
@settings(deadline=None, max_examples=150)
@given(
    st.lists(finite, min_size=4, max_size=40),
    st.sampled_from([("int8", 8), ("int8", 2), ("fp8", 8)]),
    st.lists(st.sampled_from([0.0, 1e-30, 1.0, 1e30, math.nan]), min_size=2, max_size=2),
)
def test_every_range_is_finite_and_positive(values, grid, energy):
    x = np.array(values[: len(values) // 2 * 2], np.float32).reshape(-1, 2)
    absmax = float(np.abs(x).max())
    amax = amax_for_output(seen(x), np.array(energy), grid[0], absmax, grid[1])
    assert math.isfinite(amax)
    assert 0 < amax <= max(absmax, DEAD_AMAX)
    errors = channel_error(seen(x), amax, grid[0], bits=grid[1])
    assert np.isfinite(errors).all()
    assert (errors >= 0).all()


def test_nonsense_is_refused():
    channels = seen(np.ones((4, 3)))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="amax"):
            channel_error(channels, bad, "int8")
    with pytest.raises(ValueError, match="scale"):
        channel_error(channels, 1.0, "int8", np.array([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="bits"):
        channel_error(channels, 1.0, "fp8", bits=6)
    with pytest.raises(ValueError, match="weight_energy"):
        amax_for_output(channels, np.ones(2), "int8", 1.0)


def test_every_other_image_is_a_half_and_both_are_all(tmp_path):
    images = np.random.default_rng(3).standard_normal((7, 8, 5, 6)).astype(np.float32)
    images[1::2, 2] *= 9.0
    path = model_of_channels(tmp_path / "m.onnx")
    parts = [{"input": images[:3]}, {"input": images[3:6]}, {"input": images[6:]}]  # a batch need not end on a pair
    statistics = collect_statistics(path, parts)
    save_statistics(statistics, tmp_path / "s.npz")
    for known in (statistics, statistics_from_npz((tmp_path / "s.npz").read_bytes(), "s.npz")):
        seen = known.tensors["relu"].channels
        first, second = seen.halves
        for half, own in ((first, images[::2]), (second, images[1::2])):
            values = np.maximum(own, 0.0).transpose(1, 0, 2, 3).reshape(8, -1)
            assert (half.count == values.shape[1]).all()
            np.testing.assert_array_equal(half.absmax, values.max(1))
            np.testing.assert_allclose(half.mean_square, np.square(values, dtype=float).mean(1), rtol=1e-6)
        whole = np.maximum(images, 0.0).transpose(1, 0, 2, 3).reshape(8, -1)
        np.testing.assert_allclose(seen.mean, whole.mean(1, dtype=float), rtol=1e-6)
        np.testing.assert_array_equal(seen.log_histogram, first.log_histogram + second.log_histogram)
    alone = collect_statistics(path, [{"input": images[:1]}]).tensors["relu"].channels
    assert alone.halves == ()


def test_a_range_reaches_further_where_halves_say_little_of_each_other():
    random = np.random.default_rng(0)
    energy, ratios = np.ones(4), []
    for values in (random.standard_normal((8000, 4)), random.standard_t(1.5, (200, 4))):
        statistics = seen(values.astype(np.float32), 2)
        largest = float(statistics.absmax.max())
        blind = dataclasses.replace(statistics, halves=())
        chosen, before = (amax_for_output(each, energy, "int8", largest) for each in (statistics, blind))
        assert before <= largest
        assert chosen <= 2.0 * largest
        ratios.append(chosen / before)
    assert 0.9 < ratios[0] < 1.2 < 1.5 < ratios[1], ratios
