"""Where Q/DQ pay on the device: regions are left in floats in turn, and stay so where that is no slower.

Latency and accuracy are searched together: of what is fast enough only what the gate does not reject is taken, and
where it rejects, the region that hurts most for what it gains goes first. Every measurement is a finished stage, so
that a killed search goes on where it stopped. What it measures of regions is kept for the next network.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.errors import ResvitError
from resvit_engines.targets.table import Target
from resvit_export.pipeline import Pipeline
from resvit_export.recipe.choices import Tuning
from resvit_export.records.patterns import keep_patterns, known_patterns
from resvit_export.records.place import Place
from resvit_export.run_folder import NotFinishedError
from resvit_export.settle import after_rejection, measured
from resvit_export.stages.decide.region_search import FLOAT, Found, Start, Ways, search_regions
from resvit_export.stages.decide.search import SENSITIVITY_IMAGES
from resvit_export.stages.decide.tune import (
    Candidate,
    TimeVariants,
    Timings,
    Tune,
    finished_tuning,
    not_measurable,
    place_here,
)
from resvit_export.to_tensorrt.plugin_choice import By

if TYPE_CHECKING:
    from resvit_quantize.search.regions import Region


@dataclass(frozen=True)
class _Effort:
    """How often regions are gone through, rounds of a measurement, and seconds that each variant is timed in it.

    With ``trusts`` what was measured of the same pattern in another network is not measured again.
    """

    passes: int
    rounds: int
    seconds: float
    trusts: bool = False


_EFFORTS = {
    Tuning.QUICK: _Effort(1, 12, 2.5, trusts=True),
    Tuning.DEFAULT: _Effort(2, 20, 6.0),
    Tuning.THOROUGH: _Effort(4, 40, 16.0),
}


def settled(pipeline: Pipeline) -> Pipeline:
    """The pipeline of what ships: where a rejection led to another one, or times to another placement, that."""
    return tuned(after_rejection(pipeline))


def tuned(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or where the recipe asks for it the one whose Q/DQ were measured to pay.

    Does the stages up to ``quantize`` of every variant, and up to ``validate`` of those that are fast enough. What was
    finished for the same placement at the run's place, or anywhere where that is not said, is not done again.

    Raises:
        NotFinishedError: where stages are only looked up, and it was not done.
        ResvitError: IMPOSSIBLE where nothing can be timed, and what building and timing raise.
    """
    recipe, run = pipeline.recipe, pipeline.run
    if recipe.tune is None:
        return pipeline
    target, plain = run.require_target(), pipeline.quantized.model
    done = finished_tuning(run.folder, plain, recipe.tune.value, run.place)
    if done is not None:
        return pipeline.vary(precisions=done.precisions, tuned=done)
    if run.folder.looks_only:
        raise NotFinishedError(Tune.name)
    place = run.place or place_here(target)
    if place is None:
        raise not_measurable(target)
    return _Tuning(pipeline, place).done()


