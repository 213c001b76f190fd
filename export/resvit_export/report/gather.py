"""The report of a run folder: gathers what the finished stages wrote and renders it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.errors import ResvitError
from resvit_export.recipe.file import recipe_to_toml
from resvit_export.report.layout.data import ChangedImage, ReportData
from resvit_export.report.page import write_report
from resvit_export.run_folder import NotFinishedError
from resvit_export.stage import Artifact
from resvit_export.stages.device import newest_on_device
from resvit_export.stages.validate import CHANGED, Validated

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline


def write_run_report(pipeline: Pipeline, name: str = "report.html") -> Path:
    """Write the report ``name`` into the run folder from the stages that are finished; does no stage itself.

    Raises ``ResvitError`` where not even one stage is.
    """
    folder = pipeline.run.folder
    stages = {artifact.stage: artifact for artifact in _finished_stages(pipeline)}
    if not stages:
        raise ResvitError(
            f"There is nothing to report in {folder.path}: no stage of this recipe is finished.",
            "Run 'resvit-export build' with the same settings first.",
        )
    path = folder.path / name
    write_report(path, _report_data(pipeline, stages))
    return path


def _finished_stages(pipeline: Pipeline) -> Iterator[Artifact]:
    """Look up the stages in order, as far as they are finished."""
    with pipeline.run.folder.looking_only(), contextlib.suppress(NotFinishedError):
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
    def document(stage: str, file: str) -> dict[str, Any] | None:
        artifact = stages.get(stage)
        return artifact.json(file) if artifact and artifact.has(file) else None

    versions: dict[str, str] = {}
    for artifact in stages.values():
        versions.update(artifact.record.versions)
    bundle, target = None, pipeline.run.target
    if "bundle" in stages:
        from resvit_engines.bundle.bundle import read_manifest

        bundle = read_manifest(pipeline.bundled.bundle.path).to_json()
    return ReportData(
        name=_title(pipeline),
        prune=document("prune", "prune.json"),
        retrain=document("retrain", "retrain.json"),
        fold=document("fold", "fold.json"),
        export=document("export", "export.json"),
        ranges=document("calibrate", "ranges.json"),
        quantize=document("quantize", "quantize.json"),
        verdict=document("validate", "verdict.json"),
        costs=document("predict", "costs.json"),
        search=document("search", "search.json"),
        engine=document("compile", "engine.json"),
        plan=document("compile", "plan.json"),
        audit=document("audit", "audit.json"),
        device=document("device", "device.json"),
        bundle=bundle,
        recipe=recipe_to_toml(pipeline.recipe),
        targets=[target.to_json()] if target else [],
        sizes=_sizes(pipeline, stages),
        versions=versions,
        digests={name: artifact.digest for name, artifact in stages.items()},
        images=_changed_images(stages["validate"]) if "validate" in stages else (),
    )


def _title(pipeline: Pipeline) -> str:
    where = f" for {pipeline.run.target.title}" if pipeline.run.target else ""
    return f"{pipeline.recipe.label}{where}, {pipeline.run.precision.value.upper()}"


def _sizes(pipeline: Pipeline, stages: Mapping[str, Artifact]) -> dict[str, int]:
    files = {
        "float ONNX": ("export", "model.onnx"),
        f"{pipeline.run.precision.value.upper()} ONNX": ("quantize", "model.onnx"),
        "engine": ("compile", "engine.plan"),
    }
    return {
        label: int(stages[stage].record.outputs[file].bytes)
        for label, (stage, file) in files.items()
        if stage in stages and stages[stage].has(file)
    }


def _changed_images(artifact: Artifact) -> list[ChangedImage]:
    import numpy as np

    assert isinstance(artifact, Validated)
    verdict = artifact.verdict
    with np.load(artifact.path(CHANGED), allow_pickle=False) as pictures:
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
