"""How a bundle says that its outputs are read, and the answers that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.boxes import BoxReader, DetectionOptions
from resvit_engines.answers.maps import (
    DepthOptions,
    SegmentationOptions,
    as_depths,
    depths_name,
    label_map,
    map_at,
    masks_name,
    require_masks,
)
from resvit_engines.answers.options import options_from
from resvit_engines.answers.texts import TextOptions, decoders_for, scores_of
from resvit_engines.answers.vectors import EmbeddingOptions, logits_of, vectors_of
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.program.answers import (
    UNSEEN,
    Answer,
    Classification,
    Depths,
    Detections,
    Embedding,
    Line,
    Mask,
    Names,
    Outputs,
)
from resvit_engines.program.frames import Placement
from resvit_engines.records import Record
from resvit_engines.run.feeds import Array, Arrays

_MOST_CLASSES = 1 << 20
_NEARLY_ONE = 0.01
"""By how much probabilities in FP16 may miss a sum of 1."""


@dataclass(frozen=True)
class Reading:
    """What the outputs of a network are: of which ``task``, with which ``options``, named how.

    ``classes`` is how many classes the data has, where that is known; ``names`` are theirs, by the numbers that the
    network answers.
    """

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    def answers(self, outputs: Arrays, places: list[Placement], least_score: float | None = None) -> list[Answer]:
        """One answer for each of N frames, of ``outputs`` [N, …] by name; ``places`` say where each frame lies.

        ``least_score`` is of boxes that are given; without it the task's option ``shown`` decides.

        Raises:
            ResvitError: MISMATCH for NaN and infinity, INPUT for outputs that are not the task's.
        """
        _require_finite(outputs)
        read: dict[str, Callable[[Arrays, list[Placement]], list[Answer]]] = {
            "classification": self._classes,
            "detection": lambda arrays, at: self._boxes(arrays, at, least_score),
            "segmentation": self._masks,
            "depth": self._depths,
            "text": self._lines,
            "embedding": self._vectors,
        }
        return read.get(self.task, _as_they_are)(outputs, places)

    def _classes(self, outputs: Arrays, places: list[Placement]) -> list[Answer]:
        return [Classification(_probabilities(row), Names(self.names)) for row in logits_of(outputs, len(places))]

    def _boxes(self, outputs: Arrays, places: list[Placement], least_score: float | None) -> list[Answer]:
        options = options_from(DetectionOptions, self.task, self.options)
        reader = BoxReader(options, outputs, self.classes)
        found: list[Answer] = []
        for boxes, scores, place in zip(outputs[reader.boxes], outputs[reader.scores], places, strict=True):
            one = reader.read(boxes, scores, place.size)
            few = one.scores >= (options.shown if least_score is None else least_score)
            corners = place.boxes(one.boxes[few])
            found.append(Detections(corners, one.scores[few], one.classes[few], Names(self.names)))
        return found

    def _masks(self, outputs: Arrays, places: list[Placement]) -> list[Answer]:
        output = outputs[masks_name(options_from(SegmentationOptions, self.task, self.options), outputs)]
        require_masks(output, places[0].size)
        return [
            Mask(place.labels(label_map(one, place.size), UNSEEN), Names(self.names))
            for one, place in zip(output, places, strict=True)
        ]

    def _depths(self, outputs: Arrays, places: list[Placement]) -> list[Answer]:
        options = options_from(DepthOptions, self.task, self.options)
        output = outputs[depths_name(options, outputs)]
        found: list[Answer] = []
        for one, place in zip(output if output.ndim == 3 else output[:, 0], places, strict=True):
            depths = np.clip(as_depths(map_at(one, place.size), options), options.min_depth, options.max_depth)
            found.append(Depths(place.values(depths.astype(np.float32))))
        return found

    def _lines(self, outputs: Arrays, places: list[Placement]) -> list[Answer]:
        del places
        options = options_from(TextOptions, self.task, self.options)
        scores = scores_of(options, outputs)
        decoders = decoders_for(options, scores.shape[2])
        if len(decoders) > 1:
            raise ResvitError(
                "The bundle does not say how positions become a text: "
                f"{' or '.join(str(decoder) for decoder in decoders)} would fit.",
                "Make the bundle again: its manifest then says which.",
            )
        return [Line(text) for text in decoders[0].texts(scores.argmax(axis=2).astype(np.int32))]

    def _vectors(self, outputs: Arrays, places: list[Placement]) -> list[Answer]:
        del places
        vectors = vectors_of(options_from(EmbeddingOptions, self.task, self.options), outputs)
        return [Embedding(vector) for vector in vectors.astype(np.float32)]


def reading_of(manifest: Manifest) -> Reading:
    """How a bundle's manifest says that its outputs are read; of one that does not say its task, as they are.

    Raises:
        ResvitError: INPUT where what it says is malformed.
    """
    verdict = manifest.verdict
    if verdict is None:
        return Reading("other")
    names = dict(enumerate(verdict.class_names))
    if manifest.answers is None:
        return Reading(verdict.task, {}, len(names) or None, names)
    record = Record(manifest.answers, "the manifest", "answers")
    options = record.optional("options", record.plain) or {}
    ids = record.optional("class_ids", record.wholes) or ()
    if options.get("class_numbers") == "id" and len(ids) == len(names):
        names = dict(zip(ids, verdict.class_names, strict=True))
    classes = record.optional("classes", lambda key: record.whole(key, 1, _MOST_CLASSES))
    return Reading(verdict.task, options, classes, names)


def _as_they_are(outputs: Arrays, places: list[Placement]) -> list[Answer]:
    batched = {name for name, value in outputs.items() if value.ndim and len(value) == len(places)}
    return [
        Outputs({name: value[at] if name in batched else value for name, value in outputs.items()})
        for at in range(len(places))
    ]


def _probabilities(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Softmax of one image's scores [K]; what are probabilities already, stay."""
    if row.min() >= 0.0 and abs(float(row.sum()) - 1.0) <= _NEARLY_ONE:
        return row
    powers = np.exp(row.astype(np.float64) - float(row.max()))
    return np.asarray(powers / powers.sum(), np.float32)


def _require_finite(outputs: Mapping[str, Array]) -> None:
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ResvitError(
                f"The network's output {name} holds NaN or infinity.",
                "Run the golden check (load with check=True), and build the engine again on this device.",
                ExitCode.MISMATCH,
            )
