"""The bundle: one file that holds everything a device needs, the same bytes for the same content.

A ``.resvit`` file is a plain zip, stored without compression (engines and weights hardly compress, and stored bytes
depend on no zlib). Its first member, ``manifest.json``, holds the digest and size of every other; the second, in a
signed bundle, is ``signature.json``. Any unzip reads it. This module reads it from front to back, believes no header,
and refuses every byte that it would not have written itself.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.bundle.manifest import MANIFEST, SIGNATURE, Manifest, check_names
from resvit_engines.bundle.reader import OpenBundle, opened_bundle
from resvit_engines.bundle.source import Source, copy_as_described, described
from resvit_engines.bundle.zip_layout import Member, directory, local_header
from resvit_engines.errors import ResvitError
from resvit_engines.files import atomic_directory, atomic_file, pretty_json, sha256_bytes, sha256_stream
from resvit_engines.keys.private import SigningKey
from resvit_engines.keys.public import PublicKey, TrustStore
from resvit_engines.keys.signing import envelope_from_manifest, require_signature, signatures_in


def write_bundle(
    path: Path, manifest: Manifest, files: Mapping[str, Source], key: SigningKey | None = None
) -> Manifest:
    """Write ``manifest`` and ``files`` (name in the bundle → content) to ``path``, signed by ``key`` if there is one.

    A ``RecordedFile`` is packed only as it was when its digest was recorded. The same inputs and key give the same
    bytes. Returns the manifest as written, which lists these files.

    Raises:
        ResvitError: INPUT for a name that could leave the folder, and for a file that is missing, is not the one that
            was recorded, or changes meanwhile; then nothing is written.
    """
    check_names([MANIFEST, SIGNATURE, *files], f"{path.name} cannot be written")
    ordered = sorted(files.items())
    sources = [described(name, source) for name, source in ordered]
    full = dataclasses.replace(manifest, files=tuple(file for file, _ in sources))
    head = pretty_json(full.to_json())
    first = [(MANIFEST, head)]
    if key is not None:
        first.append((SIGNATURE, envelope_from_manifest(head, key)))
    members = [Member(name, len(data), zlib.crc32(data)) for name, data in first]
    with atomic_file(path) as partial, partial.open("wb") as out:
        for member, (_, data) in zip(members, first, strict=True):
            out.write(local_header(member) + data)
        for (file, member), (_, source) in zip(sources, ordered, strict=True):
            out.write(local_header(member))
            copy_as_described(source, file, out)
            members.append(member)
        out.write(directory(members))
    return full


def sign_bundle(path: Path, key: SigningKey, out: Path | None = None) -> Manifest:
    """Sign a bundle, in place or as the file ``out``, in one step. Returns the manifest.

    The signature of ``key`` takes the place of any that it has.

    Raises:
        ResvitError: INPUT as ``verify_bundle``: what is damaged is not signed.
    """
    with opened_bundle(path) as old:
        manifest = old.manifest()
        envelope = envelope_from_manifest(old.head, key)
        first = [
            Member(MANIFEST, len(old.head), zlib.crc32(old.head)),
            Member(SIGNATURE, len(envelope), zlib.crc32(envelope)),
        ]
        with atomic_file(out or path) as partial, partial.open("wb") as stream:
            stream.write(local_header(first[0]) + old.head + local_header(first[1]) + envelope)
            # The members' headers do not depend on where they stand; what is written is what was checked.
            kept = [member for member in old.check(manifest, out=stream) if member.name not in (MANIFEST, SIGNATURE)]
            stream.write(directory([*first, *kept]))
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read a bundle's manifest, signed or not. The files themselves are not looked at: see ``verify_bundle``.

    Raises:
        ResvitError: INPUT where ``path`` is no bundle, is damaged or truncated, or is of a newer format.
    """
    with opened_bundle(path) as bundle:
        return bundle.manifest()


def verify_bundle(path: Path) -> Manifest:
    """Check every byte against the manifest, whoever wrote it: damage is found, forgery is not. Returns the manifest.

    Raises:
        ResvitError: INPUT, naming the file that is damaged.
    """
    with opened_bundle(path) as bundle:
        manifest = bundle.manifest()
        bundle.check(manifest)
    return manifest


def signers(path: Path) -> list[str]:
    """The key ids that a bundle's signature names, none for an unsigned one. Whether it holds is not looked at."""
    with opened_bundle(path) as bundle:
        return [] if bundle.envelope is None else [keyid for keyid, _ in signatures_in(bundle.envelope, path.name)]


def extract_bundle(path: Path, into: Path) -> Manifest:
    """Unpack into the new folder ``into``, checking every file on the way, whoever wrote it. Returns the manifest.

    On any fault nothing is left there.

    Raises:
        ResvitError: INPUT as ``verify_bundle``, and where ``into`` exists and is not an empty folder.
    """
    _require_new(into)
    with opened_bundle(path) as bundle:
        manifest = bundle.manifest()
        with atomic_directory(into) as partial:
            bundle.check(manifest, partial)
    return manifest


def read_trusted_manifest(path: Path, trust: TrustStore, *, expired_ok: bool = False) -> Manifest:
    """Read the manifest of a bundle whose signature holds. Only manifest and signature are read before that.

    ``expired_ok`` is for what was signed while its key was good.

    Raises:
        ResvitError: UNTRUSTED as ``signing.require_signature``; INPUT as ``read_manifest``.
    """
    with trusted_bundle(path, trust, expired_ok=expired_ok) as bundle:
        return bundle.manifest


def extract_trusted(path: Path, into: Path, trust: TrustStore) -> Manifest:
    """Unpack a bundle whose signature holds into the new folder ``into``. Returns the manifest.

    Raises:
        ResvitError: UNTRUSTED as ``signing.require_signature``; INPUT as ``extract_bundle``.
    """
    _require_new(into)
    with trusted_bundle(path, trust) as bundle, atomic_directory(into) as partial:
        bundle.extract(partial)
    return bundle.manifest


@dataclass(frozen=True)
class TrustedBundle:
    """An open bundle whose signature held. ``digest`` is the SHA-256 of its manifest, which holds all the others."""

    manifest: Manifest
    digest: str
    key: PublicKey
    _bundle: OpenBundle

    def file_digest(self) -> str:
        """SHA-256 of the whole open file."""
        self._bundle.stream.seek(0)
        return sha256_stream(self._bundle.stream)

    def check(self) -> None:
        """Check every byte of its files; raises INPUT, naming the one that is damaged."""
        self._bundle.check(self.manifest)

    def extract(self, folder: Path) -> None:
        """Write its files, manifest and signature into the empty ``folder``, checking each; raises as ``check``."""
        self._bundle.check(self.manifest, folder)


@contextmanager
def trusted_bundle(path: Path, trust: TrustStore, *, expired_ok: bool = False) -> Iterator[TrustedBundle]:
    """Open a bundle and check its signature; everything that is read later is read from the same open file.

    Raises:
        ResvitError: UNTRUSTED as ``signing.require_signature``; INPUT as ``read_manifest``.
    """
    with opened_bundle(path) as bundle:
        key = require_signature(bundle.head, bundle.envelope, trust, path.name, expired_ok=expired_ok)
        yield TrustedBundle(bundle.manifest(), sha256_bytes(bundle.head), key, bundle)


def _require_new(into: Path) -> None:
    if into.is_symlink() or (into.exists() and (not into.is_dir() or any(into.iterdir()))):
        raise ResvitError(f"{into} exists already and is not an empty folder.", "Name a folder that is not there yet.")
