"""Reading a bundle from front to back: no header is believed, no byte accepted that we would not have written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from resvit_engines.bundle.manifest import FIX_DAMAGED, MANIFEST, SIGNATURE, Manifest, manifest_from_bytes
from resvit_engines.bundle.parts import BundledFile
from resvit_engines.bundle.zip_layout import LOCAL_MAGIC, Member, directory, local_header, read_local_header, total_size
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import leads_to_file, leads_to_folder

MANIFEST_LIMIT = 16 << 20
SIGNATURE_LIMIT = 64 << 10
_CHUNK = 1 << 20
_NAMED = 5


@dataclass(frozen=True)
class OpenBundle:
    """An open bundle of which the manifest's and the signature's bytes were read, and nothing else."""

    path: Path
    stream: BinaryIO
    head: bytes
    envelope: bytes | None
    contents_at: int

    def manifest(self) -> Manifest:
        """Parse the manifest, and hold the bundle's size against it."""
        manifest = manifest_from_bytes(self.head, self.path)
        expected = total_size([*self._first(), *((file.path, file.bytes) for file in manifest.files)])
        size = os.fstat(self.stream.fileno()).st_size
        if size != expected:
            raise ResvitError(
                f"{self.path} is not a whole bundle: it has {size:,} bytes where its manifest says {expected:,}.",
                FIX_DAMAGED,
            )
        return manifest

    def places(self, manifest: Manifest) -> dict[str, int]:
        """Where the bytes of each file begin, counted from the bundle's beginning."""
        found, at = {}, self.contents_at
        for file in manifest.files:
            at += len(local_header(Member(file.path, file.bytes, 0)))
            found[file.path] = at
            at += file.bytes
        return found

    def check(self, manifest: Manifest, into: Path | None = None, out: BinaryIO | None = None) -> list[Member]:
        """Read everything, compare it with the manifest, and write it ``into`` a folder if one is given.

        ``out`` gets the files with their headers, as they are read; they are right only if nothing is raised.
        """
        members = [
            Member(name, size, zlib.crc32(data))
            for (name, size), data in zip(self._first(), (self.head, self.envelope or b""), strict=False)
        ]
        if into is not None:
            (into / MANIFEST).write_bytes(self.head)
            if self.envelope is not None:
                (into / SIGNATURE).write_bytes(self.envelope)
        self.stream.seek(self.contents_at)
        for file in manifest.files:
            member, header = _next_header(self.stream, self.path)
            if header != local_header(Member(file.path, file.bytes, member.crc)):
                raise _rewritten(self.path, f"the header of {file.path}")
            members.append(member)
            if out is not None:
                out.write(header)
            self._check_file(file, member.crc, into, out)
        if self.stream.read() != directory(members):
            raise _rewritten(self.path, "the directory at its end")
        return members

    def _check_file(self, file: BundledFile, crc: int, into: Path | None, out: BinaryIO | None) -> None:
        digest, checksum = hashlib.sha256(), 0
        with contextlib.ExitStack() as owned:
            written = [] if out is None else [out]
            if into is not None:
                target = into / PurePosixPath(file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                written.append(owned.enter_context(target.open("xb")))
            for chunk in pieces(self.stream, file.bytes):
                digest.update(chunk)
                checksum = zlib.crc32(chunk, checksum)
                for stream in written:
                    stream.write(chunk)
        if digest.hexdigest() != file.sha256 or checksum != crc:
            raise ResvitError(f"{file.path} in {self.path} is damaged: it is not what the manifest says.", FIX_DAMAGED)

    def _first(self) -> list[tuple[str, int]]:
        signature = [] if self.envelope is None else [(SIGNATURE, len(self.envelope))]
        return [(MANIFEST, len(self.head)), *signature]


@contextmanager
def opened_bundle(path: Path) -> Iterator[OpenBundle]:
    """Open a bundle and read its manifest and signature, as bytes.

    Raises:
        ResvitError: INPUT where it is no bundle, or its beginning is damaged; SYSTEM where it may not be read.
    """
    if leads_to_folder(path):
        inside = sorted(file for pattern in ("*.resvit", "*/*.resvit") for file in path.glob(pattern))[:_NAMED]
        given = f"Give the .resvit file in it: {', '.join(map(str, inside))}." if inside else "Give a .resvit file."
        raise ResvitError(f"{path} is a folder, and no bundle.", given)
    if not leads_to_file(path):
        raise ResvitError(f"There is no bundle {path}.", "Give the path of a .resvit file.")
    try:
        stream = path.open("rb")
    except PermissionError as error:
        raise ResvitError(f"{path} cannot be read: {error}.", "Check its permissions.", ExitCode.SYSTEM) from error
    with stream:
        member, header = _next_header(stream, path)
        if member.name != MANIFEST:
            raise ResvitError(f"{path} is a zip file, but no bundle: it does not begin with {MANIFEST}.", FIX_DAMAGED)
        head = _small(stream, member, header, MANIFEST_LIMIT, path)
        contents_at = stream.tell()
        envelope = None
        following = stream.read(4)
        stream.seek(contents_at)
        if following == LOCAL_MAGIC:
            member, header = _next_header(stream, path)
            if member.name == SIGNATURE:
                envelope = _small(stream, member, header, SIGNATURE_LIMIT, path)
                contents_at = stream.tell()
        yield OpenBundle(path, stream, head, envelope, contents_at)


def _next_header(stream: BinaryIO, path: Path) -> tuple[Member, bytes]:
    try:
        return read_local_header(stream)
    except ValueError as error:
        raise ResvitError(f"{path} is not a whole bundle: {error}.", FIX_DAMAGED) from error


def _small(stream: BinaryIO, member: Member, header: bytes, limit: int, path: Path) -> bytes:
    """Read the bytes of manifest or signature, which are held in memory."""
    if header != local_header(member) or member.size > limit:
        raise _rewritten(path, f"the header of {member.name}")
    data = stream.read(member.size)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ResvitError(f"{path} is not a whole bundle: its {member.name} is damaged.", FIX_DAMAGED)
    return data


def pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes, or fewer where the file ends."""
    while size > 0 and (chunk := stream.read(min(_CHUNK, size))):
        size -= len(chunk)
        yield chunk


def _rewritten(path: Path, where: str) -> ResvitError:
    return ResvitError(
        f"{path} is refused: {where} is not what its manifest says; it is damaged, or another program rewrote it.",
        FIX_DAMAGED,
    )
