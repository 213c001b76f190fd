"""The stage ``audit``: what the compiler made of the quantised graph, beside the FP16 engine of the same network."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.audit.audit import audit_engine
from resvit_engines.audit.findings import FusionAudit, Subject
from resvit_engines.audit.inspector import layers_from_file
from resvit_engines.audit.kernels import Kernel
from resvit_engines.audit.record import SkippedAudit, audit_from_json, record_of
from resvit_engines.builder.builder import build_engine, builder_here
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import TITLES, BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.records import record_from_file
from resvit_engines.targets.table import Target, proxy_target
from resvit_export.run_folder import Artifact
from resvit_export.to_tensorrt.copy import TENSORRT_COPY, onnx_for_tensorrt
from resvit_export.work import half_into

if TYPE_CHECKING:
    from resvit_export.pipeline import Pipeline

RESULT = "audit.json"
KERNELS = "kernels.json"
"""All kernels of what was compiled for the audit alone: ``quantized`` where no engine is built here, and ``fp16``."""


@dataclass(frozen=True)
class Graphs:
    """What is compiled: the quantised ONNX, and the float one with its ranges, from which the FP16 one is made.

    ``ranges`` is None where the quantised one is FP16 itself, so that there is nothing to compare with.
    """

    quantized: Path
    floating: Path
    ranges: Path | None


def audited(pipeline: Pipeline) -> Artifact:
    """Stage ``audit``: ``audit.json`` and ``kernels.json``, after ``compile``."""
    compiled, target, digest = pipeline.compiled, pipeline.require_target(), pipeline.float_model[1]
    low, _, high = pipeline.recipe.batch_range
    # A dynamic batch has no shapes in its kernels: the usual one is compiled for the audit.
    engine = compiled.folder if compiled.path("engine.json").exists() and low == high else None
    graphs, settings = _audited_build(pipeline, own=engine is not None)
    remark = _about_plugins(pipeline, own=engine is not None)
    return pipeline.run.stage(
        "audit",
        {
            "target": target.to_json(),
            "stand_in": proxy_target(target).to_json(),
            **settings.to_json(),
            "plugins": remark,
        },
        {
            "quantized": pipeline.shipped.digest,
            "compiled": compiled.digest,
            "model": digest,
            "ranges": pipeline.calibrated.digest,
        },
        ("onnx-ir", "tensorrt-rtx-cu13-libs", "tensorrt"),
        lambda folder: audit_into(
            folder,
            graphs=graphs,
            target=target,
            settings=settings,
            engine=engine,
            reporter=pipeline.reporter,
            remark=remark,
        ),
    )


def audit_on_device(pipeline: Pipeline, folder: Path) -> None:
    """The same for the engine that was brought back from the device into ``folder``, from its own layers."""
    graphs, settings = _audited_build(pipeline, own=True)
    target = pipeline.require_target()
    audit_into(folder, graphs=graphs, target=target, settings=settings, engine=folder, reporter=pipeline.reporter)


def _about_plugins(pipeline: Pipeline, *, own: bool) -> str:
    """Which way was taken, and why; and that a stand-in, which takes no plugins, compiled the graph without ours."""
    choice = pipeline.plugin_choice
    if pipeline.shipped is pipeline.quantized:
        why = "none was chosen, for the reasons in fusion.json" if pipeline.fuses else choice.reason
        return f"No kernel of our own is in the engine: {why}."
    count = len(pipeline.fused.json("fusion.json")["matches"])
    sentence = f"{count} kernels of our own are in the engine ({choice.reason})"
    return f"{sentence}." if own else f"{sentence}; the stand-in takes none: what is listed is the graph without them."


def _audited_build(pipeline: Pipeline, *, own: bool) -> tuple[Graphs, BuildSettings]:
    """What TensorRT reads, and how it is built for the audit: at the usual batch.

    ``own`` is for the target's own engine; a stand-in gets the graph without kernels of ours, which it cannot take.
    """
    recipe, target = pipeline.recipe, pipeline.require_target()
    usual = recipe.batch_range[1]
    settings = BuildSettings(
        batch=(usual, usual, usual),
        workspace_mib=recipe.workspace_mib or target.workspace_mib,
        optimization_level=recipe.optimization_level,
        sparse=recipe.sparsity is not None,
    )
    ranges = pipeline.calibrated.path("ranges.json") if recipe.precision != "fp16" else None
    plain = pipeline.shipped is pipeline.quantized
    copy = pipeline.compiled.path(TENSORRT_COPY)
    quantized = copy if copy.exists() and (own or plain) else pipeline.quantized.path("model.onnx")
    return Graphs(quantized, pipeline.float_model[0], ranges), settings


def audit_into(
    folder: Path,
    *,
    graphs: Graphs,
    target: Target,
    settings: BuildSettings,
    engine: Path | None,
    reporter: Reporter,
    remark: str = "",
) -> None:
    """Write ``audit.json`` and ``kernels.json``.

    ``engine`` is the folder of the target's own engine, built here or brought back from the device, with its
    ``engine.json`` and, where that names one, the inspector's layer file. Without one, the graph is compiled for the
    nearest GPU that TensorRT for RTX serves; where that cannot be, ``audit.json`` says why. ``remark`` joins what the
    audit says.
    """
    from resvit_export.to_tensorrt.expectation import expectation_from_onnx

    try:
        with tempfile.TemporaryDirectory(prefix="resvit-audit-") as scratch:
            report, kernels = _quantized(graphs.quantized, target, settings, engine, Path(scratch), reporter)
            fp16, note = _fp16(graphs, target, settings, engine, Path(scratch), reporter)
    except ResvitError as error:
        if engine is not None or error.code not in (ExitCode.MISSING, ExitCode.BUILD, ExitCode.IMPOSSIBLE):
            raise
        reporter.warn(f"Nothing was audited for {target.title}: {error.problem}")
        skipped = SkippedAudit(target.name, f"{error.problem} {error.fix}")
        (folder / RESULT).write_bytes(pretty_json(skipped.to_json()))
        return
    batch = settings.batch[1]
    stands_in = "" if engine is not None else stand_in_sentence(target)
    subject = Subject(
        target.name,
        report.sm,
        TITLES[report.builder],
        report.builder_version,
        batch,
        stands_in,
    )
    io_names = [tensor.name for tensor in (*report.inputs, *report.outputs)]
    audit = audit_engine(subject, expectation_from_onnx(graphs.quantized, batch), kernels, io_names, fp16)
    result = record_of(audit, [text for text in (note, remark) if text])
    (folder / RESULT).write_bytes(pretty_json(result.to_json()))
    compiled = {"quantized": kernels} if engine is None else {}
    compiled |= {"fp16": fp16} if fp16 is not None else {}
    listing = {name: [kernel.to_json() for kernel in found] for name, found in compiled.items()}
    (folder / KERNELS).write_bytes(pretty_json(listing))


def audit_of_layers(layers: Path, onnx: Path, fp16_layers: Path | None = None) -> FusionAudit:
    """Audit an engine by the layer file that trtexec or the engine inspector wrote, and the ONNX behind it.

    Raises:
        ResvitError: INPUT where one of the files cannot be read, or the layers are names only.
    """
    from resvit_export.to_tensorrt.expectation import expectation_from_onnx

    engine = layers_from_file(layers)
    fp16 = layers_from_file(fp16_layers).kernels if fp16_layers else None
    subject = Subject(layers.name, None, "TensorRT", engine.form, _batch_of(engine.kernels, engine.io_names))
    return audit_engine(subject, expectation_from_onnx(onnx, subject.batch), engine.kernels, engine.io_names, fp16)


def _batch_of(kernels: tuple[Kernel, ...], io_names: frozenset[str]) -> int:
    """The batch of the first kernel that reads an input of the network; 1 where it is dynamic or not told."""
    for kernel in kernels:
        for name, shape in zip(kernel.input_names, kernel.input_shapes, strict=False):
            if name in io_names and shape and shape[0] > 0:
                return shape[0]
    return 1


def refuse_if_unfused(audit: Mapping[str, Any]) -> None:
    """The gate of ``--require-fused`` on the content of ``audit.json``.

    Raises:
        ResvitError: REJECTED where something did not fuse, MISSING where nothing could be audited.
    """
    audit_from_json(audit, RESULT).require_fused()


def stand_in_sentence(target: Target) -> str:
    """Say what is compiled in place of the target's own engine; empty where nothing stands in."""
    proxy = proxy_target(target)
    if proxy.sm == target.sm and proxy.builder is target.builder:
        return ""
    return (
        f"SM {proxy.sm / 10:.1f} stands in for {target.title} (SM {target.sm / 10:.1f}) and {TITLES[proxy.builder]} "
        f"for {target.software}: what is built on the device may fuse otherwise."
    )


