"""The commands ``fleet apply``, ``fleet status`` and ``fleet rollback``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from resvit_engines.console import Output, console, emit_json, output_options, table
from resvit_engines.errors import ExitCode
from resvit_export.cli.stages import examples_text

if TYPE_CHECKING:
    from resvit_export.fleet.commands import Seen
    from resvit_export.fleet.ssh_transport import SshTransport

_SHOWN = 40
_file = click.argument("file", type=click.Path(path_type=Path))


@click.group(
    name="fleet",
    epilog=examples_text("fleet apply --help", "fleet status --help", "fleet rollback --help"),
)
def fleet_command() -> None:
    """Bring a release to many devices, in waves that failures stop and take back.

    The fleet's file says which devices there are, what they are to run, and when one is well. Exit codes: 13 where a
    release was stopped, 14 where devices are missing.
    """


@fleet_command.command(
    name="apply",
    epilog="\b\nExamples:\n  resvit-export fleet apply fleet.toml\n"
    "  resvit-export fleet apply fleet.toml --again --json",
)
@_file
@click.option("--again", is_flag=True, help="Try a release once more that was stopped or rolled back.")
@click.option("--take-over", is_flag=True, help="Claim devices that another fleet has claimed.")
@output_options
def apply_command(file: Path, again: bool, take_over: bool, quiet: bool, as_json: bool) -> int:
    """Bring the release of FILE to its devices: one of each type, then a share, then all.

    An engine is built once for all devices with the same GPU and TensorRT. After each switch the device is checked;
    where more fail than may, the release is stopped and taken back from all. The same command goes on where it was
    interrupted, and asks devices again that could not be reached.
    """
    from resvit_engines.progress import reporter
    from resvit_export.fleet.commands import apply
    from resvit_export.fleet.plan import fleet_from_toml

    fleet = fleet_from_toml(file)
    outcome, seen = apply(fleet, _ssh(), reporter(quiet or as_json), again=again, take_over=take_over)
    _show(fleet.name, seen, Output(quiet, as_json), outcome.code)
    return int(outcome.code)


@fleet_command.command(
    name="status",
    epilog="\b\nExamples:\n  resvit-export fleet status fleet.toml\n"
    "  resvit-export fleet status fleet.toml --ask --json",
)
@_file
@click.option("--ask", is_flag=True, help="Ask every device what it runs now.")
@output_options
def status_command(file: Path, ask: bool, quiet: bool, as_json: bool) -> None:
    """Show how the devices of FILE stand, and write the page that lists them all."""
    from resvit_engines.progress import reporter
    from resvit_export.fleet.commands import status
    from resvit_export.fleet.plan import fleet_from_toml

    fleet = fleet_from_toml(file)
    seen = status(fleet, _ssh() if ask else None, reporter(quiet or as_json))
    _show(fleet.name, seen, Output(quiet, as_json), ExitCode.OK)


@fleet_command.command(
    name="rollback",
    epilog="\b\nExamples:\n  resvit-export fleet rollback fleet.toml\n  resvit-export fleet rollback fleet.toml --json",
)
@_file
@output_options
def rollback_command(file: Path, quiet: bool, as_json: bool) -> int:
    """Return every device of FILE that runs the release to what it ran before.

    A second time goes on with the devices that could not be reached, and never further back.
    """
    from resvit_engines.progress import reporter
    from resvit_export.fleet.commands import rollback
    from resvit_export.fleet.plan import fleet_from_toml

    fleet = fleet_from_toml(file)
    outcome, seen = rollback(fleet, _ssh(), reporter(quiet or as_json))
    _show(fleet.name, seen, Output(quiet, as_json), outcome.code)
    return int(outcome.code)


def _ssh() -> SshTransport:
    from resvit_engines.remote.wheelhouse import chosen_wheels
    from resvit_export.fleet.ssh_transport import SshTransport

    return SshTransport(chosen_wheels())


def _show(name: str, seen: Seen, output: Output, code: ExitCode) -> None:
    from resvit_export.fleet.page import TITLES
    from resvit_export.fleet.state import Status

    release = seen.release
    counts = Counter(device.status for device in seen.devices)
    if output.json:
        emit_json(
            {
                "fleet": name,
                "release": release.to_json() if release else None,
                "counts": {status.value: counts[status] for status in Status},
                "devices": [device.to_json() for device in seen.devices],
                "page": str(seen.page.resolve()),
                "exit_code": int(code),
            }
        )
        return
    told = ", ".join(f"{counts[status]:,} {TITLES[status]}" for status in TITLES if counts[status])
    if output.quiet:
        click.echo(told)
        return
    if release is not None:
        click.echo(f"{release.label}: {release.phase.value}, wave {release.wave}.")
        if release.reason:
            click.echo(release.reason)
    amiss = [device for device in seen.devices if device.status is not Status.RUNS]
    if amiss:
        rows = [(d.name, d.type, TITLES[d.status], f"{d.problem} {d.fix}".strip()) for d in amiss[:_SHOWN]]
        console().print(table("Devices that do not run it", ("device", "type", "state", "why"), rows, left=4))
        if len(amiss) > _SHOWN:
            click.echo(f"And {len(amiss) - _SHOWN:,} more.")
    click.echo(f"{len(seen.devices):,} devices: {told}.")
    click.echo(f"page: {seen.page}")
