"""One run's work over several workers: what each does is a part, and the run joins what they made.

Parts are to the byte what one process makes. What no worker brings the run does itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resvit_export.sweep.layers import layers_of
from resvit_export.sweep.part import Spread
from resvit_export.sweep.ranges import LEAST, ranges_of
from resvit_export.sweep.trials import Stages, Trial

if TYPE_CHECKING:
    from resvit_calibrate.answers.parts import Parts
    from resvit_export.run import Run
    from resvit_export.stages.decide.sensitivity import Measure
    from resvit_export.stages.score import Asked
    from resvit_quantize.sensitivity.known_noise import KnownNoise


@dataclass(frozen=True)
class Divided:
    """Has parts of the run called ``name`` done by up to ``workers``; validation in ranges of ``least`` images or more.

    ``idle`` counts the workers that have nothing else to do: what may turn out not to be needed is left to those.
    """

    name: str
    spread: Spread
    workers: int
    idle: Callable[[], int]
    least: int = LEAST

    def answer(self, run: Run, asked: Sequence[Asked], stores: Mapping[str, Parts]) -> None:
        """Have the networks asked; what ``stores`` have already is not asked again."""
        parts = ranges_of(run, self.name, asked, stores, self.workers, self.least)
        if len(parts) < 2:
            return
        for _, answer in self.spread(parts):
            for title, files in answer.items():
                stores[title].take(files)

    def measure(self, run: Run, stage: Measure, store: KnownNoise) -> None:
        """Have the layers measured that ``store`` does not have yet."""
        known = store.read()
        missing = [one for one in stage.noise_sources() if one not in known]
        parts = layers_of(run, self.name, stage, missing, self.workers)
        if len(parts) < 2:
            return
        for _, found in run.reporter.track(self.spread(parts), "sensitivity (parts)", len(parts)):
            known |= found
            store.write(known)

    def trials_at_once(self, images: int) -> int:
        """How many candidates of a search are worth trying at once, validated on so many images.

        With n workers, trying ahead makes a bisection log2(n + 1) times as fast; dividing each validation into ranges
        makes it as many times as fast as there are ranges, and wastes nothing.
        """
        ranges, idle = max(min(self.workers, images // self.least), 1), self.idle()
        return idle if math.log2(idle + 1) > ranges else 1

    def tried(self, run: Run, recovers: bool, candidates: Sequence[tuple[Mapping[str, str], float]]) -> list[Stages]:
        """The stages of candidates, each with its confidence; those that were lost have none."""
        parts = [Trial(run.recipe, self.name, run.folder.path, recovers, *one) for one in candidates]
        found: list[Stages] = [{}] * len(parts)
        for place, stages in self.spread(parts):
            found[place] = stages
        return found


def divide(
    run: Run, name: str, spread: Spread, workers: int, idle: Callable[[], int] | None = None, least: int = LEAST
) -> None:
    """Let parts of a run be done as ``Divided`` says; without ``idle`` no worker has anything else to do."""
    run.division = Divided(name, spread, workers, idle or (lambda: workers), least)
