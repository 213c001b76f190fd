"""Whether kernels of our own go into an engine: by wish, by what was measured, or not at all; always with a reason."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.measure.results import measured_results
from resvit_engines.targets.table import Builder, Target
from resvit_export.recipe.choices import PluginAttention, Plugins

if TYPE_CHECKING:
    from resvit_export.recipe.recipe import Recipe


class By(str, enum.Enum):
    """What decides for each node."""

    WISH = "wish"
    """Every node that a kernel serves."""
    TABLE = "table"
    """The results of ``benchmarks/kernels.py`` on this GPU."""
    TIME = "time"
    """Engines with and without, timed on the GPU of this machine."""
    NOTHING = "nothing"
    """The plain graph stays."""


@dataclass(frozen=True)
class PluginChoice:
    """How nodes are chosen, how their kernels reach the engine (``aot`` or ``library``; empty: not), and why."""

    by: By
    way: str
    reason: str


def plugin_choice(recipe: Recipe, target: Target | None, *, here: bool) -> PluginChoice:
    """Decide for a target; ``here`` says that this machine builds for it.

    Raises:
        ResvitError: IMPOSSIBLE where plugins are asked for and the builder takes none, or where attention in 8 bits
            is asked for and nothing of ours is used.
    """
    choice = _choice(recipe, target, here=here)
    eight_bits, half = recipe.plugin_attention is PluginAttention.EIGHT_BITS, not recipe.precision.quantises
    if eight_bits and (half or choice.by is By.NOTHING):
        why = f"the build is {recipe.precision.value.upper()}" if half else choice.reason
        raise ResvitError(
            f"Attention in 8 bits is for our own kernels, and none is used: {why}.",
            "Say --plugins on with --precision int8 or fp8, or leave --plugin-attention out.",
            ExitCode.IMPOSSIBLE,
        )
    return choice


def _choice(recipe: Recipe, target: Target | None, *, here: bool) -> PluginChoice:
    if target is None or recipe.plugins is Plugins.OFF:
        return PluginChoice(By.NOTHING, "", "--plugins off" if target else "no target was named")
    if recipe.sizes is not None:
        return PluginChoice(By.NOTHING, "", "kernels of our own are compiled for one image size")
    if target.builder is not Builder.TENSORRT:
        why = "they are for GPUs" if target.on_cpu else "TensorRT for RTX takes no plugins"
        if recipe.plugins is Plugins.ON:
            raise ResvitError(
                f"Kernels of our own cannot be built into an engine for {target.title}: {why}.",
                "Leave --plugins out." if target.on_cpu else "Leave --plugins out, or say --builder tensorrt.",
                ExitCode.IMPOSSIBLE,
            )
        return PluginChoice(By.NOTHING, "", why)
    if recipe.plugins is Plugins.ON:
        return PluginChoice(By.WISH, target.plugins, "--plugins on")
    if here:
        return PluginChoice(By.TIME, target.plugins, f"timed on this {target.title}")
    if any(row.sm == target.sm for row in measured_results()):
        return PluginChoice(By.TABLE, target.plugins, f"by what was measured on SM {target.sm / 10:.1f}")
    return PluginChoice(By.NOTHING, "", f"no kernel of ours was ever measured on SM {target.sm / 10:.1f}")
