"""Assignments of a precision to every product: the fastest, and from it step by step to the most accurate.

Damage is the noise-to-signal power that quantising one layer alone causes at the network's output; it adds up over
layers, as independent small errors do (Dong et al., "HAWQ-V2", NeurIPS 2020, rest their search on the same sum).
Raising the layers that save most damage per microsecond first gives a family of nested assignments, the greedy
solution of the knapsack problem (Dantzig, "Discrete-variable extremum problems", Operations Research 5(2), 1957).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from resvit_engines.files import canonical_json, sha256_bytes
from resvit_engines.targets.costs import CostModel
from resvit_engines.targets.layer_work import Precisions
from resvit_engines.targets.table import TENSOR_CORES, Precision

_PASSES = 8
_TIE_US = 1e-9
DISTINCT = 0.8
"""Of assignments whose damages are nearer than this ratio (1 dB) one is asked about: the gate tells them not apart."""


@dataclass(frozen=True)
class Problem:
    """What a search decides on.

    ``allowed`` gives the precisions of each product, by node name, that the placement rules and the target permit
    (FP16 always). ``damage`` is by node and precision; none in FP16. ``plain`` is what the recipe does without a
    search.
    """

    costs: CostModel
    allowed: Mapping[str, frozenset[Precision]]
    damage: Mapping[str, Mapping[Precision, float]]
    plain: Precisions

    def assignment(self, precisions: Precisions, paid: Mapping[str, float] | None = None) -> Assignment:
        """An assignment with its predicted latency and damage; ``paid`` as :class:`Assignment` has it."""
        complete = {node: precisions.get(node, Precision.FP16) for node in self.allowed}
        damage = math.fsum(self.damage_of(node, precision) for node, precision in complete.items())
        return Assignment(complete, self.costs.total_us(complete), damage, dict(paid or {}))

    def damage_of(self, node: str, precision: Precision) -> float:
        """Noise-to-signal power that ``node`` causes in this precision."""
        return 0.0 if precision is Precision.FP16 else self.damage.get(node, {}).get(precision, 0.0)

    def plain_assignment(self) -> Assignment:
        """What the recipe does without a search."""
        return self.assignment(self.plain)


@dataclass(frozen=True)
class Assignment:
    """One assignment, with its predicted microseconds per call and damage.

    ``paid`` gives the microseconds that raising each node added when it was raised, after those before it; they sum
    up to what the assignment takes longer than the fastest one.
    """

    precisions: Precisions
    latency_us: float
    damage: float
    paid: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def digest(self) -> str:
        """Identifies the assignment: 12 hexadecimal digits."""
        return sha256_bytes(canonical_json(self.precision_names))[:12]

    @property
    def precision_names(self) -> dict[str, str]:
        """Plain JSON values: precision by node."""
        return {node: precision.value for node, precision in self.precisions.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the assignment."""
        counts = {p.value: sum(q is p for q in self.precisions.values()) for p in TENSOR_CORES}
        return {"digest": self.digest, "ms": self.latency_us / 1e3, "damage": self.damage, "products": counts}


@dataclass(frozen=True)
class Raised:
    """A product left in a higher precision than the fastest one: what that costs, and what it saves."""

    node: str
    precision: Precision
    instead_of: Precision
    costs_us: float
    saves: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "node": self.node,
            "precision": self.precision.value,
            "instead_of": self.instead_of.value,
            "costs_us": self.costs_us,
            "saves": self.saves,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Raised:
        """Read what ``to_json`` wrote."""
        precisions = {key: Precision(document[key]) for key in ("precision", "instead_of")}
        return cls(**{**document, **precisions})


def fastest_precisions(problem: Problem) -> dict[str, Precision]:
    """For each product the precision with the least predicted time, the others given; on a tie 8 bits.

    A tensor's format depends on both of its ends, so products are gone through until nothing changes, from the
    plain recipe's choice on: the result is never slower than that.
    """
    current = {node: problem.plain.get(node, Precision.FP16) for node in problem.allowed}
    for _ in range(_PASSES):
        before = dict(current)
        for node, allowed in problem.allowed.items():
            changes = {p: problem.costs.change_us(current, node, p) for p in TENSOR_CORES if p in allowed}
            least = min(changes.values())
            if least > -_TIE_US and current[node] is not Precision.FP16:
                continue
            fast = [p for p, change in changes.items() if change <= least + _TIE_US]
            current[node] = min(fast, key=lambda p: _preference(p, problem.plain.get(node)))
        if current == before:
            break
    return current


