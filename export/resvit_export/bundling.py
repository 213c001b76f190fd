"""The bundle stage: which files of a run go to the device, and what the manifest says about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.files import pretty_json
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
    from resvit_engines.bundle.bundle import write_bundle

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
        files["engine.json"] = pretty_json(_engine_facts(compiled))
    if compiled.path("plan.json").exists():
        files["README.txt"] = _device_readme(pipeline).encode()
    write_bundle(path, _manifest(pipeline), files, key=pipeline.signing_key)


def _manifest(pipeline: Pipeline) -> dict[str, Any]:
    recipe, verdict = pipeline.recipe, pipeline.verdict
    export = pipeline.exported.json("export.json")
    target = pipeline.require_target()
    settings = {
        item.name: list(value) if isinstance(value := getattr(recipe, item.name), tuple) else value
        for item in dataclasses.fields(recipe)
        if item.name not in _PATH_SETTINGS and item.name not in ("model_args", "preprocess")
    }
    manifest: dict[str, Any] = {
        "name": pipeline.bundle_name.removesuffix(".resvit"),
        "release": recipe.release,
        "versions": {"resvit-export": package_version("resvit-export"), **pipeline.quantized.record["versions"]},
        "model": pipeline.identity,
        "precision": recipe.precision,
        "quantizer": recipe.quantizer,
        "target": target.to_json(),
        "settings": settings,
        "build": pipeline.engine_settings.to_json(),
        "preprocess": pipeline.preprocess.to_json(),
        "class_names": verdict["class_names"],
        "input": export["input"],
        **({"inputs": export["inputs"]} if "inputs" in export else {}),
        "outputs": export["outputs"],
        "calibration": {
            "images": pipeline.calibrated.json("images.json")["images"],
            "digest": pipeline.calibrated.json("images.json")["digest"],
        },
        "validation": {"images": verdict["images"], "digest": verdict["data_digest"]},
        "verdict": verdict["verdict"],
        "verdict_reason": verdict["reason"],
        "task": verdict["task"],
        "golden": verdict["golden"],
        "stages": {
            artifact.stage: artifact.record["key"]
            for artifact in (pipeline.exported, pipeline.calibrated, pipeline.quantized, pipeline.validated)
        },
    }
    if pipeline.recovers:
        manifest["stages"]["recover"] = pipeline.recovered.record["key"]
        manifest["recovery"] = {"images": pipeline.training_images.digest, **recovery_facts(pipeline.recovered)}
    if verdict["verdict"] != "accepted":
        manifest["warning"] = f"Validation did not accept this model ({verdict['verdict']}): {verdict['reason']}"
    for kind, file in (("engine", "engine.json"), ("plan", "plan.json")):
        if pipeline.compiled.path(file).exists():
            manifest[kind] = _engine_facts(pipeline.compiled) if kind == "engine" else pipeline.compiled.json(file)
    return manifest


def recovery_facts(recovered: Artifact) -> dict[str, Any]:
    """How much recovery trained, without what differs from run to run."""
    return {key: recovered.json("recover.json")[key] for key in ("images", "steps", "kept_step", "before", "after")}


def _engine_facts(compiled: Artifact) -> dict[str, Any]:
    """What is true of the engine whenever it is built: without the time and memory that this build took."""
    return {key: value for key, value in compiled.json("engine.json").items() if key not in ("seconds", "peak_mib")}


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
