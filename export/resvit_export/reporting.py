"""The report of a run folder: gathers what the finished stages wrote and renders it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ResvitError
from resvit_export.recipe import recipe_to_toml
from resvit_export.report import ChangedImage, ReportData, write_report
from resvit_export.runfolder import Artifact, NotFinishedError

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline


def write_run_report(pipeline: Pipeline) -> Path:
    """Write ``report.html`` into the run folder from the stages that are finished; does no stage itself.

    Raises ``ResvitError`` where not even one stage is.
    """
    with pipeline.run.looking_only():
        found = {
            "fold": None if pipeline.from_onnx else _finished(lambda: pipeline.folded),
            "export": _finished(lambda: pipeline.exported),
        }
        found["calibrate"] = found["export"] and _finished(lambda: pipeline.calibrated)
        found["quantize"] = found["calibrate"] and _finished(lambda: pipeline.quantized)
        found["validate"] = found["quantize"] and _finished(lambda: pipeline.validated)
        found["compile"] = found["validate"] and pipeline.target and _finished_unless_rejected(pipeline)
        found["bundle"] = found["compile"] and _finished(lambda: pipeline.bundled)
    stages = {name: artifact for name, artifact in found.items() if artifact}
    if not stages:
        raise ResvitError(
            f"There is nothing to report in {pipeline.run.path}: no stage of this recipe is finished.",
            "Run 'resvit-export build' with the same settings first.",
        )
    path = pipeline.run.path / "report.html"
    write_report(path, _report_data(pipeline, stages))
    return path


def _finished(stage: Callable[[], Artifact]) -> Artifact | None:
    try:
        return stage()
    except NotFinishedError:
        return None


def _finished_unless_rejected(pipeline: Pipeline) -> Artifact | None:
    if pipeline.verdict["verdict"] == "rejected" and not pipeline.recipe.allow_rejected:
        return None
    return _finished(lambda: pipeline.compiled)


def _report_data(pipeline: Pipeline, stages: dict[str, Artifact]) -> ReportData:
    def document(stage: str, file: str) -> dict[str, Any] | None:
        artifact = stages.get(stage)
        return artifact.json(file) if artifact and artifact.path(file).exists() else None

    versions: dict[str, str] = {}
    for artifact in stages.values():
        versions.update(artifact.record["versions"])
    bundle = None
    if "bundle" in stages:
        from resvit_engines.bundle import read_manifest

        bundle = read_manifest(pipeline.bundle_path)
    return ReportData(
        name=pipeline.run.path.resolve().name,
        fold=document("fold", "fold.json"),
        export=document("export", "export.json"),
        ranges=document("calibrate", "ranges.json"),
        quantize=document("quantize", "quantize.json"),
        verdict=document("validate", "verdict.json"),
        engine=document("compile", "engine.json"),
        plan=document("compile", "plan.json"),
        bundle=bundle,
        recipe=recipe_to_toml(pipeline.recipe),
        targets=[pipeline.target.to_json()] if pipeline.target else [],
        sizes=_sizes(pipeline, stages),
        versions=versions,
        digests={name: artifact.digest for name, artifact in stages.items()},
        images=_changed_images(stages["validate"]) if "validate" in stages else (),
    )


def _sizes(pipeline: Pipeline, stages: dict[str, Artifact]) -> dict[str, int]:
    files = {
        "float ONNX": ("export", "model.onnx"),
        f"{pipeline.recipe.precision.upper()} ONNX": ("quantize", "model.onnx"),
        "engine": ("compile", "engine.plan"),
    }
    return {
        label: int(stages[stage].record["outputs"][file]["bytes"])
        for label, (stage, file) in files.items()
        if stage in stages and file in stages[stage].record["outputs"]
    }


def _changed_images(artifact: Artifact) -> list[ChangedImage]:
    import numpy as np

    verdict = artifact.json("verdict.json")
    with np.load(artifact.path("changed.npz"), allow_pickle=False) as pictures:
        return [
            ChangedImage(
                pictures[f"image_{item['index']}"],
                item["label"],
                item["float"],
                item["quantized"],
                verdict["class_names"] or None,
            )
            for item in verdict["changed"]
            if f"image_{item['index']}" in pictures
        ]