def _quantized(
    model: Path, target: Target, settings: BuildSettings, engine: Path | None, scratch: Path, reporter: Reporter
) -> tuple[EngineReport, tuple[Kernel, ...]]:
    """The engine's record and kernels: of the one built here, from TensorRT's own layer file where there is one."""
    if engine is None:
        report = build_engine(model, scratch / "engine.plan", proxy_target(target), settings, reporter)
        return report, report.kernels
    report = EngineReport.from_json(record_from_file(engine / "engine.json"))
    return report, layers_from_file(engine / report.layers).kernels if report.layers else report.kernels


def _fp16(
    graphs: Graphs, target: Target, settings: BuildSettings, engine: Path | None, scratch: Path, reporter: Reporter
) -> tuple[tuple[Kernel, ...] | None, str]:
    """The kernels of the FP16 engine, by the same builder; or None, and why where that is no choice."""
    if graphs.ranges is None:
        return None, ""
    if engine is not None and builder_here(target) is None:
        return None, "There is no FP16 engine to compare with: this one was built on the device."
    builder = target if engine is not None else proxy_target(target)
    model = _fp16_model(graphs, target, scratch)
    try:
        return build_engine(model, scratch / "fp16.plan", builder, settings, reporter).kernels, ""
    except ResvitError as error:
        if error.code is not ExitCode.BUILD:
            raise
        return None, f"There is no FP16 engine to compare with: {error.problem}"


def _fp16_model(graphs: Graphs, target: Target, scratch: Path) -> Path:
    """The float network in FP16, in the form that TensorRT reads."""
    assert graphs.ranges is not None
    half_into(scratch, graphs.floating, graphs.ranges, target)
    model, copy = scratch / "model.onnx", scratch / TENSORRT_COPY
    return copy if onnx_for_tensorrt(model, copy) else model
