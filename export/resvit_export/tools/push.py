"""What ``push`` sends: the bundles of finished runs, and bundles that are files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter
from resvit_export.run_folder import NotFinishedError, RunFolder

_RECIPE = "recipe.toml"
_NAMED = 5


def bundles_in(sources: Sequence[Path], reporter: Reporter) -> list[Path]:
    """The bundles of run folders, one for each of a run's targets, and bundles themselves; does no stage.

    Raises:
        ResvitError: INPUT where a run is not finished up to its bundle, and for what is neither.
    """
    return [bundle for source in sources for bundle in _bundles_of(source, reporter)]


def _bundles_of(source: Path, reporter: Reporter) -> list[Path]:
    if not source.is_dir():
        return [source]
    if (source / _RECIPE).is_file():
        return _of_run(source, reporter)
    found = sorted(source.glob("*.resvit"))
    if not found:
        raise ResvitError(
            f"{source} is no run folder, and holds no bundle.",
            "Give the folder that 'resvit-export build --run' wrote, or a .resvit file.",
        )
    return found


def _of_run(folder: Path, reporter: Reporter) -> list[Path]:
    """As the run's recipe says now: bundles of other settings that lie in its folder are not those.

    Where the model is not here to ask, nothing tells which these are, and the user has to name them.
    """
    from resvit_export.pipeline import Pipeline
    from resvit_export.recipe.file import recipe_from_toml
    from resvit_export.run import runs_for
    from resvit_export.tune import settled

    recipe = recipe_from_toml(folder / _RECIPE)
    run_folder = RunFolder(folder, reporter)
    bundles = []
    with run_folder.locked(), run_folder.looking_back():
        try:
            for run in runs_for(recipe, run_folder, reporter):
                pipeline = Pipeline(run)
                with contextlib.suppress(NotFinishedError):
                    pipeline = settled(pipeline)
                bundles.append(pipeline.bundled.bundle.path)
        except NotFinishedError:
            raise
        except ResvitError as error:
            there = [str(path) for path in sorted(folder.glob("bundle-*/*.resvit"))]
            if not there:
                raise
            raise ResvitError(
                f"Which bundles of {folder} are those of its recipe cannot be told here: {error.problem}",
                f"Go to where it was built, or give the .resvit files: {', '.join(there[:_NAMED])}.",
            ) from error
    return bundles
