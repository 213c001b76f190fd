"""The commands ``facts`` and ``build`` of the device."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.cli.installing import maker_option
from resvit_engines.console import Output, console, emit_json, mib, output_options, table
from resvit_engines.progress import reporter


@click.command(name="facts", epilog="\b\nExamples:\n  resvit-engine facts\n  resvit-engine facts --json")
@output_options
def facts_command(quiet: bool, as_json: bool) -> None:
    """Say what this machine is: GPU, TensorRT, JetPack, memory, disk, power mode, clocks."""
    from resvit_engines.machine import this_machine

    machine = this_machine().to_json()
    if as_json:
        emit_json(machine)
        return
    rows = [(name.replace("_mib", " (MiB)").replace("_", " "), "unknown" if value is None else str(value))
            for name, value in machine.items() if not quiet or value is not None]  # fmt: skip
    console().print(table("This device", ("what", "found"), rows, left=2))


@click.command(
    name="build",
    epilog="\b\nExamples:\n  resvit-engine build model-jetson-orin-int8.resvit\n"
    "  resvit-engine build model-jetson-orin-int8.resvit --rehearse --json",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--job", type=click.Path(path_type=Path), help="Folder of the work.  [default: NAME-engine by the bundle]"
)
@maker_option
@click.option("--rehearse", is_flag=True, help="Let TensorRT for RTX stand in for TensorRT, and say so everywhere.")
@output_options
def build_command(
    bundle: Path, job: Path | None, trust: Path | None, rehearse: bool, quiet: bool, as_json: bool
) -> None:
    """Build, check and time the engine of BUNDLE on this device.

    The bundle's signature is verified first, and nothing is unpacked before. The built engine must give the golden
    outputs; it goes into a new bundle, signed by this device's own key, that 'resvit-engine install' takes. A killed
    build continues where it stopped.
    """
    from resvit_engines.keys.public import load_trust
    from resvit_engines.remote.job import Job, run_job

    output = Output(quiet, as_json)
    folder = job or bundle.with_name(f"{bundle.stem}-engine")
    result = run_job(Job(bundle, folder, rehearse), load_trust(trust), reporter(output.quiet or output.json))
    if output.json:
        emit_json({"folder": str(folder.resolve()), **result.to_json()})
        return
    engine = result.engine
    click.echo(f"engine: {folder / 'built' / 'engine.plan'} ({mib(engine.bytes)}, {engine.seconds or 0.0:.1f} s)")
    click.echo(f"bundle: {folder / result.bundle.name}")
    click.echo("It is signed by this device's own key, which is trusted on this device from now on, and nowhere else.")
    if rehearse:
        click.echo("This was a rehearsal: TensorRT for RTX stood in for TensorRT.")
