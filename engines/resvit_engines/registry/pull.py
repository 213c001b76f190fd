"""Pulling: what fits this device, its signature checked before anything large is fetched, and installing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.install.install import Check, Installed, install_bundle, installed_version, require_newer
from resvit_engines.install.state import model_folder, read_state
from resvit_engines.keys.public import TrustStore
from resvit_engines.machine import Machine
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.registry.choice import Chosen, Wishes, choose
from resvit_engines.registry.client import Client
from resvit_engines.registry.download import Downloaded, download

_DOWNLOADS = ".downloads"
"""Below the root of installations, by a name that no model has."""


@dataclass(frozen=True)
class Pulled:
    """What a pull did. ``path`` is the bundle, None where it was not kept or not needed; ``pinned`` the reference held
    to this content. ``installed`` is what installing did; with neither, that version runs already.
    """

    chosen: Chosen
    pinned: str
    path: Path | None
    fetched: int
    kept: int
    installed: Installed | None = None
    already: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.chosen.manifest.name,
            "release": self.chosen.manifest.release,
            "digest": self.chosen.digest,
            "signed_by": {"name": self.chosen.key.name, "keyid": self.chosen.key.keyid},
            "verdict": self.chosen.offer.verdict,
            "target": self.chosen.offer.target,
            "precision": self.chosen.offer.precision,
            "pinned": self.pinned,
            "path": str(self.path) if self.path else None,
            "bytes_fetched": self.fetched,
            "bytes_kept": self.kept,
            "already": self.already,
            "installed": self.installed.to_json() if self.installed else None,
        }


@dataclass(frozen=True)
class Place:
    """Where a pulled bundle is installed, and how what it computes is checked there."""

    root: Path
    check: Check
    allow_downgrade: bool = False


def pull(
    client: Client,
    trust: TrustStore,
    machine: Machine,
    wishes: Wishes,
    *,
    out: Path | None = None,
    place: Place | None = None,
    reporter: Reporter = SILENT,
) -> Pulled:
    """Fetch the bundle that fits ``machine``, to the file or folder ``out``, and install it where ``place`` says.

    Without ``out``, what is installed is fetched below the installations and removed afterwards. A version that runs
    already is neither fetched nor installed again.

    Raises:
        ResvitError: as ``choose``, ``download`` and ``install_bundle``; the version that ran before still does.
    """
    chosen = choose(client, trust, machine, wishes)
    pinned = client.reference.at(chosen.tag_digest)
    if chosen.offer.verdict != "accepted":
        reporter.warn(f"Validation did not accept {chosen.offer.name}: {chosen.offer.verdict or 'it has no verdict'}.")
    name = f"{chosen.offer.name}.resvit"
    if place is None:
        done = download(client, chosen, _file_in(out, name), reporter)
        return Pulled(chosen, pinned, done.path, done.fetched, done.kept)
    if out is None and _runs_already(chosen, place, trust):
        return Pulled(chosen, pinned, None, 0, 0, already=True)
    require_newer(chosen.manifest, read_state(model_folder(place.root, chosen.manifest.name)),
                  allow_downgrade=place.allow_downgrade)  # fmt: skip
    path = place.root / _DOWNLOADS / name if out is None else _file_in(out, name)
    done = download(client, chosen, path, reporter)
    try:
        installed = _installed(done, chosen, trust, machine, wishes, place, reporter)
    finally:
        if out is None:
            path.unlink(missing_ok=True)
    return Pulled(chosen, pinned, path if out is not None else None, done.fetched, done.kept, installed)


def _installed(
    done: Downloaded, chosen: Chosen, trust: TrustStore, machine: Machine, wishes: Wishes, place: Place,
    reporter: Reporter,
) -> Installed:  # fmt: skip
    """Install the file that was put together, by the same way as any other, which believes nothing of the above."""
    return install_bundle(
        done.path,
        place.root,
        trust,
        check=place.check,
        machine=machine,
        allow_downgrade=place.allow_downgrade,
        expect=chosen.manifest.name,
        rehearse=wishes.rehearse,
        reporter=reporter,
    )


def _runs_already(chosen: Chosen, place: Place, trust: TrustStore) -> bool:
    """Whether what was chosen is what runs, every file of it whole."""
    try:
        return installed_version(place.root, str(chosen.manifest.name), trust).digest == chosen.digest
    except ResvitError:
        return False


def _file_in(out: Path | None, name: str) -> Path:
    return Path(name) if out is None else out / name if out.is_dir() else out
