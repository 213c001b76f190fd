"""The options that commands share, and how flags, a recipe file and a run folder become one recipe."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from resvit_engines.errors import ResvitError
from resvit_export.cli.keys import key_option
from resvit_export.recipe import (
    ATTENTIONS,
    CALIBRATORS,
    EFFORTS,
    FILES,
    IMPORTANCES,
    PLUGINS,
    PRECISIONS,
    PRUNABLE,
    QUANTIZERS,
    RECOVERIES,
    SPARSITIES,
    TASKS,
    Recipe,
    absolute_file,
    absolute_reference,
    recipe_from_toml,
)

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
_MODEL = [
    click.option(
        "--model",
        help="resvit:NAME, timm:NAME, hf:FOLDER, package.module:factory, file.py:factory, a .pt2 or an .onnx file.",
    ),
    click.option("--checkpoint", help="Trained weights: .pt, .pth or .safetensors."),
    click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Argument of the model."),
    click.option("--input-shape", metavar="CxHxW", help="Shape of one image, where the model does not say it."),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="NAME=BxS…[:TYPE]",
        help="Of an input by name, its batch N or LOW..HIGH first: pixel_values=1..8x3x224x224, sizes=1x2:int64.",
    ),
]
_TARGET = [
    click.option(
        "--target",
        "targets",
        multiple=True,
        metavar="NAME",
        help="Device to build for ('resvit-export targets' lists them), or auto: this machine's. Repeat it for more.",
    ),
    click.option("--jetpack", help="JetPack on the Jetson, where it is not the usual one."),
    click.option("--batch", help="Fixed batch N, or MIN:OPT:MAX for a dynamic one.  [default: 1]"),
]
_DATA = [
    click.option("--data", help="Images: a folder, an .npz, fashion-mnist, or package.module:factory."),
    click.option("--validation-data", help="Other images to validate on; without it, part of --data."),
    click.option("--calibration-images", type=int, help="Images to calibrate with.  [default: 512]"),
    click.option("--validation-images", type=int, help="Images to validate with.  [default: all there are]"),
    click.option("--seed", type=int, help="Seed of the choice of images.  [default: 0]"),
    click.option(
        "--preprocess",
        multiple=True,
        metavar="KEY=VALUE",
        help="How an image becomes input, where the model does not say: size, resize, interpolation, mean, std …",
    ),
]
_TASK = [
    click.option("--task", type=click.Choice(TASKS), help="What the network is for.  [default: auto, by the data]"),
    click.option(
        "--task-option",
        "task_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="Of outputs and targets: boxes, scores, activation, nms_iou, output, ignore, classes, depth_scale …",
    ),
    click.option("--metric", help="package.module:function or file.py:function, a metric of your own."),
]
_CALIBRATE = [
    click.option("--calibrator", type=click.Choice(CALIBRATORS), help="How ranges are chosen.  [default: output]"),
]
_PRECISION = [
    click.option("--precision", type=click.Choice(PRECISIONS), help="Of the engine.  [default: int8]"),
]
_QUANTIZE = [
    click.option("--quantizer", type=click.Choice(QUANTIZERS), help="Ours, or ModelOpt's.  [default: resvit]"),
    click.option("--effort", type=click.Choice(EFFORTS), help="best: also learn from the images.  [default: fast]"),
    click.option("--include", multiple=True, metavar="PATTERN", help="Quantise nodes that the rules leave in FP16."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep nodes that match in FP16."),
]
_PLUGINS = [
    click.option(
        "--plugins",
        type=click.Choice(PLUGINS),
        help="Kernels of our own: everywhere they fit, nowhere, or where measured to be faster.  [default: auto]",
    ),
    click.option(
        "--plugin-attention",
        type=click.Choice(ATTENTIONS),
        help="What they multiply attention in; 8bit: the precision of the build.  [default: fp16]",
    ),
]
_VALIDATE = [
    click.option("--max-drop", type=float, help="Accepted drop of the task's metric, points.  [default: 1.0]"),
    click.option("--confidence", type=float, help="Of the interval around the drop.  [default: 0.95]"),
]
_PRUNE = [
    click.option("--prune-macs", type=float, metavar="SHARE", help="Prune to this share of the multiply-accumulates."),
    click.option(
        "--prune-latency", type=float, metavar="SHARE", help="Or to this share of the latency, predicted or measured."
    ),
    click.option("--measured-times", metavar="FILE", help="JSON of layer times measured on the device."),
    click.option("--prune-params", type=float, metavar="SHARE", help="Or to this share of the weights."),
    click.option(
        "--prune-what",
        multiple=True,
        type=click.Choice(PRUNABLE),
        help="What may go; repeat it.  [default: channels, heads, mlp]",
    ),
    click.option("--prune-importance", type=click.Choice(IMPORTANCES), help="By what it goes.  [default: hessian]"),
    click.option("--sparsity", type=click.Choice(SPARSITIES), help="Zero two of four weights for sparse tensor cores."),
    click.option("--prune-epochs", type=int, help="Passes over --train-data behind it.  [default: 3]"),
    click.option(
        "--train-data", help="Images to train on behind pruning and in recovery, labels not needed; as for --data."
    ),
    click.option("--train-images", type=int, help="At most so many of them.  [default: all; 20000 in recovery]"),
]
_RECOVER = [
    click.option(
        "--recover",
        type=click.Choice(RECOVERIES),
        is_flag=False,
        flag_value="always",
        help="Train the weights against the float model; auto: where calibration alone is rejected.  [default: auto]",
    ),
    click.option("--recover-epochs", type=int, help="Passes over the training images.  [default: 3]"),
]
_SEARCH = [
    click.option(
        "--search/--no-search",
        default=None,
        help="Raise layers to FP8 or FP16 where the plain recipe is not accepted.  [default: search]",
    ),
    click.option("--latency-budget", metavar="BUDGET", help="Least loss within 3.5ms, or 0.7x of FP16, predicted."),
]
_COMPILE = [
    click.option("--workspace-mib", type=int, help="Memory that the builder's kernels may use as scratch."),
    click.option("--optimization-level", type=int, help="0 builds fast, 5 searches longest.  [default: 3]"),
    click.option(
        "--hardware-compatible", is_flag=True, default=None, help="An engine that newer GPUs run too; not on a Jetson."
    ),
    click.option(
        "--version-compatible", is_flag=True, default=None, help="An engine that later TensorRT of its major run too."
    ),
    click.option(
        "--strip-weights", is_flag=True, default=None, help="An engine without weights; refit puts them back."
    ),
    click.option("--timing-cache", metavar="FOLDER", help="Keep what TensorRT measures, for the next build."),
    click.option(
        "--require-fused",
        is_flag=True,
        default=None,
        help="Refuse (exit code 4) what 'resvit-export audit' finds not fused: 8-bit products, attention, plugins.",
    ),
    click.option(
        "--allow-rejected",
        is_flag=True,
        default=None,
        help="Go on although validation rejected the model; the bundle says so.",
    ),
]
_BUNDLE = [
    key_option,
    click.option("--release", type=int, help="Number of this release; devices refuse to go back.  [default: 1]"),
]

_LAYERS = {
    "prune": [_MODEL, _TARGET, _DATA, _TASK, _PRUNE, _PRECISION],
    "fold": [],
    "export": [],
    "calibrate": [_CALIBRATE],
    "quantize": [_QUANTIZE],
    "fuse": [_PLUGINS],
    "validate": [_VALIDATE, _RECOVER, _SEARCH],
    "compile": [_COMPILE],
    "bundle": [_BUNDLE],
}


def recipe_options(stage: str) -> Callable[[F], F]:
    """Add every option that the stages up to ``stage`` understand."""

    def decorate(function: F) -> F:
        groups = [_RUN]
        for name, layer in _LAYERS.items():
            groups += layer
            if name == stage:
                break
        for option in reversed([option for group in groups for option in group]):
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
    flags = dict(flags)
    run_folder: Path | None = flags.pop("run_folder")
    recipe_file: Path | None = flags.pop("recipe_file")
    flags["model_args"] = _key_values("--model-arg", flags.get("model_args", ()), plain_values)
    flags["preprocess"] = _key_values("--preprocess", flags.get("preprocess", ()), preprocess_values)
    flags["task_options"] = _key_values("--task-option", flags.get("task_options", ()), task_values)
    for name in ("model", "checkpoint", "data", "validation_data", "train_data", "metric"):
        if flags.get(name):
            flags[name] = absolute_reference(flags[name], Path.cwd())
    for name in FILES:
        if flags.get(name):
            flags[name] = absolute_file(flags[name], Path.cwd())
    if recipe_file is None and flags.get("model") is None:
        saved = run_folder / "recipe.toml" if run_folder else None
        recipe_file = next((file for file in (saved, LOCAL_RECIPE) if file and file.exists()), None)
    recipe = recipe_from_toml(recipe_file.resolve()) if recipe_file else Recipe()
    recipe = recipe.with_settings({key: value for key, value in flags.items() if value not in (None, (), {})})
    if recipe.model is None:
        raise ResvitError(
            "No model was given.",
            "Say --model (for example --model timm:vit_small_r26_s32_224 --checkpoint weights.pth), or write it "
            f"into {LOCAL_RECIPE} as name under [model].",
        )
    return recipe, run_folder or Path("runs") / recipe.label


def _key_values(flag: str, pairs: tuple[str, ...], parse: Callable[[str, str], Any]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ResvitError(f"{flag} {pair} is not KEY=VALUE.", f"Write it as {flag} name=value.")
        values[key.strip()] = parse(key.strip(), text.strip())
    return values


def plain_values(key: str, text: str) -> bool | int | float | str:
    """Read a value as bool, integer, number or text, whichever fits first."""
    del key
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def task_values(key: str, text: str) -> Any:
    """Read a value of ``--task-option``: whole numbers for ``ignore``, else plain."""
    if key == "ignore":
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all(re.fullmatch(r"-?\d+", part) for part in parts):
            raise ResvitError(
                f"--task-option ignore={text} is not a list of whole numbers.",
                "Write it as ignore=255 or ignore=0,255.",
            )
        return [int(part) for part in parts]
    return plain_values(key, text)


def preprocess_values(key: str, text: str) -> Any:
    """Read a value of ``--preprocess``: numbers for mean and std, height and width for size, else plain."""
    if key in ("mean", "std"):
        try:
            return [float(part) for part in text.split(",")]
        except ValueError as error:
            raise ResvitError(
                f"--preprocess {key}={text} is not a list of numbers.", f"Write it as {key}=0.5,0.5,0.5."
            ) from error
    if key == "size":
        match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text)
        if not match:
            raise ResvitError(f"--preprocess size={text} is not HEIGHTxWIDTH.", "Write it as size=224x224.")
        return [int(match[1]), int(match[2] or match[1])]
    return plain_values(key, text)
