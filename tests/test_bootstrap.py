from __future__ import annotations

import math

import numpy as np
import pytest

from resvit_calibrate.answers.mask_counts import mean_iou
from resvit_calibrate.gate.bootstrap import _student, percentile_interval, resampled
from resvit_calibrate.gate.comparison import Resampled
from resvit_calibrate.gate.intervals import normal_quantile, paired_difference, two_digits_up


def comparison(drop: float, draws: np.ndarray, count: int, worse: int = 50, better: int = 50) -> Resampled:
    return Resampled(
        images=count,
        metric="mIoU",
        reference={"mIoU": 0.8},
        candidate={"mIoU": 0.8 - drop / 100},
        drop=drop,
        draws=draws,
        confidence=0.95,
        agreement=1.0,
        agreement_of="pixels",
        sqnr_db=30.0,
        not_finite=0,
        worse=worse,
        better=better,
    )


def test_images_are_drawn_with_replacement_and_the_same_again():
    seen = resampled(lambda weights: weights, 40, 500)
    assert seen.shape == (500, 40)
    assert (seen.sum(axis=1) == 40).all()
    assert seen.mean() == 1.0
    assert seen.var() == pytest.approx(1 - 1 / 40, rel=0.05)
    np.testing.assert_array_equal(seen, resampled(lambda weights: weights, 40, 500))
    assert not np.array_equal(seen, resampled(lambda weights: weights, 40, 500, seed=1))


def test_many_images_are_drawn_in_pieces():
    rows = []
    resampled(lambda weights: rows.append(len(weights)) or weights[:, :1], 50_000, 200)
    assert sum(rows) == 200
    assert max(rows) * 50_000 <= 1 << 22


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (9, 2.2622), (29, 2.0452), (1000, 1.9623)])
def test_students_quantile(freedom, quantile):
    assert _student(normal_quantile(0.95), freedom) == pytest.approx(quantile, rel=0.01)


def test_the_interval_of_a_mean_is_students():
    random = np.random.default_rng(0)
    values = random.normal(3, 2, 25)
    draws = resampled(lambda w: (w @ values)[:, None] / 25, 25, 20_000)[:, 0]
    low, high = percentile_interval(values.mean(), draws, 25, 0.95)
    half = 2.0639 * values.std(ddof=1) / 5
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.15 * half),
        pytest.approx(values.mean() + half, abs=0.15 * half),
    )


def test_beyond_what_the_drawings_can_tell_the_interval_goes_on():
    draws = np.random.default_rng(0).normal(size=2000)
    wide = percentile_interval(0.0, draws, 1000, 1 - 1e-6)
    assert wide[1] == pytest.approx(4.9, abs=0.3)
    assert percentile_interval(5.0, draws, 1000, 0.95)[1] == 5.0  # the point is inside
    assert percentile_interval(1.0, draws, 1, 0.95) == (1.0, 1.0)


def covered(count: int, trials: int, confidence: float) -> float:
    """How often the interval holds the true drop in mIoU of two correlated networks, for sets of ``count`` images.

    Images differ in their share of three classes, of which the third is rare, and in how hard they are.
    """
    random = np.random.default_rng(count)

    def images(size: int) -> np.ndarray:
        known = random.dirichlet([6, 3, 0.3], size) * 1000
        hard = random.beta(2, 8, size)[:, None]
        both = []
        for extra in (1.0, 1.15):  # the second network is wrong on 15% more pixels
            wrong = np.clip(hard * extra * random.uniform(0.8, 1.2, known.shape), 0, 1)
            shared = known * (1 - wrong)
            answered = shared + (known * wrong).sum(axis=1, keepdims=True) / 3
            both.append(np.concatenate([shared, answered, known], axis=1))
        return np.stack(both, axis=1)  # (images, 2, 9)

    def drop(sums: np.ndarray) -> np.ndarray:
        shares = [mean_iou(*np.moveaxis(sums[:, n].reshape(-1, 3, 3), 1, 0)) for n in (0, 1)]
        return 100 * (shares[0] - shares[1])

    true = float(drop(images(400_000).sum(axis=0)[None])[0])
    hits = 0
    for _ in range(trials):
        one = images(count)
        draws = resampled(lambda w, one=one: drop(np.tensordot(w, one, 1))[:, None], count, 600)[:, 0]
        low, high = percentile_interval(float(drop(one.sum(axis=0)[None])[0]), draws, count, confidence)
        hits += low <= true <= high
    return hits / trials


@pytest.mark.whole
@pytest.mark.parametrize(("count", "confidence"), [(25, 0.95), (100, 0.95), (100, 0.8)])
def test_coverage_is_near_nominal(count, confidence):
    trials = 300
    spread = math.sqrt(confidence * (1 - confidence) / trials)
    assert covered(count, trials, confidence) == pytest.approx(confidence, abs=3 * spread + 0.01)


# --- comparisons --------------------------------------------------------------------------------------------------


def test_few_changed_images_widen_the_interval_to_tangos():
    draws = np.full(2000, 0.1)
    got = comparison(0.1, draws, 400, worse=3, better=1)
    low, high = (100 * edge for edge in paired_difference(3, 1, 400))
    assert got.interval == (pytest.approx(low), pytest.approx(high))
    many = comparison(0.1, draws, 400, worse=6, better=4)
    assert many.interval == (pytest.approx(0.1), pytest.approx(0.1))
    assert math.isfinite(comparison(0.0, np.zeros(5), 1, 0, 0).interval[1])


def test_images_needed_shrink_the_interval_to_the_limit():
    draws = np.random.default_rng(0).normal(0.4, 0.5, 2000)
    got = comparison(0.4, draws, 200)
    needed = got.images_needed(1.0, 0.95)
    half = got.interval[1] - 0.4
    assert needed == two_digits_up(math.ceil(200 * (half / 0.6) ** 2))
    assert got.images_needed(0.4, 0.95) is None
    assert got.images_needed(0.4 + 1e-5, 0.95) is None
    assert comparison(0.0, np.zeros(100), 50, 0, 0).images_needed(1.0, 0.95) == 390
    assert comparison(0.0, np.zeros(100), 50, 0, 0).images_needed(0.0, 0.95) is None
