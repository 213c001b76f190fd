"""The stage ``quantize``: the ONNX with Q/DQ and FP16 in the graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_engines.targets.table import Builder, Precision
from resvit_engines.trt.io_tensor import IoTensor, io_tensors_from_json
from resvit_export.recipe.choices import InputType
from resvit_export.stage import Artifact, File, Stage
from resvit_export.to_tensorrt.copy import suit_builder

if TYPE_CHECKING:
    import onnx_ir as ir

    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_quantize.qdq.report import QuantizeReport
    from resvit_quantize.settings import QuantizeSettings

MODEL = "model.onnx"
REPORT = "quantize.json"
BINDINGS = "bindings.json"


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

    ``clips`` are what recovery learned with the weights; where there are any, no statistics are used and nothing is
    judged. ``images``, of ``batch_size`` at a time, are what ``--effort best`` learns from, and ``fast`` is judged on;
    ``selects_rows`` (see :class:`ExportReport`) says that rows of outputs may change places.
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
    selects_rows: bool

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the quantised model and its report."""
        from resvit_calibrate.images.held_back import held_apart
        from resvit_calibrate.ranges.ranges import ranges_from_json
        from resvit_calibrate.ranges.statistics import statistics_from_npz
        from resvit_quantize.check.choose import held_back_of
        from resvit_quantize.quantize import quantize_model
        from resvit_quantize.recovery.recover import pinned_ranges, settings_behind_recovery

        settings, ranges = self.settings, self.ranges.read(ranges_from_json)
        if self.clips is not None:
            settings = settings_behind_recovery(settings)
            ranges = pinned_ranges(ranges, self.clips.json())
        held_back = held_back_of(held_apart(self.images), self.batch_size, sets=self.selects_rows)
        report = quantize_model(
            self.model.path,
            ranges,
            settings,
            folder / MODEL,
            reporter,
            statistics=self.statistics.read(statistics_from_npz) if self.clips is None else None,
            images=lambda count: self.images.first(count, self.batch_size),
            held_back=held_back if self.clips is None else None,
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
class Bound(Artifact):
    """``model.onnx`` and ``bindings.json``: the ONNX that ships, with its inputs' and outputs' types."""

    @property
    def model(self) -> File:
        """The ONNX."""
        return self.file(MODEL)

    @functools.cached_property
    def tensors(self) -> tuple[tuple[IoTensor, ...], tuple[IoTensor, ...]]:
        """Inputs and outputs with their types, the image with how it is encoded."""

        def read(found: Mapping[str, Any]) -> tuple[tuple[IoTensor, ...], tuple[IoTensor, ...]]:
            record = Record(found, BINDINGS)
            return io_tensors_from_json(record.records("inputs")), io_tensors_from_json(record.records("outputs"))

        return self.read(BINDINGS, read)


@dataclass(frozen=True)
class Bind(Stage[Bound]):
    """Give inputs and outputs other types than FP32; ``pixels`` is how the images are prepared, where that is known."""

    name: ClassVar[str] = "bind"
    artifact: ClassVar[type[Artifact]] = Bound
    packages: ClassVar[tuple[str, ...]] = ("onnx-ir",)

    model: File
    input_type: InputType
    pixels: Preprocess | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the ONNX and the types."""
        del reporter
        import onnx_ir

        from resvit_export.to_tensorrt.bindings import retype_bindings

        network = onnx_ir.load(self.model.path)
        encoding = retype_bindings(network, self.input_type, self.pixels)
        onnx_ir.save(network, folder / MODEL)
        inputs = [_io_tensor(value) for value in network.graph.inputs]
        inputs[0] = dataclasses.replace(inputs[0], encoding=encoding)
        sides = {"inputs": inputs, "outputs": [_io_tensor(value) for value in network.graph.outputs]}
        document = {name: [tensor.to_json() for tensor in tensors] for name, tensors in sides.items()}
        (folder / BINDINGS).write_bytes(pretty_json(document))


def _io_tensor(value: ir.Value) -> IoTensor:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    dtype = value.dtype.numpy().name if value.dtype is not None else ""
    return IoTensor(str(value.name), shape, dtype)


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
