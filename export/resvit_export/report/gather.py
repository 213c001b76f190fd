"""The report of a run folder: gathers what the finished stages wrote and renders it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.bundle.bundle import signers
from resvit_engines.errors import ResvitError
from resvit_export.recipe.file import recipe_to_toml
from resvit_export.report.layout.data import ChangedImage, ReportData
from resvit_export.report.next_steps import Ending, next_commands
from resvit_export.report.page import write_report
from resvit_export.run_folder import NotFinishedError
from resvit_export.stage import Artifact
from resvit_export.stages.audit import Audited
from resvit_export.stages.bundle import Bundled
from resvit_export.stages.calibrate import Calibrated
from resvit_export.stages.compile import Compiled
from resvit_export.stages.decide.predict import Predicted
from resvit_export.stages.decide.recover import Recovered
from resvit_export.stages.decide.search import Searched
from resvit_export.stages.device import OnDevice, newest_on_device
from resvit_export.stages.export import Exported
from resvit_export.stages.fold import Folded
from resvit_export.stages.prune import Pruned
from resvit_export.stages.quantize import Quantized
from resvit_export.stages.retrain import Retrained
from resvit_export.stages.validate import CHANGED, Validated

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline

A = TypeVar("A", bound=Artifact)


def write_run_report(pipeline: Pipeline, name: str = "report.html") -> Path:
    """Write the report ``name`` into the run folder from the stages that are finished; does no stage itself.

    Raises ``ResvitError`` where not even one stage is.
    """
    folder = pipeline.run.folder
    with folder.looking_back():
        stages = {artifact.stage: artifact for artifact in _finished_stages(pipeline)}
        if not stages:
            raise ResvitError(
                f"There is nothing to report in {folder.path}: no stage of this recipe is finished.",
                "Run 'resvit-export build' with the same settings first.",
            )
        data = _report_data(pipeline, stages)
    path = folder.path / name
    write_report(path, data)
    return path


def _finished_stages(pipeline: Pipeline) -> Iterator[Artifact]:
    """Look up the stages in order, as far as they are finished."""
    with contextlib.suppress(NotFinishedError):
        for name in pipeline.variant.order(pipeline.run):
            if name == "quantized" and pipeline.variant.search:
                yield pipeline.variant.search
            yield getattr(pipeline, name)
        rejected = pipeline.validated.verdict.kind is VerdictKind.REJECTED and not pipeline.recipe.allow_rejected
        if pipeline.run.target and not rejected:
            yield pipeline.compiled
            # Either may be missing: without 'audit', or refused by --require-fused.
            with contextlib.suppress(ResvitError):
                yield pipeline.audited
            with contextlib.suppress(ResvitError):
                yield pipeline.bundled
                if (on_device := newest_on_device(pipeline.run.folder, pipeline.bundled.bundle)) is not None:
                    yield on_device


def _report_data(pipeline: Pipeline, stages: Mapping[str, Artifact]) -> ReportData:
    found = tuple(stages.values())
    pruned, retrained, folded = _one(found, Pruned), _one(found, Retrained), _one(found, Folded)
    recovered = _one(found, Recovered)
    exported, calibrated, quantized = _one(found, Exported), _one(found, Calibrated), _one(found, Quantized)
    validated, predicted, searched = _one(found, Validated), _one(found, Predicted), _one(found, Searched)
    compiled, audited, bundled = _one(found, Compiled), _one(found, Audited), _one(found, Bundled)
    on_device, target = _one(found, OnDevice), pipeline.run.target
    versions: dict[str, str] = {}
    for artifact in found:
        versions.update(artifact.record.versions)
    return ReportData(
        name=_title(pipeline, _ships(pipeline, quantized)),
        prune=pruned.report if pruned else None,
        retrain=retrained.report if retrained else None,
        recover=recovered.report if recovered else None,
        fold=folded.report if folded else None,
        export=exported.report if exported else None,
        ranges=calibrated.known if calibrated else None,
        quantize=quantized.report if quantized else None,
        verdict=validated.verdict if validated else None,
        least_sqnr_db=_least_sqnr(pipeline),
        costs=predicted.costs if predicted else None,
        speed=predicted.costs.speed(target).for_wish(pipeline.run.precision) if predicted and target else None,
        search=searched.result if searched else None,
        engine=compiled.engine if compiled else None,
        plan=compiled.plan if compiled else None,
        audit=audited.result if audited else None,
        device=on_device.result if on_device else None,
        bundle=bundled.manifest if bundled else None,
        next_commands=_next_commands(pipeline, validated, compiled, bundled, on_device),
        preprocess=_preprocess(pipeline) if exported else (),
        recipe=recipe_to_toml(pipeline.recipe),
        targets=[target] if target else [],
        sizes=_sizes(_ships(pipeline, quantized), stages),
        versions=dict(sorted(versions.items())),
        digests={name: artifact.digest for name, artifact in stages.items()},
        images=_changed_images(validated) if validated else (),
    )


def _one(artifacts: Iterable[Artifact], kind: type[A]) -> A | None:
    """The artefact of that kind; None where its stage is not finished."""
    return next((artifact for artifact in artifacts if isinstance(artifact, kind)), None)


def _ships(pipeline: Pipeline, quantized: Quantized | None) -> str:
    """What the ONNX that ships is called; as it was asked for, where there is none yet."""
    return (pipeline.ships if quantized else pipeline.run.precision).value.upper()


def _title(pipeline: Pipeline, precision: str) -> str:
    where = f" for {pipeline.run.target.title}" if pipeline.run.target else ""
    return f"{pipeline.recipe.label}{where}, {precision}"


def _next_commands(
    pipeline: Pipeline,
    validated: Validated | None,
    compiled: Compiled | None,
    bundled: Bundled | None,
    on_device: OnDevice | None,
) -> list[tuple[str, str]]:
    run = pipeline.run
    if validated is None or run.target is None:
        return []
    with contextlib.suppress(ResvitError):
        return next_commands(
            Ending(
                folder=run.folder.path,
                recipe=pipeline.recipe,
                target=run.target,
                verdict=validated.verdict,
                speed=pipeline.speed,
                bundle=bundled.bundle.path if bundled else None,
                signs=bool(bundled and signers(bundled.bundle.path)),
                planned=bool(compiled and compiled.plan),
                on_device=on_device is not None,
            )
        )
    return []


def _preprocess(pipeline: Pipeline) -> list[tuple[str, str]]:
    if pipeline.recipe.data is None:
        return []
    with contextlib.suppress(ResvitError):
        return pipeline.run.preprocess_steps(pipeline.network)
    return []


def _least_sqnr(pipeline: Pipeline) -> float | None:
    from resvit_calibrate.tasks.other import OtherOptions

    said = pipeline.recipe.task_options.get("least_sqnr_db", OtherOptions.least_sqnr_db)
    return float(said) if isinstance(said, (int, float)) else None


def _sizes(precision: str, stages: Mapping[str, Artifact]) -> dict[str, int]:
    files = {
        "float ONNX": ("export", "model.onnx"),
        f"{precision} ONNX": ("quantize", "model.onnx"),
        "engine": ("compile", "engine.plan"),
    }
    return {
        label: int(stages[stage].record.outputs[file].bytes)
        for label, (stage, file) in files.items()
        if stage in stages and stages[stage].has(file)
    }


def _changed_images(validated: Validated) -> list[ChangedImage]:
    import numpy as np

    verdict = validated.verdict
    with np.load(io.BytesIO(validated.content(CHANGED)), allow_pickle=False) as pictures:
        return [
            ChangedImage(
                pictures[f"image_{item.index}"],
                item.label,
                item.before,
                item.after,
                verdict.class_names or None,
                item.outcome,
                *(
                    {n.split("_", 2)[2]: pictures[n] for n in pictures if n.startswith(f"{who}_{item.index}_")}
                    for who in ("float", "quantized")
                ),
            )
            for item in verdict.changed
            if f"image_{item.index}" in pictures
        ]
