"""``sweep.toml``: which models, precisions and targets, and what all of them share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.names import require_name
from resvit_export.recipe.file import document_from_toml, recipe_from_document
from resvit_export.recipe.recipe import Recipe

_TABLES = ("targets", "precisions", "models", "recipe")
_TASKS_MOST = 10_000
_SHAPE = (
    'Write targets = ["jetson-orin"], precisions = ["int8", "fp16"], a table [models.NAME] for each model, and '
    "[recipe] for what all share."
)


@dataclass(frozen=True)
class Task:
    """One model in one precision for all targets: one run folder, whose stages the targets share."""

    model: str
    precision: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """What its run folder is called."""
        return f"{self.model}-{self.precision}"

    def for_targets(self, *targets: str) -> Recipe:
        """The recipe for some of the targets."""
        return dataclasses.replace(self.recipe, targets=targets)


def sweep_from_toml(path: Path) -> tuple[Task, ...]:
    """The tasks of a sweep file, in its order. Relative paths are relative to the folder that it lies in.

    ``targets`` and ``precisions`` are lists; ``[models.NAME]`` and ``[recipe]`` hold the tables of a recipe, the
    model's over those that all share.

    Raises:
        ResvitError: INPUT for a file that is missing or malformed, and for what a recipe refuses.
    """
    document = document_from_toml(path, "sweep", "Give the path of a sweep file.")
    if unknown := sorted(set(document) - set(_TABLES)):
        raise ResvitError(f"The sweep {path} has an entry that does not exist: {unknown[0]}.", _SHAPE)
    targets, precisions = (_texts(document, key, path) for key in ("targets", "precisions"))
    models, shared = document.get("models"), document.get("recipe", {})
    if not isinstance(models, dict) or not models or not isinstance(shared, dict):
        raise ResvitError(f"The sweep {path} names no models.", _SHAPE)
    if len(models) * len(precisions) > _TASKS_MOST:
        raise ResvitError(f"The sweep {path} has more than {_TASKS_MOST} combinations.", "Divide it.")
    tasks = []
    for name, own in models.items():
        require_name(name, f"In the sweep {path}, the model")
        if not isinstance(own, dict):
            raise ResvitError(f"In the sweep {path}, models.{name} is no table.", _SHAPE)
        for precision in precisions:
            tables = _over(shared, own)
            for table, key, value in (("target", "name", targets), ("quantize", "precision", precision)):
                place = tables.setdefault(table, {})
                if not isinstance(place, dict) or key in place:
                    raise ResvitError(
                        f"In the sweep {path}, {table}.{key} is said for one model or for all.",
                        "Leave it out: the lists targets and precisions say it.",
                    )
                place[key] = value
            tasks.append(Task(name, precision, recipe_from_document(tables, path)))
    return tuple(tasks)


def _texts(document: Mapping[str, Any], key: str, path: Path) -> list[str]:
    found = document.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise ResvitError(f"The sweep {path} has no list of {key}.", _SHAPE)
    return list(dict.fromkeys(found))


def _over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of both, those of ``own`` over the others."""
    made = copy.deepcopy(dict(shared))
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] = _over(made[key], value)
        else:
            made[key] = copy.deepcopy(value)
    return made
