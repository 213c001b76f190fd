"""``--effort fast``, judged: our methods beside plain ranges on images that no range was taken from.

Every method of ours serves on most networks, and none on all: factors that fit the calibration images may cut what
other images hold. So the outputs of the quantised graph are held against the float network's on a few held-back images,
and so are those of the same graph with plain ranges, by the maximum and by the percentile. Where ours is not clearly
ahead, its methods are left out one at a time; what is better beyond the noise of these images is taken. Then layers
whose error is out of line are left in FP16, where the outputs keep little (see ``mend``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_calibrate.runtime.sessions import Arrays
from resvit_engines.targets.table import Precision
from resvit_quantize.check.judge import Errors, Gain, Judge, gain, same_graph
from resvit_quantize.check.mend import LOW_DB, WORTH_DB, layers_out_of_line, reasons
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.graph.external import weight_bytes
from resvit_quantize.graph.network import MOST_ALONE
from resvit_quantize.qdq.held_back import OURS, HeldBackCheck, MendedLayer, Tried
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.qdq.quantised import insert_plan
from resvit_quantize.settings import Methods, QuantizeSettings, Rules

FEW, MANY = 8, 16
"""Images that are judged: few of networks that take long."""
_LIGHT = 2_000_000_000
"""Multiply-accumulates up to which a network is judged on many."""
_HALVES = 32
"""Images that are split where none can be held back."""
_FEWEST = 4
_SWITCHES = {
    "smoothing": "smoothing",
    "shifting": "shifting",
    "output_ranges": "ranges at the output",
    "bias_correction": "bias correction",
}
PLAIN = {Estimator.MAX: "plain max", Estimator.PERCENTILE: "plain percentile"}
_ROUNDS = 2


@dataclass(frozen=True, eq=False)
class HeldBack:
    """Images to judge on.

    ``images(n)`` gives the first n that no range was taken from, in batches; where there are none (``apart`` is false),
    the first n calibration images, of which each half is then judged by ranges of the other. ``sets`` says that rows of
    outputs may change places. ``ranged(n)`` gives the first n images that ranges were taken from, which tell the layers
    out of line; without it none is looked for.
    """

    images: Callable[[int], Iterable[Batch]]
    apart: bool = True
    sets: bool = False
    ranged: Callable[[int], Iterable[Batch]] | None = None


@dataclass(frozen=True, eq=False)
class Built:
    """One way to quantise: its plan, put into the graph."""

    settings: QuantizeSettings
    plan: Plan
    network: ir.Model


@dataclass(frozen=True, eq=False)
class _Fold:
    """Ranges, and the images that judge them."""

    ranges: Ranges
    statistics: Statistics | None
    judge: Judge


def build(
    graph: AnalysedGraph, ranges: Ranges, settings: QuantizeSettings, statistics: Statistics | None = None
) -> Built:
    """Plan and quantise; raises as :func:`plan_quantization` and :func:`insert_plan` do."""
    plan = plan_quantization(graph, ranges, settings, statistics)
    return Built(settings, plan, insert_plan(plan, ranges, settings))


class Check:
    """Ways to quantise one network, tried on the held-back images."""

    def __init__(
        self,
        graph: AnalysedGraph,
        folds: Sequence[_Fold],
        ranges: Ranges,
        statistics: Statistics | None,
        built: dict[str, Built],
    ) -> None:
        self.graph, self.folds, self.ranges, self.statistics = graph, folds, ranges, statistics
        self.tried: list[Tried] = []
        self.built = built
        """By ``ranges``, as it would ship."""

    def errors(self, ways: dict[str, QuantizeSettings]) -> dict[str, Errors]:
        """Judge each; ways that differ in ranges alone share one session."""
        found: dict[str, list[Errors]] = {name: [] for name in ways}
        for fold in self.folds:
            made = self.made(ways, fold)
            names = list(made)
            while names:
                first = made[names[0]].network
                alike = [name for name in names if same_graph(first, made[name].network)]
                networks = [made[name].network for name in alike]
                for name, errors in zip(alike, fold.judge.errors(networks[0], networks[1:]), strict=True):
                    found[name].append(errors)
                names = [name for name in names if name not in alike]
        return {name: _joined(parts) for name, parts in found.items()}

    def made(self, ways: dict[str, QuantizeSettings], fold: _Fold) -> dict[str, Built]:
        """Build each by a fold's ranges; what would ship is built once."""
        if fold.ranges is not self.ranges:
            return {name: build(self.graph, fold.ranges, way, fold.statistics) for name, way in ways.items()}
        return {name: self.final(name, way) for name, way in ways.items()}

    def forget_but(self, *names: str) -> None:
        """Keep in memory only what may still ship."""
        self.built = {name: built for name, built in self.built.items() if name in names}

    def note(self, what: str, errors: Errors, gained: Gain | None = None) -> None:
        """Remember what was tried."""
        figures = (gained.gain_db, gained.noise_db) if gained else (0.0, 0.0)
        self.tried.append(Tried(what, errors.sqnr_db, errors.agreement, *figures))

    def final(self, name: str, settings: QuantizeSettings) -> Built:
        """What ships."""
        if name not in self.built:
            self.built[name] = build(self.graph, self.ranges, settings, self.statistics)
        return self.built[name]


