"""The stage ``audit``: what the compiler made of the quantised graph, beside the FP16 engine of the same network.

Where TensorRT builds the engine elsewhere, its kernels are predicted by its own rules. TensorRT for RTX, which could
compile here, writes other kernels of 8-bit layers: what it makes of a graph says nothing about TensorRT.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from resvit_engines.audit.audit import audit_engine
from resvit_engines.audit.expectation import Expectation
from resvit_engines.audit.findings import FusionAudit, Subject
from resvit_engines.audit.inspector import layers_from_file
from resvit_engines.audit.kernels import Kernel
from resvit_engines.audit.record import AuditRecord, SkippedAudit, audit_from_json, record_of
from resvit_engines.builder.builder import build_engine, builds_here
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import TITLES, BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.records import record_from_file
from resvit_engines.targets.choice import rtx_in_place
from resvit_engines.targets.table import Builder, Target
from resvit_export.run import Run
from resvit_export.stage import Artifact, File, Stage
from resvit_export.stages.compile import Compiled, for_usual
from resvit_export.stages.fuse import Fused
from resvit_export.stages.quantize import Halve, Quantized
from resvit_export.to_tensorrt.copy import TENSORRT_COPY, onnx_for_tensorrt
from resvit_export.to_tensorrt.plugin_choice import PluginChoice

RESULT = "audit.json"
KERNELS = "kernels.json"
"""All kernels of what was compiled for the audit alone: ``quantized`` where no engine is built here, and ``fp16``."""


_NOT_OF_CPUS = (
    "the rules are those of TensorRT's kernels. What ONNX Runtime's optimiser made of the graph, node by node, is in "
    "engine.json; 'resvit-export bench' times it against FP32."
)


@dataclass(frozen=True)
class Audited(Artifact):
    """``audit.json`` and ``kernels.json``."""

    @functools.cached_property
    def result(self) -> AuditRecord | SkippedAudit:
        """What fused, or why nothing was audited."""
        return self.read(RESULT, lambda found: audit_from_json(found, RESULT))


@dataclass(frozen=True)
class Audit(Stage[Audited]):
    """Say what the compiler made of the graph ``quantized``, beside the FP16 engine of the same network.

    ``half`` makes the FP16 network; None where the quantised one is FP16 itself. ``compiled`` is the stage with the
    target's own engine; without it, the kernels are predicted where TensorRT builds for the target, and compiled where
    TensorRT for RTX does. ``settings`` are for one batch. ``remark`` joins what the audit says.
    """

    name: ClassVar[str] = "audit"
    artifact: ClassVar[type[Artifact]] = Audited
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir", "tensorrt-rtx-cu13-libs", "tensorrt")

    quantized: File
    half: Halve | None
    target: Target
    settings: BuildSettings
    compiled: Compiled | None
    remark: str

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the audit and all kernels; where they cannot be compiled, ``audit.json`` says why."""
        self.write(folder, self.compiled.folder if self.compiled else None, reporter)

    def write(self, folder: Path, engine: Path | None, reporter: Reporter) -> None:
        """The same of the engine in any folder, with its ``engine.json`` and the inspector's layer file, if any."""
        from resvit_export.to_tensorrt.expectation import expectation_from_onnx

        if self.target.on_cpu:
            (folder / RESULT).write_bytes(pretty_json(SkippedAudit(self.target.name, _NOT_OF_CPUS).to_json()))
            return
        batch = self.settings.batch[1]
        expectation = expectation_from_onnx(self.quantized.path, batch)
        predicted = engine is None and is_predicted(self.target)
        try:
            with tempfile.TemporaryDirectory(prefix="resvit-audit-") as scratch:
                if predicted:
                    subject, kernels, fp16 = self._predicted(expectation, Path(scratch))
                    io_names, note = io_names_of(kernels), ""
                else:
                    report, kernels = self._quantized(engine, Path(scratch), reporter)
                    fp16, note = self._fp16(engine, Path(scratch), reporter)
                    subject = Subject(
                        self.target.name, report.sm, TITLES[report.builder], report.builder_version, batch
                    )
                    io_names = frozenset(tensor.name for tensor in (*report.inputs, *report.outputs))
        except ResvitError as error:
            if (
                engine is not None
                or predicted
                or error.code not in (ExitCode.MISSING, ExitCode.BUILD, ExitCode.IMPOSSIBLE)
            ):
                raise
            reporter.warn(f"Nothing was audited for {self.target.title}: {error.problem}")
            skipped = SkippedAudit(self.target.name, f"{error.problem} {error.fix}")
            (folder / RESULT).write_bytes(pretty_json(skipped.to_json()))
            return
        audit = audit_engine(subject, expectation, kernels, io_names, fp16)
        record = record_of(audit, [text for text in (note, self.remark) if text])
        (folder / RESULT).write_bytes(pretty_json(record.to_json()))
        listed = {"quantized": kernels} if engine is None else {}
        listed |= {"fp16": fp16} if fp16 is not None else {}
        listing = {name: [kernel.to_json() for kernel in each] for name, each in listed.items()}
        (folder / KERNELS).write_bytes(pretty_json(listing))

    def _predicted(
        self, expectation: Expectation, scratch: Path
    ) -> tuple[Subject, tuple[Kernel, ...], tuple[Kernel, ...] | None]:
        """What TensorRT's rules make of both graphs."""
        from resvit_export.to_tensorrt.expectation import expectation_from_onnx
        from resvit_export.to_tensorrt.predicted_kernels import predicted_kernels

        target, batch = self.target, self.settings.batch[1]
        kernels = predicted_kernels(self.quantized.path, batch, expectation.attention)
        fp16 = None
        if self.half is not None:
            model = scratch / "model.onnx"
            self.half.write(model)
            fp16 = predicted_kernels(model, batch, expectation_from_onnx(model, batch).attention)
        subject = Subject(
            target.name, target.sm, "TensorRT", target.tensorrt, batch, prediction_sentence(target), predicted=True
        )
        return subject, kernels, fp16

    def _quantized(
        self, engine: Path | None, scratch: Path, reporter: Reporter
    ) -> tuple[EngineReport, tuple[Kernel, ...]]:
        """The engine's record and kernels: from TensorRT's own layer file where there is one."""
        if engine is None:
            model, plan = self.quantized.path, scratch / "engine.plan"
            report = build_engine(model, plan, self.target, self.settings, reporter)
            return report, report.kernels
        report = EngineReport.from_json(record_from_file(engine / "engine.json"))
        return report, layers_from_file(engine / report.layers).kernels if report.layers else report.kernels

    def _fp16(self, engine: Path | None, scratch: Path, reporter: Reporter) -> tuple[tuple[Kernel, ...] | None, str]:
        """The kernels of the FP16 engine, by the same builder; or None, and why where that is no choice."""
        if self.half is None:
            return None, ""
        if engine is not None and not builds_here(self.target):
            return None, "There is no FP16 engine to compare with: this one was built on the device."
        model, copy = scratch / "model.onnx", scratch / TENSORRT_COPY
        self.half.write(model)
        model = copy if onnx_for_tensorrt(model, copy, self.target) else model
        try:
            return build_engine(model, scratch / "fp16.plan", self.target, self.settings, reporter).kernels, ""
        except ResvitError as error:
            if error.code is not ExitCode.BUILD:
                raise
            return None, f"There is no FP16 engine to compare with: {error.problem}"


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


