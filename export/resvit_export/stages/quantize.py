"""The stage ``quantize``: the ONNX with Q/DQ and FP16 in the graph."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import Builder, Precision
from resvit_export.stage import Artifact, File, Stage
from resvit_export.to_tensorrt.copy import suit_builder

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_quantize.qdq.report import QuantizeReport
    from resvit_quantize.settings import QuantizeSettings

MODEL = "model.onnx"
REPORT = "quantize.json"


@dataclass(frozen=True)
class Quantized(Artifact):
    """``model.onnx`` and ``quantize.json``."""

    @property
    def model(self) -> File:
        """The ONNX with its precision in the graph."""
        return self.file(MODEL)

    @functools.cached_property
    def report(self) -> QuantizeReport:
        """What the graph holds."""
        from resvit_quantize.qdq.report import QuantizeReport

        return self.read(REPORT, QuantizeReport.from_json)

    @property
    def eight_bit_products(self) -> dict[str, Precision]:
        """The precision of every product that runs in 8 bits, by name."""
        eight_bits = (Precision.INT8.value, Precision.FP8.value)
        return {node.name: Precision(node.precision) for node in self.report.nodes if node.precision in eight_bits}


@dataclass(frozen=True)
class Quantize(Stage[Quantized]):
    """Quantise a float model with our own quantiser, in the form that ``builder`` does best.

    ``clips`` are what recovery learned with the weights; where there are any, no statistics are used. ``images``, of
    ``batch_size`` at a time, are what ``--effort best`` learns from.
    """

    name: ClassVar[str] = "quantize"
    artifact: ClassVar[type[Artifact]] = Quantized
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir")

    model: File
    ranges: File
    statistics: File
    clips: File | None
    settings: QuantizeSettings
    images: ImageSet
    batch_size: int
    builder: Builder | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the quantised model and its report."""
        from resvit_calibrate.ranges.ranges import ranges_from_json
        from resvit_calibrate.ranges.statistics import statistics_from_npz
        from resvit_quantize.quantize import quantize_model
        from resvit_quantize.recovery.recover import pinned_ranges, settings_behind_recovery

        settings, ranges = self.settings, self.ranges.read(ranges_from_json)
        if self.clips is not None:
            settings = settings_behind_recovery(settings)
            ranges = pinned_ranges(ranges, self.clips.json())
        report = quantize_model(
            self.model.path,
            ranges,
            settings,
            folder / MODEL,
            reporter,
            statistics=self.statistics.read(statistics_from_npz) if self.clips is None else None,
            images=lambda count: self.images.first(count, self.batch_size),
            suit=lambda out: suit_builder(out, self.builder),
        )
        (folder / REPORT).write_bytes(pretty_json(report.to_json()))


@dataclass(frozen=True)
class QuantizeByModelOpt(Stage[Quantized]):
    """The same with NVIDIA ModelOpt's own placement and ranges, from the images."""

    name: ClassVar[str] = "quantize"
    artifact: ClassVar[type[Artifact]] = Quantized
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir", "nvidia-modelopt")

    model: File
    settings: QuantizeSettings
    images: ImageSet
    batch_size: int
    builder: Builder | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the quantised model and its report."""
        from resvit_quantize.modelopt.quantizer import quantize_with_modelopt

        batches = self.images.batches(self.batch_size)
        report = quantize_with_modelopt(
            self.model.path,
            batches,
            self.settings,
            folder / MODEL,
            reporter,
            lambda out: suit_builder(out, self.builder),
        )
        (folder / REPORT).write_bytes(pretty_json(report.to_json()))


@dataclass(frozen=True)
class Halve(Stage[Quantized]):
    """The float network, by the way of ``--precision fp16`` or ``fp32``: what quantised engines are held against."""

    name: ClassVar[str] = "half"
    artifact: ClassVar[type[Artifact]] = Quantized
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir")

    model: File
    ranges: File
    statistics: File
    builder: Builder | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the model, in FP16 or, for processors, FP32."""
        del reporter
        report = self.write(folder / MODEL)
        (folder / REPORT).write_bytes(pretty_json(report.to_json()))

    def write(self, out: Path) -> QuantizeReport:
        """Write it to any path; returns the report."""
        from resvit_calibrate.ranges.ranges import ranges_from_json
        from resvit_calibrate.ranges.statistics import statistics_from_npz
        from resvit_quantize.quantize import quantize_model
        from resvit_quantize.settings import QuantizeSettings, Rules

        return quantize_model(
            self.model.path,
            self.ranges.read(ranges_from_json),
            QuantizeSettings(Precision.FP32, rules=Rules.ONNXRUNTIME)
            if self.builder is Builder.ONNXRUNTIME
            else QuantizeSettings(Precision.FP16),
            out,
            statistics=self.statistics.read(statistics_from_npz),
            suit=lambda model: suit_builder(model, self.builder),
        )
