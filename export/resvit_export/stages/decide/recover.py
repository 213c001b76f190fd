"""The stage ``recover``: the float ONNX with its weights trained, the quantisers in the loop."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.bundle.parts import Recovery
from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_export.stage import Artifact, File, Stage
from resvit_export.task_choice import TaskChoice

if TYPE_CHECKING:
    from resvit_calibrate.data.training_images import TrainingImages
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_quantize.recovery.options import RecoverReport
    from resvit_quantize.settings import QuantizeSettings

MODEL = "recovered.onnx"
CLIPS = "clips.json"
RESULT = "recover.json"
RESUME = "recover.resume"
"""In the run's folder: where a killed training stands."""


@dataclass(frozen=True)
class Recovered(Artifact):
    """``recovered.onnx``, ``clips.json`` and ``recover.json``."""

    @property
    def model(self) -> File:
        """The float ONNX of the same nodes, with other constants."""
        return self.file(MODEL)

    @property
    def clips(self) -> File:
        """The clip of each activation that was learned with the weights."""
        return self.file(CLIPS)

    @functools.cached_property
    def report(self) -> RecoverReport:
        """How the weights were trained."""
        from resvit_quantize.recovery.options import RecoverReport

        clips = self.json(CLIPS)
        return self.read(RESULT, lambda found: RecoverReport.from_json({**found, "clips": clips}))

    @functools.cached_property
    def recovery(self) -> Recovery:
        """How much was trained, without what differs from run to run."""
        return self.read(RESULT, lambda found: Recovery.from_json(Record(found, RESULT)))


@dataclass(frozen=True)
class Recover(Stage[Recovered]):
    """Train the weights against the float model, for the quantisers that ``settings`` put into the graph.

    ``task`` is what has a loss of its own, boxes, masks or depths, and ``classes`` how many of them the validation
    images know.
    """

    name: ClassVar[str] = "recover"
    artifact: ClassVar[type[Artifact]] = Recovered
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx-ir")

    model: File
    ranges: File
    statistics: File
    settings: QuantizeSettings
    images: TrainingImages
    preprocess: Preprocess
    epochs: int
    seed: int
    task: TaskChoice | None
    classes: int | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the trained model, its clips, and how it was trained."""
        from resvit_calibrate.ranges.ranges import ranges_from_json
        from resvit_calibrate.ranges.statistics import statistics_from_npz
        from resvit_export.to_onnx.report import selects_rows
        from resvit_quantize.graph.network import network_from_onnx
        from resvit_quantize.recovery.options import RecoverOptions
        from resvit_quantize.recovery.recover import recover_model
        from resvit_quantize.training.objectives.objective import Teaching

        teaching = None
        if self.task is not None:
            selects = selects_rows(network_from_onnx(self.model.path))
            teaching = Teaching.of(self.task.task(), self.images, self.classes, selects=selects)
        report = recover_model(
            self.model.path,
            self.ranges.read(ranges_from_json),
            self.settings,
            self.images,
            folder / MODEL,
            folder.parent / RESUME,
            RecoverOptions(epochs=self.epochs, seed=self.seed),
            reporter,
            statistics=self.statistics.read(statistics_from_npz),
            teaching=teaching,
        )
        document = report.to_json()
        (folder / CLIPS).write_bytes(pretty_json(document.pop("clips")))
        (folder / RESULT).write_bytes(pretty_json(document))