def audit_of(
    run: Run, quantized: Quantized, half: Halve, fused: Fused | None, compiled: Compiled, *, own: bool
) -> Audit:
    """The audit of the target's ``own`` engine, or of what is predicted or compiled: the graph without our kernels."""
    target, recipe = run.require_target(), run.recipe
    ours = fused is not None and fused.model is not None
    settings = BuildSettings(
        recipe.batch_range,
        recipe.sizes,
        workspace_mib=recipe.workspace_mib or target.workspace_mib,
        optimization_level=recipe.optimization_level,
        sparse=recipe.sparsity is not None,
    )
    return Audit(
        quantized=(compiled.copy if own or not ours else None) or quantized.model,
        half=half if run.precision.quantises else None,
        target=target,
        settings=for_usual(settings),
        compiled=compiled if own else None,
        remark=" ".join([*rtx_in_place(target, run.precision), remark_about_plugins(run.plugins, fused, own=own)]),
    )


def remark_about_plugins(choice: PluginChoice, fused: Fused | None, *, own: bool) -> str:
    """Which way was taken, and why; and that without the engine itself the graph without our kernels is listed."""
    if fused is None or fused.model is None:
        why = "none was chosen, for the reasons in fusion.json" if fused else choice.reason
        return f"No kernel of our own goes into the engine: {why}."
    sentence = f"{fused.count} kernels of our own go into the engine ({choice.reason})"
    return f"{sentence}." if own else f"{sentence}; what is listed is the graph without them."


def is_predicted(target: Target) -> bool:
    """Whether the kernels of an engine that is built elsewhere are predicted, not compiled here."""
    return target.builder is not Builder.RTX


def prediction_sentence(target: Target) -> str:
    """What a prediction rests on."""
    return (
        f"No engine for {target.title} was compiled: the rules are those that real engines of TensorRT were seen to "
        "follow; the engine's own layers tell once it is built."
    )


def io_names_of(kernels: Sequence[Kernel]) -> frozenset[str]:
    """Tensors that no kernel writes, or none reads: a predicted network's inputs and outputs."""
    read = {name for kernel in kernels for name in kernel.input_names}
    written = {name for kernel in kernels for name in kernel.output_names if name not in kernel.input_names}
    return frozenset(read ^ written)
