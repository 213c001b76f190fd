"""The command ``keylist``: the signed list of keys that devices are told when keys change."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import click

from resvit_engines.console import emit_json, output_options
from resvit_engines.errors import ResvitError
from resvit_export.cli.stages import examples_text

_DAYS = 180


@click.command(
    name="keylist",
    epilog=examples_text(
        "keylist runs/keys-1.json --root runs/robots.key --key runs/release.pub",
        "keylist runs/keys-2.json --after runs/keys-1.json --root runs/robots.key --days 90 --json",
    ),
)
@click.argument("out", metavar="LIST", type=click.Path(path_type=Path))
@click.option(
    "--root", "roots", multiple=True, required=True, help="Root key that signs the list, as of --key elsewhere."
)
@click.option(
    "--after", type=click.Path(path_type=Path), help="The list before: what it holds stays, but for the below."
)
@click.option("--key", "keys", multiple=True, type=click.Path(path_type=Path), help="Public key that signs bundles.")
@click.option("--retire", multiple=True, metavar="KEYID", help="Let this key sign nothing new from tomorrow on.")
@click.option(
    "--revoke", multiple=True, metavar="KEYID", help="Withdraw this key: what it signed does not run any more."
)
@click.option("--add-root", multiple=True, type=click.Path(path_type=Path), help="Public key of one more root.")
@click.option("--drop-root", multiple=True, metavar="KEYID", help="Take this root away.")
@click.option(
    "--threshold", type=click.IntRange(1, 16), help="How many roots sign the next list.  [default: as before, 1]"
)
@click.option(
    "--days", type=click.IntRange(1, 3650), default=_DAYS, show_default=True, help="Days that it is good for."
)
@click.option("--cosign", is_flag=True, help="Add the signature of --root to LIST, which is there already.")
@output_options
def keylist_command(
    out: Path, roots: tuple[str, ...], after: Path | None, keys: tuple[Path, ...], retire: tuple[str, ...],
    revoke: tuple[str, ...], add_root: tuple[Path, ...], drop_root: tuple[str, ...], threshold: int | None, days: int,
    cosign: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a signed list of the keys that devices are to trust; 'resvit-engine keys LIST' takes it there.

    No file is overwritten.
    Roots sign lists and nothing else: make one with keygen and keep it where nobody builds. Each list has a higher
    version than the one it comes after, and an end: devices take no older list, and install nothing once theirs has
    ended.
    """
    from resvit_engines.files import write_atomic
    from resvit_engines.keys.key_list import LIST_FILE_MOST, described, list_from_bytes
    from resvit_engines.keys.private import load_signing_key
    from resvit_engines.keys.public import read_public_key
    from resvit_engines.keys.writing import Changes, changed_list
    from resvit_engines.outside import read_outside

    signing = [key for key in map(load_signing_key, roots) if key is not None]
    if cosign:
        if after or keys or retire or revoke or add_root or drop_root or threshold:
            raise ResvitError("--cosign adds a signature to a list as it is.", "Leave the other options out.")
        signed = list_from_bytes(read_outside(out, LIST_FILE_MOST), str(out)).cosigned(*signing)
    else:
        if os.path.lexists(out):
            raise ResvitError(
                f"{out} exists already, and a list that may be with devices is not overwritten.",
                "Choose another name, or move it away; --cosign adds a signature to it.",
            )
        before = list_from_bytes(read_outside(after, LIST_FILE_MOST), str(after)) if after else None
        today = datetime.now(timezone.utc).date()
        changes = Changes(
            tuple(map(read_public_key, keys)),
            retire,
            revoke,
            tuple(map(read_public_key, add_root)),
            drop_root,
            threshold,
        )
        signed = changed_list(before, changes, signing, today, today + timedelta(days=days))
    write_atomic(out, signed.to_bytes())
    missing = signed.keys.threshold - len(signed.signed_by(signed.keys.roots))
    if as_json:
        emit_json({"list": str(out), "signatures_missing": max(0, missing), **described(signed.keys)})
    elif quiet:
        click.echo(str(out))
    else:
        names = ", ".join(key.name for key in signed.keys.keys) or "no key"
        until = signed.keys.expires
        click.echo(f"{out}: version {signed.keys.version}, good until {until}; trusted for bundles: {names}.")
        if missing > 0:
            click.echo(f"{missing} more roots have to sign it: resvit-export keylist {out} --cosign --root ROOT.key")
