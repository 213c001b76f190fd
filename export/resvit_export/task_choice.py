"""What a network is for and what it is asked, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess


_TAUGHT = ("detection", "segmentation", "depth")


@dataclass(frozen=True)
class TaskChoice:
    """``options`` say how outputs are read; ``metric`` names a function, whose code ``metric_digest`` tells apart."""

    kind: str
    options: Mapping[str, Any]
    metric: str | None = None
    metric_digest: str | None = None

    def for_training(self) -> TaskChoice | None:
        """What decides the loss of a training: the reading of boxes, masks or depths; None where outputs are alone."""
        return TaskChoice(self.kind, self.options) if self.kind in _TAUGHT else None

    def task(self) -> Task:
        """The task; raises as ``task_named``."""
        from resvit_calibrate.tasks.kinds import task_named

        return task_named(self.kind, self.options, self.metric)


@dataclass(frozen=True)
class Questions:
    """The validation images, how many are asked at once, and what is kept of the answers."""

    images: ImageSet
    preprocess: Preprocess
    batch_size: int
    task: TaskChoice
