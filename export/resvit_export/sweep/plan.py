"""``sweep.toml``: which models, precisions, targets and budgets, and what all of them share."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.names import require_name
from resvit_engines.targets.own import AUTO, resolve_target
from resvit_export.recipe.file import document_from_toml, recipe_from_document
from resvit_export.recipe.recipe import Recipe

_LISTS = ("targets", "precisions")
_TABLES = (*_LISTS, "models", "budgets", "recipe")
_TASKS_MOST = 10_000
_SHAPE = (
    'Write targets = ["jetson-orin"], precisions = ["int8", "fp16"], a table [models.NAME] for each model, and '
    "[recipe] for what all share."
)


@dataclass(frozen=True)
class Task:
    """One model in one precision and budget for all targets: one run folder, whose stages the targets share.

    ``budget`` is the name of one, empty in a sweep without.
    """

    model: str
    precision: str
    recipe: Recipe
    budget: str = ""

    @property
    def name(self) -> str:
        """What its run folder is called."""
        return "-".join(filter(None, (self.model, self.precision, self.budget)))

    def for_targets(self, *targets: str) -> Recipe:
        """The recipe for some of the targets."""
        return dataclasses.replace(self.recipe, targets=targets)


def sweep_from_toml(path: Path) -> tuple[Task, ...]:
    """The tasks of a sweep file, in its order. Relative paths are relative to the folder that it lies in.

    ``targets`` and ``precisions`` are lists; ``[models.NAME]``, ``[budgets.NAME]`` and ``[recipe]`` hold the tables of
    a recipe: a budget's over the model's, and these over those that all share.

    Raises:
        ResvitError: INPUT for a file that is missing or malformed, and for what a recipe refuses; IMPOSSIBLE for a
            target that there is none of.
    """
    document = document_from_toml(path, "sweep", "Give the path of a sweep file.")
    if unknown := sorted(set(document) - set(_TABLES)):
        raise ResvitError(f"The sweep {path} has an entry that does not exist: {unknown[0]}.", _SHAPE)
    targets, precisions = (_texts(document, key, path) for key in ("targets", "precisions"))
    models, shared = document.get("models"), document.get("recipe", {})
    if not isinstance(models, dict) or not models or not isinstance(shared, dict):
        raise ResvitError(f"The sweep {path} names no models.", _SHAPE)
    budgets = document.get("budgets", {"": {}})
    if not isinstance(budgets, dict) or not budgets:
        raise ResvitError(f"The sweep {path} has budgets that are no tables.", "Write [budgets.NAME] for each.")
    if len(models) * len(precisions) * len(budgets) > _TASKS_MOST:
        raise ResvitError(f"The sweep {path} has more than {_TASKS_MOST} combinations.", "Divide it.")
    _require_tables({"models": models, "budgets": document.get("budgets", {})}, shared, path)
    tasks: dict[str, Task] = {}
    for (name, own), precision in itertools.product(models.items(), precisions):
        for budget, allowed in budgets.items():
            tables = _over(_over(shared, own), allowed)
            for table, key, value in (("target", "name", targets), ("quantize", "precision", precision)):
                place = tables.setdefault(table, {})
                if not isinstance(place, dict) or key in place:
                    raise ResvitError(
                        f"In the sweep {path}, {table}.{key} is said for one model or for all.",
                        "Leave it out: the lists targets and precisions say it.",
                    )
                place[key] = value
            task = Task(name, precision, recipe_from_document(tables, path), budget)
            _require_targets(task, path)
            if task.name in tasks:
                raise ResvitError(f"In the sweep {path}, two runs would be called {task.name}.", "Rename a model.")
            tasks[task.name] = task
    return tuple(tasks.values())


def _require_tables(named: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any], path: Path) -> None:
    """Refuse a name that makes no folder, what is no table, and a list that TOML counts to the table above it."""
    tables = {"recipe": shared}
    for kind, ones in named.items():
        for name, own in ones.items():
            require_name(name, f"In the sweep {path}, the {kind.removesuffix('s')}")
            if not isinstance(own, dict):
                raise ResvitError(f"In the sweep {path}, {kind}.{name} is no table.", _SHAPE)
            tables[f"{kind}.{name}"] = own
    for where, table in tables.items():
        for key in _LISTS:
            if isinstance(table.get(key), list):
                raise ResvitError(
                    f"In the sweep {path}, {key} stands below [{where}], and so belongs to that table.",
                    f"Put it at the top of the file, before the first line in brackets: {key} = [...].",
                )


def _require_targets(task: Task, path: Path) -> None:
    """Refuse a target that nothing is known of; whether it can do what is asked for, its row tells."""
    for target in task.recipe.targets:
        if target.strip().lower() == AUTO:
            continue  # of the machine that works on it
        try:
            resolve_target(target, own=task.recipe.own_targets)
        except ResvitError as error:
            raise ResvitError(f"In the sweep {path}: {error.problem}", error.fix, error.code) from error


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
