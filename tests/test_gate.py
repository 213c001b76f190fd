from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from resvit_calibrate.answers.classes import ClassComparison, Predictions, compare
from resvit_calibrate.gate.comparison import recorded_sqnr
from resvit_calibrate.gate.gate import Verdict, VerdictKind, judge
from resvit_calibrate.gate.intervals import normal_quantile, paired_difference, score
from resvit_engines.errors import ExitCode, ResvitError


def outcome(right: int, lost: int, gained: int, count: int) -> ClassComparison:
    """A comparison with these counts; the reference is right on ``right`` images."""
    low, high = paired_difference(lost, gained, count)
    return ClassComparison(
        images=count,
        reference_top1=right / count,
        candidate_top1=(right - lost + gained) / count,
        agreement=1 - (lost + gained) / count,
        sqnr_db=30.0,
        drop=100 * (lost - gained) / count,
        interval=(100 * low, 100 * high),
        confidence=0.95,
        lost=lost,
        gained=gained,
        not_finite=0,
        reference_answers=min(10, count),
        candidate_answers=min(10, count),
    )


def simulated(random: np.random.Generator, count: int, top1: float, lose: float, gain: float) -> ClassComparison:
    """Two networks of 10 classes, the second wrong where the first is right with probability ``lose``…"""
    labels = random.integers(0, 10, count)
    draw = random.random(count)
    first = draw < top1
    second = first.copy()
    second[draw < lose] = False
    second[draw > 1 - gain] = True

    def logits(right: np.ndarray) -> np.ndarray:
        answers = np.where(right, labels, (labels + 1) % 10)
        return np.eye(10, dtype=np.float32)[answers]

    return compare(Predictions(logits(first), labels), Predictions(logits(second), labels))


def judged(comparison: ClassComparison, limit: float = 1.0, classes: int = 10, confidence: float = 0.95) -> Verdict:
    verdict = judge(dataclasses.replace(comparison, classes=classes), limit, confidence)
    json.dumps(verdict.to_json(), allow_nan=False)
    return verdict


def test_accepts_rejects_or_leaves_open():
    accepted = judged(outcome(9000, 60, 50, 10_000))
    assert accepted.kind is VerdictKind.ACCEPTED
    assert accepted.exit_code is ExitCode.OK
    assert accepted.images_needed is None
    rejected = judged(outcome(9000, 500, 50, 10_000))
    assert rejected.kind is VerdictKind.REJECTED
    assert rejected.exit_code is ExitCode.REJECTED
    undecided = judged(outcome(900, 12, 5, 1000))
    assert undecided.kind is VerdictKind.UNDECIDED
    assert undecided.exit_code is ExitCode.UNDECIDED
    assert undecided.images_needed > 1000
    assert not undecided.chance_level
    assert accepted.to_json()["verdict"] == "accepted"


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
def test_follows_the_interval(limit):
    for lost in range(0, 200, 3):
        verdict = judged(outcome(1800, lost, 10, 2000), limit)
        low, high = verdict.interval
        wanted = "accepted" if high <= limit else "rejected" if low > limit else "undecided"
        assert verdict.kind.value == wanted


@pytest.mark.whole
@pytest.mark.parametrize(
    ("count", "gain"),
    [(1000, 0.02), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2500, 0.0), (4000, 0.05)))],
)
def test_a_drop_above_the_limit_is_rarely_accepted(count, gain):
    random, trials, limit = np.random.default_rng(7), 500, 1.0
    # True drop 1.05 points: just above.
    wrongly = sum(
        judged(simulated(random, count, 0.9, gain + 0.0105, gain), limit).kind is VerdictKind.ACCEPTED
        for _ in range(trials)
    )
    bound = 0.025
    assert wrongly / trials <= bound + 3 * math.sqrt(bound * (1 - bound) / trials)


