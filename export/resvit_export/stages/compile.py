"""The stage ``compile``: an engine where one can be built here, else the plan to build it where it can."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.device_plan import DevicePlan, plan_for_device
from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.files import pretty_json
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_engines.targets.faults import faults_of, warnings_for
from resvit_engines.targets.table import Precision, Target
from resvit_export.run import Run
from resvit_export.stage import Artifact, File, Stage
from resvit_export.to_tensorrt.copy import TENSORRT_COPY, onnx_for_tensorrt

if TYPE_CHECKING:
    from resvit_export.stages.quantize import Bound
    from resvit_export.to_onnx.report import ExportReport

ENGINE = "engine.plan"
ENGINE_REPORT = "engine.json"
PLAN = "plan.json"
LAYERS = "layers.json"
_TRTEXEC_TYPES = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class Compiled(Artifact):
    """``engine.plan`` and ``engine.json`` where there was a builder, else ``plan.json``; the copy TensorRT reads."""

    @functools.cached_property
    def engine(self) -> EngineReport | None:
        """What came out of the build; None where only a plan did."""
        if not self.has(ENGINE_REPORT):
            return None
        return self.read(ENGINE_REPORT, lambda found: EngineReport.from_json(Record(found, ENGINE_REPORT)))

    @functools.cached_property
    def plan(self) -> DevicePlan | None:
        """How to build it where it can be; None where it was built."""
        return self.read(PLAN, lambda found: DevicePlan.from_json(Record(found, PLAN))) if self.has(PLAN) else None

    @property
    def copy(self) -> File | None:
        """What TensorRT reads, where that is not the validated file itself."""
        return self.file(TENSORRT_COPY) if self.has(TENSORRT_COPY) else None


@dataclass(frozen=True)
class PlannedInput:
    """What the plan says of the graph's inputs: the image [C, H, W], and others by name, without the batch."""

    name: str
    shape: tuple[int, int, int]
    beside: Mapping[str, tuple[int, ...]]
    dynamic_batch: bool
    bundle: str
    """File name of the bundle, which the plan's commands name."""
    formats: tuple[str, ...] = ()
    """What ``trtexec`` is to be told of the inputs' types, where it would not keep those of the graph."""


def planned_input(report: ExportReport, run: Run, ships: Precision, bound: Bound | None = None) -> PlannedInput:
    """What the export says of the graph's inputs; of an image that may have several sizes the usual one."""
    sizes = run.recipe.sizes
    name, (batch, channels, *shape) = report.input
    height, width = sizes.usual if sizes else map(int, shape)
    beside = {item.name: item.shape for item in report.inputs if item.name != name}
    types = [tensor.dtype for tensor in bound.tensors[0]] if bound else []
    # It takes an INT8 input for one in floats unless told otherwise, and then wants to be told all.
    formats = tuple(f"{_TRTEXEC_TYPES.get(dtype, dtype)}:chw" for dtype in types) if "int8" in types else ()
    fixed = (int(channels), height, width)
    return PlannedInput(name, fixed, beside, not isinstance(batch, int), run.bundle_name(ships), formats)


@dataclass(frozen=True)
class Compile(Stage[Compiled]):
    """Build the engine by the target's builder; ``planned`` is set where this machine cannot."""

    name: ClassVar[str] = "compile"
    artifact: ClassVar[type[Artifact]] = Compiled

    model: File
    target: Target
    settings: BuildSettings
    planned: PlannedInput | None

    def libraries(self) -> tuple[str, ...]:
        """What builds, and what compiles kernels of our own."""
        plugins = ("triton",) if self.settings.plugins != "off" else ()
        return ("onnxruntime",) if self.target.on_cpu else ("tensorrt-rtx-cu13-libs", "tensorrt", *plugins)

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the engine and its report, or the plan."""
        model, settings, copy = self.model.path, self.settings, folder / TENSORRT_COPY
        if not self.target.on_cpu and onnx_for_tensorrt(model, copy, self.target, settings.plugins):
            model = copy
        faults = self._faults(model)
        if self.planned is None:
            report = build_engine(model, folder / ENGINE, self.target, settings, reporter, folder / "build.log")
            report = dataclasses.replace(report, warnings=(*report.warnings, *faults))
            (folder / ENGINE_REPORT).write_bytes(pretty_json(report.to_json()))
            return
        image = self.planned
        plan = plan_for_device(
            self.target,
            settings,
            image.shape,
            dynamic_batch=image.dynamic_batch,
            bundle=image.bundle,
            onnx=model.name,
            onnx_sha256=File.of(model).digest,
            input_name=image.name,
            beside=image.beside,
            input_formats=image.formats,
        )
        plan = dataclasses.replace(plan, notes=(*plan.notes, *faults))
        (folder / PLAN).write_bytes(pretty_json(plan.to_json()))

    def _faults(self, model: Path) -> tuple[str, ...]:
        """What the target's TensorRT is known to compute wrongly of what it reads."""
        from resvit_export.to_tensorrt.fault_patterns import patterns_in

        if not faults_of(self.target):
            return ()
        return warnings_for(self.target, patterns_in(model), self.settings.batch[2], copied=True)


def lasting(report: EngineReport) -> EngineReport:
    """What is true of the engine whenever it is built: without the time and memory that this build took."""
    return dataclasses.replace(report, seconds=None, peak_mib=None)


def for_usual(settings: BuildSettings) -> BuildSettings:
    """The same build for the usual batch and size alone."""
    batch, sizes = settings.batch[1], settings.sizes
    one = SizeRange(sizes.usual, sizes.usual, sizes.usual) if sizes else None
    return dataclasses.replace(settings, batch=(batch, batch, batch), sizes=one)
