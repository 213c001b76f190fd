"""Where Q/DQ pay on this machine: regions are left in FP32 in turn, and stay so where that is no slower.

Latency and accuracy are searched together: of what is fast enough only what the gate does not reject is taken, and
where it rejects, the region that hurts most for what it gains goes first. Every measurement is a finished stage, so
that a killed search goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.bench.compare import Ratio
from resvit_engines.machine import this_machine
from resvit_engines.targets.table import Precision
from resvit_export.pipeline import Pipeline
from resvit_export.recipe.choices import Tuning
from resvit_export.settle import after_rejection, measured
from resvit_export.stages.decide.search import SENSITIVITY_IMAGES
from resvit_export.stages.decide.tune import RegionChoice, TimeVariants, Timings, Tune, pays

if TYPE_CHECKING:
    from resvit_quantize.search.regions import Region

FLOAT, PLAIN, TUNED = "float", "plain", "tuned"


class Times(Protocol):
    """What a device says of variants that it timed in turns."""

    def ratio(self, slower: str, faster: str) -> Ratio:
        """How many times as fast ``faster`` is."""
        ...

    def median_ms(self, name: str) -> float:
        """Of one call."""
        ...


@dataclass(frozen=True)
class Ways:
    """How the search asks about variants, each named by its regions in FP32; that of none is the plain placement.

    ``timed`` times variants by name in turns, ``accepts`` says whether the gate lets one pass, and ``damage`` how much
    a region hurts in 8 bits.
    """

    timed: Callable[[Mapping[str, frozenset[str]]], Times]
    accepts: Callable[[frozenset[str]], bool]
    damage: Callable[[Region], float]


@dataclass
class Found:
    """What the search chose: the regions in FP32, what was measured of each region, and sentences for people."""

    out: frozenset[str] = frozenset()
    choices: dict[str, RegionChoice] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)


def search_regions(regions: Sequence[Region], ways: Ways, passes: int, say: Callable[[str], None]) -> Found:
    """Choose which ``regions`` are quantised.

    In each of the ``passes`` every region that is left is timed in FP32 beside the variant so far, all in one
    measurement; those without which it is no slower go. What remains is held against FP32 and the plain placement, and
    against the gate. It ends in FP32 where nothing else is faster and accepted.
    """
    found, every = Found(), frozenset(region.name for region in regions)
    for number in range(passes):
        left = [region for region in regions if region.name not in found.out]
        if not left:
            break
        times = ways.timed({PLAIN: found.out} | {region.name: found.out | {region.name} for region in left})
        dropped = set()
        for region in left:
            ratio = times.ratio(region.name, PLAIN)
            found.choices[region.name] = RegionChoice(region.name, region.nodes, region.share, ratio, pays(ratio))
            dropped |= set() if pays(ratio) else {region.name}
        if not dropped:
            break
        found.out |= dropped
        say(f"tune: pass {number + 1} leaves {', '.join(sorted(dropped))} in FP32")
    candidates = {TUNED: found.out, PLAIN: frozenset()}
    while candidates := {name: out for name, out in candidates.items() if out != every}:
        times = ways.timed({FLOAT: every, **candidates})
        fast = [name for name in candidates if pays(times.ratio(FLOAT, name))]
        if not fast:
            best = min(candidates, key=times.median_ms)
            found.sentences.append(
                "No placement of Q/DQ gains 2% on FP32 on this processor; the best is "
                f"{times.ratio(FLOAT, best).sentence} as fast."
            )
            break
        # Q/DQ that gain less than it takes are none: then the plain placement must be faster by as much.
        plain = PLAIN in fast and (TUNED not in fast or pays(times.ratio(TUNED, PLAIN)))
        name = PLAIN if plain else TUNED
        out = candidates[name]
        if ways.accepts(out):
            kept = ", ".join(region.name for region in regions if region.name not in out)
            found.sentences.append(
                f"Q/DQ stay in {kept}: {times.median_ms(name):.3f} ms on this processor, "
                f"{times.ratio(FLOAT, name).sentence} as fast as FP32 ({times.median_ms(FLOAT):.3f} ms)."
            )
            found.out = out
            return found
        worst = max((region for region in regions if region.name not in out), key=lambda r: _price(r, found, ways))
        found.sentences.append(f"The gate rejects the fastest placement: {worst.name} goes back to FP32.")
        say(f"tune: {found.sentences[-1]}")
        candidates = {TUNED: out | {worst.name}}
    found.out = every
    found.sentences.append("The engine computes in FP32: nothing that was tried gains and is accepted.")
    return found


def _price(region: Region, found: Found, ways: Ways) -> float:
    """The damage of a region for each part that it gains."""
    gain = found.choices[region.name].faster.value - 1.0 if region.name in found.choices else 0.0
    return ways.damage(region) / max(gain, 1e-3)


@dataclass(frozen=True)
class _Effort:
    """How often regions are gone through, rounds of a measurement, and seconds of each variant in it."""

    passes: int
    rounds: int
    seconds: float


_EFFORTS = {
    Tuning.QUICK: _Effort(1, 12, 0.5),
    Tuning.DEFAULT: _Effort(2, 20, 1.5),
    Tuning.THOROUGH: _Effort(4, 40, 4.0),
}


def settled(pipeline: Pipeline) -> Pipeline:
    """The pipeline of what ships: where a rejection led to another one, or times to another placement, that."""
    return tuned(after_rejection(pipeline))


def tuned(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or where the recipe asks for it the one whose Q/DQ were measured to pay.

    Does the stages up to ``quantize`` of every variant, and up to ``validate`` of those that are fast enough.
    """
    from resvit_quantize.graph.analysed import graph_from_onnx
    from resvit_quantize.search.regions import regions_of

    recipe, run = pipeline.recipe, pipeline.run
    if recipe.tune is None or not recipe.precision.quantises:
        return pipeline
    effort, machine = _EFFORTS[recipe.tune], this_machine()
    where = {"processor": machine.processor, "host": machine.host, "onnxruntime": machine.onnxruntime}
    analysis = graph_from_onnx(pipeline.float_model.path).analysis
    regions = regions_of(analysis, set(pipeline.quantized.eight_bit_products))
    remarks: dict[str, None] = {}

    def precisions(out: frozenset[str]) -> dict[str, str]:
        return {node: Precision.FP32.value for region in regions if region.name in out for node in region.nodes}

    def timed(variants: Mapping[str, frozenset[str]]) -> Timings:
        models = {name: pipeline.vary(precisions=precisions(out)).quantized.model for name, out in variants.items()}
        settings = run.build_settings
        timings = run.folder.do(
            TimeVariants(models, run.require_target(), settings, where, effort.rounds, effort.seconds * len(models))
        )
        remarks.update(dict.fromkeys(timings.remarks))
        return timings

    def accepts(out: frozenset[str]) -> bool:
        return pipeline.vary(precisions=precisions(out)).validated.verdict.kind is not VerdictKind.REJECTED

    def damage(region: Region) -> float:
        layers = measured(pipeline, SENSITIVITY_IMAGES).sensitivity.layers
        return sum(layer.damage.get(Precision.INT8.value, 0.0) for layer in layers if layer.node in region.nodes)

    found = search_regions(regions, Ways(timed, accepts, damage), effort.passes, run.reporter.say)
    lines = [
        f"{choice.name}: {choice.faster.sentence} as fast in INT8, {'kept' if choice.kept else 'left in FP32'}."
        for choice in found.choices.values()
    ]
    chosen = precisions(found.out)
    regions_json = tuple(choice.to_json() for choice in found.choices.values())
    record = run.folder.do(Tune(regions_json, chosen, (*found.sentences, *lines, *remarks)))
    return pipeline.vary(precisions=chosen, tuned=record)