@pytest.mark.parametrize(("count", "limit", "gain"), [(200, 0.02, 0.0), (150, 0.02, 0.01), (100, 0.05, 0.03)])
def test_a_drop_at_the_limit_is_accepted_with_half_of_the_error_probability(count, limit, gain):
    z, total = normal_quantile(0.95), 0.0
    for lost in range(50):
        for gained in range(1 if gain == 0.0 else 30):
            shares = ((lost, gain + limit), (gained, gain), (count - lost - gained, 1 - limit - 2 * gain))
            logs = math.lgamma(count + 1) + sum(n * math.log(p) - math.lgamma(n + 1) for n, p in shares if n)
            if score(limit, lost, gained, count) <= -z:
                total += math.exp(logs)
    assert total <= 0.0275


def acceptance(count: int, limit: float, gain: float, drop: float, confidence: float, draws: int) -> float:
    """How often a network of this true drop (share) is accepted, over drawn experiments."""
    shares = [gain + drop, gain, 1 - 2 * gain - drop]
    pairs, times = np.unique(
        np.random.default_rng(11).multinomial(count, shares, size=draws)[:, :2], axis=0, return_counts=True
    )
    accepted = [
        judged(outcome(int(0.9 * count), int(lost), int(gained), count), 100 * limit, 10, confidence).kind
        is VerdictKind.ACCEPTED
        for lost, gained in pairs
    ]
    return float(times @ np.array(accepted) / draws)


@pytest.mark.whole
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("limit", [0.003, 0.01, 0.02])
@pytest.mark.parametrize(("count", "gain"), [(200, 0.0), (200, 0.02), (1000, 0.0), (1000, 0.01), (5000, 0.002)])
def test_a_drop_just_above_the_limit_is_accepted_no_oftener_than_the_confidence_allows(count, gain, limit, confidence):
    draws, allowed = 3000, (1 - confidence) / 2
    share = acceptance(count, limit, gain, 1.02 * limit, confidence, draws)
    # Three standard deviations of what is drawn, and a tenth for the score interval, which is exact in the limit only.
    assert share <= 1.1 * allowed + 3 * math.sqrt(allowed * (1 - allowed) / draws)


@pytest.mark.slow
@pytest.mark.whole
def test_a_drop_within_the_limit_is_rarely_rejected_and_mostly_accepted_with_enough_images():
    random = np.random.default_rng(8)
    verdicts = [judged(simulated(random, 10_000, 0.9, 0.015, 0.011)).kind for _ in range(200)]
    assert verdicts.count(VerdictKind.REJECTED) == 0
    assert verdicts.count(VerdictKind.ACCEPTED) > 190


def test_higher_confidence_decides_less():
    comparison = outcome(9000, 110, 50, 10_000)
    assert judged(comparison, confidence=0.9).kind is VerdictKind.ACCEPTED
    assert judged(comparison, confidence=0.999).kind is VerdictKind.UNDECIDED


@pytest.mark.parametrize("top1", [0.02, 0.1, 0.11])
def test_reference_at_chance_is_undecided(top1):
    verdict = judged(outcome(int(top1 * 1000), 5, 5, 1000))
    assert verdict.kind is VerdictKind.UNDECIDED
    assert verdict.chance_level
    assert verdict.images_needed is None
    assert "guessing" in verdict.reason


def test_two_classes():
    assert judged(outcome(510, 0, 0, 1000), classes=2).chance_level
    assert judged(outcome(900, 0, 0, 1000), classes=2).kind is VerdictKind.ACCEPTED
    # Each wrong answer of one is right in the other: nothing but discordant pairs.
    assert judged(outcome(900, 900, 100, 1000), classes=2).kind is VerdictKind.REJECTED


def test_single_image():
    right = judged(outcome(1, 0, 0, 1))
    assert right.kind is VerdictKind.UNDECIDED
    assert right.images_needed >= 300
    assert judged(outcome(1, 1, 0, 1)).kind in (VerdictKind.UNDECIDED, VerdictKind.REJECTED)
    assert judged(outcome(0, 0, 0, 1)).chance_level


