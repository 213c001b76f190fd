"""A bundle that lies unpacked in a folder: checked again before anything in it is used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from resvit_engines.bundle.manifest import MANIFEST, SIGNATURE, Manifest, manifest_from_bytes
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes, sha256_file
from resvit_engines.keys.public import PublicKey, TrustStore
from resvit_engines.keys.signing import require_signature

_LIMITS = {MANIFEST: 16 << 20, SIGNATURE: 64 << 10}


@dataclass(frozen=True)
class TrustedFolder:
    """An unpacked bundle whose signature and digests held. ``digest`` is the SHA-256 of its manifest."""

    folder: Path
    manifest: Manifest
    digest: str
    key: PublicKey


def read_trusted_folder(folder: Path, trust: TrustStore, *, expired_ok: bool = False) -> TrustedFolder:
    """Check the signature, then every file of an unpacked bundle, and that there is no other.

    ``expired_ok`` is for what was installed while its key was good: a device does not stop on the day it expires. A
    revoked key does stop it.

    Raises:
        ResvitError: UNTRUSTED as ``signing.require_signature``, and where a file is not the one that was signed.
    """
    head = _read(folder, MANIFEST)
    if head is None:
        raise ResvitError(f"{folder} is no unpacked bundle: it has no {MANIFEST}.", "Install the bundle again.")
    key = require_signature(head, _read(folder, SIGNATURE), trust, str(folder), expired_ok=expired_ok)
    manifest = manifest_from_bytes(head, folder)
    listed = {entry.path: entry for entry in manifest.files}
    there = set(_files(folder)) - {MANIFEST, SIGNATURE}
    if odd := sorted(there ^ set(listed)):
        raise _changed(folder, odd[0])
    for name, entry in listed.items():
        file = folder / PurePosixPath(name)
        if file.is_symlink() or file.stat().st_size != entry.bytes or sha256_file(file) != entry.sha256:
            raise _changed(folder, name)
    return TrustedFolder(folder, manifest, sha256_bytes(head), key)


def _files(folder: Path) -> list[str]:
    """All names below the folder but those of folders; links count as files."""
    names = []
    for at, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        names += [(Path(at) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return names


def _read(folder: Path, name: str) -> bytes | None:
    file = folder / name
    if file.is_symlink() or not file.is_file():
        return None
    if file.stat().st_size > _LIMITS[name]:
        raise _changed(folder, name)
    return file.read_bytes()


def _changed(folder: Path, name: str) -> ResvitError:
    return ResvitError(
        f"{name} in {folder} is not what was signed: it was changed, added or lost after it was installed.",
        "Install the bundle again.",
        ExitCode.UNTRUSTED,
    )