def checked(
    model: Path,
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    statistics: Statistics | None,
    held: HeldBack,
) -> tuple[Built, HeldBackCheck]:
    """Quantise in the way that is best on the held-back images, and say what was compared.

    ``model`` is the file of ``graph``. Raises as :func:`build` does, and for images that the model cannot run on.
    """
    shipped = build(graph, ranges, settings, statistics)
    folds: list[_Fold] = []
    why_not = "nothing is quantised"
    if shipped.plan.placement.edges:
        why_not, folds = _folds(model, graph, ranges, statistics, held)
    if why_not:
        return shipped, HeldBackCheck(0, not held.apart, (), OURS, note=why_not)
    check = Check(graph, folds, ranges, statistics, {OURS: shipped})
    ours = check.errors({OURS: settings})[OURS]
    check.note(OURS, ours)
    name, way, errors = OURS, settings, ours
    plain = {PLAIN.get(e, f"plain {e.value}"): _plain(settings, e) for e in _estimators(settings)}
    plain_errors = check.errors(plain)
    for what, each in plain_errors.items():
        check.note(what, each, gain(ours, each))
    best = max(plain_errors, key=lambda what: plain_errors[what].sqnr_db)
    check.forget_but(OURS, best)
    if not gain(plain_errors[best], ours).is_real:
        name, way, errors = _without_methods(check, settings, ours, best)
        if gain(errors, plain_errors[best]).is_real:
            name, way, errors = best, plain[best], plain_errors[best]
    name, way, layers, note = _mended(check, name, way, errors, held)
    built = check.final(name, way)
    built.plan.placement.reasons.update(reasons(layers))
    return built, HeldBackCheck(len(errors.ratios), not held.apart, tuple(check.tried), name, layers, note)


def _mended(
    check: Check, name: str, way: QuantizeSettings, errors: Errors, held: HeldBack
) -> tuple[str, QuantizeSettings, tuple[MendedLayer, ...], str]:
    """Leave layers in FP16 whose error is out of line, where the outputs keep little and that really helps them."""
    # Where the search chose precisions, it raises the worst layers itself.
    if errors.sqnr_db >= LOW_DB or way.precisions or held.ranged is None or way.rules is not Rules.TENSORRT:
        return name, way, (), ""
    lists, note = layers_out_of_line(check.graph, check.ranges, way, held.ranged)
    taken: tuple[MendedLayer, ...] = ()
    base, chosen = name, way
    for layers in lists.values():
        if not layers or layers == taken:
            continue
        share = sum(item.macs for item in layers)
        what = f"{base}, {len(layers)} layers ({share:.1%} of the multiply-accumulates) in FP16"
        own = dict.fromkeys((item.node for item in layers), Precision.FP16)
        wider = replace(way, precisions={**way.precisions, **own})
        found = check.errors({what: wider})[what]
        gained = gain(errors, found)
        check.note(what, found, gained)
        if not gained.is_real or gained.gain_db < WORTH_DB:
            break
        name, errors, taken, chosen = what, found, layers, wider
    return name, chosen, taken, note


