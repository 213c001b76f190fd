"""The command ``push``: bundles into a registry."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from resvit_engines.cli.registry import registry_options
from resvit_engines.console import Output, console, emit_json, mib, output_options, table
from resvit_export.cli.stages import examples_text

if TYPE_CHECKING:
    from resvit_engines.registry.offer import Offer
    from resvit_engines.registry.reference import Reference


@click.command(
    name="push",
    epilog=examples_text(
        "push runs/release.resvit oci://registry.example/vision/net:1.0 --dry-run",
        "push runs/release.resvit oci://registry.example/vision/net:1.0 --dry-run --json",
    ),
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("reference")
@click.option("--dry-run", is_flag=True, help="Check the bundles and say what would be pushed, without a registry.")
@registry_options
@output_options
def push_command(
    runs: tuple[Path, ...], reference: str, dry_run: bool, ca: Path | None, plain_http: bool, quiet: bool, as_json: bool
) -> None:
    """Push signed bundles under one tag, from which each device pulls the one that fits it.

    RUNS are run folders, of which the bundles of all targets go, or .resvit files; REFERENCE is oci://HOST[:PORT]/NAME:TAG.
    What the registry has is not sent again, and the tag changes last, in one step. Credentials are those of
    'docker login'. The same bundles give the same digest.
    """
    from resvit_engines.progress import reporter
    from resvit_engines.registry.client import Client
    from resvit_engines.registry.push import push
    from resvit_engines.registry.reference import reference_from_text
    from resvit_export.tools.push import bundles_in

    output, say = Output(quiet, as_json), reporter(quiet or as_json)
    named = reference_from_text(reference)
    bundles = bundles_in(runs, say)
    if dry_run:
        _show_what_would_be(bundles, named, output)
        return
    with Client(named, push=True, ca=ca, plain=plain_http, reporter=say) as client:
        done = push(bundles, client, say)
    for offer in done.offers:
        if offer.verdict != "accepted":
            say.warn(f"Validation did not accept {offer.name}: {offer.verdict or 'it has no verdict'}.")
    if output.json:
        emit_json(done.to_json())
    elif output.quiet:
        click.echo(named.at(done.digest))
    else:
        _show(done.offers)
        click.echo(f"{named} is {done.digest}" + (f"; before it was {done.before}." if done.before else "."))
        click.echo(f"{done.sent} blobs sent ({mib(done.sent_bytes)}), {done.there} were there.")
        click.echo(f"This content for ever: {named.at(done.digest)}")


def _show_what_would_be(bundles: Sequence[Path], named: Reference, output: Output) -> None:
    from resvit_engines.bundle.reader import opened_bundle
    from resvit_engines.registry.client import digest_of
    from resvit_engines.registry.push import index_of, package

    with contextlib.ExitStack() as owned:
        packages = [package(owned.enter_context(opened_bundle(path))) for path in bundles]
    digest = digest_of(index_of(packages))
    sizes = {blob: body.size for one in packages for blob, body in one.blobs}
    if output.json:
        offers = [one.offer.to_annotations() for one in packages]
        emit_json({"reference": str(named), "digest": digest, "bundles": offers, "bytes": sum(sizes.values())})
    elif output.quiet:
        click.echo(digest)
    else:
        _show([one.offer for one in packages])
        click.echo(f"{named} would be {digest}: {len(sizes)} blobs, {mib(sum(sizes.values()))}.")


def _show(offers: Sequence[Offer]) -> None:
    rows = [
        (
            offer.name,
            offer.target,
            offer.sm_title,
            f"{offer.builder_title} {offer.tensorrt}",
            offer.jetpack,
            offer.precision,
            offer.verdict,
            offer.holds,
            offer.release,
        )
        for offer in offers
    ]
    columns = ("bundle", "target", "SM", "builder", "JetPack", "precision", "verdict", "holds", "release")
    console().print(table("Bundles", columns, rows, left=8))
