"""The command ``wheel``: what a device installs, for one that is not on the network."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.console import emit_json, output_options
from resvit_engines.errors import ResvitError
from resvit_export.cli.stages import examples_text


@click.command(name="wheel", epilog=examples_text("wheel runs/wheels", "wheel runs/wheels --json"))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--target",
    metavar="NAME",
    help="Also download all that it needs on that Jetson, for 'pip install --no-index --find-links FOLDER' there.",
)
@click.option("--jetpack", help="JetPack on the Jetson, where it is not the usual one.")
@output_options
def wheel_command(folder: Path, target: str | None, jetpack: str | None, quiet: bool, as_json: bool) -> None:
    """Write the slim wheel of resvit_engines, which brings 'resvit-engine' to a device; never torch or onnx.

    Only for a device that is installed by hand: 'build --device' does this by itself.
    """
    from resvit_engines.files import explain_os_errors
    from resvit_engines.remote.wheel import write_device_wheel
    from resvit_engines.remote.wheelhouse import download_wheels
    from resvit_engines.targets.own import jetson_machine
    from resvit_engines.targets.table import find_target

    if target is None and jetpack is not None:
        raise ResvitError("--jetpack says what is on a Jetson.", "Say --target too.")
    facts = jetson_machine(find_target(target, jetpack)) if target else None
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wheel = write_device_wheel(folder)
    if facts is not None:
        download_wheels(facts, folder)
    if as_json:
        emit_json({"wheel": str(wheel.resolve()), "wheels": sorted(path.name for path in folder.glob("*.whl"))})
        return
    click.echo(str(wheel))
    if not quiet:
        where = f"--no-index --find-links {folder.name} " if facts else ""
        click.echo(
            "Copy the folder to the device, and there: python3 -m venv --system-site-packages venv && "
            f"venv/bin/pip install {where}{folder.name}/{wheel.name}"
        )
