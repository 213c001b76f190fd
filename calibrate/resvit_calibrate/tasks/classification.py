"""Which of K classes the whole image shows: top-1 and top-5, with Tango's interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from resvit_calibrate.answers.base import Place, Task
from resvit_calibrate.answers.classes import ClassComparison, Predictions, changed_answers, compare, predictions_of
from resvit_calibrate.gate.comparison import SHARE
from resvit_calibrate.images.image_set import Batch, ImageSet
from resvit_engines.answers.options import Array, options_from


@dataclass(frozen=True)
class _Options:
    """Classification has none of its own."""


class Classification(Task):
    """One output [B, K], or one called ``logits``: the class is the largest of it."""

    name: ClassVar[str] = "classification"
    metric = "top-1"
    unit = SHARE

    def __init__(self, options: Mapping[str, Any]) -> None:
        options_from(_Options, self.name, options)

    def kept(self, batch: Batch, outputs: Mapping[str, Array], image_set: ImageSet, place: Place) -> Predictions:
        """Logits and labels of every image."""
        del place
        return predictions_of(batch, dict(outputs), image_set)

    def joined(self, parts: Sequence[Predictions]) -> Predictions:
        """All logits and labels."""
        return Predictions(np.concatenate([p.logits for p in parts]), np.concatenate([p.labels for p in parts]))

    def load(self, data: bytes, where: str) -> Predictions:
        """Read ``Predictions``."""
        return Predictions.load(data, where)

    def compare(self, reference: Predictions, candidate: Predictions, confidence: float = 0.95) -> ClassComparison:
        """Accuracies, and Tango's interval of their difference."""
        return compare(reference, candidate, confidence)

    def changed(self, reference: Predictions, candidate: Predictions) -> list[dict[str, Any]]:
        """The images whose class changed."""
        return [dict(row) for row in changed_answers(reference, candidate)]
