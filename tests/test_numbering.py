"""A baseline on wrong class numbers is recognised from the answers themselves, and a merely weak one is not."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_calibrate.answers.boxes import pairs_of
from resvit_calibrate.answers.classes import Predictions, compare
from resvit_calibrate.answers.mask_counts import pairs_in_map
from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.gate.numbering import Pairs, other_numbering
from resvit_calibrate.images.targets import BoxTarget
from resvit_engines.answers.boxes import Boxes

CLASSES = 10


def answers(random: np.random.Generator, truth: np.ndarray, right: float, outputs: int = CLASSES) -> np.ndarray:
    """What a network answers that is ``right`` so often, and else guesses."""
    return np.where(random.random(len(truth)) < right, truth, random.integers(0, outputs, len(truth)))


def pairs(known: np.ndarray, answered: np.ndarray) -> Pairs:
    return Pairs(np.arange(len(known)), known, answered, np.ones(len(known), np.int64))


def predictions(known: np.ndarray, answered: np.ndarray, outputs: int = CLASSES) -> Predictions:
    logits = np.random.default_rng(0).normal(0, 0.1, (len(known), outputs)).astype(np.float32)
    logits[np.arange(len(known)), answered] += 4
    return Predictions(logits, known)


@pytest.mark.whole
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.permutations(range(CLASSES)), st.floats(0.6, 1.0), st.integers(120, 400))
def test_a_permutation_is_found_and_the_right_order_is_left_alone(
    seed: int, order: list[int], right: float, count: int
) -> None:
    random = np.random.default_rng(seed)
    truth = np.arange(count) % CLASSES
    answered = answers(random, truth, right)
    assert other_numbering(pairs(truth, answered), 0.95) is None
    # Class ``order[k]`` of the data is output k.
    found = other_numbering(pairs(np.array(order)[truth], answered), 0.95)
    expected = {known: output for output, known in enumerate(order)}
    if all(known == output for known, output in expected.items()):
        assert found is None
    elif found is not None:
        assert found.outputs == expected
    else:
        assert sum(known != output for known, output in expected.items()) < 3


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.5), st.integers(8, 200))
def test_a_weak_network_is_not_told_that_its_classes_are_wrong(seed: int, right: float, count: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.integers(0, CLASSES, count)
    assert other_numbering(pairs(truth, answers(random, truth, right)), 0.95) is None


def test_classes_that_a_network_takes_for_others_are_no_other_numbering() -> None:
    truth = np.arange(400) % CLASSES
    answered = truth.copy()
    answered[truth == 3] = 4  # one class is always taken for its neighbour
    answered[truth == 6] = 2
    assert other_numbering(pairs(truth, answered), 0.95) is None


def test_two_classes_that_are_exchanged_are_found() -> None:
    truth = np.arange(400) % CLASSES
    exchanged = np.select([truth == 2, truth == 6], [6, 2], truth)
    found = other_numbering(pairs(exchanged, truth), 0.95)
    assert found is not None
    assert found.moved == {2: 6, 6: 2}


def test_three_folders_on_ten_outputs_are_not_accepted_and_the_map_is_named() -> None:
    outputs = np.array([1, 5, 9])
    truth = np.arange(60) % 3
    reference = predictions(truth, outputs[truth])
    names = ("trouser", "sandal", "zboot")
    comparison = compare(reference, reference)
    verdict = judge(comparison, 8.0, 0.95, names)
    assert verdict.kind is VerdictKind.UNDECIDED
    listed = re.search(r"--classes with (\{.*?\})", verdict.reason)
    assert listed is not None
    assert json.loads(listed[1]) == {"trouser": 1, "sandal": 5, "zboot": 9}
    right = compare(predictions(outputs[truth], outputs[truth]), predictions(outputs[truth], outputs[truth]))
    assert right.numbering is None
    assert judge(right, 8.0).kind is VerdictKind.ACCEPTED


@pytest.mark.parametrize("step", [-1, 1])
def test_a_background_counted_first_is_said_as_such(step: int) -> None:
    truth = 1 + np.arange(200) % 8
    found = other_numbering(pairs(truth, truth + step), 0.95)
    assert found is not None
    assert f"every class of the data is 1 {'lower' if step > 0 else 'higher'} than the network's" in found.words()


def test_boxes_are_paired_by_place_whatever_their_class() -> None:
    box = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
    known = [BoxTarget(box, np.array([k % 4, (k + 1) % 4]), np.array([False, False])) for k in range(40)]
    found = [Boxes(t.boxes, np.array([0.9, 0.8], np.float32), t.classes) for t in known]
    assert other_numbering(pairs_of(found, known), 0.95) is None
    shifted = [replace(item, classes=item.classes + 1) for item in found]
    other = other_numbering(pairs_of(shifted, known), 0.95)
    assert other is not None
    assert other.outputs == {0: 1, 1: 2, 2: 3, 3: 4}
    crowds = [replace(item, crowd=np.array([True, True])) for item in known]
    assert len(pairs_of(shifted, crowds).known) == 0
    assert other_numbering(pairs_of(shifted, crowds), 0.95) is None


def test_pixels_count_class_by_class() -> None:
    random = np.random.default_rng(0)
    rows, wrong = [], []
    for image in range(30):
        known = np.where(random.random((16, 16)) < 0.9, 0, random.integers(1, 4, (16, 16))).astype(np.int16)
        known[0] = -1
        found = np.where(random.random((16, 16)) < 0.9, known, 0).astype(np.int16)
        found[known < 0] = 3
        rows.append(pairs_in_map(image, found, known))
        moved = np.select([known == 1, known == 2, known == 3], [2, 3, 1], known).astype(np.int16)
        wrong.append(pairs_in_map(image, found, moved))
    assert np.concatenate(rows)[:, 3].sum() == 30 * 15 * 16
    assert other_numbering(Pairs(*np.concatenate(rows).T), 0.95) is None
    other = other_numbering(Pairs(*np.concatenate(wrong).T), 0.95)
    assert other is not None
    assert other.moved == {2: 1, 3: 2, 1: 3}
