from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.costs import CostModel
from resvit_engines.targets.layer_work import LayerKind, LayerWork, Read
from resvit_engines.targets.table import Precision, find_target
from resvit_quantize.search.assignments import (
    Assignment,
    Problem,
    best_within,
    distinct_assignments,
    fastest_precisions,
    nested_assignments,
    raised_products,
)
from resvit_quantize.search.search import (
    Answer,
    SearchResult,
    confidence_of_look,
    latency_budget_from,
    search_latency_budget,
    search_max_drop,
)

FP16, INT8, FP8 = Precision.FP16, Precision.INT8, Precision.FP8


def problem_of(
    macs: list[int], damage: list[dict[Precision, float]], target: str = "h100", plain: Precision = INT8
) -> Problem:
    """A chain of convolutions with these multiply-accumulates and damages, the first input from a cast kernel."""
    works = [LayerWork("cast", LayerKind.POINTWISE, (Read("x", 64),), "input", 64)]
    for index, work in enumerate(macs):
        read = (Read(works[-1].writes, 64, follows=True),)
        works.append(LayerWork(f"c{index}", LayerKind.CONV, read, f"t{index}", 64, work, 64, nodes=(f"c{index}",)))
    names = [f"c{index}" for index in range(len(macs))]
    allowed = {name: frozenset({FP16, *known}) for name, known in zip(names, damage, strict=True)}
    plain_precisions = {name: plain if plain in allowed[name] else FP16 for name in names}
    costs = CostModel(works, find_target(target))
    return Problem(costs, allowed, dict(zip(names, damage, strict=True)), plain_precisions)


BIG = 4_000_000_000
"""Multiply-accumulates beside which formats and kernels cost nothing."""

amounts = st.floats(1e-9, 1e-1)
damages = st.one_of(
    st.fixed_dictionaries({INT8: amounts}), st.fixed_dictionaries({INT8: amounts, FP8: amounts}), st.just({})
)
problems = st.lists(st.tuples(st.integers(0, 10**9), damages), min_size=1, max_size=8).flatmap(
    lambda layers: st.builds(
        lambda target, plain: problem_of([m for m, _ in layers], [d for _, d in layers], target, plain),
        st.sampled_from(["h100", "rtx-4090"]),
        st.sampled_from([INT8, FP8]),
    )
)


def gate(limit: float, asked: list[tuple[Assignment, float]] | None = None):
    """Accepts what damages at most ``limit``."""

    def accepts(assignment: Assignment, confidence: float) -> Answer:
        if asked is not None:
            asked.append((assignment, confidence))
        accepted = assignment.damage <= limit
        return Answer(accepted, {"verdict": "accepted" if accepted else "rejected"})

    return accepts


@pytest.mark.whole
@settings(deadline=None, max_examples=60)
@given(problems)
def test_the_plans_are_nested_and_neither_slower_and_worse(problem: Problem) -> None:
    assignments = nested_assignments(problem)
    assert assignments == nested_assignments(problem)
    assert assignments[0].latency_us <= problem.plain_assignment().latency_us + 1e-6
    assert set(assignments[-1].precisions.values()) == {FP16}
    for before, after in itertools.pairwise(assignments):
        assert before.latency_us < after.latency_us
        assert before.damage >= after.damage - 1e-12
        for node, precision in before.precisions.items():
            assert problem.damage_of(node, after.precisions[node]) <= problem.damage_of(node, precision)
    for assignment in assignments:
        assert assignment.latency_us == pytest.approx(problem.costs.total_us(assignment.precisions))
        assert all(p in problem.allowed[node] for node, p in assignment.precisions.items())
        raised = raised_products(problem, assignment, assignments[0])
        assert sum(assignment.paid.values()) - sum(assignments[0].paid.values()) == pytest.approx(
            assignment.latency_us - assignments[0].latency_us, abs=1e-6
        )
        assert {item.node for item in raised} <= set(assignment.paid)
    kept = distinct_assignments(assignments)
    assert (kept[0], kept[-1]) == (assignments[0], assignments[-1])


