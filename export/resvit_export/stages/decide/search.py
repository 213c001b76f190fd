"""The stage ``search``: which layer gets which precision, from the damage and the price of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import TENSOR_CORES, Precision
from resvit_export.stage import Artifact, Stage
from resvit_export.stages.decide.predict import Pricing
from resvit_export.stages.decide.sensitivity import Measured

if TYPE_CHECKING:
    from resvit_export.records.search import SearchRecord
    from resvit_quantize.search.assignments import Problem
    from resvit_quantize.search.search import Answer, SearchResult

RESULT = "search.json"
SENSITIVITY_IMAGES = 128
_SHOWN = 12


@dataclass(frozen=True)
class Question:
    """What is searched for: a precision for each product, from its damage and its price.

    ``asked`` is the precision of the plain recipe.
    """

    pricing: Pricing
    damage: Measured
    asked: Precision

    def problem(self) -> Problem:
        """As the search takes it."""
        from resvit_quantize.search.assignments import Problem

        layers, known = self.damage.sensitivity.layers, self.pricing.target.precisions
        allowed = {
            layer.node: frozenset({Precision.FP16, *(Precision(q) for q in layer.quantized)}) & known
            for layer in layers
        }
        damage = {layer.node: {Precision(p): value for p, value in layer.damage.items()} for layer in layers}
        plain = {layer.node: self.asked if self.asked.value in layer.quantized else Precision.FP16 for layer in layers}
        return Problem(self.pricing.cost_model(), allowed, damage, plain)


@dataclass(frozen=True)
class Searched(Artifact):
    """``search.json``."""

    @functools.cached_property
    def result(self) -> SearchRecord:
        """What was chosen, and what of it people read."""
        from resvit_export.records.search import SearchRecord

        return self.read(RESULT, SearchRecord.from_json)

    @property
    def assignment(self) -> Mapping[str, str]:
        """The precision of every product by name."""
        return self.result.assignment

    @property
    def confidence(self) -> float:
        """That of the look at what was chosen."""
        return self.result.confidence

    @property
    def lines(self) -> tuple[str, ...]:
        """What was found, for people."""
        return (*self.result.sentences, *self.result.prices)


@dataclass(frozen=True)
class Search(Stage[Searched]):
    """Search once more with what the gate has answered already, and write down all of it.

    ``answers`` are by digest of an assignment, each from finished stages. With a ``latency_budget`` nobody was asked.
    """

    name: ClassVar[str] = "search"
    artifact: ClassVar[type[Artifact]] = Searched
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir",)

    question: Question
    latency_budget: str | None
    confidence: float
    answers: Mapping[str, Answer]

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write what was chosen, and everything that was looked at on the way."""
        del reporter
        from resvit_quantize.search.search import latency_budget_from, search_latency_budget, search_max_drop

        problem = self.question.problem()
        if self.latency_budget is not None:
            result = search_latency_budget(problem, latency_budget_from(self.latency_budget))
            result = dataclasses.replace(result, confidence=self.confidence)
        else:
            result = search_max_drop(problem, lambda assignment, _: self.answers[assignment.digest], self.confidence)
        fp16_us = problem.costs.total_us({})
        document: dict[str, Any] = {
            **result.to_json(),
            "plain": problem.plain_assignment().to_json(),
            "fp16_ms": fp16_us / 1e3,
            "sentences": _sentences(result, problem, fp16_us),
            "prices": _prices(result),
        }
        (folder / RESULT).write_bytes(pretty_json(document))


def _sentences(result: SearchResult, problem: Problem, fp16_us: float) -> list[str]:
    """What was found, for people."""
    chosen, plain = result.chosen, problem.plain_assignment()
    counts = {p: sum(q is p for q in chosen.precisions.values()) for p in TENSOR_CORES}
    shares = ", ".join(f"{count} in {p.value.upper()}" for p, count in counts.items() if count)
    lines = [
        f"The search chose {shares}: predicted {chosen.latency_us / 1e3:.3f} ms, against {plain.latency_us / 1e3:.3f} "
        f"of the plain recipe and {fp16_us / 1e3:.3f} in FP16."
    ]
    if result.looks:
        lines.append(
            f"{len(result.looks)} candidates were validated, the last at {result.confidence:.4%} confidence, so that "
            "all looks together err as rarely as one."
        )
    if result.accepted is False:
        lines.append("No candidate was accepted; FP16 throughout is the most accurate of them.")
    return lines


def _prices(result: SearchResult) -> list[str]:
    """What each layer left in a higher precision costs and saves, the dearest first."""
    lines = [
        f"{item.node} stays in {item.precision.value.upper()}: costs {item.costs_us:.2f} us against "
        f"{item.instead_of.value.upper()}, saves {item.saves:.1e} of noise to signal."
        for item in result.raised[:_SHOWN]
    ]
    if len(result.raised) > _SHOWN:
        lines.append(f"{len(result.raised) - _SHOWN} more layers are in search.json under 'raised'.")
    return lines
