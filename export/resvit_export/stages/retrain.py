"""The stage ``retrain``: the pruned network, taught by the one that it was."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import canonical_json, pretty_json, sha256_bytes
from resvit_engines.progress import Reporter
from resvit_export.loading.source import NetworkSource
from resvit_export.stage import Artifact, File, Stage
from resvit_export.task_choice import TaskChoice

if TYPE_CHECKING:
    from resvit_calibrate.data.training_images import TrainingImages
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_quantize.pruning.distill.options import DistillReport

REPORT = "retrain.json"
RESUME = "retrain.resume"
"""In the run's folder: where a killed training stands."""


@dataclass(frozen=True)
class Retrained(Artifact):
    """``retrained.pt``, ``retrained.pt2`` and ``retrain.json``."""

    @property
    def weights(self) -> File:
        """State dict and structure, as a checkpoint."""
        return self.file("retrained.pt")

    @functools.cached_property
    def report(self) -> DistillReport:
        """How it was trained."""
        from resvit_quantize.pruning.distill.options import DistillReport

        return self.read(REPORT, DistillReport.from_json)


@dataclass(frozen=True)
class Retrain(Stage[Retrained]):
    """Train the pruned weights until the network answers as the whole one does; labels are not needed.

    ``code`` is a digest of the network's code: dropout and the like are in no exported program. ``task`` is what has a
    loss of its own, boxes, masks or depths, and ``classes`` how many of them the validation images know.
    """

    name: ClassVar[str] = "retrain"
    artifact: ClassVar[type[Artifact]] = Retrained
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    source: NetworkSource
    weights: File
    masks: File | None
    images: TrainingImages
    preprocess: Preprocess
    epochs: int
    seed: int
    code: str
    task: TaskChoice | None
    classes: int | None

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the trained network and how it was trained."""
        import torch

        from resvit_export.loading.checkpoint import structure_in, write_network
        from resvit_export.loading.program.facts import floating_outputs, selects_rows
        from resvit_quantize.pruning.copies import copy_of
        from resvit_quantize.pruning.distill.distill import distill
        from resvit_quantize.pruning.distill.options import DistillOptions
        from resvit_quantize.pruning.structure import Structure
        from resvit_quantize.training.objectives.objective import Teaching

        teacher = self.source.network(reporter)
        pruned = self.source.with_checkpoint(self.weights.path).network(reporter)
        assert teacher.module is not None
        assert pruned.module is not None
        options = DistillOptions(epochs=self.epochs, seed=self.seed)
        teaching = None
        if self.task is not None:
            outputs, selects = floating_outputs(teacher.program), selects_rows(teacher.program)
            teaching = Teaching.of(self.task.task(), self.images, self.classes, outputs, selects=selects)
        masks = torch.load(self.masks.path, weights_only=True) if self.masks else {}
        training = {
            "teacher": teacher.digest,
            "student": pruned.digest,
            "images": self.images.digest,
            "count": len(self.images),
            "options": {key: str(value) for key, value in dataclasses.asdict(options).items()},
            "masks": sorted(masks),
            "teaching": teaching.identity if teaching else None,
        }
        key, state = sha256_bytes(canonical_json(training)), folder.parent / RESUME
        student = copy_of(pruned.module)
        report = distill(
            student, teacher.module, self.images, options, state, key, reporter, masks=masks, teaching=teaching
        )
        write_network(folder, "retrained", student, structure_in(self.weights.path) or Structure(), teacher.input_shape)
        (folder / REPORT).write_bytes(pretty_json(report.to_json()))
        state.unlink(missing_ok=True)
