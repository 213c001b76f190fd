"""Files that are never half-written, and digests of what they hold."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError

_CHUNK = 1 << 20
MOST_TEXT = 16 << 20
"""Bytes of a text that somebody wrote by hand."""


def canonical_json(value: Any) -> bytes:
    """Serialise to the one byte string that equal values share: sorted keys, no spaces, no NaN.

    Raises ``ValueError`` for NaN or infinity, which JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def pretty_json(value: Any) -> bytes:
    """Serialise for people to read: sorted keys, two-space indent, final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path, what: str, fix: str, most: int = MOST_TEXT) -> str:
    """A text that somebody wrote by hand: UTF-8, with or without the mark that Windows' editors put first.

    ``what`` names it in messages. Raises ``ResvitError`` for what is no file, is longer than ``most`` bytes, cannot be
    read or is of another encoding, with ``fix`` where nothing more is known; ``FileNotFoundError`` is the caller's.
    """
    try:
        if path.exists() and not path.is_file():
            raise ResvitError(f"{what} {path} is not a file.", fix)
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ResvitError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}.", fix) from error
    if len(data) > most:
        raise ResvitError(f"{what} {path} is longer than {most >> 20} MiB.", fix)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ResvitError(
            f"{what} {path} is UTF-16, as Windows' PowerShell writes with `>`.",
            "Save it as UTF-8: in an editor, or with `| Out-File -Encoding utf8`.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ResvitError(f"{what} {path} is not UTF-8: line {line} holds other bytes.", "Save it as UTF-8.") from error


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing ``path`` into a problem and a fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = _free_mib(path)
            raise ResvitError(
                f"The disk is full: {path} could not be written ({free} MiB free). Nothing was damaged.",
                "Free some space and run the same command again; finished stages are kept.",
                ExitCode.SYSTEM,
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResvitError(
                f"{path} cannot be written: {os.strerror(error.errno or 0)}.",
                "Choose a folder that you may write to, or change its permissions.",
                ExitCode.SYSTEM,
            ) from error
        if _on_the_way(error, path):
            raise ResvitError(
                f"{path} cannot be written: {os.strerror(error.errno or 0)}.",
                "Check that the path leads to a folder that exists, or can be made.",
                ExitCode.SYSTEM,
            ) from error
        raise


def _on_the_way(error: OSError, path: Path) -> bool:
    """Whether the error is about a folder that leads to ``path``, and not about some other file read meanwhile."""
    named = error.filename if isinstance(error.filename, str) else ""
    return bool(named) and (Path(named) in (path, *path.parents) or Path(named).parent == path.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, it becomes ``path`` in one step.

    A kill at any moment leaves the old file or the new one, never a part of either.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o666 & ~_umask())
            _sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds all of it or is left as it was."""
    with atomic_file(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; when the block ends well, it becomes ``path`` in one step.

    A complete ``path`` that exists already is replaced.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield partial
            partial.chmod(0o777 & ~_umask())
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _free_mib(path: Path) -> int:
    folder = path if path.is_dir() else path.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20
