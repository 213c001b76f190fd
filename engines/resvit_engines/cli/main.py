"""The command ``resvit-engine``: what is done on the device. Commands parse, call the library and print."""

from __future__ import annotations

import click

from resvit_engines.console import LazyCommands, run_command, run_process
from resvit_engines.version import own_version

_COMMANDS = {
    "facts": "resvit_engines.cli.building",
    "build": "resvit_engines.cli.building",
    "time": "resvit_engines.cli.timing",
    "plugin": "resvit_engines.cli.plugins",
    "verify": "resvit_engines.cli.installing",
    "pull": "resvit_engines.cli.registry",
    "install": "resvit_engines.cli.installing",
    "rollback": "resvit_engines.cli.installing",
    "status": "resvit_engines.cli.installing",
    "keys": "resvit_engines.cli.keys",
    "health": "resvit_engines.cli.fleet",
    "claim": "resvit_engines.cli.fleet",
    "run": "resvit_engines.cli.running",
    "bench": "resvit_engines.cli.running",
    "compare": "resvit_engines.cli.comparing",
}


class _Commands(LazyCommands):
    modules = _COMMANDS


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Exit codes: 0 done, 2 misspelt command, 3 unusable bundle or input, 6 impossible on this device, 7 something
missing, 8 engine build failed, 9 disk, memory or permissions, 10 signature or trust, 11 the outputs are not
those that were validated, 130 interrupted, 1 a bug of ours.""",
)
@click.version_option(own_version())
def cli() -> None:
    """Build, verify, install, run and roll back engines on the device that they are for."""


def main() -> None:
    """Entry point of the console script."""
    run_process(run)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    return run_command(
        cli, "resvit-engine", arguments, missing="pip install it beside resvit_engines, or 'resvit-engine facts'."
    )
