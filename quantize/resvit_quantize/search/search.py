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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.costs import Prediction
from resvit_engines.targets.table import TENSOR_CORES, Builder, Precision, Target
from resvit_engines.targets.tensorrt_rules import RATIO_ERROR
from resvit_quantize.search.assignments import (
    Assignment,
    Problem,
    Raised,
    best_within,
    distinct_assignments,
    nested_assignments,
    raised_products,
)

_NOTABLE = 1.02
"""A predicted gain below this is none: the model is not that exact."""


@dataclass(frozen=True)
class Answer:
    """What the gate said of an assignment; undecided and rejected both count as not accepted."""

    accepted: bool
    document: Mapping[str, Any]
    """The verdict, as plain JSON values."""


Accepts = Callable[[Assignment, float], Answer]
"""Asks the gate about an assignment at a confidence."""


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


def search_max_drop(problem: Problem, accepts: Accepts, confidence: float) -> SearchResult:
    """Find the fastest assignment that the gate accepts, by bisection over the nested assignments.

    The plain recipe is asked about first; accepted, it is the result. If no assignment is accepted, all FP16 is the
    result, with the answer that belongs to it.
    """
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
        if assignments[middle].digest != plain.digest and look(assignments[middle]):
            found, high = looks[-1], middle - 1
        else:
            low = middle + 1
    last = found or next(item for item in looks if item.assignment.digest == assignments[-1].digest)
    raised = raised_products(problem, last.assignment, assignments[0])
    return SearchResult(last.assignment, last.confidence, last.answer.accepted, tuple(looks), raised, assignments)


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


@dataclass(frozen=True)
class Worth:
    """The predicted gain over FP16 as a factor, a sentence about it, and whether there is any."""

    gain: float
    faster: bool
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"gain": self.gain, "faster": self.faster, "sentence": self.sentence}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Worth:
        """Read what ``to_json`` wrote; more than that is passed over."""
        return cls(document["gain"], document["faster"], document["sentence"])


def worth_measured(target: Target) -> Worth:
    """What is said of a target whose times are measured, not predicted."""
    sentence = f"No time is predicted for {target.title}: 'resvit-export bench' measures INT8 against FP32."
    return Worth(1.0, faster=False, sentence=sentence)


def worth_it(fp16: Prediction, chosen: Prediction, target: Target) -> Worth:
    """Whether 8 bits are predicted to pay on ``target``, against the same network in FP16."""
    used = {layer.precision for layer in chosen.layers} - {Precision.FP16}
    basis = "predicted, from measured layer times" if any(layer.measured for layer in chosen.layers) else "predicted"
    if not used:
        sentence = f"FP16: {basis} {fp16.milliseconds:.3f} ms on {target.title}."
        return Worth(1.0, faster=False, sentence=sentence)
    label = " and ".join(p.value.upper() for p in TENSOR_CORES if p in used)
    gain = fp16.total_us / chosen.total_us
    detail = (
        f"{chosen.milliseconds:.3f} against {fp16.milliseconds:.3f} ms, "
        f"{chosen.kernels} against {fp16.kernels} kernels, "
        f"{chosen.activation_bytes / 1e6:.1f} against {fp16.activation_bytes / 1e6:.1f} MB of activations"
    )
    faster = gain >= _NOTABLE
    fixed_us = sum(layer.fixed_us for layer in fp16.layers)
    if not faster and fixed_us > fp16.total_us / 2:
        detail += f"; {fixed_us / 1e3:.3f} ms of FP16's are the fixed cost of kernels, which 8 bits do not change"
    said = f"{label} is {basis} {gain:.2f}x as fast as" if faster else f"{label} is {basis} not faster than"
    sentence = f"{said} FP16 on {target.title}: {detail}"
    held = target.builder is not Builder.RTX and not any(layer.measured for layer in chosen.layers)
    if held and abs(gain - 1) < RATIO_ERROR:
        sentence += f"; of real engines this was told up to {RATIO_ERROR:.0%} wrong, so time both"
    elif not faster:
        sentence += "; build with --precision fp16"
    return Worth(gain, faster=faster, sentence=f"{sentence}.")
