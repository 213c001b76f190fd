"""What a loss of boxes, masks or depths is: called with a student's and a teacher's answers and what is labelled."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from resvit_calibrate.images.image_set import Batch
from resvit_engines.errors import ResvitError

Outputs: TypeAlias = Mapping[str, Tensor]
"""Of a network, [B, ...] by name."""


class Objective(abc.ABC):
    """How far a student's answers are from its teacher's and, where the images have them, from the labels.

    ``told`` says it in words, for the record and the report; ``reads`` names the outputs that it judges. ``labelled``:
    the training images have what the task asks for.
    """

    told: str
    reads: tuple[str, ...]
    labelled: bool

    def __call__(self, outputs: Outputs, targets: Outputs, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar. ``targets`` are the teacher's answers; raises ``ResvitError`` for NaN there.

        What the student gets wrong of the labels of ``batch`` counts too, where there are any.
        """
        if not all(bool(targets[name].isfinite().all()) for name in self.reads):
            raise ResvitError(
                "The network that teaches gives NaN or infinity for training images.",
                "Check the checkpoint and the preprocessing; 'resvit-export validate' names what is not finite.",
            )
        return self.loss(outputs, targets, batch if self.labelled else dataclasses.replace(batch, targets=None))

    @abc.abstractmethod
    def loss(self, outputs: Outputs, targets: Outputs, batch: Batch) -> Tensor:
        """The loss of a batch whose targets are finite."""


def unread(objective: Objective, outputs: Outputs) -> list[str]:
    """The outputs that the objective does not judge."""
    return [name for name in outputs if name not in objective.reads]
