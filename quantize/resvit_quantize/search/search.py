"""The mixed-precision search: the fastest assignment that the accuracy gate accepts, or the most accurate in a time.

The gate looks at one validation set several times, and each look is a chance to accept a bad network by luck. So the
error that the confidence level leaves, alpha = 1 - confidence, is spent over the looks: look k may wrongly accept with
a probability of alpha * 2^-k, which adds up to at most alpha however many there are (the union bound; the spending
scheme follows Lan and DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 70(3), 1983). The
gate's interval is two-sided, so that look k uses the interval at confidence 1 - alpha * 2^(1-k): the first look, at
the plain recipe, is the ordinary one.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_quantize.search.assignments import (
    Assignment,
    Problem,
    Raised,
    best_within,
    distinct_assignments,
    nested_assignments,
    raised_products,
)


@dataclass(frozen=True)
class Answer:
    """What the gate said of an assignment; undecided and rejected both count as not accepted."""

    accepted: bool
    document: Mapping[str, Any]
    """The verdict, as plain JSON values."""


Accepts = Callable[[Assignment, float], Answer]
"""Asks the gate about an assignment at a confidence."""
TryAhead = Callable[[Sequence[tuple[Assignment, float]]], None]
"""Does what it takes to answer several such questions, some of which may never be asked."""


@dataclass(frozen=True)
class Look:
    """One question to the gate."""

    assignment: Assignment
    confidence: float
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.assignment.to_json(), "confidence": self.confidence, **self.answer.document}


@dataclass(frozen=True)
class SearchResult:
    """What was chosen, and everything that was looked at on the way.

    ``confidence`` is that of the look at the chosen assignment; ``accepted`` is ``None`` where the gate was not asked.
    """

    chosen: Assignment
    confidence: float
    accepted: bool | None
    looks: tuple[Look, ...]
    raised: tuple[Raised, ...]
    assignments: tuple[Assignment, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "chosen": self.chosen.to_json(),
            "assignment": self.chosen.precision_names,
            "confidence": self.confidence,
            "accepted": self.accepted,
            "looks": [look.to_json() for look in self.looks],
            "raised": [item.to_json() for item in self.raised],
            "plans": [each.to_json() for each in self.assignments],
        }


def confidence_of_look(confidence: float, look: int) -> float:
    """The two-sided confidence of look ``look`` (1, 2, …), so that all together err with 1 - ``confidence``."""
    return 1.0 - (1.0 - confidence) * 2.0 ** (1 - look)


def search_max_drop(
    problem: Problem, accepts: Accepts, confidence: float, try_ahead: TryAhead | None = None, at_once: int = 1
) -> SearchResult:
    """Find the fastest assignment that the gate accepts, by bisection over the nested assignments.

    The plain recipe is asked about first; accepted, it is the result. If no assignment is accepted, all FP16 is the
    result, with the answer that belongs to it.

    ``try_ahead`` gets the next question before it comes, with others that may follow, ``at_once`` together: what is
    asked, and in which order, is the same without it.
    """
    ahead: set[str] = set()
    looks: list[Look] = []

    def look(assignment: Assignment) -> bool:
        tightened = confidence_of_look(confidence, len(looks) + 1)
        looks.append(Look(assignment, tightened, accepts(assignment, tightened)))
        return looks[-1].answer.accepted

    plain = problem.plain_assignment()
    if look(plain):
        return SearchResult(plain, confidence, accepted=True, looks=tuple(looks), raised=())
    assignments = distinct_assignments(nested_assignments(problem))
    found: Look | None = None
    low, high = 0, len(assignments) - 1
    while low <= high:
        middle = (low + high) // 2
        if try_ahead is not None and assignments[middle].digest not in {plain.digest, *ahead}:
            trials = [
                (assignments[place], confidence_of_look(confidence, len(looks) + 1 + later))
                for place, later in _next_trials(assignments, plain, (low, high), at_once)
            ]
            ahead |= {assignment.digest for assignment, _ in trials}
            try_ahead(trials)
        if assignments[middle].digest != plain.digest and look(assignments[middle]):
            found, high = looks[-1], middle - 1
        else:
            low = middle + 1
    last = found or next(item for item in looks if item.assignment.digest == assignments[-1].digest)
    raised = raised_products(problem, last.assignment, assignments[0])
    return SearchResult(last.assignment, last.confidence, last.answer.accepted, tuple(looks), raised, assignments)


def _next_trials(
    assignments: Sequence[Assignment], plain: Assignment, between: tuple[int, int], count: int
) -> list[tuple[int, int]]:
    """The next question of a bisection and those that may follow, by place, with how many are asked before it.

    The nearest first: after each question there are two that may come.
    """
    found: list[tuple[int, int]] = []
    waiting = deque([(*between, 0)])
    while waiting and len(found) < count:
        low, high, later = waiting.popleft()
        if low > high:
            continue
        middle = (low + high) // 2
        if assignments[middle].digest == plain.digest:  # whose answer is known
            waiting.appendleft((middle + 1, high, later))
            continue
        found.append((middle, later))
        waiting += [(low, middle - 1, later + 1), (middle + 1, high, later + 1)]
    return found


@dataclass(frozen=True)
class LatencyBudget:
    """A predicted latency not to be exceeded: in milliseconds, or relative to FP16's (``relative``)."""

    value: float
    relative: bool

    def microseconds(self, fp16_us: float) -> float:
        """The budget in microseconds, where FP16 is predicted to take ``fp16_us``."""
        return self.value * fp16_us if self.relative else self.value * 1e3


def latency_budget_from(text: str) -> LatencyBudget:
    """Read ``3.5ms`` or ``0.7x``.

    Raises:
        ResvitError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|x)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise ResvitError(
            f"The latency budget '{text}' is neither milliseconds nor a share of FP16's latency.",
            "Write it as in --latency-budget 3.5ms, or --latency-budget 0.7x for 0.7 of the predicted FP16 latency.",
        )
    return LatencyBudget(float(match[1]), match[2] == "x")


def search_latency_budget(problem: Problem, budget: LatencyBudget) -> SearchResult:
    """The least damaging assignment whose predicted latency is within the budget; the gate is not asked.

    Raises:
        ResvitError: IMPOSSIBLE where even the fastest assignment is slower, with what can be reached.
    """
    fp16_us = problem.costs.total_us({})
    assignments = nested_assignments(problem)
    assignment = best_within(problem, assignments[0], budget.microseconds(fp16_us))
    if assignment is None:
        target, fastest = problem.costs.target, assignments[0].latency_us
        wanted = budget.microseconds(fp16_us) / 1e3
        # Rounded up, so that what is suggested can be reached.
        reach = -(-fastest // 1) / 1e3
        share = -(-fastest * 1e3 // fp16_us) / 1e3
        raise ResvitError(
            f"{wanted:.3f} ms cannot be reached on {target.title}: the fastest assignment is predicted to take "
            f"{fastest / 1e3:.3f} ms, FP16 {fp16_us / 1e3:.3f} ms.",
            f"The nearest is --latency-budget {reach:.3f}ms or {share:.3f}x; a smaller model or input goes further.",
            ExitCode.IMPOSSIBLE,
        )
    raised = raised_products(problem, assignment, assignments[0])
    return SearchResult(
        assignment, 0.0, accepted=None, looks=(), raised=raised, assignments=distinct_assignments(assignments)
    )
