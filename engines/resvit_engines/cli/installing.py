"""The commands for signed bundles on the device: verify, install, rollback, status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resvit_engines.console import F, Output, console, emit_json, output_options, table
from resvit_engines.errors import ResvitError

if TYPE_CHECKING:
    from resvit_engines.install.install import Check, Installed
    from resvit_engines.install.state import State, Version


def _trust(what: str, beside: str = "") -> Callable[[F], F]:
    return click.option(
        "--trust",
        type=click.Path(path_type=Path),
        help=f"{what}  [default: $RESVIT_TRUST, else /etc/resvit/keys for root and ~/.config/resvit/keys{beside}]",
    )


def trust_option(function: F) -> F:
    """Add ``--trust``."""
    return _trust("A .pub file, or a folder of them, that is trusted.")(function)


def maker_option(function: F) -> F:
    """Add ``--trust`` of what builds here: the folders that it falls back to hold this device's own key too."""
    own = ", which hold this device's own key too"
    return _trust("Public key of the maker, or a folder of such.", own)(function)


def root_option(function: F) -> F:
    """Add ``--root``."""
    return click.option(
        "--root",
        type=click.Path(path_type=Path),
        help="Where versions are installed.  [default: $RESVIT_ROOT, else /var/lib/resvit for root and "
        "~/.local/share/resvit]",
    )(function)


def leniency_options(function: F) -> F:
    """Add ``--allow-downgrade`` and ``--rehearse``."""
    function = click.option(
        "--rehearse",
        is_flag=True,
        help="This machine stands in for the device: processor, GPU, JetPack and TensorRT are not compared.",
    )(function)
    return click.option(
        "--allow-downgrade", is_flag=True, help="Take a lower release than one that was installed before."
    )(function)


def golden_runtime_option(function: F) -> F:
    """Add ``--runtime``."""
    return click.option(
        "--runtime",
        type=click.Choice(["auto", "tensorrt", "rtx", "onnxruntime"]),
        default="auto",
        show_default=True,
        help="What runs the golden inputs.",
    )(function)


