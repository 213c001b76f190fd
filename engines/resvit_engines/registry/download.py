"""A bundle as it comes from a registry: written in order into one file, which a later attempt goes on with.

The file holds the bundle from its beginning to where it came; what is there is read again before it is gone on with,
and nothing has the bundle's name before every file of it has the digest that is signed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.bundle.manifest import MANIFEST, SIGNATURE
from resvit_engines.bundle.parts import BundledFile
from resvit_engines.bundle.zip_layout import Member, directory, local_header, total_size
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors, make_folder
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.registry.choice import Chosen
from resvit_engines.registry.client import Client, wrong_bytes

_PIECE = 1 << 20
_SPARE = 16 << 20
"""Bytes of disk that stay free beside a download."""


@dataclass(frozen=True)
class Downloaded:
    """A whole bundle at ``path``; ``fetched`` bytes came now, ``kept`` were there from an earlier attempt."""

    path: Path
    fetched: int
    kept: int


def download(client: Client, chosen: Chosen, path: Path, reporter: Reporter = SILENT) -> Downloaded:
    """Fetch the files of a chosen bundle, and put them together as ``path``, byte for byte as it was pushed.

    After a lost connection, or an end by Ctrl-C, what came lies beside ``path``, and the same call goes on with it.
    It is removed where the disk is full, and where the registry sends other bytes than are signed.

    Raises:
        ResvitError: SYSTEM for a lost connection, a full disk, or another download to the same place; INPUT for wrong
            bytes.
    """
    with explain_os_errors(path):
        make_folder(path.parent)
        part = path.with_name(f".{path.name}.{chosen.digest[:12]}.part")
        with _held(part) as handle:
            _remove_others(part, path)
            work = _Part(handle, chosen)
            _require_space(path, work)
            try:
                for _ in reporter.track(work.filled(client), "pulling", work.total // _PIECE + 1):
                    pass
                os.fchmod(handle, 0o644)
                os.fsync(handle)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    part.unlink(missing_ok=True)
                raise
            except _WrongBytesError as error:
                part.unlink(missing_ok=True)
                raise error.refusal from error
            part.replace(path)
    return Downloaded(path, work.fetched, work.kept)


class _WrongBytesError(Exception):
    """What came is not what is signed."""

    def __init__(self, refusal: ResvitError) -> None:
        super().__init__(refusal.problem)
        self.refusal = refusal


class _Part:
    """The file that becomes the bundle; members are written in order, each header when its CRC-32 is known."""

    def __init__(self, handle: int, chosen: Chosen) -> None:
        self._handle = handle
        self._chosen = chosen
        self._first = [(MANIFEST, chosen.head), (SIGNATURE, chosen.envelope)]
        self.there = os.fstat(handle).st_size
        files = [(file.path, file.bytes) for file in chosen.manifest.files]
        self.total = total_size([*((name, len(data)) for name, data in self._first), *files])
        self.fetched = 0
        self.kept = 0
        self._told = 0

    def filled(self, client: Client) -> Iterator[None]:
        """Fetch what is missing; yields after every MiB, and at the end."""
        members, at = [], 0
        for name, data in self._first:
            member = Member(name, len(data), zlib.crc32(data))
            self._write(local_header(member) + data, at)
            members.append(member)
            at += len(local_header(member)) + len(data)
        for file in self._chosen.manifest.files:
            start = at + len(local_header(Member(file.path, file.bytes, 0)))
            crc = yield from self._file(client, file, start)
            member = Member(file.path, file.bytes, crc)
            self._write(local_header(member), at)
            members.append(member)
            at = start + file.bytes
        os.ftruncate(self._handle, at)
        self._write(directory(members), at)
        yield

    def _file(self, client: Client, file: BundledFile, start: int) -> Generator[None, None, int]:
        """Fetch one file to ``start``; returns its CRC-32. What an earlier attempt left is trusted only as a whole."""
        kept = min(max(self.there - start, 0), file.bytes)
        for have in dict.fromkeys((kept, 0)):
            digest, crc, at = hashlib.sha256(), 0, have
            for piece in self._read(start, have):
                digest.update(piece)
                crc = zlib.crc32(piece, crc)
            for piece in client.blob(f"sha256:{file.sha256}", file.bytes, have):
                digest.update(piece)
                crc = zlib.crc32(piece, crc)
                self._write(piece, start + at)
                at += len(piece)
                self.fetched += len(piece)
                while self.fetched // _PIECE > self._told:
                    self._told += 1
                    yield
            if digest.hexdigest() == file.sha256:
                self.kept += have
                return crc
        refusal = wrong_bytes(f"{file.path} in {client.reference}", f"sha256:{file.sha256}")
        raise _WrongBytesError(refusal)

    def _read(self, start: int, size: int) -> Iterator[bytes]:
        while size > 0 and (piece := os.pread(self._handle, min(size, _PIECE), start)):
            yield piece
            start += len(piece)
            size -= len(piece)

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._handle, view, at)
            view, at = view[done:], at + done


@contextlib.contextmanager
def _held(part: Path) -> Iterator[int]:
    """The descriptor of the file, for this process alone."""
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ResvitError(f"{part} is no plain file.", "Remove it: it is made anew.", ExitCode.SYSTEM)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResvitError(
                f"Another process is pulling to {part.parent}.", "Wait for it to end.", ExitCode.SYSTEM
            ) from error
        yield handle
    finally:
        os.close(handle)


def _remove_others(part: Path, path: Path) -> None:
    """Remove what is left of other bundles of that name, which nobody is fetching: the tag has moved since."""
    for other in part.parent.iterdir():
        ours = other.name.startswith(f".{path.name}.") and other.name.endswith(".part")
        if ours and other != part and not other.is_symlink() and other.is_file():
            with contextlib.suppress(OSError, ResvitError), _held(other):
                other.unlink()


def _require_space(path: Path, work: _Part) -> None:
    free, missing = shutil.disk_usage(path.parent).free, max(work.total - work.there, 0)
    if free < missing + _SPARE:
        raise ResvitError(
            f"The disk is too small: {missing >> 20} MiB are still to be fetched to {path.parent}, and "
            f"{free >> 20} MiB are free.",
            "Free some space, or choose another place.",
            ExitCode.SYSTEM,
        )
