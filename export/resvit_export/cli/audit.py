"""The command ``audit``: what fused, for a run's targets or for a layer file of trtexec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import Output, output_options
from resvit_engines.errors import ResvitError
from resvit_export.cli.grouped_help import GroupedHelp
from resvit_export.cli.options import recipe_options
from resvit_export.cli.stages import each, examples_text, open_runs

if TYPE_CHECKING:
    from resvit_export.run import Run


@click.command(
    name="audit",
    cls=GroupedHelp,
    epilog=examples_text(
        "audit --model resvit:embed-mini --checkpoint runs/demo/embed-mini.pt --data fashion-mnist --target rtx-4090 "
        "--run runs/by-stage",
        "audit --run runs/by-stage --target jetson-orin --json",
    ),
)
@output_options
@click.option(
    "--layers",
    type=click.Path(path_type=Path),
    help="Audit another engine: its layers, from trtexec --exportLayerInfo (with --profilingVerbosity=detailed).",
)
@click.option("--onnx", type=click.Path(path_type=Path), help="With --layers: the ONNX that the engine was built from.")
@click.option("--fp16-layers", type=click.Path(path_type=Path), help="With --layers: those of the FP16 engine.")
@recipe_options("compile")
def audit_command(
    quiet: bool, as_json: bool, layers: Path | None, onnx: Path | None, fp16_layers: Path | None, **flags: Any
) -> int:
    """Say what the compiler made of the graph: which Q/DQ and which attention fused, and what the rest would need.

    Where TensorRT builds the engine elsewhere, its kernels are predicted by TensorRT's rules, and the output says so.
    The FP16 engine of the same network is listed beside it. --require-fused makes it a gate: exit code 4 where
    something that should be one kernel, or run in 8 bits, is not. An engine that somebody else built needs no run
    folder: --layers FILE --onnx FILE.
    """
    output = Output(quiet, as_json)
    if layers is not None:
        return _audit_layers(layers, onnx, fp16_layers, bool(flags["require_fused"]), output)
    if onnx is not None or fp16_layers is not None:
        raise ResvitError("--onnx and --fp16-layers belong to --layers.", "Say --layers with the layer file as well.")

    def do(run: Run) -> tuple[dict[str, Any], int]:
        from resvit_export.cli.output import show_stage, summarize
        from resvit_export.pipeline import Pipeline
        from resvit_export.tune import settled

        run.require_target()
        pipeline = settled(Pipeline(run))
        artifact = pipeline.audited
        show_stage(artifact, output)
        if run.recipe.require_fused:
            artifact.result.require_fused()
        return summarize(artifact), 0

    with open_runs(flags, output, looks=True) as runs:
        return each(runs, output, do)


def _audit_layers(layers: Path, onnx: Path | None, fp16_layers: Path | None, gate: bool, output: Output) -> int:
    from resvit_engines.audit.record import record_of
    from resvit_engines.console import console, emit_json
    from resvit_export.cli.audit_tables import audit_tables
    from resvit_export.stages.audit import audit_of_layers

    if onnx is None:
        raise ResvitError(
            f"{layers} alone does not say what should have fused.", "Say --onnx with the file it was built from."
        )
    audit = record_of(audit_of_layers(layers, onnx, fp16_layers))
    if output.json:
        emit_json(audit.to_json())
    elif not output.quiet:
        for item in audit_tables(audit):
            console().print(item, soft_wrap=True)
    if gate:
        audit.require_fused()
    return 0
