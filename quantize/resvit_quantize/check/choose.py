"""``--effort fast``, judged: our methods beside plain ranges on images that no range was taken from.

Every method of ours serves on most networks, and none on all: factors that fit the calibration images may cut what
other images hold. So the outputs of the quantised graph are held against the float network's on a few held-back images,
and so are those of the same graph with plain ranges, by the maximum and by the percentile. Where a first look at four
images leaves no doubt that ours is ahead, that is all. Else all of the images are asked, and where ours is not likely
ahead even then, its methods are left out one at a time, and those together whose leaving out helped. Of all ways that
saw all images the best is taken, and ours where no other is better by more than one standard error over these images.
Then layers whose error is out of line are left in FP16, where the outputs keep little (see ``mend``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import OutOfMemoryError
from resvit_engines.targets.table import Precision
from resvit_quantize.check.contest import Built, Contest, Fold, build
from resvit_quantize.check.judge import LIKELY, SURE, Judge, cut
from resvit_quantize.check.mend import LOW_DB, WORTH_DB, layers_out_of_line, reasons
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.graph.external import weight_bytes
from resvit_quantize.graph.network import MOST_ALONE
from resvit_quantize.qdq.held_back import OURS, HeldBackCheck, MendedLayer
from resvit_quantize.settings import Methods, QuantizeSettings, Rules

__all__ = ["Built", "HeldBack", "build", "checked"]

FEW, MANY = 8, 16
"""Images that are judged at most: few of networks that take long."""
_LIGHT = 2_000_000_000
"""Multiply-accumulates up to which a network is judged on many."""
_HALVES = 32
"""Images that are split where none can be held back."""
_FEWEST = 4
_MARGIN_DB = 5.0
"""How much more the outputs must keep at the first look for it to tell that they keep enough."""
_SWITCHES = {
    "smoothing": "smoothing",
    "shifting": "shifting",
    "output_ranges": "ranges at the output",
    "bias_correction": "bias correction",
}
PLAIN = {Estimator.MAX: "plain max", Estimator.PERCENTILE: "plain percentile"}


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

    def unchecked(why: str) -> tuple[Built, HeldBackCheck]:
        return shipped, HeldBackCheck(0, not held.apart, (), OURS, note=why)

    if not shipped.plan.placement.edges:
        return unchecked("nothing is quantised")
    try:
        why_not, folds = _folds(model, graph, ranges, statistics, held)
        if why_not:
            return unchecked(why_not)
        return _best(Contest(graph, folds, ranges, statistics, shipped), held)
    except (OutOfMemoryError, MemoryError):
        # The float network alone did run: calibration has. Our own way is what it would be without images.
        return unchecked("memory ran out")


def _best(contest: Contest, held: HeldBack) -> tuple[Built, HeldBackCheck]:
    """Plain ranges beside our way, then less of our methods, then layers in FP16, as far as there is doubt."""
    settings = contest.settings(OURS)
    plain = {PLAIN.get(e, f"plain {e.value}"): _plain(settings, e) for e in _estimators(settings)}
    contest.enter(plain)
    name = OURS
    if not all(contest.gain(OURS, other, first=True).beyond(SURE) for other in plain):
        best = max(plain, key=lambda other: contest.errors(other).sqnr_db)
        contest.rest(*(other for other in plain if other != best))
        if not contest.gain(OURS, best).beyond(LIKELY):
            _without_methods(contest)
        name = contest.winner()
    name, layers, note = _mended(contest, name, held)
    built = contest.final(name, contest.settings(name))
    built.plan.placement.reasons.update(reasons(layers))
    tried = contest.tried()
    return built, HeldBackCheck(max(item.images for item in tried), not held.apart, tried, name, layers, note)


def _without_methods(contest: Contest) -> None:
    """Leave methods out one at a time, and then those together whose leaving out helps."""
    settings, helped = contest.settings(OURS), []
    for switch in _SWITCHES:
        if not getattr(settings.methods, switch):
            continue
        what = _called([switch])
        contest.enter({what: replace(settings, methods=replace(settings.methods, **{switch: False}))})
        # What the first look rules out is not asked about the other images.
        if contest.gain(what, OURS, first=True).is_possible and contest.gain(what, OURS).beyond(LIKELY):
            helped.append(switch)
        contest.rest(what)
    if len(helped) > 1:
        what = _called(helped)
        methods = replace(settings.methods, **dict.fromkeys(helped, False))
        contest.enter({what: replace(settings, methods=methods)})
        contest.errors(what)


def _mended(contest: Contest, name: str, held: HeldBack) -> tuple[str, tuple[MendedLayer, ...], str]:
    """Leave layers in FP16 whose error is out of line, where the outputs keep little and that really helps them."""
    way = contest.settings(name)
    # Where the search chose precisions, it raises the worst layers itself.
    if way.precisions or held.ranged is None or way.rules is not Rules.TENSORRT:
        return name, (), ""
    clear = contest.errors(name, first=True).sqnr_db >= LOW_DB + _MARGIN_DB
    if clear or contest.errors(name).sqnr_db >= LOW_DB:
        return name, (), ""
    lists, note = layers_out_of_line(contest.graph, contest.ranges, way, held.ranged)
    taken: tuple[MendedLayer, ...] = ()
    base, standing = name, name
    for layers in filter(None, dict.fromkeys(lists.values())):
        share = sum(item.macs for item in layers)
        what = f"{base}, {len(layers)} layers ({share:.1%} of the multiply-accumulates) in FP16"
        own = dict.fromkeys((item.node for item in layers), Precision.FP16)
        contest.enter({what: replace(way, precisions={**way.precisions, **own})}, against=standing)
        gained = contest.gain(what, standing)
        if gained.beyond(LIKELY) and gained.gain_db >= WORTH_DB:
            standing, taken = what, layers
    return standing, taken, note


def _called(left: list[str]) -> str:
    return "without " + " and ".join(_SWITCHES[switch] for switch in left)


def _estimators(settings: QuantizeSettings) -> tuple[Estimator, ...]:
    """Those of the plain graphs; where the user named one, that."""
    return tuple(PLAIN) if settings.methods.output_ranges else (settings.estimator,)


def _plain(settings: QuantizeSettings, estimator: Estimator) -> QuantizeSettings:
    off = Methods(**dict.fromkeys(_SWITCHES, False))
    methods = replace(off, importance=settings.methods.importance, sparing=settings.methods.sparing)
    return replace(settings, estimator=estimator, methods=methods)


def _folds(
    model: Path, graph: AnalysedGraph, ranges: Ranges, statistics: Statistics | None, held: HeldBack
) -> tuple[str, list[Fold]]:
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
        return "", [Fold(ranges, statistics, Judge(model, batches, sets=held.sets))]
    every = cut(batches, 1)
    halves = every[0::2], every[1::2]
    folds = []
    for own, other in (halves, halves[::-1]):
        seen = collect_statistics(model, own)
        judged = other[: count // 2]
        folds.append(Fold(ranges_from(seen, "a half"), seen, Judge(model, judged, sets=held.sets)))
    return "", folds
