"""The commands that run what a bundle holds: run and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from resvit_engines.cli.installing import root_option, trust_option
from resvit_engines.console import F, Output, output_options


def runtime_option(function: F) -> F:
    """Add ``--runtime``."""
    return click.option(
        "--runtime",
        type=click.Choice(["auto", "tensorrt", "rtx", "onnxruntime"]),
        default="auto",
        show_default=True,
        help="What computes; auto: the engine where it can run, else ONNX Runtime on the CPU.",
    )(function)


def size_option(function: F) -> F:
    """Add ``--size``."""
    return click.option(
        "--size",
        metavar="HxW",
        help="Size of the images, of a bundle that takes several.  [default: the usual one]",
    )(function)


def bench_options(function: F) -> F:
    """Add what is measured, and for how long."""
    for option in reversed(
        (
            click.option("--batch", type=int, help="Images per call.  [default: 1, or the smallest that is taken]"),
            click.option("--seconds", type=float, default=5.0, show_default=True, help="To measure."),
            click.option("--warmup", type=float, default=1.0, show_default=True, help="Seconds before that."),
            click.option("--iterations", type=int, help="Calls to measure, in place of --seconds."),
            click.option("--streams", type=int, default=1, show_default=True, help="Calls under way at once."),
            click.option("--cuda-graph/--no-cuda-graph", default=True, help="Launch by CUDA graph.  [default: on]"),
        )
    ):
        function = option(function)
    return function


@click.command(
    name="run",
    epilog="\b\nExamples:\n  resvit-engine run net.resvit --input images.npy --output logits.npy\n"
    "  resvit-engine run net-jetson-orin-int8 --input photos --output logits.npy --json",
)
@click.argument("what", metavar="BUNDLE_OR_NAME")
@click.option(
    "--input",
    "sources",
    multiple=True,
    required=True,
    metavar="[NAME=]PATH",
    help="A picture, a folder of them, or prepared images [N, C, H, W] as .npy; of a model that reads more, NAME=FILE "
    "for each of the others.",
)
@click.option("--output", "target", type=click.Path(path_type=Path), required=True, help="Where the outputs go, .npy.")
@click.option("--output-name", help="Which output, where the model has several.  [default: logits, or the first]")
@size_option
@runtime_option
@trust_option
@root_option
@output_options
def run_command(
    what: str, sources: tuple[str, ...], target: Path, output_name: str | None, size: str | None, runtime: str,
    trust: Path | None, root: Path | None, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run images through a bundle, or through what is installed under a name, after checking its signature.

    Pictures (with Pillow installed) are prepared as manifest.json says under 'preprocess', in the order of their names;
    images in an .npy are prepared so already. Any number of them: they run in batches.
    """
    from resvit_engines.bench.commands import arrays_from, image_source, outputs_into
    from resvit_engines.console import emit_json
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust
    from resvit_engines.pictures.sizes import size_from_text
    from resvit_engines.run.opened import opened
    from resvit_engines.run.prepared import listed, preprocess_at

    wanted = None if size is None else size_from_text(size)
    pictures = listed(image_source(sources))
    with opened(what, root or default_root(), load_trust(trust), runtime) as (runner, _, manifest):
        images, beside = arrays_from(sources, preprocess_at(manifest, wanted), pictures)
        done = outputs_into(target, runner, images, manifest, output_name, beside, pictures)
    if as_json:
        emit_json(done.to_json())
    elif quiet:
        click.echo(str(target))
    else:
        if done.why:
            click.echo(f"Not by the engine: {done.why}.")
        if done.left_out:
            click.echo(f"Left out, since their names are not those of pictures: {', '.join(done.left_out)}.")
        click.echo(f"{done.images} images by {done.label}: {done.output} {list(done.shape)} in {target}")


@click.command(
    name="bench",
    epilog="\b\nExamples:\n  resvit-engine bench net.resvit\n"
    "  resvit-engine bench net-int8.resvit --against net-fp16.resvit --batch 8 --streams 2 --json",
)
@click.argument("what", metavar="BUNDLE_OR_NAME")
@click.option("--against", metavar="BUNDLE_OR_NAME", multiple=True, help="Time these beside it; the first is the base.")
@bench_options
@size_option
@runtime_option
@trust_option
@root_option
@output_options
def bench_command(
    what: str, against: tuple[str, ...], size: str | None, runtime: str, trust: Path | None, root: Path | None,
    quiet: bool, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Time a bundle: latency, throughput, memory, with power mode and clocks on record.

    With --against, both are timed in turn in one run, and the verdict says whether this one is faster.
    """
    import contextlib

    from resvit_engines.bench.bench import measure
    from resvit_engines.bench.commands import golden_feeds, settings_from
    from resvit_engines.bench.compare import compare
    from resvit_engines.bench.text import comparison_lines, report_lines
    from resvit_engines.console import console, emit_json
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust
    from resvit_engines.pictures.sizes import size_from_text
    from resvit_engines.progress import reporter
    from resvit_engines.run.opened import opened

    wanted = None if size is None else size_from_text(size)
    trusted, place = load_trust(trust), root or default_root()
    with contextlib.ExitStack() as owned:
        found = [owned.enter_context(opened(name, place, trusted, runtime)) for name in (*against, what)]
        settings = settings_from(flags, found[-1][0])
        feeds = golden_feeds(found[-1][1], found[-1][2], found[-1][0], wanted)
        if not against:
            report = measure(found[0][0], settings, feeds)
            document, lines = report.to_json(), report_lines(report)
        else:
            runners = {name: item[0] for name, item in zip((*against, what), found, strict=True)}
            comparison = compare(runners, settings, feeds, reporter=reporter(quiet or as_json))
            document, lines = comparison.to_json(), comparison_lines(comparison, brief=quiet)
    output = Output(quiet, as_json)
    if output.json:
        emit_json(document)
        return
    for line in lines:
        console().print(line)
