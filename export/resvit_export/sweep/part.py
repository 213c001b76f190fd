"""A part of a run's work that a worker does: it finds the run, makes what the run would make, and hands that over."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from resvit_engines.progress import SILENT
from resvit_export.recipe.recipe import Recipe
from resvit_export.stage import File
from resvit_export.sweep.store import RunStore

if TYPE_CHECKING:
    from resvit_export.run import Run
    from resvit_export.run_folder import RunFolder

T = TypeVar("T")


@dataclass(frozen=True)
class Part(abc.ABC, Generic[T]):
    """A part of the run ``name`` for the one target of ``recipe``; ``folder`` is the run's, where the part was made."""

    recipe: Recipe
    name: str
    folder: Path

    @abc.abstractmethod
    def done(self, place: Path | RunStore) -> T:
        """What a worker that sees ``place`` makes of it; raises ``ResvitError`` as the stages that it is a part of."""

    def seen(self, place: Path | RunStore) -> Path:
        """The run's folder on this machine, with all finished stages that a store has."""
        if isinstance(place, RunStore):
            place.meet(self.name, place.scratch / self.name)
            return place.scratch / self.name
        return place / self.name

    def run_in(self, folder: RunFolder) -> Run:
        """The run, in a folder of its stages."""
        from resvit_export.run import runs_for

        (run,) = runs_for(self.recipe, folder, SILENT)
        return run


class Spread(Protocol):
    """Has parts done somewhere."""

    def __call__(self, parts: Sequence[Part[T]]) -> Iterator[tuple[int, T]]:
        """Give what was made of them as it comes, each with the part's place; what was lost is left out."""
        ...


def own_fields(stage: Any, told: Sequence[str]) -> dict[str, Any]:
    """A stage's fields, but for those that its run tells."""
    return {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage) if item.name not in told}


def moved(fields: Mapping[str, Any], before: Path, folder: Path) -> dict[str, Any]:
    """The same with its files in another run folder."""
    return {
        name: File(folder / value.path.relative_to(before), value.digest) if isinstance(value, File) else value
        for name, value in fields.items()
    }
