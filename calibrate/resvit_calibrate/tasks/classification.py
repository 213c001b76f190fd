"""Which of K classes the whole image shows: top-1 and top-5, with Tango's interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resvit_calibrate.answers.base import Task, options_from
from resvit_calibrate.answers.classes import ClassComparison, Predictions, changed_answers, compare, predict
from resvit_calibrate.images.image_set import ImageSet
from resvit_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from resvit_calibrate.runtime.runner import Runner


@dataclass(frozen=True)
class _Options:
    """Classification has none of its own."""


class Classification(Task):
    """One output [B, K], or one called ``logits``: the class is the largest of it."""

    name: ClassVar[str] = "classification"
    metric = "top-1"
    unit = "percentage points"

    def __init__(self, options: Mapping[str, Any]) -> None:
        options_from(_Options, self.name, options)

    def answers(
        self,
        runner: Runner,
        image_set: ImageSet,
        batch_size: int,
        reporter: Reporter = SILENT,
        what: str = "validate",
    ) -> Predictions:
        """Logits and labels of every image; raises as ``metrics.predict``."""
        return predict(runner, image_set, batch_size, reporter, what)

    def load(self, path: Path) -> Predictions:
        """Read ``Predictions``."""
        return Predictions.load(path)

    def compare(self, reference: Predictions, candidate: Predictions, confidence: float = 0.95) -> ClassComparison:
        """Accuracies, and Tango's interval of their difference."""
        return compare(reference, candidate, confidence)

    def changed(self, reference: Predictions, candidate: Predictions) -> list[dict[str, Any]]:
        """The images whose class changed."""
        return [dict(row) for row in changed_answers(reference, candidate)]
