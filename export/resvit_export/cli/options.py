"""The options that commands share, and how flags, a recipe file and a run folder become one recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from resvit_engines.errors import ResvitError
from resvit_export.recipe.choices import StageName
from resvit_export.recipe.file import absolute, recipe_from_toml
from resvit_export.recipe.pairs import read_pairs
from resvit_export.recipe.recipe import SETTINGS, Recipe
from resvit_export.recipe.setting import Setting

F = TypeVar("F", bound=Callable[..., Any])

LOCAL_RECIPE = Path("resvit.toml")


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


def resolve_recipe(flags: dict[str, Any]) -> tuple[Recipe, Path]:
    """Merge flags with a recipe and choose the run folder.

    Flags win. Below them stands ``--recipe``; without it, and without ``--model``, the recipe that the run folder
    keeps, else ``./resvit.toml``.
    """
    run_folder: Path | None = flags["run_folder"]
    recipe_file: Path | None = flags["recipe_file"]
    settings = {
        name: _setting_from_flag(SETTINGS[name], value)
        for name, value in flags.items()
        if name not in ("run_folder", "recipe_file") and value not in (None, ())
    }
    if recipe_file is None and "model" not in settings:
        saved = run_folder / "recipe.toml" if run_folder else None
        recipe_file = next((file for file in (saved, LOCAL_RECIPE) if file and file.exists()), None)
    recipe = recipe_from_toml(recipe_file.resolve()) if recipe_file else Recipe()
    recipe = recipe.with_settings(settings)
    if recipe.model is None:
        raise ResvitError(
            "No model was given.",
            "Say --model (for example --model timm:vit_small_r26_s32_224 --checkpoint weights.pth), or write it "
            f"into {LOCAL_RECIPE} as name under [model].",
        )
    return recipe, run_folder or Path("runs") / recipe.label


def _setting_from_flag(item: Setting, value: Any) -> Any:
    if item.pairs is not None:
        return read_pairs(item.flag, value, item.pairs)
    return absolute(item, value, Path.cwd())
