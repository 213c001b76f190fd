"""The stage ``export``: the float ONNX in canonical form, from the folded program or the user's own file."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_calibrate.runtime.runner import scorable_opset
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.pictures.sizes import SizeRange, shape_from_text
from resvit_engines.progress import Reporter
from resvit_export.loading.inputs import ShapeWish
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.source import NetworkSource
from resvit_export.recipe.recipe import Recipe
from resvit_export.run import Run
from resvit_export.stage import Artifact, File, Stage
from resvit_export.stages.fold import Folded
from resvit_export.stages.load import Loaded, write_network_record

if TYPE_CHECKING:
    from resvit_export.to_onnx.report import ExportReport
    from resvit_export.to_tensorrt.fault_patterns import Found

OLDEST_OPSET = 20
"""What every TensorRT from 10.3 on reads."""
MODEL = "model.onnx"
REPORT = "export.json"
PATTERNS = "patterns.json"


@dataclass(frozen=True)
class Exported(Loaded):
    """``model.onnx``, ``export.json``, ``patterns.json`` and ``network.json``."""

    @property
    def model(self) -> File:
        """The float ONNX."""
        return self.file(MODEL)

    @property
    def reference(self) -> str:
        """What the float ONNX was held against."""
        return "your ONNX" if self.record.value.get("is") == Import.__name__ else "PyTorch"

    @functools.cached_property
    def report(self) -> ExportReport:
        """The float ONNX in figures."""
        from resvit_export.to_onnx.report import ExportReport

        return self.read(REPORT, ExportReport.from_json)

    @functools.cached_property
    def patterns(self) -> Found:
        """What it contains that some TensorRT computes wrongly."""
        from resvit_export.to_tensorrt.fault_patterns import found_from_json

        return self.read(PATTERNS, found_from_json)


@dataclass(frozen=True)
class Export(Stage[Exported]):
    """Export a folded program, and check its parity with PyTorch; ``batch`` None leaves the batch dynamic."""

    name: ClassVar[str] = "export"
    artifact: ClassVar[type[Artifact]] = Exported
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime")

    program: File
    network: NetworkRecord
    opset: int
    batch: int | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the float ONNX, its report, and what is known of the network."""
        from resvit_export.loading.libraries import quiet_libraries
        from resvit_export.loading.program.check import COUPLED, ONE_BATCH
        from resvit_export.loading.pt2 import program_from_pt2
        from resvit_export.to_onnx.export import onnx_from_program

        require_batch(self.network, self.batch)
        with quiet_libraries():
            program = program_from_pt2(self.program.path)
            report = onnx_from_program(
                program, folder / MODEL, opset=self.opset, batch=self.batch, sizes=self.network.sizes
            )
        for note in self.network.notes:
            if note in (COUPLED, ONE_BATCH):
                reporter.say(note)
        write_network_record(folder, self.network)
        _write_reports(folder, report)


def require_batch(network: NetworkRecord, batch: int | None) -> None:
    """Refuse another batch than 1 for a network that mixes the images of one; ``batch`` None is a dynamic one.

    Raises:
        ResvitError: INPUT, with the remedy.
    """
    if network.coupled and batch != 1:
        raise ResvitError(
            "The network's answers for an image depend on the other images of its batch, and "
            f"{'a dynamic batch' if batch is None else f'batch {batch}'} was asked for. A view with a "
            "hard-coded batch of 1, or statistics over the batch, do this.",
            "Build it for --batch 1, or mend its forward.",
        )


def batch_of(recipe: Recipe) -> int | None:
    """The batch that is exported for; None for a dynamic one."""
    return None if recipe.dynamic_batch else recipe.batch_range[0]


def export_of(run: Run, folded: Folded | None) -> Export | Import:
    """The export of a run: of the folded program, or where there is none of the user's own ONNX."""
    target, recipe = run.target, run.recipe
    if folded is None:
        said = None if recipe.input_shape is None else shape_from_text(recipe.input_shape)
        return Import(
            run.network, recipe.shape_wishes, said, *((target.opset, target.software) if target else (None, ""))
        )
    # What cannot be validated here is not exported.
    opset = target.opset if target and target.opset <= scorable_opset() else OLDEST_OPSET
    return Export(folded.program, folded.network, opset, batch_of(recipe))


@dataclass(frozen=True)
class Import(Stage[Exported]):
    """Take the user's own ONNX, checked; ``opset`` is the newest that ``reader`` reads, None where nothing asks."""

    name: ClassVar[str] = "export"
    artifact: ClassVar[type[Artifact]] = Exported
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir", "onnxruntime")

    source: NetworkSource
    wishes: tuple[ShapeWish, ...]
    image: tuple[int, SizeRange] | None
    """Channels and sizes of the image, where the user says them."""
    opset: int | None
    reader: str

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the same files as ``Export``; refuse an opset that the target's TensorRT does not read."""
        del reporter
        from resvit_export.to_onnx.own_onnx import import_onnx

        network, report = import_onnx(Path(self.source.spec.model), folder / MODEL, self.wishes, self.image)
        if self.opset is not None and report.opset > self.opset:
            raise ResvitError(
                f"The model is of opset {report.opset}, and {self.reader} reads up to opset {self.opset}.",
                f"Export it with opset {self.opset}, or choose a target with a newer TensorRT.",
                ExitCode.IMPOSSIBLE,
            )
        write_network_record(folder, network)
        _write_reports(folder, report)


def _write_reports(folder: Path, report: ExportReport) -> None:
    from resvit_export.to_tensorrt.fault_patterns import found_to_json, patterns_in

    (folder / REPORT).write_bytes(pretty_json(report.to_json()))
    (folder / PATTERNS).write_bytes(pretty_json(found_to_json(patterns_in(folder / MODEL))))
