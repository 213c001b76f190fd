from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from resvit_calibrate.answers.classes import Predictions, changed_answers, compare, sqnr
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.gate.intervals import normal_quantile, paired_difference, score, share
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.tasks.classification import Classification
from resvit_engines.errors import ResvitError
from task_images import Images


def predictions(answers: list[int], labels: list[int], classes: int = 4) -> Predictions:
    logits = np.full((len(answers), classes), -1.0, np.float32)
    logits[np.arange(len(answers)), answers] = 2.0
    return Predictions(logits, np.array(labels, np.int64))


# --- intervals ----------------------------------------------------------------------------------------------------


def test_known_interval():
    # Complete response before and after consolidation therapy (Cavo et al. 2012: 59, 6, 16, 80), the paired
    # example of Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables", chapter 8. These
    # are the values of that book's own R package, contingencytables.
    low, high = paired_difference(6, 16, 161)
    assert (round(low, 4), round(high, 4)) == (-0.1240, -0.0054)


@pytest.mark.parametrize("count", [1, 10, 1000, 50_000])
def test_no_discordant_pair_has_a_closed_form(count):
    z2 = normal_quantile(0.95) ** 2
    low, high = paired_difference(0, 0, count)
    assert high == pytest.approx(z2 / (count + z2), rel=1e-9)
    assert low == -high


def test_all_lost():
    low, high = paired_difference(5, 0, 5)
    assert high == 1.0
    assert low == pytest.approx(_by_hand(5, 0, 5), abs=1e-6)


def _by_hand(lost: int, gained: int, count: int) -> float:
    """The lower end from a grid search for the most likely q at each difference, without the quadratic."""
    z = normal_quantile(0.95)

    def statistic(difference: float) -> float:
        start, end = max(0.0, -difference), (1.0 - difference) / 2.0
        for _ in range(12):
            q = np.linspace(start, end, 401)
            with np.errstate(divide="ignore", invalid="ignore"):
                parts = [(lost, q + difference), (gained, q), (count - lost - gained, 1.0 - 2.0 * q - difference)]
                likelihood = sum(n * np.log(np.maximum(p, 0.0)) if n else 0.0 * p for n, p in parts)
            best = int(np.nanargmax(likelihood))
            start, end = q[max(best - 1, 0)], q[min(best + 1, 400)]
        variance = count * (2 * q[best] + difference - difference**2)
        return (lost - gained - count * difference) / math.sqrt(max(variance, 1e-300))

    low, high = -1.0, (lost - gained) / count
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if statistic(middle) > z else (low, middle)
    return high


@pytest.mark.parametrize("counts", [(7, 1, 21), (1, 7, 21), (40, 20, 160), (0, 3, 50), (3, 0, 50), (2, 2, 4)])
def test_agrees_with_a_search_for_the_likelihoods_top(counts):
    assert paired_difference(*counts)[0] == pytest.approx(_by_hand(*counts), abs=1e-6)


@pytest.mark.parametrize("counts", [(7, 1, 21), (0, 0, 9), (5, 0, 5), (3, 100, 50_000), (1e-3, 2e-3, 1e7)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_interval_is_sound(counts, confidence):
    lost, gained, count = counts
    low, high = paired_difference(lost, gained, count, confidence)
    assert -1.0 <= low < (lost - gained) / count <= high <= 1.0
    mirrored = paired_difference(gained, lost, count, confidence)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)
    z = normal_quantile(confidence)
    for edge, wanted in ((low, z), (high, -z)):
        if abs(edge) < 1.0:
            assert score(edge, lost, gained, count) == pytest.approx(wanted, abs=1e-5)
    values = [score(d, lost, gained, count) for d in np.linspace(-0.999, 0.999, 400)]
    assert all(after <= before for before, after in itertools.pairwise(values))


def exact_probability(count: int, lose: float, gain: float, said) -> float:
    """Probability that ``said(lost, gained)`` holds, summed over all outcomes."""
    total = 0.0
    for lost in range(count + 1):
        for gained in range(count + 1 - lost):
            same = count - lost - gained
            logs = math.lgamma(count + 1) - sum(math.lgamma(n + 1) for n in (lost, gained, same))
            logs += sum(n * math.log(p) for n, p in ((lost, lose), (gained, gain), (same, 1 - lose - gain)) if n)
            if logs > -30 and said(lost, gained):
                total += math.exp(logs)
    return total


@pytest.mark.parametrize(("count", "lose", "gain"), [(60, 0.1, 0.1), (100, 0.08, 0.03), (150, 0.05, 0.02)])
def test_coverage_is_near_nominal(count, lose, gain):
    z = normal_quantile(0.95)
    covered = exact_probability(count, lose, gain, lambda b, c: abs(score(lose - gain, b, c, count)) <= z)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_share_is_wilsons():
    # Newcombe, Statistics in Medicine 17, 1998: 81 of 263 and 0 of 20.
    assert [round(x, 4) for x in share(81, 263)] == [0.2553, 0.3662]
    assert [round(x, 4) for x in share(0, 20)] == [0.0, 0.1611]


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, -1, math.nan, 1 - 1e-12])
def test_impossible_confidence(confidence):
    with pytest.raises(ResvitError):
        paired_difference(1, 1, 10, confidence)


# --- comparing ----------------------------------------------------------------------------------------------------


