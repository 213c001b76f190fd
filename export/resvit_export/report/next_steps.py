"""What comes after a build: command lines that really apply to what came out, the most useful first."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resvit_calibrate.gate.comparison import SHARE
from resvit_calibrate.gate.gate import VerdictKind
from resvit_engines.targets.speed_verdict import SpeedKind
from resvit_engines.targets.table import Builder
from resvit_export.refusals import recoverable
from resvit_quantize.settings import Effort

if TYPE_CHECKING:
    from resvit_engines.targets.speed_verdict import SpeedVerdict
    from resvit_engines.targets.table import Target
    from resvit_export.recipe.recipe import Recipe
    from resvit_export.records.verdict import VerdictRecord

_MOST = 3


@dataclass(frozen=True)
class Ending:
    """What a build came to, in the run folder ``folder``.

    ``bundle`` is None where what was built does not ship. ``planned`` says that the engine is built elsewhere by a
    plan, ``on_device`` that a device has built and judged it.
    """

    folder: Path
    recipe: Recipe
    target: Target
    verdict: VerdictRecord
    speed: SpeedVerdict
    bundle: Path | None
    signs: bool
    planned: bool
    on_device: bool


def next_commands(end: Ending) -> list[tuple[str, str]]:
    """At most three command lines, each with what it is for."""
    return list(dict.fromkeys(_commands(end)))[:_MOST]


def _commands(end: Ending) -> Iterator[tuple[str, str]]:
    recipe, folder = end.recipe, shlex.quote(str(end.folder))
    build = f"resvit-export build --run {folder}"
    if end.bundle is None or end.verdict.kind is VerdictKind.REJECTED:
        yield from _after_rejection(end, build, folder)
    elif end.verdict.kind is VerdictKind.UNDECIDED:
        yield from _after_doubt(end, build)
    fp16 = shlex.quote(f"{end.folder}-fp16")
    if end.target.on_cpu and end.bundle is not None:
        yield f"resvit-export bench --run {folder}", "time INT8 against FP32 here"
    elif recipe.precision.quantises and end.speed.kind is not SpeedKind.FASTER:
        recipe_file = shlex.quote(str(end.folder / "recipe.toml"))
        yield f"resvit-export build --recipe {recipe_file} --precision fp16 --run {fp16}", "the same in FP16"
    if end.bundle is None or end.on_device:
        yield f"resvit-export audit --run {folder}", "which layers fused, and why others did not"
        return
    bundle = shlex.quote(str(end.bundle))
    if not end.signs:
        yield (
            f"resvit-export keygen release.key && resvit-export sign {bundle} --key release.key",
            ("sign it: devices take no unsigned bundle by hand"),
        )
    if end.planned and end.target.builder is Builder.TENSORRT:
        yield f"{build} --device ssh://USER@HOST", f"build, validate and time it on the {end.target.title}"
        yield f"resvit-engine build {shlex.quote(end.bundle.name)} --trust release.pub", "build it by hand, there"
    else:
        yield f"resvit-engine install {shlex.quote(end.bundle.name)} --trust release.pub", "there"
    yield f"resvit-export audit --run {folder}", "which layers fused, and why others did not"


def _after_rejection(end: Ending, build: str, folder: str) -> Iterator[tuple[str, str]]:
    recipe = end.recipe
    if end.verdict.kind is not VerdictKind.REJECTED:  # what did not fuse was refused
        yield f"resvit-export audit --run {folder}", "which layers fused, and why others did not"
        return
    if recoverable(recipe):
        yield f"resvit-export sensitivity --run {folder}", "which layers the loss comes from"
    if recoverable(recipe) and recipe.effort is Effort.FAST:
        yield f"{build} --effort best", "learn rounding and ranges from the images"
    if recoverable(recipe) and recipe.train_data is None:
        yield f"{build} --train-data IMAGES", "train the weights against the float network"


def _after_doubt(end: Ending, build: str) -> Iterator[tuple[str, str]]:
    verdict, recipe = end.verdict.verdict, end.recipe
    if verdict.chance_level:
        yield f"{build} --classes FILE", "say how the network numbers its classes"
        return
    asked = recipe.validation_images
    if verdict.images_needed and asked is not None and verdict.images >= asked:
        yield f"{build} --validation-images {verdict.images_needed}", "validate on as many as would decide"
    else:
        yield f"{build} --validation-data IMAGES", "validate on more images"
    high = verdict.interval[1]
    if verdict.unit == SHARE and verdict.max_drop < high < 100:
        wider = -(-high * 10 // 1) / 10
        yield f"{build} --max-drop {wider:g}", "if a drop of so much would do"
