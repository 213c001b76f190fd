"""The command ``compare``: two engines side by side, by their layers."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.cli.comparing import layer_time_options
from resvit_engines.console import output_options
from resvit_export.cli.stages import examples_text


@click.command(
    name="compare",
    epilog=examples_text(
        "compare runs/l4-fp8:fp16 runs/l4-fp8 --html runs/compared.html", "compare runs/l4-fp8:fp16 runs/l4-fp8 --json"
    ),
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@layer_time_options
@click.option("--target", help="Which of a run's targets.  [default: the first]")
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="FILE", help="Write all of it as a page.")
@output_options
def compare_command(
    a: str, b: str, profile_a: Path | None, profile_b: Path | None, times_a: Path | None, times_b: Path | None,
    target: str | None, page: Path | None, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put two engines of one network side by side, operator by operator: two precisions, versions or devices.

    A and B are run folders (RUN:fp16 is the FP16 network that a run listed beside its own), bundles with an engine,
    layer files (trtexec --exportLayerInfo with --profilingVerbosity=detailed) or profiles (--exportProfile). Shows what
    each fused, where the time went, what got slower in B, reformats and casts, and operators in one alone. Times by
    layer come from --profile-a and --profile-b.
    """
    from resvit_engines.audit.compare.comparison import compare_engines
    from resvit_engines.audit.compare.text import comparison_lines
    from resvit_engines.console import console, emit_json
    from resvit_export.report.sections.compare import write_comparison_page
    from resvit_export.tools.engine_compare import engine_of

    found = compare_engines(engine_of(a, target, profile_a, times_a), engine_of(b, target, profile_b, times_b))
    if page is not None:
        write_comparison_page(page, found)
    if as_json:
        emit_json(found.to_json() | ({"page": str(page.resolve())} if page else {}))
        return
    for line in comparison_lines(found, brief=quiet):
        console().print(line, markup=False, soft_wrap=True)
    if page is not None:
        console().print(f"page: {page}", markup=False, soft_wrap=True)
