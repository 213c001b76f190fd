"""Help of commands with very many options: what most people use in groups, and all of them where asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from resvit_export.recipe.recipe import SETTINGS

_USUAL = {
    "Network": ("model", "checkpoint", "preprocess"),
    "Images": ("data",),
    "Target": ("targets", "device"),
    "What is wanted": ("precision", "max_drop", "prune_macs"),
    "Run": ("run_folder",),
}
_TITLES = {
    "model": "Network",
    "preprocess": "Images",
    "data": "Images",
    "task": "Task",
    "target": "Target and engine",
    "prune": "Pruning",
    "quantize": "Quantising",
    "search": "Search and measured times",
    "validate": "Verdict",
    "recover": "Recovery",
    "bundle": "Bundle",
}
"""By the table of the recipe file that a setting is in."""
_OWN = {
    **dict.fromkeys(
        ("run_folder", "recipe_file", "quiet", "as_json", "verbose", "help", "all_options"), "Run and output"
    ),
    **dict.fromkeys(("device", "rehearse"), "Device"),
}

_ALONE = "This command"
"""Options that no other command has."""


class GroupedHelp(click.Command):
    """A command whose ``--help`` lists the usual options, in groups, and ``--help-all`` every one."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its options and ``--help-all``; click's own ``--help`` is the last."""
        params = super().get_params(ctx)
        return [*params[:-1], _everything(), params[-1]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups."""
        params = self.get_params(ctx)
        rows = {str(item.name): row for item in params if (row := item.get_help_record(ctx))}
        rows["help"] = rows.pop(str(params[-1].name))  # click's versions name it differently
        for title, names in (_all(rows) if ctx.meta.get(__name__) else _usual(rows)).items():
            with formatter.section(title):
                formatter.write_dl([rows[name] for name in names], col_max=26)


def _usual(rows: Mapping[str, Any]) -> dict[str, list[str]]:
    groups = {_ALONE: _alone(rows)}
    groups |= {title: [name for name in names if name in rows] for title, names in _USUAL.items()}
    left = len(rows) - sum(map(len, groups.values())) - 2
    groups[f"Help ({left} more)"] = ["all_options", "help"]
    return {title: names for title, names in groups.items() if names}


def _all(rows: Mapping[str, Any]) -> dict[str, list[str]]:
    titles = dict.fromkeys((_ALONE, *_TITLES.values(), *_OWN.values()))
    groups: dict[str, list[str]] = {title: [] for title in titles}
    groups[_ALONE] = _alone(rows)
    for name in rows:
        if name in _OWN or name in SETTINGS:
            groups[_OWN.get(name) or _TITLES[SETTINGS[name].table]].append(name)
    return {title: names for title, names in groups.items() if names}


def _alone(rows: Mapping[str, Any]) -> list[str]:
    return [name for name in rows if name not in _OWN and name not in SETTINGS]


def _everything() -> click.Option:
    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        del parameter
        if value and not ctx.resilient_parsing:
            ctx.meta[__name__] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return click.Option(
        ["--help-all", "all_options"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show every option.",
    )
