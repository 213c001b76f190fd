"""The stage ``preprocessing``: whether the float network was trained with other numbers than its images come with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.stage import Artifact, File, Stage
from resvit_export.task_choice import Questions

if TYPE_CHECKING:
    from resvit_calibrate.images.preprocess import Preprocess

FOUND = "preprocessing.json"


@dataclass(frozen=True)
class PreprocessSeen(Artifact):
    """``preprocessing.json``: the usual normalisation under which the network does much better, or none."""

    @property
    def doubt(self) -> str:
        """Why answers to these images tell nothing, empty where nothing was found."""
        from resvit_calibrate.answers.other_preprocess import OtherPreprocess

        other = self.json(FOUND)["better"]
        return OtherPreprocess.from_json(other).words if other else ""


@dataclass(frozen=True)
class SeePreprocess(Stage[PreprocessSeen]):
    """A few labelled images under each usual normalisation, before anything is calibrated on them."""

    name: ClassVar[str] = "preprocessing"
    artifact: ClassVar[type[Artifact]] = PreprocessSeen
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    questions: Questions
    model: File
    stated: Preprocess | None
    """What the network itself says of its input."""

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Ask the float network."""
        from resvit_calibrate.answers.other_preprocess import other_preprocess
        from resvit_calibrate.runtime.runner import onnx_runner

        asked = self.questions
        how = (onnx_runner(self.model.path), asked.images, asked.batch_size, self.stated)
        better = other_preprocess(asked.task.task(), *how, reporter)
        if better:
            reporter.warn(f"Look at the preprocessing first: {better.words}.")
        (folder / FOUND).write_bytes(pretty_json({"better": better.to_json() if better else None}))
