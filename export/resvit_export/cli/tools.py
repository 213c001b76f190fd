"""The commands that need no run folder: targets, inspect, doctor."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from resvit_engines.console import Output, output_options
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.targets.choice import tensorrts_of
from resvit_engines.targets.table import TARGETS, Builder

_BUILT = {Builder.RTX: "here", Builder.TENSORRT: "where that GPU is", Builder.ONNXRUNTIME: "here or there"}
_RUNS = {Builder.RTX: "RTX ", Builder.TENSORRT: "", Builder.ONNXRUNTIME: "ONNX Runtime "}


@click.command(name="targets", epilog="\b\nExamples:\n  resvit-export targets\n  resvit-export targets --json")
@output_options
def targets_command(quiet: bool, as_json: bool) -> None:
    """List the devices that can be built for, and what each can do."""
    from resvit_engines.console import console, emit_json, table

    if as_json:
        emit_json({"targets": [{**target.to_json(), "tensorrts": tensorrts_of(target)} for target in TARGETS]})
        return
    if quiet:
        click.echo("\n".join(target.name for target in TARGETS))
        return
    rows = [
        (
            target.name,
            target.title,
            target.jetpack or "",
            str(target.sm or ""),
            f"{_RUNS[target.builder]}{target.tensorrt}",
            " ".join(sorted(precision.value for precision in target.precisions)),
            str(target.opset),
            _BUILT[target.builder],
        )
        for target in TARGETS
    ]
    columns = ("target", "device", "JetPack", "SM", "TensorRT", "precisions", "opset", "engine is built")
    console().print(table("Targets", columns, rows, left=8))


@click.command(
    name="inspect",
    epilog="\b\nExamples:\n  resvit-export inspect runs/demo/embed-mini.pt\n"
    "  resvit-export inspect runs/demo/embed-mini.pt --json\n"
    "  resvit-export inspect model.onnx --dla",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trust",
    type=click.Path(path_type=Path),
    help="Public key, or folder of them, to verify a bundle's signature by.  [default: those trusted on this machine]",
)
@click.option(
    "--dla", is_flag=True, help="Of an ONNX: which layers the DLA of a Jetson AGX Orin would run, by NVIDIA's table."
)
@output_options
def inspect_command(file: Path, trust: Path | None, dla: bool, quiet: bool, as_json: bool) -> None:
    """Say what a checkpoint, program, ONNX, engine or bundle is: sizes, precisions, layers, and who signed it.

    As signer only a key is named whose signature was verified. --dla looks layers up in a table; 'build' puts none
    there.
    """
    from resvit_engines.console import console, emit_json

    if dla:
        _show_dla(file, Output(quiet, as_json))
        return
    from resvit_export.tools.inspect import describe_file, render

    description = describe_file(file, trust)
    if as_json:
        emit_json(description)
    else:
        for item in render(description, brief=quiet):
            console().print(item)


def _show_dla(file: Path, output: Output) -> None:
    from resvit_engines.console import console, emit_json, table
    from resvit_export.to_tensorrt.dla import DEVICE, dla_fit_of

    fit = dla_fit_of(file)
    if output.json:
        emit_json(fit.to_json())
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for layer in fit.layers:
        groups.setdefault((layer.op, layer.why_not), []).append(layer.macs)
    total = sum(layer.macs for layer in fit.layers) or 1
    rows = [(op, str(len(macs)), f"{sum(macs) / total:.1%}", "DLA" if not why else f"GPU: {why}")
            for (op, why), macs in sorted(groups.items(), key=lambda item: -sum(item[1]))]  # fmt: skip
    pieces = f"{fit.loadables} piece{'s' if fit.loadables != 1 else ''}"
    if not output.quiet:
        console().print(table(DEVICE, ("operator", "layers", "products", "runs on"), rows, left=1))
    click.echo(f"{fit.share:.1%} of the products would run on the DLA, in {pieces}. {fit.sentence}")
    click.echo("'build' puts nothing there: no engine was ever held to this table.")


@click.command(
    name="doctor",
    epilog="\b\nExamples:\n  resvit-export doctor\n  resvit-export doctor --target jetson-orin --tensorrt 10.7\n"
    "  resvit-export doctor --json",
)
@click.option("--target", help="Also say what the TensorRT of this target is known to compute wrongly.")
@click.option("--tensorrt", help="With --target: the release on the device, such as 10.7.")
@click.option(
    "--onnx",
    type=click.Path(path_type=Path),
    help="With --target: look for it in this graph, such as model.onnx of a run's export.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="With --onnx: the largest batch.")
@output_options
def doctor_command(
    target: str | None, tensorrt: str | None, onnx: Path | None, batch: int, quiet: bool, as_json: bool
) -> int:
    """Check what is installed, what is missing, and say what to do about it.

    With --target, also what that target's TensorRT is known to answer wrongly (docs/faults.md): all of it, or with
    --onnx what a graph contains.
    """
    from resvit_engines.console import console, emit_json, table
    from resvit_export.tools.doctor import examine
    from resvit_export.tools.known_faults import fault_checks

    output = Output(quiet, as_json)
    if target is None and (tensorrt is not None or onnx is not None):
        raise ResvitError("--tensorrt and --onnx belong to --target.", "Say --target as well, such as jetson-orin.")
    faults = fault_checks(target, tensorrt, onnx, batch) if target is not None else []
    checks = [*examine(), *faults]
    failed = [check for check in checks if check.state == "fail"]
    if output.json:
        emit_json({"ok": not failed, "checks": [check.to_json() for check in checks]})
    else:
        shown = [check for check in checks if check.state != "ok"] if output.quiet else checks
        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        rows = [(Text(check.state, styles[check.state]), check.name, check.found, check.fix) for check in shown]
        if rows:
            console().print(table("Doctor", ("", "what", "found", "what to do"), rows, left=4))
    return ExitCode.MISSING if failed else ExitCode.OK
