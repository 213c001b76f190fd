"""Every estimator gives a usable amax, and the ones that optimise do."""

from __future__ import annotations

import itertools
import math
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_calibrate.observe.histogram import BINS, GrowingHistogram, TensorStatistics
from resvit_calibrate.ranges.estimators import DEAD_AMAX, PRECISIONS, Estimator, amax_from, quantization_error
from resvit_calibrate.ranges.ranges import Ranges, TensorRange, ranges_from, ranges_from_json, save_ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError


def seen(values) -> TensorStatistics:
    x = np.asarray(values, np.float32)
    histogram = GrowingHistogram()
    histogram.add(x, float(np.abs(x).max()))
    return TensorStatistics(histogram.count, float(x.min()), float(x.max()), histogram.counts, histogram.bin_width)


def quantized(x, amax, precision):
    if precision == "int8":
        return np.clip(np.rint(x / (amax / 127)), -128, 127) * (amax / 127)
    codes = np.clip(x / (amax / 448), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32) * (amax / 448)


def true_error(x, amax, precision):
    return float(np.mean((x - quantized(x, amax, precision)) ** 2))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.whole
@settings(deadline=None, max_examples=150)
@given(st.lists(finite, min_size=1, max_size=60), st.sampled_from(PRECISIONS), st.sampled_from(Estimator))
def test_amax_is_finite_positive_and_capped_by_the_maximum(values, precision, estimator):
    statistics = seen(values)
    amax = amax_from(statistics, estimator, precision)
    assert math.isfinite(amax)
    assert amax > 0
    assert amax <= max(statistics.absmax, DEAD_AMAX)
    scale = np.float32(amax / (127 if precision == "int8" else 448))
    assert np.isfinite(scale)
    assert scale > 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(PRECISIONS), st.sampled_from(["normal", "laplace", "lognormal"]))
def test_mse_is_never_worse_than_max(seed, precision, law):
    rng = np.random.default_rng(seed)
    x = getattr(rng, law)(size=3000).astype(np.float32)
    statistics = seen(x)
    best, largest = (amax_from(statistics, e, precision) for e in (Estimator.MSE, Estimator.MAX))
    judged = quantization_error(statistics, [best, largest], precision)
    assert judged[0] <= judged[1]
    assert true_error(x, best, precision) <= true_error(x, largest, precision) * 1.02


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("share", [0.03, 0.3, 1.0])
def test_the_judged_error_is_the_real_one(precision, share):
    x = np.random.default_rng(3).laplace(size=400_000).astype(np.float32)
    statistics = seen(x)
    amax = share * statistics.absmax
    judged = quantization_error(statistics, amax, precision)[0]
    assert judged == pytest.approx(true_error(x, amax, precision), rel=0.03)


@pytest.mark.whole
@pytest.mark.parametrize("precision", PRECISIONS)
def test_mse_finds_the_clip_of_an_exhaustive_search(precision):
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    amax = amax_from(seen(x), Estimator.MSE, precision)
    searched = min(true_error(x, a, precision) for a in np.linspace(0.05, np.abs(x).max(), 150))
    assert true_error(x, amax, precision) <= searched * 1.02


def test_int8_clip_of_a_gaussian_is_the_published_one():
    # Banner et al. (2019), table 1 of the appendix: about 3.92 standard deviations for 8 bits of a Gaussian.
    x = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)
    assert amax_from(seen(x), Estimator.MSE, "int8") == pytest.approx(3.95, abs=0.15)


def test_percentile_is_numpys():
    x = np.random.default_rng(0).exponential(size=500_000).astype(np.float32)
    amax = amax_from(seen(x), Estimator.PERCENTILE, "int8")
    assert amax == pytest.approx(np.percentile(x, 99.99), rel=0.01)


def test_percentile_counts_zeros():
    x = np.maximum(np.random.default_rng(0).standard_normal(500_000), 0).astype(np.float32)
    assert amax_from(seen(x), Estimator.PERCENTILE, "int8") == pytest.approx(np.percentile(x, 99.99), rel=0.01)


@pytest.mark.parametrize("estimator", [Estimator.PERCENTILE, Estimator.MSE, Estimator.ENTROPY])
def test_one_huge_outlier_does_not_set_the_range(estimator):
    x = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    x[7] = 60.0
    assert 2.5 < amax_from(seen(x), estimator, "int8") < 15.0
    assert amax_from(seen(x), Estimator.MAX, "int8") == 60.0


