"""What a fleet asks of a device, and can be asked by hand: health, claim."""

from __future__ import annotations

from pathlib import Path

import click

from resvit_engines.cli.installing import golden_runtime_option, root_option, trust_option
from resvit_engines.console import emit_json, output_options
from resvit_engines.errors import ResvitError


@click.command(
    name="health",
    epilog="\b\nExamples:\n  resvit-engine health net-jetson-orin-int8\n"
    "  resvit-engine health net-jetson-orin-int8 --seconds 5 --json",
)
@click.argument("name")
@click.option("--no-golden", is_flag=True, help="Leave the golden images out.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 600),
    default=1.0,
    show_default=True,
    help="How long is timed; 0 leaves it out.",
)
@trust_option
@root_option
@golden_runtime_option
@output_options
def health_command(
    name: str, no_golden: bool, seconds: float, trust: Path | None, root: Path | None, runtime: str, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Check what is installed under NAME: signature, every file, golden outputs, and its latency."""
    from resvit_engines.bench.health import health_of
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust

    where, trusted = root or default_root(), load_trust(trust)
    found = health_of(where, name, trusted, runtime, golden=not no_golden, seconds=seconds)
    if as_json:
        emit_json(found.to_json())
    elif not quiet:
        click.echo(f"{name} {found.digest[:12]}, release {found.release}: whole, and signed by a key that is trusted.")
        if found.golden:
            click.echo(found.golden.sentence)
        if found.latency_ms is not None:
            click.echo(f"{found.latency_ms:.3f} ms, the median")


@click.command(
    name="claim",
    epilog="\b\nExamples:\n  resvit-engine claim\n  resvit-engine claim --release --json",
)
@click.option("--fleet", metavar="NAME", help="Claim this device for a fleet; 'resvit-export fleet apply' does so.")
@click.option("--holder", metavar="ID", help="The 32 hexadecimal digits of that fleet's state.")
@click.option("--device", metavar="NAME", help="What that fleet calls this device.")
@click.option("--take-over", is_flag=True, help="Take it from the fleet that has it.")
@click.option("--release", is_flag=True, help="Take the claim away, whoever has it.")
@root_option
@output_options
def claim_command(
    fleet: str | None, holder: str | None, device: str | None, take_over: bool, release: bool, root: Path | None,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say which fleet installs on this device; one does at a time."""
    from resvit_engines.install import claim as claims
    from resvit_engines.install.state import default_root

    where = root or default_root()
    if release:
        if fleet or holder or device or take_over:
            raise ResvitError("--release takes a claim away, and the other options make one.", "Say one of both.")
        was = claims.release(where)
        found = None
    elif fleet or holder or device or take_over:
        if not (fleet and holder and device):
            raise ResvitError("A claim has three parts.", "Say --fleet, --holder and --device.")
        was, found = None, claims.claim(where, fleet, holder, device, take_over=take_over)
    else:
        was, found = None, claims.claimed(where)
    if as_json:
        emit_json({"claim": found.to_json() if found else None, "was": was.to_json() if was else None})
    elif not quiet:
        told = (
            f"The fleet {found.fleet} has this device since {found.since}, and calls it {found.device}."
            if found
            else ""
        )
        click.echo(told or (f"The fleet {was.fleet} has it no longer." if was else "No fleet has claimed this device."))