@pytest.mark.whole
@settings(deadline=None, max_examples=60)
@given(problems, st.floats(0.0, 0.2))
def test_the_search_is_never_worse_than_the_plain_recipe(problem: Problem, limit: float) -> None:
    plain = problem.plain_assignment()
    result = search_max_drop(problem, gate(limit), 0.95)
    assert result.accepted
    assert result.chosen.damage <= limit
    if plain.damage <= limit:
        assert result.chosen == plain
        assert len(result.looks) == 1
    else:
        looked = [look.assignment for look in result.looks if look.answer.accepted]
        assert result.chosen == min(looked, key=lambda assignment: assignment.latency_us)
        accepted = [
            assignment
            for assignment in result.assignments
            if assignment.damage <= limit and assignment.digest != plain.digest
        ]
        assert result.chosen.latency_us == min(assignment.latency_us for assignment in accepted)
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.whole
@settings(deadline=None, max_examples=60)
@given(problems, st.floats(0.3, 1.2))
def test_a_budget_is_kept_or_the_nearest_is_named(problem: Problem, share: float) -> None:
    fp16_us = problem.costs.total_us({})
    fastest = nested_assignments(problem)[0].latency_us
    budget = latency_budget_from(f"{share:.4f}x")
    if fastest > budget.microseconds(fp16_us):
        with pytest.raises(ResvitError) as caught:
            search_latency_budget(problem, budget)
        assert caught.value.code is ExitCode.IMPOSSIBLE
        named = latency_budget_from(caught.value.fix.split("--latency-budget ")[1].split(" or ")[0])
        assert search_latency_budget(problem, named).chosen.latency_us <= named.microseconds(fp16_us)
        return
    result = search_latency_budget(problem, budget)
    assert result.accepted is None
    assert result.chosen.latency_us <= budget.microseconds(fp16_us) + 1e-6
    plain = problem.plain_assignment()
    if plain.latency_us <= budget.microseconds(fp16_us):
        assert result.chosen.damage <= plain.damage + 1e-15


@given(problems, st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 9))
def test_trials_ahead_change_nothing_and_every_question_was_among_them(
    problem: Problem, said: list[bool], at_once: int
) -> None:
    def asked(tried: list[list[tuple[str, float]]] | None) -> tuple[SearchResult, list[tuple[str, float]]]:
        questions: list[tuple[str, float]] = []

        def accepts(assignment: Assignment, confidence: float) -> Answer:
            questions.append((assignment.digest, confidence))
            if tried is not None and len(questions) > 1:  # the plain recipe is asked about before any
                assert questions[-1] in itertools.chain(*tried)
            return Answer(said[len(questions) - 1], {})

        def try_ahead(trials: Sequence[tuple[Assignment, float]]) -> None:
            assert tried is not None
            tried.append([(assignment.digest, confidence) for assignment, confidence in trials])

        ahead = None if tried is None else try_ahead
        return search_max_drop(problem, accepts, 0.95, ahead, at_once), questions

    tried: list[list[tuple[str, float]]] = []
    assert asked(None) == asked(tried)
    together = list(itertools.chain(*tried))
    assert len(together) == len(set(together))
    assert all(0 < len(trials) <= at_once for trials in tried)


def test_of_seven_trials_at_once_three_questions_are_answered() -> None:
    problem = problem_of([BIG] * 40, [{INT8: 2.0**-index} for index in range(40)])
    tried: list[int] = []
    asked: list[tuple[Assignment, float]] = []
    search_max_drop(problem, gate(2.0**-30, asked), 0.95, lambda trials: tried.append(len(trials)), 7)
    assert len(asked) - 1 in (4, 5, 6)
    assert len(tried) == 2


def test_the_layer_that_saves_most_per_microsecond_is_raised_first() -> None:
    # Equal damage: the smaller layers cost less to raise. FP16 of c0 costs four times that of c1.
    problem = problem_of([4 * BIG, BIG, 2 * BIG], [{INT8: 0.01}, {INT8: 0.01}, {INT8: 0.01}])
    order = [[n for n, p in assignment.precisions.items() if p is FP16] for assignment in nested_assignments(problem)]
    assert order == [[], ["c1"], ["c1", "c2"], ["c0", "c1", "c2"]]
    # Ten times the damage outweighs four times the time.
    problem = problem_of([4 * BIG, BIG], [{INT8: 0.1}, {INT8: 0.01}])
    assert list(nested_assignments(problem)[1].precisions.values()) == [FP16, INT8]
    # Twice the damage does not.
    problem = problem_of([4 * BIG, BIG], [{INT8: 0.02}, {INT8: 0.01}])
    assert list(nested_assignments(problem)[1].precisions.values()) == [INT8, FP16]


