"""What follows a rejection: weights are trained, layers are raised to a higher precision, where the recipe allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resvit_calibrate.gate.gate import Verdict, VerdictKind
from resvit_export.choices import Recovery
from resvit_export.pipeline import Pipeline
from resvit_export.recipe import Recipe
from resvit_export.refusals import recoverable
from resvit_export.stages.decide.search import SENSITIVITY_IMAGES, Question, Search

if TYPE_CHECKING:
    from resvit_quantize.search.assignments import Plan
    from resvit_quantize.search.search import Answer

_ALONE = "sensitivity is measured for networks that read images alone."


def settled(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or the one that recovers or was searched, where the gate or the recipe asks for it.

    Does the stages up to ``validate`` where that question is open.
    """
    return searched(recovered_if_rejected(pipeline))


def recovered_if_rejected(pipeline: Pipeline) -> Pipeline:
    """The pipeline that recovers, where ``auto`` finds that calibration alone is rejected."""
    recipe = pipeline.recipe
    if recipe.recover is not Recovery.AUTO or recipe.train_data is None or not recoverable(recipe):
        return pipeline
    verdict = pipeline.validated.verdict
    if verdict.kind is not VerdictKind.REJECTED or pipeline.network.inputs:
        return pipeline
    pipeline.run.reporter.say(f"calibration alone is rejected ({verdict.reason}): recovery follows")
    return pipeline.vary(recovers=True)


def searched(pipeline: Pipeline) -> Pipeline:
    """The pipeline, or where its plain recipe is not accepted or a latency budget is set, the one that was searched."""
    recipe, reporter = pipeline.recipe, pipeline.run.reporter
    if pipeline.run.target is None or not recoverable(recipe):
        return pipeline
    if recipe.latency_budget is None:
        if not recipe.search:
            return pipeline
        verdict = pipeline.validated.verdict
        if verdict.kind is VerdictKind.ACCEPTED:
            return pipeline
        why = _ALONE if pipeline.network.inputs else hopeless(verdict.verdict, recipe)
        if why:
            reporter.warn(f"No precisions are searched for: {why}")
            return pipeline
        reporter.say(f"the plain recipe is {verdict.kind.value}: the search follows")
    question = Question(pipeline.pricing, pipeline.measured(SENSITIVITY_IMAGES), pipeline.run.precision)
    answers = {} if recipe.latency_budget else answers_of_the_gate(pipeline, question)
    search = pipeline.run.folder.do(Search(question, recipe.latency_budget, recipe.confidence, answers))
    return pipeline.vary(precisions=search.assignment, confidence=search.confidence, search=search)


def answers_of_the_gate(pipeline: Pipeline, question: Question) -> dict[str, Answer]:
    """What the gate says of every assignment that the search looks at, by digest.

    Each look is a chain of finished stages, so that a killed search goes on where it stopped.
    """
    from resvit_quantize.search.search import Answer, search_max_drop

    problem = question.problem()
    plain, answers = problem.plain_plan().digest, dict[str, Answer]()

    def look(plan: Plan, confidence: float) -> Answer:
        verdict = pipeline.validated.verdict
        if plan.digest != plain:
            verdict = pipeline.vary(precisions=plan.plain_assignment, confidence=confidence).validated.verdict
            pipeline.run.reporter.say(f"search: {plan.latency_us / 1e3:.3f} ms predicted, {verdict.kind.value}")
        kept = verdict.verdict.to_json()
        document = {key: kept[key] for key in ("verdict", "reason", "interval")}
        answers[plan.digest] = Answer(verdict.kind is VerdictKind.ACCEPTED, document)
        return answers[plan.digest]

    search_max_drop(problem, look, pipeline.recipe.confidence)
    return answers


def hopeless(verdict: Verdict, recipe: Recipe) -> str:
    """Why no network at all could be accepted on these images, empty if one could."""
    from resvit_calibrate.gate.intervals import paired_difference
    from resvit_quantize.search.search import confidence_of_look

    if verdict.chance_level:
        return "the float network itself cannot be told from guessing."
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
