"""Train a semantic segmentation on scenes of Fashion-MNIST items, in a few minutes on two CPU cores.

    python examples/segmentation/train.py --out runs/segmentation/fpn-nano-seg.pt

The checkpoint holds ``state_dict``, ``config`` (for ``resvit_model``) and ``scores`` (mIoU and Dice),
and loads with ``torch.load(..., weights_only=True)``. Killed, it goes on from the last whole epoch when it is run
again; finished and unchanged, it is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from resvit_calibrate.scenes import VALIDATION
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import reporter
from resvit_export.models import resvit_config
from resvit_export.models.config import Task
from resvit_export.models.training import SceneRecipe, finished, train

TASK = Task.SEGMENTATION


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option(
    "--model", default="resvit:fpn-nano-seg", show_default=True, help="A reference hybrid with a segmentation head."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint. [runs/segmentation/MODEL.pt]")
@click.option("--scenes", type=click.IntRange(1, 10**6), default=3000, show_default=True, help="New in every epoch.")
@click.option("--epochs", type=click.IntRange(1, 1000), default=6, show_default=True)
@click.option("--test-scenes", type=click.IntRange(1, 10**5), default=VALIDATION, show_default=True)
@click.option("--seed", type=click.IntRange(0, 1000), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress.")
def main(*, model: str, out: Path | None, scenes: int, epochs: int, test_scenes: int, seed: int, quiet: bool) -> None:
    """Train and print the accuracy on the test scenes."""
    # Read when torch is first imported: threads that spin while they wait slow down whatever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        recipe = SceneRecipe(resvit_config(model.removeprefix("resvit:")), scenes, epochs, seed, test_scenes)
        if recipe.config.task is not TASK:
            raise ResvitError(f"{model} is made for {recipe.config.task.value}.", "Choose resvit:fpn-nano-seg.")
        out = out or Path("runs", TASK.value, f"{recipe.config.name}.pt")
        if record := finished(out, recipe.key):
            click.echo(f"{out}: finished before and unchanged, {in_words(record['scores'])}")
            return
        record = train(recipe, out, reporter(quiet))
    except ResvitError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(int(error.code)) from None
    except OSError as error:
        click.echo(f"error: {error}\n  → Choose an --out in a folder that can be written.", err=True)
        raise SystemExit(int(ExitCode.SYSTEM)) from None
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command goes on from the last whole epoch.", err=True)
        raise SystemExit(int(ExitCode.INTERRUPTED)) from None
    click.echo(
        f"{out}: {in_words(record['scores'])} on {record['test_scenes']} test scenes, "
        f"{record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of CPU time)"
    )


def in_words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.2f}%" for name, value in scores.items())


if __name__ == "__main__":
    main()