def test_constant_candidate_and_constant_reference():
    labels = np.arange(1000) % 10
    good = Predictions(np.eye(10, dtype=np.float32)[labels], labels)
    constant = Predictions(np.tile(np.eye(10, dtype=np.float32)[3], (1000, 1)), labels)
    verdict = judged(compare(good, constant))
    assert verdict.kind is VerdictKind.REJECTED
    assert "the same class for every image" in verdict.reason
    # 97% of the labels are class 3: a network that always says 3 is no evidence, however often it is right.
    skewed = np.where(np.arange(1000) < 970, 3, labels)
    always = Predictions(constant.logits, skewed)
    verdict = judged(compare(always, always))
    assert verdict.kind is VerdictKind.UNDECIDED
    assert verdict.chance_level


def test_not_a_number_is_rejected_even_at_chance():
    labels = np.arange(100) % 10
    good = Predictions(np.eye(10, dtype=np.float32)[labels], labels)
    bad = Predictions(good.logits.copy(), labels)
    bad.logits[7, 2] = np.nan
    verdict = judged(compare(good, bad), limit=100.0)
    assert verdict.kind is VerdictKind.REJECTED
    assert "1 of 100 images" in verdict.reason


@pytest.mark.parametrize(
    "counts", [(90, 1, 0, 100), (450, 8, 6, 500), (45, 0, 0, 50), (95, 3, 1, 100), (900, 40, 9, 1000)]
)
@pytest.mark.parametrize("limit", [0.5, 1.0, 2.5])
def test_images_needed_would_decide_and_few_fewer_would_not(counts, limit):
    comparison = outcome(*counts)
    if judged(comparison, limit).kind is not VerdictKind.UNDECIDED:
        return
    needed = comparison.images_needed(limit, 0.95)
    _, lost, gained, count = counts
    if needed is None:
        assert abs(comparison.drop - limit) < 0.1
        return

    def decides(images: float) -> bool:
        low, high = paired_difference(lost / count * images, gained / count * images, images)
        return high <= limit / 100 or low > limit / 100

    assert decides(needed)
    assert not decides(0.85 * needed)


def test_a_number_of_images_from_far_too_few_is_called_a_guess() -> None:
    few, many = judged(outcome(24, 0, 0, 27)), judged(outcome(160, 1, 1, 200))
    assert (few.kind, many.kind) == (VerdictKind.UNDECIDED, VerdictKind.UNDECIDED)
    assert f"perhaps {few.images_needed} images would decide, which from 27 is a guess" in few.reason
    assert f"about {many.images_needed} images would decide" in many.reason


def test_images_needed_without_disagreement_is_the_closed_form():
    z2 = normal_quantile(0.95) ** 2
    assert outcome(45, 0, 0, 50).images_needed(1.0, 0.95) == pytest.approx(z2 * 99, rel=0.06)
    assert outcome(45, 0, 0, 50).images_needed(0.0, 0.95) is None
    assert outcome(450, 10, 5, 500).images_needed(1.0, 0.95) is None


@pytest.mark.parametrize(
    ("limit", "classes", "confidence"),
    [(-1, 10, 0.95), (math.nan, 10, 0.95), (101, 10, 0.95), (1, 1, 0.95), (1, 10, 1.0), (1, 10, 0.2)],
)
def test_settings_that_mean_nothing(limit, classes, confidence):
    with pytest.raises(ResvitError):
        judged(outcome(90, 1, 1, 100), limit, classes, confidence)


@pytest.mark.parametrize(
    ("measured", "recorded"),
    [(37.56667, 37.6), (37.56668, 37.6), (-3.21, -3.2), (132.07548, 120.0), (math.inf, None), (math.nan, None)],
)
def test_a_record_holds_no_more_of_an_sqnr_than_rounding_leaves(measured: float, recorded: float | None) -> None:
    assert recorded_sqnr(measured) == recorded
