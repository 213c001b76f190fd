"""The command ``bench``: is the quantised network faster than FP16?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resvit_engines.cli.installing import trust_option
from resvit_engines.cli.running import bench_options, runtime_option
from resvit_engines.console import output_options
from resvit_export.cli.stages import examples_text


@click.command(
    name="bench",
    epilog=examples_text(
        "bench --run runs/by-stage --seconds 1", "bench --run runs/l4-fp8 --run runs/l4-fp16 --seconds 1 --json"
    ),
)
@click.option(
    "--run",
    "sources",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    required=True,
    help="A run folder, a bundle or an ONNX file; repeat it to time several side by side.",
)
@click.option("--target", help="Which of a run's targets.  [default: the first]")
@bench_options
@runtime_option
@trust_option
@output_options
def bench_command(
    sources: tuple[Path, ...], target: str | None, runtime: str, trust: Path | None, quiet: bool, as_json: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Time the FP16 and the quantised form of a run side by side, and say whether quantising was worth it.

    Where the run was pruned, the unpruned network in FP16 is timed too, and the others are compared with it. Engines
    run where this machine has the GPU. Elsewhere ONNX Runtime on the CPU takes their place, which says nothing of the
    device, and the output says so.
    """
    from resvit_engines.bench.bench import BenchReport
    from resvit_engines.bench.text import comparison_lines, report_lines
    from resvit_engines.console import console, emit_json
    from resvit_engines.keys.public import load_trust
    from resvit_engines.progress import reporter
    from resvit_export.tools.bench import bench

    found = bench(sources, target, runtime, load_trust(trust), flags, reporter(quiet or as_json))
    if as_json:
        emit_json(found.to_json())
        return
    for line in report_lines(found) if isinstance(found, BenchReport) else comparison_lines(found, brief=quiet):
        console().print(line)