def divergence_by_the_book(statistics, end):
    """Migacz's loop as published, written out for one candidate, on the INT8 grid's cells."""
    counts = statistics.histogram.astype(np.float64)
    p = counts[:end].copy()
    p[-1] += counts[end:].sum()
    bounds = [0, *np.rint((np.arange(127) + 0.5) * end / 127).astype(int), end]
    q = np.zeros(end)
    for begin, stop in itertools.pairwise(bounds):
        cell = counts[begin:stop]
        if cell.any():
            q[begin:stop] = np.where(cell > 0, cell.sum() / (cell > 0).sum(), 0)
    p, q = p / p.sum(), q / q.sum()
    if (q[p > 0] == 0).any():
        return np.inf
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.whole
@pytest.mark.parametrize("law", ["standard_normal", "standard_cauchy", "standard_exponential"])
def test_entropy_is_migacz_search(law):
    x = getattr(np.random.default_rng(5), law)(20_000).astype(np.float32)
    statistics = seen(np.clip(x, -50, 50))
    used = int(np.ceil(statistics.absmax / statistics.bin_width))
    ends = np.unique(np.linspace(128, used, 512).astype(int))
    divergences = [divergence_by_the_book(statistics, end) for end in ends]
    expected = min(ends[int(np.argmin(divergences))] * statistics.bin_width, statistics.absmax)
    assert amax_from(statistics, Estimator.ENTROPY, "int8") == pytest.approx(expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("estimator", Estimator)
def test_dead_constant_and_nearly_dead_tensors(precision, estimator):
    assert amax_from(seen(np.zeros(100)), estimator, precision) == DEAD_AMAX
    assert 0 < amax_from(seen(np.full(100, -3.0)), estimator, precision) <= 3.0
    unseen = TensorStatistics(100, 0.0, 5.0, np.zeros(BINS, np.int64), 2.0**-8)  # the sample missed them all
    assert amax_from(unseen, estimator, precision) == 5.0


def test_growing_does_not_depend_on_the_order():
    x = np.random.default_rng(0).lognormal(sigma=3, size=(10, 1000)).astype(np.float32)
    results = []
    for parts in (x, x[::-1], [x.ravel()]):
        histogram, largest = GrowingHistogram(), 0.0
        for part in parts:
            largest = max(largest, float(part.max()))
            histogram.add(part, largest)
        results.append((histogram.bin_width, histogram.counts.tolist(), histogram.count))
    assert results[0] == results[1] == results[2]
    assert sum(results[0][1]) == x.size


@pytest.mark.whole
def test_two_hundred_tensors_take_a_moment():
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    tensors = {str(i): seen(x * (1 + i / 7)) for i in range(200)}
    start = time.process_time()
    ranges = ranges_from(Statistics(tensors, 8), "digest")
    assert time.process_time() - start < 5.0
    assert len(ranges.tensors) == 200


def test_ranges_survive_the_file(tmp_path):
    x = np.random.default_rng(0).standard_normal(5000)
    tensors = {"conv": seen(x), "norm": TensorStatistics(0, -2.0, 1.0, None, 0.0), "dead": seen(np.zeros(9))}
    ranges = ranges_from(Statistics(tensors, 4), "abc")
    save_ranges(ranges, tmp_path / "ranges.json")
    assert ranges_from_json((tmp_path / "ranges.json").read_bytes(), "ranges.json") == ranges
    assert sum(ranges.tensors["conv"].histogram) == 5000
    assert len(ranges.tensors["conv"].histogram) == len(ranges.tensors["dead"].histogram) == 64
    assert ranges.tensors["conv"].bin_width * 64 >= np.abs(x).max()
    assert ranges.amax("norm", "int8", Estimator.MAX) == 2.0
    with pytest.raises(ResvitError, match="needs a histogram"):
        ranges.amax("norm", "int8", Estimator.MSE)
    with pytest.raises(ResvitError, match="'conv'"):
        ranges.amax("conv1", "int8", Estimator.MAX)
    (tmp_path / "ranges.json").write_text('{"tensors": []}')
    with pytest.raises(ResvitError, match="does not hold"):
        ranges_from_json((tmp_path / "ranges.json").read_bytes(), "ranges.json")


def test_infinite_ranges_and_unknown_precisions_are_refused():
    bad = TensorStatistics(1, 0.0, math.inf, None, 0.0)
    with pytest.raises(ResvitError, match="not finite"):
        amax_from(bad, Estimator.MAX, "int8")
    with pytest.raises(ResvitError, match="int4"):
        Ranges({"x": TensorRange(0, 1, {}, (), 0)}, 1, "").amax("x", "int4", Estimator.MAX)
