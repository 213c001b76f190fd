"""Installing a signed bundle: signature, fit, unpacking, golden outputs, then one switch; or nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from resvit_engines.bundle.bundle import TrustedBundle, trusted_bundle
from resvit_engines.bundle.fit import require_fit
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.unpacked import TrustedFolder, read_trusted_folder
from resvit_engines.errors import ResvitError
from resvit_engines.files import explain_os_errors, open_modes
from resvit_engines.install.state import (
    State,
    Version,
    clean,
    current_version,
    installed_names,
    locked,
    model_folder,
    prune,
    read_state,
    scratch_version,
    switch_current,
    sync_folder,
    sync_tree,
    write_state,
)
from resvit_engines.keys.public import TrustStore
from resvit_engines.machine import Machine, this_machine
from resvit_engines.outside import leads_to_folder
from resvit_engines.progress import SILENT, Reporter


class GoldenResult(Protocol):
    """What a check of golden outputs tells, such as ``run.golden.GoldenReport``."""

    @property
    def sentence(self) -> str:
        """The result in words."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...


Check = Callable[[Path, Manifest], "GoldenResult | None"]
"""Runs the golden inputs of an unpacked bundle; raises MISMATCH where the outputs are not those of the manifest."""


@dataclass(frozen=True)
class Installed:
    """What an installation or a rollback did: ``before`` is the version that ran until then, if another one did."""

    name: str
    folder: Path
    version: Version
    before: Version | None
    removed: tuple[str, ...]
    golden: GoldenResult | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "version": self.version.to_json(),
            "before": self.before.to_json() if self.before else None,
            "removed": list(self.removed),
            "golden": self.golden.to_json() if self.golden else None,
        }


def install_bundle(
    path: Path,
    root: Path,
    trust: TrustStore,
    *,
    check: Check,
    machine: Machine | None = None,
    allow_downgrade: bool = False,
    expect: str | None = None,
    rehearse: bool = False,
    reporter: Reporter = SILENT,
) -> Installed:
    """Install a bundle under ``root`` and switch to it, after it has passed everything.

    ``check`` runs the golden inputs in the unpacked folder; ``machine`` is this one unless given.
    ``expect`` is the one name that is wanted; ``rehearse`` is as in ``fit.require_fit``. Versions before the last
    three are removed.

    Raises:
        ResvitError: UNTRUSTED, MISMATCH, IMPOSSIBLE, INPUT or SYSTEM; the version that ran before still does.
    """
    with trusted_bundle(path, trust) as bundle:
        name = bundle.manifest.name
        folder = model_folder(root, name)
        if expect is not None and name != expect:
            raise ResvitError(
                f"{path.name} holds the model {name}, and {expect} was expected.", "Give the bundle of that model."
            )
        require_fit(bundle.manifest, machine or this_machine(disk=nearest_folder(root)), rehearse=rehearse)
        with locked(folder, lambda: reporter.warn(f"Waiting for another installation of {name} to end.")):
            clean(folder)
            state = read_state(folder)
            require_newer(bundle.manifest, state, allow_downgrade=allow_downgrade)
            with explain_os_errors(folder):
                version, golden = _unpacked(bundle, folder, trust, check, reporter)
                new = _recorded(bundle, state, version, rehearse)
                write_state(folder, new)
                switch_current(folder, version)
                removed = prune(folder, new)
    return Installed(
        str(name), folder / "versions" / version, new.history[-1], _other(state, version), tuple(removed), golden
    )


def rollback(
    root: Path, name: str, trust: TrustStore, *, check: Check, leave: str | None = None, reporter: Reporter = SILENT
) -> Installed:
    """Return to the version that ran before the current one, after checking it as an installation does.

    The release that was rolled back still counts: an installation needs that one or a higher one. ``leave`` is the
    digest of the one version that is left: where another runs, nothing is done, so that the same can be asked twice.

    Raises:
        ResvitError: INPUT where there is nothing to return to, UNTRUSTED or MISMATCH where the previous version does
            not pass; the current one stays.
    """
    folder = _require_installed(root, name)
    with locked(folder, lambda: reporter.warn(f"Waiting for another installation of {name} to end.")):
        clean(folder)
        state = read_state(folder)
        previous = state.previous
        if leave is not None and state.running is not None and state.running.digest != leave:
            return Installed(name, folder / "versions" / state.running.version, state.running, None, (), None)
        if previous is None:
            raise ResvitError(
                f"{name} has no earlier version to return to.", "resvit-engine status lists what is there."
            )
        earlier = read_trusted_folder(folder / "versions" / previous.version, trust, expired_ok=True)
        golden = check(earlier.folder, earlier.manifest)
        switch_current(folder, previous.version)
    return Installed(name, earlier.folder, previous, state.running, (), golden)


