"""The stage ``validate``: the answers of the quantised ONNX held against the original network's, and judged."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import Precision
from resvit_export.records.verdict import ChangedAnswer, ScoreRow, VerdictRecord
from resvit_export.stage import Artifact, File, Stage
from resvit_export.stages.quantize import Quantized
from resvit_export.stages.score import Answered, Scored, shipped_in
from resvit_export.task_choice import Questions

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.data.overlap import Overlap
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.ranges.diagnostics import Diagnostic
    from resvit_calibrate.runtime.sessions import Array
    from resvit_quantize.sensitivity.own_noise import OwnNoise

VERDICT = "verdict.json"
CHANGED = "changed.npz"
CHANGED_SHOWN = 24
DRAWN = 8
"""Of these, those over which answers are drawn: each takes a row of the report."""
_PICTURE_SIDE = 224
BLAME_IMAGES = 8
"""Images that tell whether a network is sensitive itself."""
CLIPPING_IMAGES = 64
"""Images that tell whether validation looks like calibration."""


@dataclass(frozen=True)
class Validated(Artifact):
    """``verdict.json``, and ``changed.npz`` with the images that changed."""

    @functools.cached_property
    def verdict(self) -> VerdictRecord:
        """What the gate found."""
        return self.read(VERDICT, VerdictRecord.from_json)


@dataclass(frozen=True)
class Validate(Stage[Validated]):
    """Judge what ships against the original: PyTorch where the model came as PyTorch, else the float ONNX.

    ``floating``, ``statistics`` and ``quantized`` tell whether validation looks like calibration and, with
    ``selects_rows`` (see :class:`ExportReport`), what a low SQNR comes from. ``class_names`` are what the verdict calls
    the classes, which the digest of the images does not tell.
    """

    name: ClassVar[str] = "validate"
    artifact: ClassVar[type[Artifact]] = Validated
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    questions: Questions
    label: str
    reference: Answered | None
    pruned: Answered | None
    baseline: Answered
    candidate: Scored
    floating: File
    statistics: File
    quantized: Quantized
    selects_rows: bool
    max_drop: float
    confidence: float
    class_names: tuple[str, ...]
    doubt: str
    """Why the images tell nothing, where something does."""
    overlap: Overlap
    """How many images calibration and validation share."""

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the verdict and the changed images."""
        from resvit_calibrate.gate.gate import judge
        from resvit_calibrate.ranges.diagnostics import tell
        from resvit_calibrate.tasks.other import Other

        task, images = self.questions.task.task(), self.questions.images
        onnx_float = self.baseline.answers(self.questions.task)
        original = self.reference.answers(self.questions.task) if self.reference else onnx_float
        candidate = self.candidate.answers(self.questions.task)
        comparison = task.compare(original, candidate, self.confidence)
        verdict = judge(comparison, self.max_drop, self.confidence, self.class_names, self.doubt)
        itself = task.compare(original, original, self.confidence)
        rows = [ScoreRow.of("pytorch" if self.reference else "onnx float", itself)]
        if self.pruned:
            before = self.pruned.answers(self.questions.task)
            rows.append(ScoreRow.of("pruned", task.compare(original, before, self.confidence)))
        if self.reference:
            rows.append(ScoreRow.of("onnx float", task.compare(original, onnx_float, self.confidence)))
        rows.append(ScoreRow.of(self.label, comparison))

        diagnostics = self._clipping()
        tell(diagnostics, reporter)
        blame = self._blame(comparison.sqnr_db, apart=task.name == Other.name)
        changed = [ChangedAnswer.from_json(item) for item in task.changed(original, candidate)]
        shown = changed[: DRAWN if changed and task.drawing(original, changed[0].index) else CHANGED_SHOWN]
        record = VerdictRecord(
            verdict=verdict,
            task=task.name,
            data=images.description,
            data_digest=images.digest,
            runtime_note=self.candidate.runtime_note,
            diagnostics=tuple(item.to_json() for item in diagnostics),
            golden=self.candidate.golden,
            class_names=self.class_names,
            rows=tuple(rows),
            changed_total=len(changed),
            changed=tuple(shown),
            reading={
                "options": task.reading(original),
                "classes": images.num_classes,
                "class_ids": list(images.class_ids),
            },
            blame=blame,
            overlap=self.overlap,
        )
        (folder / VERDICT).write_bytes(pretty_json(record.to_json()))
        pictures = _pictures(task, images, original, candidate, shown, self.questions.batch_size)
        np.savez_compressed(folder / CHANGED, **pictures)  # type: ignore[arg-type]  # of the names, none is an option

    def _blame(self, sqnr_db: float, *, apart: bool) -> OwnNoise | None:
        """Where the outputs have a low SQNR, whether the network or its quantisation is to blame.

        ``apart`` says that ``sqnr_db`` is of what tells images apart.
        """
        from resvit_quantize.sensitivity.own_noise import LOW_DB, own_noise

        if not sqnr_db < LOW_DB:
            return None
        few = next(self.questions.images.batches(min(self.questions.batch_size, BLAME_IMAGES)))
        model, precision = self.quantized.model.path, Precision(self.quantized.report.precision)
        return own_noise(self.floating.path, model, precision, few.feeds(), sets=self.selects_rows, apart=apart)

    def _clipping(self) -> tuple[Diagnostic, ...]:
        """Whether the ranges cut much of what the first validation images hold."""
        from resvit_calibrate.ranges.clipping import clipped_shares, shares_from_statistics
        from resvit_calibrate.ranges.diagnostics import clipping_diagnostics
        from resvit_calibrate.ranges.statistics import statistics_from_npz

        clips = self.quantized.report.clips
        if not clips:
            return ()
        batch_size = self.questions.batch_size
        batches = self.questions.images.batches(min(batch_size, CLIPPING_IMAGES))
        few = itertools.islice(batches, max(CLIPPING_IMAGES // batch_size, 1))
        seen = self.statistics.read(statistics_from_npz)
        return clipping_diagnostics(clipped_shares(self.floating.path, clips, few), shares_from_statistics(seen, clips))


def sides(answered: Mapping[str, Answered]) -> tuple[Answered | None, Answered | None, Answered, Scored]:
    """Who is held against whom: original and pruned network in PyTorch, float ONNX, and the ONNX that ships."""
    return answered.get("reference"), answered.get("pruned"), answered["baseline"], shipped_in(answered)


def _pictures(
    task: Task, images: ImageSet, original: Any, candidate: Any, shown: Sequence[ChangedAnswer], batch_size: int
) -> dict[str, Array]:
    """The images that changed, and what is drawn over them, for ``changed.npz``."""
    drawings: dict[str, Array] = {}
    for item in shown:
        for who, answers in (("float", original), ("quantized", candidate)):
            drawing = task.drawing(answers, item.index)
            drawings |= {f"{who}_{item.index}_{name}": value for name, value in drawing.items()}
    indices = [item.index for item in shown]
    # What is drawn lies on the grid of the input; what is only shown is shown as people see it.
    if drawings:
        seen = _as_read(images, indices, batch_size)
    else:
        seen = {index: _small(picture) for index in indices if (picture := images.image(index)) is not None}
    return {**drawings, **{f"image_{index}": picture for index, picture in seen.items()}}


def _small(picture: Array) -> Array:
    """At most 224 pixels a side: it goes into the report."""
    step = max(1, -(-max(picture.shape[:2]) // _PICTURE_SIDE))
    return np.ascontiguousarray(picture[::step, ::step])


def _as_read(images: ImageSet, indices: Sequence[int], batch_size: int) -> dict[int, Array]:
    """Images as the network reads them: uint8 [h, w, 1 or 3] by index, each stretched to the whole range of grey."""
    pictures: dict[int, Array] = {}
    wanted, first = set(indices), 0
    for batch in images.batches(batch_size):
        for index in sorted(wanted & set(range(first, first + len(batch.images)))):
            values = batch.images[index - first].transpose(1, 2, 0).astype(np.float64)
            low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
            scaled = 255.0 * (values - low.min()) / max(float((high - low.min()).max()), 1e-12)
            pictures[index] = np.rint(scaled if scaled.shape[2] in (1, 3) else scaled[..., :1]).astype(np.uint8)
        first += len(batch.images)
        if len(pictures) == len(wanted):
            break
    return pictures
