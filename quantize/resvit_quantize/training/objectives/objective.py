"""The loss that a student of boxes, masks or depths is trained with, beside a teacher: chosen by the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from resvit_calibrate.answers.base import Task
from resvit_calibrate.tasks.depth import Depth
from resvit_calibrate.tasks.detection import Detection
from resvit_calibrate.tasks.segmentation import Segmentation
from resvit_engines.answers.boxes import BoxReader
from resvit_quantize.training.objectives.base import Objective
from resvit_quantize.training.objectives.depth import DepthObjective
from resvit_quantize.training.objectives.detection import DetectionObjective
from resvit_quantize.training.objectives.segmentation import SegmentationObjective
from resvit_quantize.training.standing import TrainingImages


@dataclass(frozen=True)
class Teaching:
    """A task whose answers are trained, and what is known of the network and the training images.

    ``outputs`` names the floating outputs of the network in its own order. ``classes`` is how many the validation data
    has, ``class_ids`` the numbers that the training data gives them. ``labelled``: the training images have boxes,
    masks or depths. ``selects``: the network picks rows by score, so that their order is not the same in two networks.
    """

    task: Task
    outputs: tuple[str, ...]
    classes: int | None
    class_ids: tuple[int, ...]
    labelled: bool
    selects: bool

    @classmethod
    def of(
        cls, task: Task, images: TrainingImages, classes: int | None, outputs: tuple[str, ...] = (), *, selects: bool
    ) -> Teaching:
        """What is known of the training ``images``, beside what is told of the network."""
        return cls(task, outputs, classes, images.class_ids, images.task == task.name, selects)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells two trainings apart, as plain values: how outputs are read, and the numbers of classes."""
        options = {key: str(value) for key, value in vars(getattr(self.task, "options", self.task)).items()}
        return {"task": self.task.name, "options": options, "classes": self.classes, "class_ids": list(self.class_ids)}

    def objective(self, shapes: Mapping[str, torch.Size]) -> Objective | None:
        """The loss for outputs of such shapes, by name; None where the outputs' own distance is all that can be told.

        That is so for classes, for anything else, and for maps that hold numbers of classes.
        """

        arrays: dict[str, npt.NDArray[np.float32]] = {
            name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in shapes.items()
        }
        task = self.task
        if isinstance(task, Detection):
            reader = BoxReader(task.options, arrays, self.classes)
            return DetectionObjective(task, reader, self.class_ids, self.selects, labelled=self.labelled)
        if not isinstance(task, Segmentation | Depth):
            return None
        wanted = task.options.output
        if wanted is not None and wanted not in arrays:
            return None
        if isinstance(task, Depth):
            return DepthObjective(task, task.name_of(arrays), labelled=self.labelled)
        name = task.name_of(arrays)
        return SegmentationObjective(name, labelled=self.labelled) if arrays[name].ndim == 4 else None
