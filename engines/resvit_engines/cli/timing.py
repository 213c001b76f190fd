"""The command ``time`` of the device: variants of a network, built here and timed in turns."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.cli.installing import maker_option
from resvit_engines.console import Output, console, emit_json, output_options, table
from resvit_engines.progress import reporter


@click.command(
    name="time",
    epilog="\b\nExamples:\n  resvit-engine time net-fp16.resvit net-int8.resvit --trust release.pub\n"
    "  resvit-engine time net-fp16.resvit net-int8.resvit net-other.resvit --rounds 40 --seconds 5 --json",
)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--job", type=click.Path(path_type=Path), help="Folder of the work.  [default: NAME-times by the first]")
@maker_option
@click.option("--rounds", type=click.IntRange(6, 1000), default=20, show_default=True, help="How often all are timed.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 3600),
    default=2.0,
    show_default=True,
    help="How long each is timed in all rounds together.",
)
@click.option("--rehearse", is_flag=True, help="Let TensorRT for RTX stand in for TensorRT, and say so everywhere.")
@output_options
def time_command(
    bundles: tuple[Path, ...], job: Path | None, trust: Path | None, rounds: int, seconds: float, rehearse: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build an engine of each of BUNDLES on this device, and time them in turns, round by round.

    All are for this device and of one network, the first the baseline. Signatures are verified before anything is
    unpacked. How many times as fast each is stands with an interval of 95%; what else used the machine meanwhile, and
    clocks that moved, are said. A killed run keeps the engines that were finished. 'resvit-export build' asks for
    this when it tunes.
    """
    from resvit_engines.keys.public import load_trust
    from resvit_engines.remote.timing import TimingJob, run_timing

    output = Output(quiet, as_json)
    folder = job or bundles[0].with_name(f"{bundles[0].stem}-times")
    work = TimingJob(bundles, folder, rounds, seconds, rehearse)
    result = run_timing(work, load_trust(trust), reporter(output.quiet or output.json))
    times, (baseline, *_) = result.times, result.times.names
    ratios = {name: times.ratio(baseline, name) for name in times.names[1:]}
    if output.json:
        told = {name: {"ms": times.median_ms(name), "faster": ratio.to_json()} for name, ratio in ratios.items()}
        emit_json({"folder": str(folder.resolve()), **result.to_json(), "variants": told})
        return
    rows = [(name, f"{times.median_ms(name):.3f}", ratios[name].sentence if name in ratios else "baseline")
            for name in times.names]  # fmt: skip
    console().print(table("Timed in turns", ("variant", "ms", "as fast as the baseline"), rows, left=1))
    for remark in times.remarks:
        click.echo(remark)
    if rehearse:
        click.echo("This was a rehearsal: these times say nothing of the device.")
