"""The command ``serve-config``: what Triton, DeepStream and ROS 2 read of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.cli.installing import trust_option
from resvit_engines.console import emit_json, output_options
from resvit_engines.errors import ResvitError

_PROGRAMS = ("triton", "deepstream", "ros2")
_INSTANCES = 2


@click.command(
    name="serve-config",
    epilog="\b\nExamples:\n"
    "  resvit-export serve-config triton runs/release.resvit --out runs/models --trust runs/robots.pub\n"
    "  resvit-export serve-config deepstream runs/release.resvit --out runs/pipeline --trust runs/robots.pub\n"
    "  resvit-export serve-config ros2 runs/release.resvit --out runs/robot --trust runs/robots.pub --json",
)
@click.argument("program", type=click.Choice(_PROGRAMS))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write; it must be new.")
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    help=f"Of Triton: how many run at once on each GPU.  [default: {_INSTANCES}]",
)
@trust_option
@output_options
def serve_config_command(
    program: str, bundle: Path, out: Path, instances: int | None, trust: Path | None, quiet: bool, as_json: bool
) -> None:
    """Write what another program reads to serve a bundle, after checking its signature and every file.

    triton: a model repository, the engine behind the manifest's preprocessing. deepstream: config_infer files and the
    parser of the outputs, where DeepStream can prepare frames as the manifest says. ros2: a package with a node that
    publishes vision_msgs.
    """
    from resvit_engines.files import explain_os_errors
    from resvit_engines.keys.public import load_trust
    from resvit_export.serve.deepstream import write_pipeline
    from resvit_export.serve.ros2 import write_package
    from resvit_export.serve.subject import new_folder, opened_subject
    from resvit_export.serve.triton import write_repository

    if instances is not None and program != "triton":
        raise ResvitError(f"--instances is of Triton, and {program} was asked for.", "Leave it out.")
    with opened_subject(bundle, load_trust(trust)) as subject, explain_os_errors(out), new_folder(out) as folder:
        if program == "triton":
            notes = write_repository(subject, folder, instances or _INSTANCES)
        elif program == "deepstream":
            notes = write_pipeline(subject, folder)
        else:
            notes = write_package(subject, folder)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    if as_json:
        emit_json({"folder": str(out.resolve()), "files": files, "notes": notes})
        return
    click.echo(str(out))
    if not quiet:
        for line in notes:
            click.echo(line)
