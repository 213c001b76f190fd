"""The bundle stage: which files of a run go to the device, and what the manifest says about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.builder.device_plan import DevicePlan
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles, ImageCount, ManifestVerdict, Recovery
from resvit_engines.files import pretty_json
from resvit_engines.records import Record
from resvit_engines.trt.io_tensor import IoTensor, io_tensors_from_json
from resvit_export.recipe import FILES
from resvit_export.run_folder import Artifact, package_version
from resvit_export.to_tensorrt.copy import TENSORRT_COPY

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline

_PATH_SETTINGS = ("model", "checkpoint", "data", "validation_data", "train_data", "metric", *FILES)


def write_run_bundle(pipeline: Pipeline, path: Path) -> None:
    """Pack the finished stages of a run into one ``.resvit`` file at ``path``.

    The manifest holds no time, host name or path of this machine, so that the same inputs give the same bytes.
    """
    validated, compiled = pipeline.validated, pipeline.compiled
    files: dict[str, Path | bytes] = {
        "model.onnx": pipeline.shipped.path("model.onnx"),
        "ranges.json": pipeline.calibrated.path("ranges.json"),
        "quantize.json": pipeline.quantized.path("quantize.json"),
        "verdict.json": validated.path("verdict.json"),
        **{name: validated.path(name) for name in validated.record["outputs"] if name.startswith("golden_")},
    }
    for name in ("engine.plan", "plan.json", "layers.json", TENSORRT_COPY):
        if name in compiled.record["outputs"]:
            files[name] = compiled.path(name)
    if "engine.json" in compiled.record["outputs"]:
        files["engine.json"] = pretty_json(_engine_report(compiled).to_json())
    if compiled.path("plan.json").exists():
        files["README.txt"] = _device_readme(pipeline).encode()
    write_bundle(path, _manifest(pipeline), files, key=pipeline.signing_key)


def _manifest(pipeline: Pipeline) -> Manifest:
    recipe, verdict = pipeline.recipe, pipeline.verdict
    export = Record(pipeline.exported.json("export.json"), "export.json")
    images = pipeline.calibrated.json("images.json")
    settings = {
        item.name: list(value) if isinstance(value := getattr(recipe, item.name), tuple) else value
        for item in dataclasses.fields(recipe)
        if item.name not in _PATH_SETTINGS and item.name not in ("model_args", "preprocess")
    }
    stages = [pipeline.exported, pipeline.calibrated, pipeline.quantized, pipeline.validated]
    recovery = None
    if pipeline.recovers:
        stages.append(pipeline.recovered)
        recovery = Recovery.from_json(Record(recovery_facts(pipeline.recovered), "recover.json"))
    warning = None
    if verdict["verdict"] != "accepted":
        warning = f"Validation did not accept this model ({verdict['verdict']}): {verdict['reason']}"
    engine, plan = (pipeline.compiled.path(file).exists() for file in ("engine.json", "plan.json"))
    return Manifest(
        name=pipeline.bundle_name.removesuffix(".resvit"),
        release=recipe.release,
        target=pipeline.require_target(),
        engine=_engine_report(pipeline.compiled) if engine else None,
        plan=DevicePlan.from_json(Record(pipeline.compiled.json("plan.json"), "plan.json")) if plan else None,
        build=pipeline.engine_settings,
        precision=recipe.precision,
        quantizer=recipe.quantizer,
        input=IoTensor.from_json(export.record("input")),
        inputs=io_tensors_from_json(export.optional("inputs", export.records) or ()),
        outputs=io_tensors_from_json(export.records("outputs")),
        golden=GoldenFiles.from_json(Record(verdict["golden"], "verdict.json", "golden")),
        calibration=ImageCount(images["images"], images["digest"]),
        verdict=ManifestVerdict(
            verdict["verdict"],
            verdict["reason"],
            verdict["task"],
            tuple(verdict["class_names"]),
            ImageCount(verdict["images"], verdict["data_digest"]),
        ),
        recovery=recovery,
        warning=warning,
        model=pipeline.identity,
        settings=settings,
        preprocess=pipeline.preprocess.to_json(),
        versions={"resvit-export": package_version("resvit-export"), **pipeline.quantized.record["versions"]},
        stages={artifact.stage: artifact.record["key"] for artifact in stages},
    )


def recovery_facts(recovered: Artifact) -> dict[str, Any]:
    """How much recovery trained, without what differs from run to run."""
    return {key: recovered.json("recover.json")[key] for key in ("images", "steps", "kept_step", "before", "after")}


def _engine_report(compiled: Artifact) -> EngineReport:
    """What is true of the engine whenever it is built: without the time and memory that this build took."""
    report = EngineReport.from_json(Record(compiled.json("engine.json"), "engine.json"))
    return dataclasses.replace(report, seconds=None, peak_mib=None)


def _device_readme(pipeline: Pipeline) -> str:
    plan = pipeline.compiled.json("plan.json")
    target = pipeline.require_target()
    commands = "\n".join(f"    {command}" for command in plan["commands"])
    notes = "\n".join(plan["notes"])
    return f"""{pipeline.bundle_name}

{plan["why"]}

On the {target.title} ({target.software}), with the wheel of resvit_engines and the public key of whoever signed this:

    resvit-engine build {pipeline.bundle_name} --trust KEY.pub

which also checks the engine and packs it for 'resvit-engine install'. Or with TensorRT's own program alone:

{commands}

{notes}

The engine reads FP32 images prepared as manifest.json says under "preprocess". golden_input.npy and
golden_output.npy hold images and the outputs that were validated: compare the engine's with them.

Verdict of the validation: {pipeline.verdict["verdict"]}; {pipeline.verdict["reason"]}.
"""
