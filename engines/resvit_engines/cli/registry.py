"""The command ``pull``: what fits this device, out of a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from resvit_engines.cli.installing import (
    golden_of,
    golden_runtime_option,
    leniency_options,
    root_option,
    show_installed,
    trust_option,
)
from resvit_engines.console import F, Output, emit_json, mib, output_options
from resvit_engines.errors import ResvitError

if TYPE_CHECKING:
    from resvit_engines.registry.pull import Pulled


def registry_options(function: F) -> F:
    """Add ``--ca`` and ``--plain-http``."""
    function = click.option(
        "--plain-http", is_flag=True, help="Speak http without TLS, in a network that is yours alone."
    )(function)
    return click.option(
        "--ca",
        type=click.Path(path_type=Path),
        help="Certificate of the registry's CA, PEM; no other is trusted then.  [default: those of the system]",
    )(function)


@click.command(
    name="pull",
    epilog="\b\nExamples:\n  resvit-engine pull oci://registry.example/vision/net:stable --install\n"
    "  resvit-engine pull oci://registry.example/vision/net:stable --precision int8 --out net.resvit --json",
)
@click.argument("reference")
@click.option("--install", is_flag=True, help="Install it, as 'resvit-engine install' does, and switch to it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File or folder for the bundle.  [default: NAME.resvit here; with --install it is not kept]",
)
@click.option("--target", metavar="NAME", help="Take the bundle for this target, where several fit.")
@click.option(
    "--precision", type=click.Choice(["int8", "fp8", "fp16", "fp32"]), help="Take this one, where several fit."
)
@trust_option
@root_option
@click.option("--expect", metavar="NAME", help="Take no bundle of any other model.")
@leniency_options
@golden_runtime_option
@registry_options
@output_options
def pull_command(
    reference: str, install: bool, out: Path | None, target: str | None, precision: str | None, trust: Path | None,
    root: Path | None, expect: str | None, allow_downgrade: bool, rehearse: bool, runtime: str, ca: Path | None,
    plain_http: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fetch from a registry the signed bundle that fits this device, and install it with --install.

    REFERENCE is oci://HOST[:PORT]/NAME:TAG; with @sha256:DIGEST behind it, a tag that was moved changes nothing.
    Manifest and signature come first: nothing else is fetched before the signature holds and the bundle fits. A lost
    connection is waited for, and the same command goes on where it stopped. A version that runs already is not fetched
    again. Credentials are those of 'docker login'.
    """
    from resvit_engines.install.install import nearest_folder
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust
    from resvit_engines.machine import this_machine
    from resvit_engines.progress import reporter
    from resvit_engines.registry.choice import Wishes
    from resvit_engines.registry.client import Client
    from resvit_engines.registry.pull import Place, pull
    from resvit_engines.registry.reference import reference_from_text

    if not install and (root is not None or allow_downgrade):
        raise ResvitError("--root and --allow-downgrade say how to install.", "Say --install too.")
    output, say = Output(quiet, as_json), reporter(quiet or as_json)
    where = root or default_root()
    named, trusted = reference_from_text(reference), load_trust(trust)
    machine = this_machine(disk=nearest_folder(where if install else (out or Path()).absolute()))
    place = Place(where, golden_of(runtime), allow_downgrade) if install else None
    with Client(named, ca=ca, plain=plain_http, reporter=say) as client:
        done = pull(
            client,
            trusted,
            machine,
            Wishes(target, precision, expect, rehearse),
            out=out,
            place=place,
            reporter=say,
        )
    if output.json:
        emit_json(done.to_json())
    else:
        _show(done, output)


def _show(done: Pulled, output: Output) -> None:
    if done.installed is not None:
        show_installed(done.installed, "runs now", f"resvit-engine rollback {done.installed.name}", output)
    elif done.already:
        click.echo(f"{done.chosen.manifest.name} {done.chosen.digest[:12]} runs already.")
    else:
        click.echo(str(done.path))
    if not output.quiet:
        kept = f", {mib(done.kept)} were there" if done.kept else ""
        click.echo(
            f"{done.chosen.offer.describe}, signed by {done.chosen.key.name}; {mib(done.fetched)} fetched{kept}."
        )
        click.echo(f"This content for ever: {done.pinned}")