@dataclass
class _Tuning:
    """One search: the pipeline of the plain placement, where it is timed, and what was timed so far."""

    pipeline: Pipeline
    place: Place
    remarks: dict[str, None] = field(default_factory=dict)
    held: tuple[Timings, Mapping[str, frozenset[str]]] | None = None
    """The last measurement in which floats were timed, and its variants."""

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """What is quantised together or not at all."""
        from resvit_quantize.graph.analysed import graph_from_onnx
        from resvit_quantize.search.regions import regions_of

        analysis = graph_from_onnx(self.pipeline.float_model.path).analysis
        return regions_of(analysis, set(self.pipeline.quantized.eight_bit_products))

    @property
    def target(self) -> Target:
        """What it is for."""
        return self.pipeline.run.require_target()

    def done(self) -> Pipeline:
        """Search, write the choice down, and keep what was measured for other networks."""
        pipeline, run, place = self.pipeline, self.pipeline.run, self.place
        assert pipeline.recipe.tune is not None
        effort, plain = _EFFORTS[pipeline.recipe.tune], pipeline.quantized.model
        known = known_patterns(place, plain.digest, run.reporter)
        told = {r.name: known[self.pattern(r)] for r in self.regions if self.pattern(r) in known}
        by_name = {name: pattern.faster for name, pattern in told.items()}
        own = {name for name, pattern in told.items() if pattern.floats == pipeline.float_model.digest}
        for names, whom in ((own, "this network, quantised otherwise"), (set(told) - own, "other networks")):
            if names:
                run.reporter.say(f"tune: {len(names)} of {len(self.regions)} regions are known of {whom} there")
        where = "this processor" if place.address is None and self.target.on_cpu else f"the {place.title}"
        floating = self.target.float_precision.value.upper()
        ways = Ways(self.timed, self.accepts, self.damage, floating, where)
        found = search_regions(self.regions, ways, effort.passes, run.reporter.say, Start(by_name, effort.trusts))
        chosen = self.precisions(found.out)
        if place.rehearse:
            chosen = dict(pipeline.variant.precisions)
            found.sentences.insert(0, "REHEARSAL: a processor's times decide nothing for a GPU; Q/DQ stay as placed.")
        regions_json = tuple(choice.to_json() for choice in found.choices.values())
        faster, best = (found.faster, found.best) if not place.rehearse else (None, None)
        record = run.folder.do(
            Tune(
                plain=plain,
                effort=pipeline.recipe.tune.value,
                place=place,
                regions=regions_json,
                precisions=chosen,
                sentences=(*found.sentences, *self._lines(found, floating, own), *self.remarks),
                faster=faster.to_json() if faster and found.ms else None,
                ms=found.ms if faster else None,
                best={**best[0].to_json(), "ms": list(best[1:])} if best else None,
                remarks=tuple(self.remarks),
                layer_times=self.layer_times(),
            )
        )
        if not place.rehearse:
            fresh = {self.pattern(r): found.choices[r.name] for r in self.regions if r.name in found.choices}
            ratios = {pattern: choice.faster for pattern, choice in fresh.items() if not choice.known}
            keep_patterns(place, plain.digest, ratios, run.reporter, pipeline.float_model.digest)
        return pipeline.vary(precisions=chosen, tuned=record)

    def _lines(self, found: Found, floating: str, own: Collection[str]) -> Iterator[str]:
        for choice in found.choices.values():
            what = "kept" if choice.kept else f"left in {floating}"
            whom = "this network, quantised otherwise," if choice.name in own else "another network of this device"
            source = f", as {whom} told" if choice.known else ""
            yield f"{choice.name}: {choice.faster.sentence} as fast in 8 bits, {what}{source}."
        yield f"Timed on {self.place.title}."

    def pattern(self, region: Region) -> str:
        """Of a region, with all that makes its time another one."""
        recipe = self.pipeline.recipe
        return f"{recipe.precision.value}, batch {recipe.batch_range[1]}, {region.pattern}"

    def precisions(self, out: frozenset[str]) -> dict[str, str]:
        """By product, what is chosen for it: what was before, and floats for the regions that are ``out``."""
        floats = {node: self.target.float_precision.value for r in self.regions if r.name in out for node in r.nodes}
        return {**self.pipeline.variant.precisions, **floats}

    def varied(self, out: frozenset[str]) -> Pipeline:
        """The pipeline with these regions in floats."""
        return self.pipeline.vary(precisions=self.precisions(out)) if out else self.pipeline

    def timed(self, variants: Mapping[str, frozenset[str]]) -> Timings:
        """Time variants where they will run."""
        assert self.pipeline.recipe.tune is not None
        run, effort = self.pipeline.run, _EFFORTS[self.pipeline.recipe.tune]
        candidates = {name: self._candidate(self.varied(out)) for name, out in variants.items()}
        timings = run.folder.do(TimeVariants(candidates, self.target, self.place, effort.rounds, effort.seconds))
        self.remarks.update(dict.fromkeys(timings.remarks))
        if FLOAT in variants:
            self.held = timings, variants
        return timings

    def _candidate(self, pipeline: Pipeline) -> Candidate:
        """What would ship; kernels of ours that are chosen by time are not in it: they are added where they gain."""
        run = pipeline.run
        if run.plugins.by is By.TIME:
            return Candidate(pipeline.quantized.model, run.build_settings)
        return Candidate(pipeline.model, pipeline.engine_settings)

    def accepts(self, out: frozenset[str]) -> bool:
        """Whether the gate lets it pass."""
        return self.varied(out).validated.verdict.kind is not VerdictKind.REJECTED

    def damage(self, region: Region) -> float:
        """What the region's layers lose in 8 bits, each alone."""
        layers, precision = measured(self.pipeline, SENSITIVITY_IMAGES).sensitivity.layers, self.pipeline.run.precision
        return sum(layer.damage.get(precision.value, 0.0) for layer in layers if layer.node in region.nodes)

    def layer_times(self) -> dict[str, dict[str, float]]:
        """Microseconds by layer and precision, where the engines' layers were told."""
        from resvit_export.to_tensorrt.measured_layers import listed_engine, times_of_layers
        from resvit_quantize.graph.fused_layers import layers_from_graph
        from resvit_quantize.graph.network import network_from_onnx

        found: dict[str, dict[str, float]] = {}
        if self.held is None or self.place.rehearse:
            return found
        timings, variants = self.held
        told = {name: (layers, profile) for name, profile in timings.times.profiles.items()
                if (layers := timings.layers_of(name)) is not None}  # fmt: skip
        if not told:
            return found
        works = layers_from_graph(
            network_from_onnx(self.pipeline.float_model.path), self.pipeline.recipe.batch_range[1]
        )
        for name, (layers, profile) in told.items():
            layers.require_unchanged()
            try:
                engine = listed_engine(layers.path, profile)
            except ResvitError as error:
                self.pipeline.run.reporter.warn(f"Layer times of the variant {name} are not used: {error.problem}")
                continue
            products = self.varied(variants[name]).quantized.eight_bit_products
            for layer, (precision, us) in times_of_layers(works, engine, products).items():
                found.setdefault(layer, {}).setdefault(precision.value, round(us, 3))
        return found
