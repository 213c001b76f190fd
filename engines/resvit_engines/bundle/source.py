"""What is packed into a bundle: bytes, or a file that is still what it was when somebody recorded its digest."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from resvit_engines.bundle.parts import BundledFile
from resvit_engines.bundle.zip_layout import Member
from resvit_engines.errors import ResvitError
from resvit_engines.outside import open_at_once

_CHUNK = 1 << 20


@dataclass(frozen=True)
class RecordedFile:
    """A file and the SHA-256 that was recorded when it was made: nothing else is packed in its place."""

    path: Path
    sha256: str


Source = RecordedFile | Path | bytes
"""A bare path is packed as it is now: for files of which nothing was recorded."""


def described(name: str, source: Source) -> tuple[BundledFile, Member]:
    """What the manifest and the zip say of a source that is packed as ``name``.

    Raises:
        ResvitError: INPUT for a file that is not there, is no plain file, or is not the one that was recorded.
    """
    digest, crc, size = hashlib.sha256(), 0, 0
    for chunk in _chunks(name, source):
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
        size += len(chunk)
    if isinstance(source, RecordedFile) and digest.hexdigest() != source.sha256:
        raise ResvitError(
            f"{source.path} is not what was checked: it was changed after it was made, so it is not packed as {name}.",
            "Run the same command again: what was changed is made anew. Let nothing else write there.",
        )
    return BundledFile(name, size, digest.hexdigest()), Member(name, size, crc)


def copy_as_described(source: Source, file: BundledFile, out: BinaryIO) -> None:
    """Write a source that was ``described`` as ``file``. The bytes that are hashed are those that are written.

    Raises:
        ResvitError: INPUT where it is not any more what was described; then ``out`` is of no use.
    """
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(file.path, source):
        digest.update(chunk)
        size += len(chunk)
        out.write(chunk)
    if digest.hexdigest() != file.sha256 or size != file.bytes:
        raise ResvitError(
            f"The source of {file.path} changed while it was being bundled.", "Run again when nothing writes to it."
        )


def _chunks(name: str, source: Source) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    path = source.path if isinstance(source, RecordedFile) else source
    try:
        stream = open_at_once(path)
    except OSError as error:
        raise _not_there(path, name, f": {error.strerror}") from error
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise _not_there(path, name, " as a plain file")
        while chunk := stream.read(_CHUNK):
            yield chunk


def _not_there(path: Path, name: str, why: str) -> ResvitError:
    return ResvitError(f"{path}, which belongs into the bundle as {name}, is not there{why}.", "Run its stage again.")
