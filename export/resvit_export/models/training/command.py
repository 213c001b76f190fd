"""The command that trains a reference hybrid on scenes: one for each task, in ``examples``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from resvit_calibrate.readers.scenes import VALIDATION
from resvit_engines.errors import ResvitError
from resvit_engines.progress import reporter
from resvit_export.models.config import Task
from resvit_export.models.reference import resvit_config
from resvit_export.models.training.errors import spoken_errors
from resvit_export.models.training.scenes import SceneRecipe, finished, train


def scene_training_command(task: Task, model: str, help_text: str, *, scenes: int, epochs: int) -> click.Command:
    """A command that trains ``model`` or another hybrid for ``task``, and prints the accuracy on the test scenes.

    ``scenes`` and ``epochs`` are its defaults. Its exit codes are those of ``resvit-export``.
    """

    @click.command(help=help_text)
    @click.option("--model", default=model, show_default=True, help=f"A reference hybrid with a {task.value} head.")
    @click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), help=f"Checkpoint. [runs/{task.value}/MODEL.pt]"
    )
    @click.option(
        "--scenes", type=click.IntRange(1, 10**6), default=scenes, show_default=True, help="New in every epoch."
    )
    @click.option("--epochs", type=click.IntRange(1, 1000), default=epochs, show_default=True)
    @click.option("--test-scenes", type=click.IntRange(1, 10**5), default=VALIDATION, show_default=True)
    @click.option("--seed", type=click.IntRange(0, 1000), default=0, show_default=True)
    @click.option("--quiet", is_flag=True, help="No progress.")
    def command(
        *, model: str, out: Path | None, scenes: int, epochs: int, test_scenes: int, seed: int, quiet: bool
    ) -> None:
        # Read when torch is first imported: threads that spin while they wait slow down whatever shares the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        with spoken_errors("goes on from the last whole epoch"):
            recipe = SceneRecipe(resvit_config(model.removeprefix("resvit:")), scenes, epochs, seed, test_scenes)
            if recipe.config.task is not task:
                raise ResvitError(f"{model} is made for {recipe.config.task.value}.", f"Choose {default}.")
            out = out or Path("runs", task.value, f"{recipe.config.name}.pt")
            if record := finished(out, recipe.key):
                click.echo(f"{out}: finished before and unchanged, {_in_words(record['scores'])}")
                return
            record = train(recipe, out, reporter(quiet))
        click.echo(
            f"{out}: {_in_words(record['scores'])} on {record['test_scenes']} test scenes, "
            f"{record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of CPU time)"
        )

    default = model
    return command


def _in_words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.2f}%" for name, value in scores.items())
