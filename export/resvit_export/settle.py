"""What follows a rejection: weights are trained, layers are raised to a higher precision, where the recipe allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_engines.targets.table import Precision
from resvit_export.pipeline import Pipeline
from resvit_export.recipe.choices import Recovery
from resvit_export.recipe.recipe import Recipe
from resvit_export.refusals import recoverable, require_own_quantizer
from resvit_export.stages.decide.predict import pricing_of
from resvit_export.stages.decide.search import SENSITIVITY_IMAGES, Question, Search
from resvit_export.stages.decide.sensitivity import Measure, Measured, measured_of
from resvit_export.to_tensorrt.plugin_choice import By
from resvit_quantize.sensitivity.method import Method

if TYPE_CHECKING:
    from resvit_quantize.search.assignments import Assignment
    from resvit_quantize.search.search import Answer


def after_rejection(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or the one that recovers or was searched, where the gate or the recipe asks for it.

    Does the stages up to ``validate`` where that question is open.
    """
    return searched(recovered_if_rejected(pipeline))


def recovered_if_rejected(pipeline: Pipeline) -> Pipeline:
    """The pipeline that recovers, where ``auto`` finds that calibration alone is rejected."""
    recipe = pipeline.recipe
    if recipe.recover is not Recovery.AUTO or recipe.train_data is None or not recoverable(recipe) or _on_cpu(pipeline):
        return pipeline
    verdict = pipeline.validated.verdict
    if verdict.kind is not VerdictKind.REJECTED:
        return pipeline
    pipeline.run.reporter.say(f"calibration alone is rejected ({verdict.reason}): recovery follows")
    return pipeline.vary(recovers=True)


def _on_cpu(pipeline: Pipeline) -> bool:
    """Whether the target is a processor: what is trained and searched is for TensorRT's grids and times."""
    return pipeline.run.target is not None and pipeline.run.target.on_cpu


def searched(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or where its plain recipe is not accepted or a latency budget is set, the one that was searched."""
    recipe, reporter = pipeline.recipe, pipeline.run.reporter
    if pipeline.run.target is None or _on_cpu(pipeline) or not recoverable(recipe):
        return pipeline
    if recipe.latency_budget is None:
        if not recipe.search:
            return pipeline
        verdict = pipeline.validated.verdict
        if verdict.kind is VerdictKind.ACCEPTED:
            return pipeline
        if why := hopeless(verdict.verdict, recipe):
            reporter.warn(f"No precisions are searched for: {why}")
            return pipeline
        reporter.say(f"the plain recipe is {verdict.kind.value}: the search follows")
    question = Question(
        pricing_of(pipeline.run, pipeline.float_model, pipeline.pixels),
        measured(pipeline, SENSITIVITY_IMAGES),
        pipeline.run.precision,
    )
    answers = {} if recipe.latency_budget else answers_of_the_gate(pipeline, question)
    search = pipeline.run.folder.do(Search(question, recipe.latency_budget, recipe.confidence, answers))
    return pipeline.vary(precisions=search.assignment, confidence=search.confidence, search=search)


def measured(pipeline: Pipeline, images: int, method: Method = Method.GRADIENT) -> Measured:
    """Which layers the accuracy loss comes from, on the first ``images`` of the calibration images."""
    run, plain = pipeline.run, pipeline.vary(recovers=False)
    require_own_quantizer(run.recipe)
    if not run.folder.looks_back:
        run.sources.require_images()
    known = run.target.precisions if run.target else (Precision.INT8, Precision.FP8)
    eight_bits = [p.value for p in (Precision.INT8, Precision.FP8) if p in known]
    return measured_of(
        run,
        Measure(
            model=plain.exported.model,
            ranges=plain.calibrated.ranges,
            settings=run.quantize_settings({}),
            precisions=tuple(dict.fromkeys([run.precision.value, *eight_bits])),
            images=plain.images[0],
            preprocess=plain.preprocess,
            count=min(images, len(plain.images[0])),
            method=method,
            task=plain.questions.task,
            seed=run.recipe.seed,
        ),
    )


def answers_of_the_gate(pipeline: Pipeline, question: Question) -> dict[str, Answer]:
    """What the gate says of every assignment that the search looks at, by digest.

    Each look is a chain of finished stages, so that a killed search goes on where it stopped.
    """
    from resvit_quantize.search.search import Answer, search_max_drop

    problem, run = question.problem(), pipeline.run
    plain, answers = problem.plain_assignment().digest, dict[str, Answer]()
    division = None if run.folder.looks_only or run.plugins.by is By.TIME else run.division
    at_once = division.trials_at_once(len(pipeline.images[1])) if division else 1
    tried: dict[str, Mapping[str, Mapping[str, bytes]]] = {}

    def try_ahead(trials: Sequence[tuple[Assignment, float]]) -> None:
        if division is not None:
            run.reporter.say(f"search: {len(trials)} candidates are tried at once")
            candidates = [(assignment.precision_names, confidence) for assignment, confidence in trials]
            found = division.tried(run, pipeline.variant.recovers, candidates)
            tried.update({trial[0].digest: stages for trial, stages in zip(trials, found, strict=True)})

    def look(assignment: Assignment, confidence: float) -> Answer:
        verdict = pipeline.validated.verdict
        if assignment.digest != plain:
            for name, files in tried.pop(assignment.digest, {}).items():
                run.folder.take(name, files)
            verdict = pipeline.vary(precisions=assignment.precision_names, confidence=confidence).validated.verdict
            pipeline.run.reporter.say(f"search: {assignment.latency_us / 1e3:.3f} ms predicted, {verdict.kind.value}")
        kept = verdict.verdict.to_json()
        document = {key: kept[key] for key in ("verdict", "reason", "interval")}
        answers[assignment.digest] = Answer(verdict.kind is VerdictKind.ACCEPTED, document)
        return answers[assignment.digest]

    search_max_drop(problem, look, pipeline.recipe.confidence, try_ahead if at_once > 1 else None, at_once)
    return answers


def hopeless(verdict: Verdict, recipe: Recipe) -> str:
    """Why no network at all could be accepted on these images, empty if one could."""
    from resvit_calibrate.gate.intervals import paired_difference
    from resvit_quantize.search.search import confidence_of_look

    if verdict.chance_level:
        return f"{verdict.reason}."
    if verdict.metric != "top-1":
        # Only of classes is it known without a candidate how wide the interval will be.
        return ""
    _, high = paired_difference(0, 0, verdict.images, confidence_of_look(recipe.confidence, 2))
    if 100 * high <= recipe.max_drop:
        return ""
    return (
        f"on {verdict.images} images even a perfect copy of the float network could not be told to lose at most "
        f"{recipe.max_drop:g} percentage points; give more validation images or a larger --max-drop."
    )
