"""Ways to quantise one network, held against each other on images that no range was taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_quantize.check.judge import FEWEST, Answers, Errors, Gain, Judge, best_of, gain, joined
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.qdq.held_back import OURS, Tried
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.qdq.quantised import insert_plan
from resvit_quantize.settings import QuantizeSettings


@dataclass(frozen=True, eq=False)
class Built:
    """One way to quantise: its plan, put into the graph."""

    settings: QuantizeSettings
    plan: Plan
    network: ir.Model


def build(
    graph: AnalysedGraph, ranges: Ranges, settings: QuantizeSettings, statistics: Statistics | None = None
) -> Built:
    """Plan and quantise; raises as :func:`plan_quantization` and :func:`insert_plan` do."""
    plan = plan_quantization(graph, ranges, settings, statistics)
    return Built(settings, plan, insert_plan(plan, ranges, settings))


@dataclass(frozen=True, eq=False)
class Fold:
    """Ranges, and the images that judge them."""

    ranges: Ranges
    statistics: Statistics | None
    judge: Judge


@dataclass(eq=False)
class _Way:
    settings: QuantizeSettings
    answers: list[Answers]
    """By fold; none of what is not judged."""
    against: str
    """What it is told to gain over."""
    seen: dict[bool, Errors] = field(default_factory=dict)
    """Of the first look, and of all images."""


class Contest:
    """Ways by name, our own from the start; images are asked for as they are needed."""

    def __init__(
        self,
        graph: AnalysedGraph,
        folds: Sequence[Fold],
        ranges: Ranges,
        statistics: Statistics | None,
        ours: Built,
    ) -> None:
        self.graph, self.folds, self.ranges, self.statistics = graph, folds, ranges, statistics
        self._built = {OURS: ours}
        self._ways: dict[str, _Way] = {}
        self.enter({OURS: ours.settings})

    def enter(self, ways: Mapping[str, QuantizeSettings], against: str = OURS) -> None:
        """Build ways by each fold, to be asked."""
        for name, settings in ways.items():
            answers = []
            for fold in self.folds:
                own = fold.ranges is self.ranges
                built = self.final(name, settings) if own else self._by(fold, settings)
                answers.append(fold.judge.answers(built.network))
            self._ways[name] = _Way(settings, answers, against)

    def enter_built(self, name: str, built: Built, against: str, *, judged: bool = True) -> None:
        """Enter what was built elsewhere from this network and all ranges; only of one fold it is ``judged``."""
        self._built[name] = built
        answers = [self.folds[0].judge.answers(built.network)] if judged else []
        self._ways[name] = _Way(built.settings, answers, against)

    def settings(self, name: str) -> QuantizeSettings:
        """Those of a way."""
        return self._ways[name].settings

    def errors(self, name: str, *, first: bool = False) -> Errors:
        """The errors of a way on all images, or at the first look."""
        way = self._ways[name]
        if first not in way.seen:
            parts: list[Errors] = []
            for fold, answers in zip(self.folds, way.answers, strict=True):
                parts += answers.errors(self._first(fold) if first else len(fold.judge.batches))
            way.seen[first] = joined(parts)
        return way.seen[first]

    def gain(self, name: str, over: str, *, first: bool = False) -> Gain:
        """What one way gains over another."""
        return gain(self.errors(over, first=first), self.errors(name, first=first))

    def rest(self, *names: str) -> None:
        """Ask these no more, and forget what was built."""
        for name in names:
            for answers in self._ways[name].answers:
                answers.close()
            self._built.pop(name, None)

    def close_all_but(self, name: str) -> None:
        """Let the sessions of all other ways go that were asked; their errors stay."""
        for way in (way for other, way in self._ways.items() if other != name and way.seen):
            for answers in way.answers:
                answers.close()

    def winner(self) -> str:
        """The way that none beats that saw all images: ours where it is as good, by the noise of these images."""
        return best_of({name: way.seen[False] for name, way in self._ways.items() if False in way.seen}, OURS)

    def tried(self) -> tuple[Tried, ...]:
        """What was compared, in its order; what was dropped at the first look with what it showed there."""
        rows = []
        for name, way in self._ways.items():
            if not way.answers:
                continue
            first = False not in way.seen
            errors = self.errors(name, first=first)
            gained = None if name == way.against else self.gain(name, way.against, first=first)
            figures = (gained.gain_db, gained.noise_db) if gained else (0.0, 0.0)
            rows.append(Tried(name, errors.sqnr_db, errors.agreement, *figures, images=len(errors.ratios)))
        return tuple(rows)

    def final(self, name: str, settings: QuantizeSettings) -> Built:
        """What ships where a way is taken."""
        if name not in self._built:
            self._built[name] = build(self.graph, self.ranges, settings, self.statistics)
        return self._built[name]

    def _by(self, fold: Fold, settings: QuantizeSettings) -> Built:
        return build(self.graph, fold.ranges, settings, fold.statistics)

    def _first(self, fold: Fold) -> int:
        """Batches of a fold at the first look."""
        images = 0
        for count, batch in enumerate(fold.judge.batches, 1):
            images += len(next(iter(batch.values())))
            if images * len(self.folds) >= FEWEST:
                return count
        return len(fold.judge.batches)
