"""The stage ``sensitivity``: which layers the accuracy loss comes from."""

from __future__ import annotations

import functools
import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resvit_engines.files import pretty_json
from resvit_engines.progress import Reporter
from resvit_export.stage import Artifact, File, Stage
from resvit_export.task_choice import TaskChoice
from resvit_quantize.sensitivity.method import Method

if TYPE_CHECKING:
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.images.preprocess import Preprocess
    from resvit_calibrate.ranges.ranges import Ranges
    from resvit_export.run import Run
    from resvit_quantize.graph.analysed import AnalysedGraph
    from resvit_quantize.sensitivity.known_noise import KnownNoise, NoiseSource
    from resvit_quantize.sensitivity.sensitivity import LayerDamage, Sensitivity
    from resvit_quantize.settings import QuantizeSettings

RESULT = "sensitivity.json"


@dataclass(frozen=True)
class Measured(Artifact):
    """``sensitivity.json``."""

    @functools.cached_property
    def sensitivity(self) -> Sensitivity:
        """The damage of every layer."""
        from resvit_quantize.sensitivity.sensitivity import sensitivity_from_json

        return self.read(RESULT, sensitivity_from_json)


@dataclass(frozen=True)
class Measure(Stage[Measured]):
    """Measure the noise that quantising each layer adds, on the first ``count`` of the calibration images.

    ``precisions`` are those that are measured, the recipe's first; ``task`` is set where its loss, not the outputs,
    tells the damage.
    """

    name: ClassVar[str] = "sensitivity"
    artifact: ClassVar[type[Artifact]] = Measured
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnx-ir", "onnxruntime")

    model: File
    ranges: File
    settings: QuantizeSettings
    precisions: tuple[str, ...]
    images: ImageSet
    preprocess: Preprocess
    count: int
    method: Method
    task: TaskChoice
    seed: int

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write the damage of every layer; a graph without gradients is refused unless the method is brute force."""
        self.fill_beside(folder, reporter, None)

    def fill_beside(self, folder: Path, reporter: Reporter, store: KnownNoise | None) -> None:
        """The same; by brute force what is in the ``store`` is not measured again, and what is measured goes there."""
        from resvit_quantize.sensitivity.sensitivity import brute_force_sensitivity, measure_sensitivity
        from resvit_quantize.sensitivity.task_loss import task_loss

        what, images = self._what, self.images.first(self.count, 16)
        if self.method is Method.BRUTE_FORCE:
            damage = brute_force_sensitivity(*what, images, reporter, precisions=self.precisions, store=store)
        else:
            loss = task_loss(self.task.task(), self.images)
            damage = measure_sensitivity(
                *what, images, reporter, self.count, precisions=self.precisions, seed=self.seed, loss=loss
            )
        (folder / RESULT).write_bytes(pretty_json(damage.to_json()))

    @property
    def _what(self) -> tuple[AnalysedGraph, Ranges, QuantizeSettings]:
        from resvit_calibrate.ranges.ranges import ranges_from_json
        from resvit_quantize.graph.analysed import graph_from_onnx

        return graph_from_onnx(self.model.path), self.ranges.read(ranges_from_json), self.settings

    def noise_sources(self) -> list[NoiseSource]:
        """All that is measured by brute force, in its order."""
        from resvit_quantize.sensitivity.sensitivity import noise_sources

        return noise_sources(*self._what, self.precisions)

    def noise_of(self, wanted: Iterable[NoiseSource]) -> Iterator[tuple[NoiseSource, float]]:
        """The noise of some of it, to the bit as ``fill`` measures it."""
        from resvit_quantize.sensitivity.sensitivity import noise_of

        return noise_of(*self._what, self.images.first(self.count, 16), self.precisions, wanted)


def measured_of(run: Run, stage: Measure) -> Measured:
    """The finished stage; one by brute force goes on where it was killed, and its layers may be measured elsewhere."""
    from resvit_quantize.sensitivity.known_noise import KnownNoise

    if stage.method is not Method.BRUTE_FORCE:
        return run.folder.do(stage)
    store = KnownNoise(*run.folder.unfinished(stage))
    if run.division is not None and run.folder.is_ahead(stage):
        run.division.measure(run, stage, store)
    (measured,) = run.folder.do_together([stage], lambda missing: stage.fill_beside(missing[0][1], run.reporter, store))
    store.remove()
    return measured


def exclude_snippet(excluded: Sequence[str], layers: Sequence[LayerDamage]) -> str:
    """Lines for the recipe file that leave out these layers, and what it leaves out already."""
    patterns = dict.fromkeys([*excluded, *(glob.escape(layer.node) for layer in layers)])
    return "[quantize]\nexclude = [\n" + "".join(f"    {json.dumps(pattern)},\n" for pattern in patterns) + "]"