def test_fp8_serves_where_it_does_less_damage() -> None:
    problem = problem_of([BIG, BIG], [{INT8: 0.01, FP8: 0.001}, {INT8: 0.001, FP8: 0.01}])
    assignments = nested_assignments(problem)
    # Equally fast and less damaging: INT8 for c0 is in no plan at all.
    assert assignments[0].precisions == {"c0": FP8, "c1": INT8}
    assert all(assignment.precisions["c0"] is not INT8 for assignment in assignments)
    result = search_max_drop(problem, gate(0.005), 0.95)
    assert result.chosen.precisions == {"c0": FP8, "c1": INT8}


def test_small_layers_are_fastest_in_fp16_where_8_bits_add_kernels() -> None:
    problem = problem_of([10, BIG], [{INT8: 0.01}, {INT8: 0.01}], target="rtx-4090")
    assert fastest_precisions(problem) == {"c0": FP16, "c1": INT8}


def test_each_look_is_stricter_and_all_together_err_as_once() -> None:
    assert confidence_of_look(0.95, 1) == pytest.approx(0.95)
    asked: list[tuple[Assignment, float]] = []
    layers = 40
    damage = [{INT8: 10.0 ** (-index / 4)} for index in range(layers)]
    result = search_max_drop(problem_of([BIG] * layers, damage), gate(1e-4, asked), 0.95)
    assert [c for _, c in asked] == [confidence_of_look(0.95, k + 1) for k in range(len(asked))]
    assert 4 < len(asked) < 9
    assert sum((1 - c) / 2 for _, c in asked) <= 0.05
    assert result.confidence == next(c for assignment, c in asked if assignment == result.chosen)
    assert len({assignment.digest for assignment, _ in asked}) == len(asked)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("trials", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_several_looks_rarely_accept_what_is_above_the_limit(trials: int) -> None:
    """Every plan truly beyond the limit, each look a fresh draw of the gate's luck: at most alpha are accepted."""
    problem = problem_of([BIG] * 12, [{INT8: 0.1 * 0.7**index} for index in range(12)])
    luck, wrongly = random.Random(3), 0
    for _ in range(trials):
        result = search_max_drop(problem, lambda _, c: Answer(luck.random() < (1 - c) / 2, {}), 0.9)
        wrongly += bool(result.accepted)
    assert wrongly / trials <= 0.1


def test_nothing_accepted_ends_in_all_fp16_with_its_answer() -> None:
    problem = problem_of([BIG, BIG], [{INT8: 0.1}, {INT8: 0.1}])
    result = search_max_drop(
        problem, lambda assignment, _: Answer(accepted=False, document={"damage": assignment.damage}), 0.95
    )
    assert result.accepted is False
    assert set(result.chosen.precisions.values()) == {FP16}
    assert result.looks[-1].answer.document == {"damage": 0.0}


def test_what_is_left_high_is_named_with_its_price() -> None:
    problem = problem_of([4 * BIG, BIG], [{INT8: 0.1}, {INT8: 0.01}])
    fastest, assignment = nested_assignments(problem)[:2]
    assert assignment.precisions == {"c0": FP16, "c1": INT8}
    (item,) = raised_products(problem, assignment, fastest)
    assert (item.node, item.precision, item.instead_of, item.saves) == ("c0", FP16, INT8, 0.1)
    # 4 x 4e9 MACs at 989 and 1979 TFLOPS, half of it reached: 64.7 us less 32.3; 3 us for the kernel that makes
    # INT8 of what an FP16 convolution writes.
    assert item.costs_us == pytest.approx(35.4, abs=0.1)
    assert best_within(problem, fastest, assignment.latency_us) == assignment
    assert best_within(problem, fastest, fastest.latency_us - 1) is None


@pytest.mark.parametrize("text", ["", "3.5", "ms", "0x", "0ms", "-1ms", "1e3ms", "nanx", "3,5ms", "0.7 y"])
def test_budgets_that_mean_nothing(text: str) -> None:
    with pytest.raises(ResvitError, match="latency budget"):
        latency_budget_from(text)


def test_budgets() -> None:
    assert latency_budget_from(" 3.5ms").microseconds(1.0) == 3500.0
    assert latency_budget_from("0.7x").microseconds(1000.0) == pytest.approx(700.0)