@click.command(
    name="verify",
    epilog="\b\nExamples:\n  resvit-engine verify net.resvit\n"
    "  resvit-engine verify net.resvit --trust release.pub --json",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@trust_option
@output_options
def verify_command(bundle: Path, trust: Path | None, quiet: bool, as_json: bool) -> None:
    """Check a bundle's signature and every byte of it, and say whether it is for this device.

    Nothing is unpacked or run. A bundle for another device is no failure here.
    """
    from resvit_engines.bundle.bundle import trusted_bundle
    from resvit_engines.bundle.fit import misfits
    from resvit_engines.keys.public import load_trust
    from resvit_engines.machine import this_machine

    with trusted_bundle(bundle, load_trust(trust)) as opened:
        opened.check()
        manifest, key = opened.manifest, opened.key
    reasons = [problem for problem, _, _ in misfits(manifest, this_machine())]
    document = {
        "bundle": str(bundle),
        "name": manifest.name,
        "release": manifest.release,
        "digest": opened.digest,
        "files": len(manifest.files),
        "signed_by": {"name": key.name, "keyid": key.keyid, "expires": str(key.expires) if key.expires else None},
        "fits": not reasons,
        "why_not": reasons,
    }
    if as_json:
        emit_json(document)
    elif not quiet:
        click.echo(f"{bundle} is whole and signed by {key.name} ({key.keyid[:16]}…).")
        click.echo(f"{document['name']}, release {document['release']}, {document['files']} files.")
        click.echo("It is for this device." if not reasons else f"It is not for this device: {' '.join(reasons)}")


@click.command(
    name="install",
    epilog="\b\nExamples:\n  resvit-engine install net.resvit\n"
    "  resvit-engine install net.resvit --trust release.pub --root engines --json",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@trust_option
@root_option
@click.option("--expect", metavar="NAME", help="Refuse a bundle of any other model.")
@leniency_options
@golden_runtime_option
@output_options
def install_command(
    bundle: Path, trust: Path | None, root: Path | None, expect: str | None, allow_downgrade: bool, rehearse: bool,
    runtime: str, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Install a signed bundle and switch to it.

    The signature comes first, then whether it fits this device, then its files, then its golden inputs; only then is
    'current' switched, in one step. Whatever fails, and whenever power is lost, the version before keeps running.
    """
    from resvit_engines.install.install import install_bundle
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust
    from resvit_engines.progress import reporter

    done = install_bundle(
        bundle,
        root or default_root(),
        load_trust(trust),
        check=golden_of(runtime),
        allow_downgrade=allow_downgrade,
        expect=expect,
        rehearse=rehearse,
        reporter=reporter(quiet or as_json),
    )
    show_installed(done, "runs now", f"resvit-engine rollback {done.name}", Output(quiet, as_json))


@click.command(
    name="rollback",
    epilog="\b\nExamples:\n  resvit-engine rollback net-jetson-orin-int8\n"
    "  resvit-engine rollback net-jetson-orin-int8 --root engines --json",
)
@click.argument("name")
@click.option(
    "--leave",
    metavar="DIGEST",
    help="Leave that version, by the digest of its manifest; where another runs, nothing is done.",
)
@trust_option
@root_option
@golden_runtime_option
@output_options
def rollback_command(
    name: str, leave: str | None, trust: Path | None, root: Path | None, runtime: str, quiet: bool, as_json: bool
) -> None:
    """Return to the version that ran before the current one, after checking it as 'install' does."""
    from resvit_engines.install.install import rollback
    from resvit_engines.install.state import default_root
    from resvit_engines.keys.public import load_trust
    from resvit_engines.progress import reporter

    quietly = reporter(quiet or as_json)
    where, trusted = root or default_root(), load_trust(trust)
    done = rollback(where, name, trusted, check=golden_of(runtime), leave=leave, reporter=quietly)
    # What was rolled back is no version to return to any more: only its bundle brings it back.
    show_installed(done, "runs again", "to return to it, install its bundle again", Output(quiet, as_json))


@click.command(
    name="status", epilog="\b\nExamples:\n  resvit-engine status\n  resvit-engine status --root engines --json"
)
@root_option
@output_options
def status_command(root: Path | None, quiet: bool, as_json: bool) -> None:
    """List what is installed: the current version of each model, its release, who signed it, what came before."""
    from resvit_engines.install.install import status
    from resvit_engines.install.state import default_root

    folder = root or default_root()
    states = status(folder)
    if as_json:
        emit_json({"root": str(folder), "installed": [_described(state) for state in states]})
    elif quiet:
        click.echo("\n".join(f"{state.name} {state.current}" for state in states))
    elif not states:
        click.echo(f"Nothing is installed under {folder}.")
    else:
        for state in states:
            console().print(table(state.name, ("", "what"), _rows(folder, state), left=2))


def _rows(root: Path, state: State) -> list[tuple[str, str]]:
    """What is installed under one name: each version with its precision, its accuracy, when and by whom."""
    rows = [(what, _told(root / state.name, version)) for what, version in
            (("current", state.running), ("rollback to", state.previous)) if version]  # fmt: skip
    return [*rows, *([("problem", state.problem)] if state.problem else [])]


def _told(folder: Path, version: Version) -> str:
    from resvit_engines.bundle.manifest import MANIFEST, manifest_from_bytes
    from resvit_engines.outside import read_outside

    told = [version.version, f"release {version.release}"]
    try:
        path = folder / "versions" / version.version / MANIFEST
        manifest = manifest_from_bytes(read_outside(path), path)
    except ResvitError as error:  # what is wrong there is for 'install' and 'run' to refuse
        told.append(error.problem)
    else:
        told += [manifest.precision.upper()] if manifest.precision else []
        told += [f"{manifest.verdict.verdict}: {manifest.verdict.reason}"] if manifest.verdict else []
    signed = f"signed by {version.key}, installed {version.installed}"
    return ", ".join([*told, signed]) + (" (rehearsal)" if version.rehearsal else "")


def _described(state: State) -> dict[str, Any]:
    running, previous = state.running, state.previous
    return {
        "name": state.name,
        "current": state.current,
        "highest_release": state.highest_release,
        "problem": state.problem,
        "running": running.to_json() if running else None,
        "previous": previous.to_json() if previous else None,
    }


def golden_of(runtime: str) -> Check:
    """The check of golden outputs by a runtime."""
    from resvit_engines.run.golden import golden_check

    return lambda folder, manifest: golden_check(folder, manifest, runtime)


def show_installed(done: Installed, what: str, back: str, output: Output) -> None:
    """Print what an installation or rollback did, and how to go ``back``."""
    if output.json:
        emit_json(done.to_json())
        return
    if output.quiet:
        click.echo(str(done.folder))
        return
    version, note = done.version, " (a rehearsal)" if done.version.rehearsal else ""
    click.echo(f"{done.name} {version.version}, release {version.release}, signed by {version.key}, {what}{note}.")
    if done.golden:
        click.echo(done.golden.sentence)
    if done.before:
        click.echo(f"Before it ran {done.before.version}, release {done.before.release}: {back}")
    click.echo(f"{done.folder}")
