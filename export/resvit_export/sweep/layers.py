"""Parts of a sensitivity by brute force: a worker measures some of the layers, each to the bit as one process does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.progress import SILENT
from resvit_export.stages.decide.sensitivity import Measure
from resvit_export.sweep.part import Part, moved, own_fields
from resvit_export.sweep.store import RunStore

if TYPE_CHECKING:
    from resvit_export.run import Run
    from resvit_quantize.sensitivity.known_noise import NoiseSource

LEAST = 2
"""Layers of a part at least: a worker runs the float network first, which costs about as much as a layer."""
_TOLD = ("images", "preprocess", "task")


@dataclass(frozen=True)
class Layers(Part["Mapping[NoiseSource, float]"]):
    """Some ``sources`` of noise of the stage with these ``fields`` and this ``key``."""

    fields: Mapping[str, Any]
    key: str
    sources: tuple[NoiseSource, ...]

    def done(self, place: Path | RunStore) -> Mapping[NoiseSource, float]:
        """Measure; nothing where this run is not the one that the layers are a part of."""
        from resvit_export.pipeline import Pipeline
        from resvit_export.run_folder import RunFolder

        folder = RunFolder(self.seen(place), SILENT)
        with folder.looking_only():
            pipeline = Pipeline(self.run_in(folder)).vary(recovers=False)
            told: dict[str, Any] = {
                "images": pipeline.images[0],
                "preprocess": pipeline.preprocess,
                "task": pipeline.questions.task,
            }
        stage = Measure(**moved(self.fields, self.folder, folder.path), **told)
        if folder.unfinished(stage)[1] != self.key:
            return {}
        return dict(stage.noise_of(self.sources))


def layers_of(run: Run, name: str, stage: Measure, missing: Sequence[NoiseSource], workers: int) -> list[Layers]:
    """What is ``missing``, for up to ``workers``."""
    each = max(-(-len(missing) // workers), LEAST)
    fields, key = own_fields(stage, _TOLD), run.folder.unfinished(stage)[1]
    return [
        Layers(run.recipe, name, run.folder.path, fields, key, tuple(missing[first : first + each]))
        for first in range(0, len(missing), each)
    ]
