"""The commands for keys and signatures: keygen, sign."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import click

from resvit_engines.console import emit_json, output_options
from resvit_engines.errors import ResvitError
from resvit_export.cli.options import option_of
from resvit_export.recipe.recipe import SETTINGS


@click.command(
    name="keygen",
    epilog="\b\nExamples:\n  resvit-export keygen runs/release.key\n"
    "  resvit-export keygen runs/robots.key --name robots --days 365 --json",
)
@click.argument("private", type=click.Path(path_type=Path))
@click.option("--public", type=click.Path(path_type=Path), help="Public key file.  [default: PRIVATE with .pub]")
@click.option("--name", help="What devices call this key.  [default: the file's name]")
@click.option("--days", type=click.IntRange(1, 36500), help="Days that the key is good for.  [default: no end]")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d"]), help="The last day that the key is good for.")
@output_options
def keygen_command(
    private: Path,
    public: Path | None,
    name: str | None,
    days: int | None,
    expires: datetime | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a key to sign bundles with: a private file for you alone, and a public one for the devices.

    The private key is never shown and no file is overwritten. Devices trust what lies in their folder of public keys:
    see 'resvit-engine verify --help'.
    """
    from resvit_engines.keys.private import make_key_pair
    from resvit_engines.keys.public import PublicKey

    today = datetime.now(timezone.utc).date()
    named = name or private.stem
    if not named.isprintable() or not named.strip():
        raise ResvitError(f"{named!r} is no name for a key.", "Use letters, digits and spaces.")
    public = public or private.with_suffix(".pub")
    if public == private:
        raise ResvitError("The private and the public key cannot be one file.", "Name the private one release.key.")
    last = _last_day(today, days, expires)
    key = make_key_pair(private, public, lambda raw: PublicKey(raw, named.strip(), today, last))
    if as_json:
        emit_json(
            {
                "private": str(private),
                "public": str(public),
                "name": key.name,
                "keyid": key.keyid,
                "expires": str(last) if last else None,
            }
        )
    elif quiet:
        click.echo(key.keyid)
    else:
        click.echo(f"private key: {private} (mode 0600; keep it, and keep it from others)")
        click.echo(f"public key:  {public} (copy it into /etc/resvit/keys of each device)")
        click.echo(f"key id:      {key.keyid}" + (f", good until {last}" if last else ""))


@click.command(
    name="sign",
    epilog="\b\nExamples:\n  resvit-export sign runs/l4-fp16 --key runs/release.key --out runs/release.resvit\n"
    "  resvit-export sign runs/release.resvit --key runs/robots.key --json\n"
    "  resvit-export sign runs/release.resvit --openssf runs/openssf.pem",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File for the signed bundle.  [default: BUNDLE itself]")
@option_of(SETTINGS["key"])
@click.option(
    "--openssf",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Private EC key (PEM): write BUNDLE.sig too, in the format of OpenSSF Model Signing.",
)
@output_options
def sign_command(
    bundle: Path, out: Path | None, key: str | None, openssf: Path | None, quiet: bool, as_json: bool
) -> None:
    """Sign a bundle that exists, after checking every byte of it; its signature takes the place of any before.

    BUNDLE is a .resvit file, or a folder that holds one. 'build' and 'bundle' sign at once when they are given a key.
    With --openssf alone the bundle stays as it is. Devices ask for the signature inside, whatever lies beside it.
    """
    from resvit_engines.bundle.bundle import sign_bundle, verify_bundle
    from resvit_engines.files import sha256_file
    from resvit_engines.keys.private import load_signing_key
    from resvit_engines.progress import reporter
    from resvit_export.tools.openssf import load_openssf_signer

    signing = load_signing_key(key)
    if signing is None and openssf is None:
        raise ResvitError(
            "There is no key to sign with.",
            "Make one with: resvit-export keygen release.key, then add --key release.key",
        )
    sign_beside = load_openssf_signer(openssf) if openssf is not None else None
    bundle = _bundle_in(bundle)
    if signing is not None:
        target = out or bundle
        old = target.with_name(f"{target.name}.sig")
        before = sha256_file(target) if target.is_file() and old.is_file() and sign_beside is None else None
        manifest = sign_bundle(bundle, signing, out)
        if before is not None and before != sha256_file(target):
            reporter(quiet or as_json).warn(
                f"{old} is of the bundle as it was, and no longer holds. Make it again: "
                f"resvit-export sign {target} --openssf KEY"
            )
    elif out is not None:
        raise ResvitError("--openssf signs beside the bundle, which is not written again.", "Leave --out away.")
    else:
        manifest = verify_bundle(bundle)
    bundle = out or bundle
    beside = sign_beside(bundle) if sign_beside is not None else None
    if as_json:
        document: dict[str, object] = {"bundle": str(bundle), "name": manifest.name}
        if signing is not None:
            document["signed_by"] = {"name": signing.public.name, "keyid": signing.public.keyid}
        emit_json({**document, **({"openssf": str(beside)} if beside else {})})
    elif not quiet:
        if signing is not None:
            click.echo(f"{bundle} is signed by {signing.public.name} ({signing.public.keyid[:16]}…).")
        if beside is not None:
            click.echo(f"{beside}: the same, as OpenSSF Model Signing has it.")


def _bundle_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.rglob("*.resvit"))
    if len(found) != 1:
        names = ", ".join(str(file) for file in found[:5]) or "none"
        raise ResvitError(f"{path} does not hold one bundle ({names}).", "Give the path of a .resvit file.")
    return found[0]


def _last_day(today: date, days: int | None, expires: datetime | None) -> date | None:
    if days is not None and expires is not None:
        raise ResvitError("Both --days and --expires say when the key ends.", "Give one of them.")
    last = expires.date() if expires else today + timedelta(days=days) if days else None
    if last is not None and last < today:
        raise ResvitError(f"A key that ended on {last} would sign nothing.", "Give a day to come.")
    return last
