"""Parts of a validation: a worker asks the networks about a range of the images.

A range ends where a batch does, and its answers are kept as those of a validation that goes on after a kill are
(``answers/parts.py``): to the byte what one process answers.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_calibrate.answers.parts import PartFiles, Parts
from resvit_engines.progress import SILENT
from resvit_export.sweep.part import Part, moved, own_fields
from resvit_export.sweep.store import RunStore

if TYPE_CHECKING:
    from resvit_export.run import Run
    from resvit_export.stages.score import Asked

LEAST = 2000
"""Images of a range at least: a worker loads the networks first."""
_TOLD = ("questions", "source")
"""Fields of these stages that a run tells: what is asked, and the user's network."""
Answer = Mapping[str, PartFiles]
"""What a worker answered, by the titles of the networks."""


@dataclass(frozen=True)
class Range(Part[Answer]):
    """Images ``first`` to ``last`` - 1, and the networks that are asked about them.

    ``networks`` are kinds of stages with their fields, but for those that the run itself tells; ``keys`` say what they
    are with these.
    """

    networks: tuple[tuple[type[Asked], Mapping[str, Any]], ...]
    keys: tuple[str, ...]
    first: int
    last: int

    def done(self, place: Path | RunStore) -> Answer:
        """Ask; nothing is answered where this run is not the one that the range is a part of."""
        from resvit_export.pipeline import Pipeline
        from resvit_export.run_folder import RunFolder

        folder = RunFolder(self.seen(place), SILENT)
        with folder.looking_only():
            run = self.run_in(folder)
            questions = Pipeline(run).questions
        told: dict[str, Any] = {"questions": questions, "source": run.network}
        networks = [
            kind(
                **moved(own, self.folder, folder.path),
                **{item.name: told[item.name] for item in dataclasses.fields(kind) if item.name in told},
            )
            for kind, own in self.networks
        ]
        if tuple(folder.unfinished(stage)[1] for stage in networks) != self.keys:
            return {}
        with tempfile.TemporaryDirectory(prefix="resvit-range-") as scratch:
            stores = {
                stage.title: Parts(Path(scratch) / str(index), key)
                for index, (stage, key) in enumerate(zip(networks, self.keys, strict=True))
            }
            runners = {stage.title: stage.asks(SILENT) for stage in networks}
            task = questions.task.task()
            task.answer_range(runners, questions.images, questions.batch_size, (self.first, self.last), stores)
            return {title: store.files(self.first) for title, store in stores.items()}


def ranges_of(
    run: Run, name: str, asked: Sequence[Asked], stores: Mapping[str, Parts], workers: int, least: int
) -> list[Range]:
    """What of a validation is not in ``stores`` yet, for up to ``workers``, in ranges of ``least`` images or more."""
    questions = asked[0].questions
    total, block = len(questions.images), questions.batch_size
    gaps = _gaps([stores[stage.title] for stage in asked], total)
    each = max(-(-sum(end - begin for begin, end in gaps) // workers), least)
    each = -(-each // block) * block
    keys = tuple(run.folder.unfinished(stage)[1] for stage in asked)
    bare = tuple((type(stage), own_fields(stage, _TOLD)) for stage in asked)
    return [
        Range(run.recipe, name, run.folder.path, bare, keys, first, min(first + each, end))
        for begin, end in gaps
        # Behind images that broke, batches begin elsewhere: those the run asks itself.
        for first in (range(begin, end, each) if begin % block == 0 else ())
    ]


def _gaps(stores: Sequence[Parts], total: int) -> list[tuple[int, int]]:
    """The images of which not all stores hold the answers, as ranges: each first one, and the one behind the last."""
    whole = set.intersection(*({(part.first, part.last) for part in store.kept()} for store in stores))
    found, end = [], 0
    for first, last in sorted(whole):
        if first < end:
            continue  # of a division into other ranges
        if first > end:
            found.append((end, first))
        end = last
    return [*found, (end, total)] if end < total else found
