"""The command that puts two engines side by side, by their layers."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.console import F, output_options


def layer_time_options(function: F) -> F:
    """Add what ``trtexec`` measured of each engine."""
    for name, text in (
        ("--times-b", "The same of B."),
        ("--times-a", "Times of A as a whole, from trtexec --exportTimes."),
        ("--profile-b", "The same of B."),
        ("--profile-a", "Times of A's layers, from trtexec --exportProfile."),
    ):
        function = click.option(name, type=click.Path(path_type=Path), metavar="FILE", help=text)(function)
    return function


@click.command(
    name="compare",
    epilog="\b\nExamples:\n  resvit-engine compare net-fp16.resvit net-int8.resvit\n"
    "  resvit-engine compare net-fp16-layers.json net-int8-layers.json --profile-a net-fp16-profile.json "
    "--profile-b net-int8-profile.json",
)
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@layer_time_options
@output_options
def compare_command(
    a: Path, b: Path, profile_a: Path | None, profile_b: Path | None, times_a: Path | None, times_b: Path | None,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put two engines of one network side by side, operator by operator.

    A and B are bundles with an engine, layer files (trtexec --exportLayerInfo with --profilingVerbosity=detailed) or
    profiles (--exportProfile) alone. Shows what each fused, where the time went, and what got slower in B.
    """
    from resvit_engines.audit.compare.comparison import compare_engines
    from resvit_engines.audit.compare.text import comparison_lines
    from resvit_engines.bench.listed import listed_engine
    from resvit_engines.console import console, emit_json

    found = compare_engines(listed_engine(a, profile_a, times_a), listed_engine(b, profile_b, times_b))
    if as_json:
        emit_json(found.to_json())
        return
    for line in comparison_lines(found, brief=quiet):
        console().print(line, markup=False, soft_wrap=True)
