"""The options that commands share, and how flags, a recipe file and a run folder become one recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_export.recipe.choices import StageName
from resvit_export.recipe.file import absolute, recipe_from_toml
from resvit_export.recipe.pairs import read_pairs
from resvit_export.recipe.recipe import SETTINGS, Recipe
from resvit_export.recipe.setting import Setting

F = TypeVar("F", bound=Callable[..., Any])

LOCAL_RECIPE = Path("resvit.toml")
_BELONG_TO = {
    "data": ("validation_data", "train_data", "classes", "preprocess", "task", "task_options"),
    "checkpoint": ("model_args", "classes", "preprocess"),
    "targets": ("jetpack", "builder", "tensorrt", "batch", "measured_times", "timing_cache"),
    "precision": ("include", "exclude", "latency_budget"),
}
"""Settings that may no longer fit where the first is changed."""

_RUN = [
    click.option(
        "--run",
        "run_folder",
        type=click.Path(path_type=Path),
        help="Folder of the run; what is finished in it is not done again.  [default: runs/MODEL]",
    ),
    click.option(
        "--recipe",
        "recipe_file",
        type=click.Path(path_type=Path),
        help="TOML file with any of these settings; flags win over it.  [default: ./resvit.toml if there is one]",
    ),
]


def option_of(item: Setting) -> Callable[[F], F]:
    """The option of one setting."""
    flag = item.flag
    more: dict[str, Any] = {}
    if item.choices:
        more["type"] = click.Choice([str(choice.value) for choice in item.choices])
    elif item.kind in (int, float):
        more["type"] = item.kind
    elif item.kind is bool:
        # Not given is None, so that a recipe's word stands.
        more["default"] = None
        more["is_flag"] = True
        flag += f"/--no-{flag.removeprefix('--')}" if item.default else ""
    if item.alone is not None:
        more |= {"is_flag": False, "flag_value": str(item.alone.value)}
    multiple = item.many or item.pairs is not None
    return click.option(flag, item.name, multiple=multiple, metavar=item.metavar, help=item.help, **more)


def recipe_options(stage: str) -> Callable[[F], F]:
    """Add every option that the stages up to ``stage`` understand."""

    stages = StageName(stage).upto
    options = [*_RUN, *(option_of(item) for item in SETTINGS.values() if item.since in stages)]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def device_options(function: F) -> F:
    """Add ``--device`` and ``--rehearse``: where to build is no part of the recipe."""
    function = click.option(
        "--rehearse", is_flag=True, help="On --device, TensorRT for RTX stands in for TensorRT; labelled everywhere."
    )(function)
    return click.option(
        "--device",
        metavar="ssh://USER@HOST",
        help="Then build, validate and time there, over your own OpenSSH; never asks for a password.",
    )(function)


def require_one_device(device: str | None, rehearse: bool, several: bool) -> tuple[str, bool] | None:
    """Address and rehearsal, None without a device; refuses what is no address, and one device for several targets."""
    from resvit_engines.remote.ssh import address_from

    if device is None:
        if rehearse:
            raise ResvitError("--rehearse says how to build on a device.", "Say --device ssh://user@host too.")
        return None
    if several:
        raise ResvitError("One device was given for several targets.", "Name the one --target that it is.")
    address_from(device)
    return device, rehearse


def resolve_recipe(flags: dict[str, Any], reporter: Reporter = SILENT) -> tuple[Recipe, Path]:
    """Merge flags with a recipe and choose the run folder.

    Flags win. Below them stands ``--recipe``; without it, and without ``--model``, the recipe that the run folder
    keeps, else ``./resvit.toml``. What such a recipe, which nobody named, adds to the flags is said.
    """
    run_folder: Path | None = flags["run_folder"]
    recipe_file: Path | None = flags["recipe_file"]
    settings = {
        name: _setting_from_flag(SETTINGS[name], value)
        for name, value in flags.items()
        if name not in ("run_folder", "recipe_file") and value not in (None, ())
    }
    unnamed = None
    if recipe_file is None and "model" not in settings:
        saved = run_folder / "recipe.toml" if run_folder else None
        recipe_file = unnamed = next((file for file in (saved, LOCAL_RECIPE) if file and file.exists()), None)
    before = recipe_from_toml(recipe_file.resolve()) if recipe_file else Recipe()
    recipe = before.with_settings(settings)
    if unnamed is not None:
        _tell_what_stays(before, recipe, set(settings), unnamed, reporter)
    if recipe.model is None:
        raise ResvitError(
            "No model was given.",
            "Say --model (for example --model timm:vit_small_r26_s32_224 --checkpoint weights.pth), or write it "
            f"into {LOCAL_RECIPE} as name under [model].",
        )
    return recipe, run_folder or Path("runs") / recipe.label


def _tell_what_stays(before: Recipe, recipe: Recipe, flags: set[str], file: Path, reporter: Reporter) -> None:
    """Say which settings come from ``file``; warn of those that belong to a setting that a flag changed."""
    default = Recipe()
    stays = {
        name: value
        for name in SETTINGS
        if (name not in flags or SETTINGS[name].kind is dict)
        and (value := getattr(before, name)) != getattr(default, name)
    }
    if not stays:
        return
    reporter.say(f"settings from {file}: {', '.join(_said(SETTINGS[name], value) for name, value in stays.items())}")
    for changed, companions in _BELONG_TO.items():
        kept = [name for name in companions if name in stays]
        if changed in flags and kept and getattr(before, changed) not in (None, (), getattr(recipe, changed)):
            reporter.warn(
                f"{SETTINGS[changed].flag} is another than in {file}, and this stays from there: "
                f"{', '.join(_said(SETTINGS[name], stays[name]) for name in kept)}; say it too if it should change"
            )


def _said(item: Setting, value: Any) -> str:
    """A setting as a flag says it; one that only a file says, by its key there."""
    name = item.flag if item.since is not None else item.toml
    if isinstance(value, bool):
        return name if value else f"--no-{name.removeprefix('--')}"
    if isinstance(value, Mapping):
        return f"{name} " + " ".join(f"{key}={part}" for key, part in value.items())
    return f"{name} " + (" ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _setting_from_flag(item: Setting, value: Any) -> Any:
    if item.pairs is not None:
        return read_pairs(item.flag, value, item.pairs)
    return absolute(item, value, Path.cwd())
