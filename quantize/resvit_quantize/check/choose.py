"""What is done to quantise, judged: our methods beside plain ranges on images that no range was taken from.

Every method of ours serves on most networks, and none on all: factors that fit the calibration images may cut what
other images hold. So the outputs of the quantised graph are held against the float network's on a few held-back images,
and so are those of the same graph with plain ranges, by the maximum and by the percentile. Where a first look at four
images leaves no doubt that ours is ahead, that is all. Else all of the images are asked, and where ours is not likely
ahead even then, its methods are left out one at a time, and those together whose leaving out helped. Of all ways that
saw all images the best is taken, and ours where no other is better by more than one standard error over these images.
Then layers whose error is out of line are left in FP16, where the outputs keep little (see ``mend``), and heads that
cost something in FP16 go to 8 bits, where the outputs keep as much with them there. What ``--effort best`` learns
starts from there, and is taken unless it is worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from resvit_calibrate.images.held_back import Apart
from resvit_calibrate.images.image_set import ImageSource
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, ranges_from
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import OutOfMemoryError
from resvit_engines.targets.table import Precision
from resvit_quantize.check.contest import Built, Contest, Fold, build
from resvit_quantize.check.judge import FEWEST, LIKELY, REAL, SURE, Judge, Sessions, cut
from resvit_quantize.check.mend import LOW_DB, WORTH_DB, layers_out_of_line, reasons
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.graph.external import EXTERNAL_ABOVE, weight_bytes
from resvit_quantize.graph.network import MOST_ALONE
from resvit_quantize.placement.patterns import node_matches
from resvit_quantize.placement.placement import head_cost, large_heads
from resvit_quantize.qdq.held_back import OURS, HeldBackCheck, MendedLayer
from resvit_quantize.settings import Methods, QuantizeSettings, Rules

__all__ = ["Built", "HeldBack", "build", "checked", "held_back_of"]

FEW, MANY = 8, 16
"""Images that are judged at most: few of networks that take long. Half as many tell the layers out of line."""
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

    images: ImageSource
    apart: bool = True
    sets: bool = False
    ranged: ImageSource | None = None


def held_back_of(apart: Apart, batch_size: int, *, sets: bool = False) -> HeldBack:
    """The images to judge on and those that ranges were taken from, in batches, as calibration parted them."""
    judged = apart.held or apart.ranges
    return HeldBack(
        lambda count: judged.first(count, batch_size),
        apart.held is not None,
        sets,
        lambda count: apart.ranges.first(count, batch_size),
    )


@dataclass(frozen=True)
class _Standing:
    """The best way so far, its layers out of line, why something was not tried, and reasons by node."""

    name: str
    layers: tuple[MendedLayer, ...]
    note: str
    reasons: Mapping[str, str]


def checked(
    model: Path,
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    statistics: Statistics | None,
    held: HeldBack,
    learn: Callable[[QuantizeSettings, ImageSource | None], Built] | None = None,
) -> tuple[Built, HeldBackCheck]:
    """Quantise in the way that is best on the held-back images, and say what was compared.

    ``model`` is the file of ``graph``. ``learn`` is for ``Effort.BEST``: it learns from the images that it is given,
    from all where that is None. Raises as :func:`build` and ``learn`` do, and for images that the model cannot run on.
    """
    shipped = build(graph, ranges, settings, statistics)

    def unchecked(why: str) -> tuple[Built, HeldBackCheck]:
        built = learn(settings, None) if learn is not None and shipped.plan.placement.edges else shipped
        return built, HeldBackCheck(0, not held.apart, (), OURS, note=why)

    if not shipped.plan.placement.edges:
        return unchecked("nothing is quantised")
    try:
        why_not, folds = _folds(model, graph, ranges, statistics, held)
        if why_not:
            return unchecked(why_not)
        contest = Contest(graph, folds, ranges, statistics, shipped)
        standing = _best(contest, held)
    except (OutOfMemoryError, MemoryError):
        # The float network alone did run: calibration has. Our own way is what it would be without images.
        return unchecked("memory ran out")
    if learn is not None:
        standing = _learned(contest, standing, held, learn)
    taken = contest.settings(standing.name)
    built = contest.final(standing.name, taken)
    built.plan.placement.reasons.update(standing.reasons)
    tried = contest.tried()
    images = max(item.images for item in tried)
    decided = {node: own.value for node, own in taken.precisions.items() if node not in settings.precisions}
    by_halves, layers, note = not held.apart, standing.layers, standing.note
    return built, HeldBackCheck(images, by_halves, tried, standing.name, layers, note, decided)


def _best(contest: Contest, held: HeldBack) -> _Standing:
    """Plain ranges beside our way, then less of our methods, layers in FP16, and heads, as far as there is doubt."""
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
    name, of_heads = _with_heads(contest, name)
    return _Standing(name, layers, note, {**reasons(layers), **of_heads})


def _learned(
    contest: Contest,
    standing: _Standing,
    held: HeldBack,
    learn: Callable[[QuantizeSettings, ImageSource | None], Built],
) -> _Standing:
    """What is learned from the way that stands, unless it is really worse on images that it has not seen.

    It is better nearly always, and few images of a network with few outputs differ by more than it gains.
    """
    way, name = contest.settings(standing.name), f"{standing.name}, with learned rounding"
    unseen = held.ranged if held.apart else None
    contest.close_all_but(standing.name)
    built, why_not = learn(way, unseen), "has seen all images"
    if unseen is not None:
        try:
            contest.enter_built(name, built, standing.name)
            worse = contest.gain(standing.name, name).beyond(REAL) or contest.gain(name, standing.name).disagrees
            return standing if worse else replace(standing, name=name)
        except (OutOfMemoryError, MemoryError):
            why_not = "does not fit into memory beside the float network"
    contest.enter_built(name, built, standing.name, judged=False)
    note = f"{standing.note} Learned rounding {why_not}, and was not compared.".strip()
    return replace(standing, name=name, note=note)


def _without_methods(contest: Contest) -> None:
    """Leave methods out one at a time, and then those together whose leaving out helps."""
    settings, helped = contest.settings(OURS), []
    for switch in _SWITCHES:
        if not getattr(settings.methods, switch):
            continue
        what = _called([switch])
        contest.enter({what: replace(settings, methods=replace(settings.methods, **{switch: False}))})
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
    lists, note = layers_out_of_line(contest.graph, contest.ranges, way, held.ranged, _most(contest.graph) // 2)
    taken: tuple[MendedLayer, ...] = ()
    base, standing = name, name
    for layers in filter(None, dict.fromkeys(lists.values())):
        share = sum(item.macs for item in layers)
        what = f"{base}, {len(layers)} layers ({share:.1%} of the multiply-accumulates) in FP16"
        own = dict.fromkeys((item.node for item in layers), Precision.FP16)
        contest.enter({what: replace(way, precisions={**way.precisions, **own})}, against=standing)
        # What the first look rules out is not asked about the other images.
        if not contest.gain(what, standing, first=True).is_possible:
            contest.rest(what)
            continue
        gained = contest.gain(what, standing)
        if gained.beyond(LIKELY) and gained.gain_db >= WORTH_DB:
            standing, taken = what, layers
    return standing, taken, note


def _with_heads(contest: Contest, name: str) -> tuple[str, Mapping[str, str]]:
    """Put heads that cost something in FP16 into 8 bits, unless the outputs want them in FP16; and why, by head.

    The rule is that of the layers out of line, turned round: where the outputs keep little without it, FP16 must gain
    half a decibel and more than one standard error to be worth its cost. Decisions that are lost are always worth it.
    """
    way, analysis = contest.settings(name), contest.graph.analysis
    if contest.settings(OURS).precisions or way.rules is not Rules.TENSORRT:
        return name, {}
    decided = {weight.node.name for weight in contest.final(name, way).plan.placement.weights} | set(way.precisions)
    heads = [
        head
        for head in large_heads(analysis, way.precision)
        if head.name not in decided and not any(node_matches(head.node, pattern) for pattern in way.exclude)
    ]
    if not heads or len((before := contest.errors(name)).ratios) < FEWEST:
        return name, {}
    what = f"{name}, the head in 8 bits"
    own = {head.name: way.precision for head in heads}
    contest.enter({what: replace(way, precisions={**way.precisions, **own})}, against=name)
    after, better = contest.errors(what), contest.gain(name, what)
    costly = after.sqnr_db < LOW_DB and better.beyond(LIKELY) and better.gain_db >= WORTH_DB
    stays = costly or contest.gain(what, name).disagrees
    figures = f"{after.sqnr_db:.1f} dB with the head in 8 bits and {before.sqnr_db:.1f} dB with it in FP16"
    if before.agreement is not None and after.agreement is not None:
        figures += f", {after.agreement:.1%} and {before.agreement:.1%} of the arg-max alike"
    why = "the outputs lose too much by it in 8 bits" if stays else "the outputs keep as much with it in 8 bits"
    return (name if stays else what), {
        head.name: f"{why}: {figures}, on held-back images; {head_cost(head, analysis.weighted_macs)}" for head in heads
    }


def _called(left: list[str]) -> str:
    return "without " + " and ".join(_SWITCHES[switch] for switch in left)


def _estimators(settings: QuantizeSettings) -> tuple[Estimator, ...]:
    """Those of the plain graphs; where the user named one, that."""
    return tuple(PLAIN) if settings.methods.output_ranges else (settings.estimator,)


def _plain(settings: QuantizeSettings, estimator: Estimator) -> QuantizeSettings:
    off = Methods(**dict.fromkeys(_SWITCHES, False))
    methods = replace(off, importance=settings.methods.importance, sparing=settings.methods.sparing)
    return replace(settings, estimator=estimator, methods=methods)


def _most(graph: AnalysedGraph) -> int:
    return MANY if sum(product.macs for product in graph.analysis.products) <= _LIGHT else FEW


def _folds(
    model: Path, graph: AnalysedGraph, ranges: Ranges, statistics: Statistics | None, held: HeldBack
) -> tuple[str, list[Fold]]:
    """Ranges with the images that judge them; or why there are none."""
    name = str(graph.network.graph.inputs[0].name)
    if weight_bytes(graph.network) > MOST_ALONE:
        return "the network's weights do not fit into one ONNX file", []
    count = _most(graph)
    batches = [batch.feeds(name) for batch in held.images(count if held.apart else _HALVES)]
    images = sum(len(batch[name]) for batch in batches)
    if images < (1 if held.apart else _FEWEST):
        return f"there are {images} images, and it takes {_FEWEST}", []
    sessions = Sessions(model.parent, one=weight_bytes(graph.network) > EXTERNAL_ABOVE)
    if held.apart:
        return "", [Fold(ranges, statistics, Judge(model, batches, sets=held.sets, sessions=sessions))]
    every = cut(batches, 1)
    halves = every[0::2], every[1::2]
    folds = []
    for own, other in (halves, halves[::-1]):
        seen = collect_statistics(model, own)
        judged = other[: count // 2]
        folds.append(Fold(ranges_from(seen, "a half"), seen, Judge(model, judged, sets=held.sets, sessions=sessions)))
    return "", folds