def _without_methods(
    check: Check, settings: QuantizeSettings, ours: Errors, plain: str
) -> tuple[str, QuantizeSettings, Errors]:
    """Leave methods out one at a time, as long as that helps."""
    name, way, errors = OURS, settings, ours
    left: list[str] = []
    for _ in range(_ROUNDS):
        ways = {
            _called([*left, switch]): replace(way, methods=replace(way.methods, **{switch: False}))
            for switch in _SWITCHES
            if getattr(way.methods, switch)
        }
        found = check.errors(ways)
        for what, each in found.items():
            check.note(what, each, gain(errors, each))
        best = max(found, key=lambda what: found[what].sqnr_db, default=None)
        check.forget_but(plain, name, *([best] if best else []))
        if best is None or not gain(errors, found[best]).is_real:
            break
        left = [switch for switch in _SWITCHES if not getattr(ways[best].methods, switch)]
        name, way, errors = best, ways[best], found[best]
    return name, way, errors


def _called(left: list[str]) -> str:
    return "without " + " and ".join(_SWITCHES[switch] for switch in left)


def _estimators(settings: QuantizeSettings) -> tuple[Estimator, ...]:
    """Those of the plain graphs; where the user named one, that."""
    return tuple(PLAIN) if settings.methods.output_ranges else (settings.estimator,)


def _plain(settings: QuantizeSettings, estimator: Estimator) -> QuantizeSettings:
    off = Methods(**dict.fromkeys(_SWITCHES, False))
    methods = replace(off, importance=settings.methods.importance, sparing=settings.methods.sparing)
    return replace(settings, estimator=estimator, methods=methods)


def _joined(parts: list[Errors]) -> Errors:
    alike = [part.alike for part in parts if part.alike is not None]
    return Errors(
        np.concatenate([part.noise for part in parts]),
        np.concatenate([part.signal for part in parts]),
        np.concatenate(alike) if len(alike) == len(parts) else None,
    )


def _folds(
    model: Path, graph: AnalysedGraph, ranges: Ranges, statistics: Statistics | None, held: HeldBack
) -> tuple[str, list[_Fold]]:
    """Ranges with the images that judge them; or why there are none."""
    name = str(graph.network.graph.inputs[0].name)
    if weight_bytes(graph.network) > MOST_ALONE:
        return "the network's weights do not fit into one ONNX file", []
    macs = sum(product.macs for product in graph.analysis.products)
    count = MANY if macs <= _LIGHT else FEW
    batches = [batch.feeds(name) for batch in held.images(count if held.apart else _HALVES)]
    images = sum(len(batch[name]) for batch in batches)
    if images < (1 if held.apart else _FEWEST):
        return f"there are {images} images, and it takes {_FEWEST}", []
    if held.apart:
        return "", [_Fold(ranges, statistics, Judge(model, batches, sets=held.sets))]
    every = _single(batches, name)
    halves = every[0::2], every[1::2]
    folds = []
    for own, other in (halves, halves[::-1]):
        seen = collect_statistics(model, own)
        judged = other[: count // 2]
        folds.append(_Fold(ranges_from(seen, "a half"), seen, Judge(model, judged, sets=held.sets)))
    return "", folds


def _single(batches: Iterable[Arrays], name: str) -> list[Arrays]:
    """One image each."""
    return list(
        itertools.chain.from_iterable(
            ({key: value[at : at + 1] for key, value in batch.items()} for at in range(len(batch[name])))
            for batch in batches
        )
    )