def status(root: Path) -> list[State]:
    """What is installed under ``root``: one entry for each name, with its ``problem`` where it does not read."""
    states = []
    for name in installed_names(root):
        try:
            states.append(read_state(root / name))
        except ResvitError as error:
            states.append(State(name, None, (), -1, error.problem))
    return states


def installed_version(root: Path, name: str, trust: TrustStore) -> TrustedFolder:
    """The current version of a name, its signature and every file checked, ready to be run.

    Raises:
        ResvitError: INPUT where nothing is installed, UNTRUSTED where it is not what was signed.
    """
    folder = _require_installed(root, name)
    version = current_version(folder)
    if version is None:
        raise ResvitError(f"{name} is not installed under {root}.", "Run: resvit-engine install BUNDLE")
    return read_trusted_folder(folder / "versions" / version, trust, expired_ok=True)


def _unpacked(
    bundle: TrustedBundle, folder: Path, trust: TrustStore, check: Check, reporter: Reporter
) -> tuple[str, GoldenResult | None]:
    """Bring the bundle to its place among the versions, checked and on the disk; returns its name there."""
    version = bundle.digest[:12]
    place = folder / "versions" / version
    if place.exists():
        if _is_whole(place, bundle.digest, trust):
            # Nothing of it is needed, but a damaged file must not be told that it was installed.
            bundle.check()
            with contextlib.suppress(PermissionError):  # another user's installation, who may run it all the same
                open_modes(place)
            return version, check(place, bundle.manifest)
        # A damaged folder may be the current one: it is left alone, and the whole one gets a name of its own.
        version = next(name for n in range(1, 10_000) if not (place.with_name(name := f"{version}.{n}")).exists())
        place = place.with_name(version)
    with scratch_version(folder) as scratch:
        reporter.say(f"Unpacking {len(bundle.manifest.files)} files")
        bundle.extract(scratch)
        reporter.say("Running the golden inputs")
        golden = check(scratch, bundle.manifest)
        open_modes(scratch)
        sync_tree(scratch)
        scratch.rename(place)
        sync_folder(place.parent)
        sync_folder(folder)
    return version, golden


def _is_whole(place: Path, digest: str, trust: TrustStore) -> bool:
    try:
        return read_trusted_folder(place, trust).digest == digest
    except (ResvitError, OSError):
        return False


def require_newer(manifest: Manifest, state: State, *, allow_downgrade: bool) -> None:
    """Refuse with INPUT a release below one that was installed here."""
    release = manifest.release
    if release < state.highest_release and not allow_downgrade:
        raise ResvitError(
            f"This is release {release} of {state.name}, and release {state.highest_release} has been installed here.",
            "An old release may have faults that were mended since. If you want it, add --allow-downgrade; "
            "resvit-engine rollback returns to the version that ran before.",
        )


def _recorded(bundle: TrustedBundle, state: State, version: str, rehearsal: bool) -> State:
    release = bundle.manifest.release
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = Version(version, release, bundle.digest, bundle.key.name, bundle.key.keyid, now, rehearsal)
    before = state.history[:-1] if state.running and state.current == version else state.history
    return State(state.name, version, (*before, entry), max(release, state.highest_release))


def _other(state: State, version: str) -> Version | None:
    return state.running if state.current != version else None


def _require_installed(root: Path, name: str) -> Path:
    folder = model_folder(root, name)
    if not leads_to_folder(folder / "versions"):
        names = ", ".join(installed_names(root)) or "nothing"
        raise ResvitError(f"{name} is not installed under {root} (installed: {names}).", "Check the name and --root.")
    return folder


def nearest_folder(path: Path) -> Path:
    """The nearest folder on the way to ``path`` that exists already."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
