"""The stages ``search`` and ``predict``: which layer gets which precision, and what that is predicted to gain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json, sha256_file
from resvit_engines.targets.layer_times import measured_times_from_json
from resvit_engines.targets.table import Precision, Target
from resvit_export.run_folder import Artifact

if TYPE_CHECKING:
    from resvit_engines.targets.costs import CostModel
    from resvit_export.pipeline import Pipeline
    from resvit_export.recipe import Recipe
    from resvit_quantize.search.assignments import Assignment, Problem
    from resvit_quantize.search.search import Answer, SearchResult

SENSITIVITY_IMAGES = 128
_SHOWN = 12
_ALONE = "sensitivity is measured for networks that read images alone."


def require_searchable(recipe: Recipe, target: Target | None) -> None:
    """Refuse a latency budget that nothing can search for, and read what the recipe names.

    Raises:
        ResvitError: IMPOSSIBLE for a budget with FP16 or ModelOpt's quantiser; INPUT for one that does not read, and
            for measured times that do not.
    """
    if recipe.measured_times is not None:
        measured_times_from_json(Path(recipe.measured_times))
    if recipe.latency_budget is None:
        return
    from resvit_quantize.search.search import latency_budget_from

    latency_budget_from(recipe.latency_budget)
    if recipe.precision == "fp16" or recipe.quantizer != "resvit":
        raise ResvitError(
            "A latency budget chooses among 8-bit layers of our own quantiser, which this recipe does not use.",
            "Leave --latency-budget out, or say --precision int8 or fp8 and --quantizer resvit.",
            ExitCode.IMPOSSIBLE,
        )
    if target is None:
        raise ResvitError("A latency budget needs a device.", "Say --target; 'resvit-export targets' lists them.")


def searched(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or where its plain recipe is not accepted or a latency budget is set, the one that was searched.

    Does the stages up to ``validate`` where that question is open.
    """
    recipe = pipeline.recipe
    if pipeline.target is None or recipe.precision == "fp16" or recipe.quantizer != "resvit":
        return pipeline
    if recipe.latency_budget is None:
        if not recipe.search or pipeline.verdict["verdict"] == "accepted":
            return pipeline
        several = pipeline.reads_more_than_images
        hopeless = _hopeless(pipeline.verdict, recipe, _ALONE if several else "")
        if hopeless:
            pipeline.reporter.warn(f"No precisions are searched for: {hopeless}")
            return pipeline
        pipeline.reporter.say(f"the plain recipe is {pipeline.verdict['verdict']}: the search follows")
    artifact = _search(pipeline)
    found = artifact.json("search.json")
    other = pipeline.with_precisions(found["assignment"], found["confidence"])
    other.search = artifact
    return other


def predicted(pipeline: Pipeline) -> Artifact:
    """Stage ``predict``: the time of every layer on the target, against all FP16, in ``costs.json``."""
    (_, digest), quantized = pipeline.float_model, pipeline.quantized
    return pipeline.run.stage(
        "predict",
        _cost_facts(pipeline),
        {"model": digest, "quantized": quantized.digest},
        ("onnx-ir",),
        lambda folder: _predict_into(folder, pipeline),
    )


def _hopeless(verdict: dict[str, Any], recipe: Recipe, alone: str = "") -> str:
    """Why no network at all could be accepted on these images, empty if one could; ``alone`` goes before."""
    from resvit_calibrate.gate.intervals import paired_difference
    from resvit_quantize.search.search import confidence_of_look

    if alone:
        return alone
    if verdict["chance_level"]:
        return "the float network itself cannot be told from guessing."
    if verdict.get("metric", "top-1") != "top-1":
        # Only of classes is it known without a candidate how wide the interval will be.
        return ""
    _, high = paired_difference(0, 0, verdict["images"], confidence_of_look(recipe.confidence, 2))
    if 100 * high <= recipe.max_drop:
        return ""
    return (
        f"on {verdict['images']} images even a perfect copy of the float network could not be told to lose at most "
        f"{recipe.max_drop:g} percentage points; give more validation images or a larger --max-drop."
    )


def _cost_facts(pipeline: Pipeline) -> dict[str, Any]:
    """What a prediction depends on beside the network."""
    from resvit_engines.targets.costs import ACCUMULATOR_BYTES, EFFICIENCY

    target, recipe = pipeline.require_target(), pipeline.recipe
    return {
        "target": target.name,
        "builder": target.builder.value,
        "speed": dataclasses.asdict(target.speed),
        "efficiency": dataclasses.asdict(EFFICIENCY),
        "accumulators": {kind.value: size for kind, size in ACCUMULATOR_BYTES.items()},
        "batch": recipe.batch_range[1],
        "measured": sha256_file(Path(recipe.measured_times)) if recipe.measured_times else None,
    }


