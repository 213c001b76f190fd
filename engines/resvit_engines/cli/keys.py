"""The command ``keys``: which keys this device trusts, and a newer list of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.cli.installing import trust_option
from resvit_engines.console import console, emit_json, output_options, table
from resvit_engines.errors import ResvitError

if TYPE_CHECKING:
    from resvit_engines.keys.public import TrustStore


@click.command(
    name="keys",
    epilog="\b\nExamples:\n  resvit-engine keys\n  resvit-engine keys keys-1.json --root root.pub\n"
    "  resvit-engine keys keys-2.json --json",
)
@click.argument("new", metavar="[LIST]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Public key of a root, for the first list; repeat it where more than one signs.",
)
@trust_option
@output_options
def keys_command(new: Path | None, roots: tuple[Path, ...], trust: Path | None, quiet: bool, as_json: bool) -> None:
    """List the keys that this device trusts. With LIST, take a newer signed list of them.

    A list is taken where the roots of the one before signed it, its version is higher, and it has not expired. Then the
    keys in it and this device's own are trusted, and other files of keys no more.
    """
    from resvit_engines.keys.public import load_trust, read_public_key, trust_folder
    from resvit_engines.keys.taking import take_list
    from resvit_engines.outside import leads_to_file

    if roots and new is None:
        raise ResvitError("--root says whose the first list is.", "Say which list.")
    folder = trust_folder(trust)
    if new is not None:
        if leads_to_file(folder):
            raise ResvitError(f"{folder} is one key, and a list is for a folder.", "Give --trust a folder.")
        take_list(folder, new, [read_public_key(path) for path in roots])
    store = load_trust(trust)
    if as_json:
        emit_json(_document(store))
    elif quiet:
        click.echo("\n".join(key.keyid for key in store.keys))
    else:
        _show(store)


def _document(store: TrustStore) -> dict[str, Any]:
    from resvit_engines.keys.key_list import described

    keys = [{"name": key.name, "keyid": key.keyid, "expires": str(key.expires) if key.expires else None}
            for key in store.keys]  # fmt: skip
    listed = described(store.listed) if store.listed else None
    document = {"source": store.source, "keys": keys, "revoked": sorted(store.withdrawn), "list": listed}
    return {**document, "nothing_installs": _nothing_installs(store)}


def _nothing_installs(store: TrustStore) -> str | None:
    """Why nothing is installed by the list that was taken; None where that is not so."""
    from resvit_engines.keys.key_list import require_fresh

    if store.listed is None:
        return None
    try:
        require_fresh(store.listed, "The list of keys")
    except ResvitError as error:
        return f"{error.problem} Nothing that its keys signed is installed until a newer list is taken. {error.fix}"
    return None


def _show(store: TrustStore) -> None:
    def until(key: Any) -> str:
        withdrawn = "withdrawn" if key.keyid in store.withdrawn else ""
        return withdrawn or (str(key.expires) if key.expires else "no end")

    if store.listed is not None:
        click.echo(f"List of keys, version {store.listed.version}, good until {store.listed.expires}.")
    if (why := _nothing_installs(store)) is not None:
        click.echo(f"warning: {why}")
    if not store.keys:
        click.echo(f"{store.source} holds no public key.")
        return
    rows = [(key.name, key.keyid, until(key)) for key in store.keys]
    console().print(table(store.source, ("key", "key id", "good until"), rows, left=3))