def nested_assignments(problem: Problem) -> tuple[Assignment, ...]:
    """From the fastest assignment to all FP16, raising what saves most damage per microsecond first.

    No assignment is both slower and more damaging than another. Deterministic: ties go by name.
    """
    assignments = [problem.assignment(fastest_precisions(problem))]
    while (step := _best_step(problem, assignments[-1].precisions)) is not None:
        assignments.append(_raise(problem, assignments[-1], *step))
    kept = [assignments[-1]]
    for assignment in reversed(assignments[:-1]):
        if assignment.latency_us < kept[-1].latency_us:
            kept.append(assignment)
    return tuple(reversed(kept))


def distinct_assignments(assignments: tuple[Assignment, ...]) -> tuple[Assignment, ...]:
    """Every assignment that does clearly less damage than the one kept before it; always the first and the last."""
    kept = [assignments[0]]
    for assignment in assignments[1:]:
        if assignment.damage <= DISTINCT * kept[-1].damage:
            kept.append(assignment)
    if kept[-1] is not assignments[-1]:
        kept.append(assignments[-1])
    return tuple(kept)


def best_within(problem: Problem, fastest: Assignment, budget_us: float) -> Assignment | None:
    """The least damaging assignment found that is predicted to take at most ``budget_us``.

    ``None`` if even the fastest is slower.

    Greedy from the fastest: raises, of the layers that still fit, the one that saves most per microsecond.
    """
    if fastest.latency_us > budget_us:
        return None
    assignment = fastest
    while (step := _best_step(problem, assignment.precisions, budget_us - assignment.latency_us)) is not None:
        assignment = _raise(problem, assignment, *step)
    plain = problem.plain_assignment()
    fits = plain.latency_us <= budget_us and plain.damage < assignment.damage
    return plain if fits else assignment


def raised_products(problem: Problem, chosen: Assignment, fastest: Assignment) -> tuple[Raised, ...]:
    """What is left above the fastest precision, the dearest first.

    ``costs_us`` is what raising the product added after those raised before it: negative where its neighbours were
    raised already, so that formats need no change any more.
    """
    found = []
    for node, precision in chosen.precisions.items():
        low = fastest.precisions[node]
        if problem.damage_of(node, precision) < problem.damage_of(node, low) and precision is not low:
            costs = chosen.paid.get(node, -problem.costs.change_us(chosen.precisions, node, low))
            saves = problem.damage_of(node, low) - problem.damage_of(node, precision)
            found.append(Raised(node, precision, low, costs, saves))
    return tuple(sorted(found, key=lambda item: (-item.costs_us, item.node)))


def _raise(problem: Problem, assignment: Assignment, node: str, precision: Precision) -> Assignment:
    added = assignment.paid.get(node, 0.0) + problem.costs.change_us(assignment.precisions, node, precision)
    return problem.assignment({**assignment.precisions, node: precision}, {**assignment.paid, node: added})


def _preference(precision: Precision, plain: Precision | None) -> int:
    """8 bits before FP16, and of those what the recipe asks for."""
    if precision is Precision.FP16:
        return 3
    return 0 if precision is plain else 1 if precision is Precision.INT8 else 2


def _best_step(problem: Problem, current: Precisions, spare_us: float = math.inf) -> tuple[str, Precision] | None:
    """The raise that saves most damage per microsecond; what costs no time comes first, most saved before less."""
    best: tuple[tuple[float, float, float, str], str, Precision] | None = None
    for node, precision in _steps(problem, current):
        saves = problem.damage_of(node, current[node]) - problem.damage_of(node, precision)
        costs = problem.costs.change_us(current, node, precision)
        if costs > spare_us:
            continue
        rate = math.inf if costs <= _TIE_US else saves / costs
        key = (-rate, -saves, costs, f"{node} {precision.value}")
        if best is None or key < best[0]:
            best = key, node, precision
    return None if best is None else (best[1], best[2])


def _steps(problem: Problem, current: Precisions) -> Iterator[tuple[str, Precision]]:
    """All raises: to another 8-bit format that does less damage, and to FP16."""
    for node, precision in current.items():
        if precision is Precision.FP16:
            continue
        yield node, Precision.FP16
        known = problem.damage.get(node, {})
        for other in (Precision.INT8, Precision.FP8):
            if other in problem.allowed[node] and other in known and known[other] < known.get(precision, 0.0):
                yield node, other