def test_known_comparison():
    labels = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    reference = predictions([0, 1, 2, 3, 0, 1, 2, 3, 1, 0], labels)  # 8 of 10
    candidate = predictions([0, 1, 2, 3, 0, 1, 3, 2, 0, 3], labels)  # loses 2, gains 1, one wrong differently
    got = compare(reference, candidate)
    assert (got.images, got.reference_top1, got.candidate_top1, got.agreement) == (10, 0.8, 0.7, 0.6)
    assert (got.lost, got.gained, got.not_finite) == (2, 1, 0)
    assert got.drop == pytest.approx(10.0)
    assert got.interval == tuple(100 * edge for edge in paired_difference(2, 1, 10))
    # Σ ref² = 10 (4 + 3); each of the 4 changed rows differs by 3 in two places.
    assert got.sqnr_db == pytest.approx(10 * math.log10(70 / 72))
    plain = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert plain["top1"] == 0.7
    assert plain["interval"] == list(got.interval)
    assert changed_answers(reference, candidate)[0] == {"index": 6, "label": 2, "float": 2, "quantized": 3}
    assert len(changed_answers(reference, candidate)) == 4


def test_sqnr_in_decibels():
    random = np.random.default_rng(0)
    clean = random.normal(size=(20_000, 10)).astype(np.float32)
    assert sqnr(clean, clean + np.float32(0.01) * random.normal(size=clean.shape)) == pytest.approx(40.0, abs=0.05)
    assert sqnr(clean, clean) == math.inf
    assert sqnr(np.zeros((2, 2)), np.ones((2, 2))) == -math.inf
    assert math.isnan(sqnr(np.ones((2, 2)), np.array([[1, np.inf], [1, 1]])))
    assert sqnr(np.full((1, 2), 1e30, np.float32), np.zeros((1, 2), np.float32)) == 0.0


def test_not_finite_outputs():
    labels = [0, 1, 2]
    good, bad = predictions([0, 1, 2], labels), predictions([0, 1, 2], labels)
    bad.logits[0, 0] = np.nan
    bad.logits[1, 2] = np.inf
    got = compare(good, bad)
    assert (got.not_finite, got.candidate_top1, got.lost) == (2, pytest.approx(1 / 3), 2)
    assert got.to_json()["sqnr_db"] is None
    assert bad.answers.tolist() == [-1, -1, 2]
    with pytest.raises(ResvitError, match="2 of 3"):
        compare(bad, good)


def test_what_cannot_be_compared():
    with pytest.raises(ResvitError, match="same images"):
        compare(predictions([0], [0]), predictions([0, 1], [0, 1]))
    with pytest.raises(ResvitError, match="same images"):
        compare(predictions([0], [0]), predictions([0], [1]))
    with pytest.raises(ResvitError, match="no image"):
        compare(predictions([], []), predictions([], []))


def test_saved_and_loaded(tmp_path):
    first = predictions([0, 1, 2], [2, 1, 0])
    first.save(tmp_path / "a b.npz")
    again = Predictions.load((tmp_path / "a b.npz").read_bytes(), "a.npz")
    np.testing.assert_array_equal(again.logits, first.logits)
    np.testing.assert_array_equal(again.labels, first.labels)
    for content in (b"", b"nonsense", (tmp_path / "a b.npz").read_bytes()[:200]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ResvitError):
            Predictions.load((tmp_path / "bad.npz").read_bytes(), "a.npz")


# --- predicting ---------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(40) % 3)
    return open_image_sets(DataSpec(str(tmp_path / "d.npz"), calibration_images=4), Preprocess((4, 4), 1))[1]


def three(arrays):
    means = arrays["input"].mean(axis=(1, 2, 3))
    return {"logits": np.stack([means, 1 - means, means * 0], axis=1)}


@pytest.mark.parametrize("size", [1, 5, 36, 100])
def test_predicts_every_image_once(images, size):
    got = Classification({}).answers(three, images, size)
    means = np.concatenate([batch.images.mean(axis=(1, 2, 3)) for batch in images.batches(3)])
    np.testing.assert_allclose(got.logits[:, 0], means, atol=1e-6)
    assert got.labels.tolist() == images.labels.tolist()


def test_only_output_may_have_any_name(images):
    got = Classification({}).answers(
        lambda arrays: {"probabilities": three(arrays)["logits"].astype(np.float16)}, images, 8
    )
    assert got.logits.dtype == np.float32
    big = Classification({}).answers(
        lambda arrays: {"x": three(arrays)["logits"].astype(np.float64) + 1e300}, images, 8
    )
    assert not big.finite.any()


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        (lambda arrays: {"a": three(arrays)["logits"], "b": three(arrays)["logits"]}, "a, b; none"),
        (lambda arrays: {"logits": three(arrays)["logits"][:, :2]}, "label 2.*0 to 1"),
        (lambda arrays: {"logits": three(arrays)["logits"][:, :1]}, "shape"),
        (lambda arrays: {"logits": three(arrays)["logits"][:3]}, "shape"),
        (lambda arrays: {"logits": arrays["input"]}, "shape"),
    ],
)
def test_outputs_that_are_not_logits(images, runner, said):
    with pytest.raises(ResvitError, match=said):
        Classification({}).answers(runner, images, 8)


def test_unlabelled_images_cannot_be_scored(images):
    with pytest.raises(ResvitError, match="no labels"):
        Classification({}).answers(three, Images(None, count=2), 8)