def _cost_model(pipeline: Pipeline) -> CostModel:
    from resvit_engines.targets.costs import CostModel
    from resvit_quantize.graph.fused_layers import layers_from_graph
    from resvit_quantize.graph.network import network_from_onnx

    recipe = pipeline.recipe
    works = layers_from_graph(network_from_onnx(pipeline.float_model[0]), recipe.batch_range[1])
    measured = measured_times_from_json(Path(recipe.measured_times)) if recipe.measured_times else None
    if measured is not None:
        measured.require_known(name for work in works for name in (work.name, *work.nodes))
    return CostModel(works, pipeline.require_target(), measured)


def _predict_into(folder: Path, pipeline: Pipeline) -> None:
    """Write ``costs.json``."""
    from resvit_quantize.search.search import worth_it

    costs = _cost_model(pipeline)
    nodes = pipeline.quantized.json("quantize.json")["nodes"]
    quantised = (Precision.INT8.value, Precision.FP8.value)
    chosen = costs.predict({n["name"]: Precision(n["precision"]) for n in nodes if n["precision"] in quantised})
    fp16 = costs.predict({})
    worth = worth_it(fp16, chosen, pipeline.require_target())
    document = {**worth.to_json(), "fp16": fp16.to_json(), "chosen": chosen.to_json()}
    (folder / "costs.json").write_bytes(pretty_json(document))


def _search(pipeline: Pipeline) -> Artifact:
    recipe = pipeline.recipe
    gate = {} if recipe.latency_budget else {"baseline": pipeline.baseline.digest}
    return pipeline.run.stage(
        "search",
        {
            **_cost_facts(pipeline),
            "quantize": pipeline.quantize_facts,
            "latency_budget": recipe.latency_budget,
            "max_drop": recipe.max_drop,
            "confidence": recipe.confidence,
            "sensitivity_images": SENSITIVITY_IMAGES,
        },
        {
            "model": pipeline.float_model[1],
            "ranges": pipeline.calibrated.digest,
            "calibration": pipeline.image_sets[0].digest,
            "images": pipeline.image_sets[1].digest,
            **gate,
        },
        ("torch", "onnx", "onnx-ir", "onnxruntime"),
        lambda folder: _search_into(folder, pipeline),
    )


def _search_into(folder: Path, pipeline: Pipeline) -> None:
    """Write ``search.json``. Every look is a pair of finished stages, so that a killed search goes on."""
    from resvit_quantize.search.search import latency_budget_from, search_latency_budget, search_max_drop

    recipe, problem = pipeline.recipe, _problem(pipeline)
    if recipe.latency_budget:
        result = search_latency_budget(problem, latency_budget_from(recipe.latency_budget))
        result = dataclasses.replace(result, confidence=recipe.confidence)
    else:
        plain = problem.plain_assignment().digest
        result = search_max_drop(
            problem, lambda assignment, c: _look(pipeline, assignment, c, plain), recipe.confidence
        )
    fp16_us = problem.costs.total_us({})
    document = {
        **result.to_json(),
        "plain": problem.plain_assignment().to_json(),
        "fp16_ms": fp16_us / 1e3,
        "sentences": _sentences(result, problem, fp16_us),
        "prices": _prices(result),
    }
    (folder / "search.json").write_bytes(pretty_json(document))


def _problem(pipeline: Pipeline) -> Problem:
    from resvit_export.sensitivity_stage import measured_sensitivity, sensitivity_of
    from resvit_quantize.search.assignments import Problem

    layers = sensitivity_of(measured_sensitivity(pipeline, SENSITIVITY_IMAGES)).layers
    known, asked = pipeline.require_target().precisions, pipeline.recipe.precision
    allowed = {
        layer.node: frozenset({Precision.FP16, *(Precision(q) for q in layer.quantized)}) & known for layer in layers
    }
    damage = {layer.node: {Precision(p): value for p, value in layer.damage.items()} for layer in layers}
    plain = {layer.node: Precision(asked) if asked in layer.quantized else Precision.FP16 for layer in layers}
    return Problem(_cost_model(pipeline), allowed, damage, plain)


def _look(pipeline: Pipeline, assignment: Assignment, confidence: float, plain: str) -> Answer:
    """Quantise and validate one assignment; the plain one is validated already."""
    from resvit_quantize.search.search import Answer

    if assignment.digest == plain:
        verdict = pipeline.verdict
    else:
        candidate = pipeline.with_precisions(assignment.precision_names, confidence)
        verdict = candidate.verdict
        pipeline.reporter.say(f"search: {assignment.latency_us / 1e3:.3f} ms predicted, {verdict['verdict']}")
    kept = {key: verdict[key] for key in ("verdict", "reason", "interval")}
    return Answer(verdict["verdict"] == "accepted", kept)


def _sentences(result: SearchResult, problem: Problem, fp16_us: float) -> list[str]:
    """What was found, for people."""
    chosen, plain = result.chosen, problem.plain_assignment()
    counts = {p: sum(q is p for q in chosen.precisions.values()) for p in Precision}
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
