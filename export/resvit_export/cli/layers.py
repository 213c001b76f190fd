"""The command ``layers``: where an engine leaves the path of its ONNX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import Output, console, emit_json, output_options, table
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.grouped_help import GroupedHelp
from resvit_export.cli.options import recipe_options
from resvit_export.cli.stages import examples_text, open_pipeline

if TYPE_CHECKING:
    from resvit_export.tools.layer_compare import LayerDifference

_SHOWN = 12
_COLUMNS = ("tensor", "operator", "error", "largest difference")


@click.command(
    name="layers",
    cls=GroupedHelp,
    epilog=examples_text(
        "layers --run runs/by-stage --against onnxruntime",
        "layers --run runs/by-stage --against onnxruntime --tolerance 0.01 --json",
    ),
)
@output_options
@click.option("--onnx", type=click.Path(path_type=Path), help="Compare this file, not that of a run.")
@click.option(
    "--input",
    "images",
    type=click.Path(path_type=Path),
    help="With --onnx: images [N, C, H, W] as .npy, prepared for the model; a bundle's golden_input.npy for example.",
)
@click.option(
    "--against",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    show_default=True,
    help="TensorRT, which needs its GPU; or ONNX Runtime's own optimised graph.",
)
@click.option("--only", multiple=True, metavar="TENSOR", help="Compare only these; what lies between them may fuse.")
@click.option("--tolerance", default=0.1, show_default=True, help="Norm of the difference over that of the values.")
@recipe_options("validate")
def layers_command(
    quiet: bool,
    as_json: bool,
    onnx: Path | None,
    images: Path | None,
    against: str,
    only: tuple[str, ...],
    tolerance: float,
    **flags: Any,
) -> int:
    """Compare the quantised ONNX layer by layer: in ONNX Runtime as it is written, and in TensorRT.

    For an engine whose outputs are not those that were validated: names the first layer that departs, and exits with
    11 where there is one. By Polygraphy, on a run's golden images, or on any --onnx and --input.
    """
    from resvit_export.stages.score import shipped_in
    from resvit_export.tools.layer_compare import compare_layers, first_departure, input_of, optimised_runner
    from resvit_export.tune import settled

    output = Output(quiet, as_json)
    if (onnx is None) != (images is None):
        raise ResvitError("--onnx and --input belong together.", "Say both, or --run with a run folder.")
    if onnx is None or images is None:
        with open_pipeline(flags, output) as pipeline:
            chosen = settled(pipeline)
            onnx, images = chosen.model.path, shipped_in(chosen.answered).path("golden_input.npy")
    runner = optimised_runner if against == "onnxruntime" else None
    found = compare_layers(onnx, input_of(onnx, images), runner, only)
    first = first_departure(found, tolerance)
    _show(found, first, output)
    if first is None:
        click.echo(f"No layer is further apart than {tolerance:.0%}.", err=as_json)
        return ExitCode.OK
    raise ResvitError(
        f"The first layer that departs is {first.node or first.tensor} ({first.op}): {first.error:.1%} apart.",
        f"Keep it in FP16 (--exclude '{first.node or first.op}') and build again, or report it with the ONNX.",
        ExitCode.MISMATCH,
    )


def _show(found: tuple[LayerDifference, ...], first: LayerDifference | None, output: Output) -> None:
    if output.json:
        plain = [dataclasses.asdict(item) for item in found]
        emit_json({"layers": plain, "first_departure": dataclasses.asdict(first) if first else None})
    elif not output.quiet:
        worst = sorted(found, key=lambda item: -item.error)[:_SHOWN]
        rows = [(item.tensor, item.op, f"{item.error:.2%}", f"{item.largest:.4g}") for item in worst]
        console().print(table(f"The {len(rows)} of {len(found)} tensors that differ most", _COLUMNS, rows, left=2))
