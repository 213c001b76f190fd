"""Files that are never half-written, and digests of what they hold."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import FILE_MOST, kind_of_file, open_outside, require_size

_CHUNK = 1 << 20
OPEN_FILE, OPEN_FOLDER = 0o644, 0o755
"""Modes of what other users read as well, such as an installation: they are the same whatever the umask."""
_REMEDIES = (
    ((errno.ENOSPC, errno.EDQUOT), "Free some space and run the same command again; finished stages are kept."),
    (
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Choose a folder that you may write to, or change its permissions.",
    ),
    ((errno.ENOENT, errno.ENOTDIR), "Check that the path leads to a folder that exists, or can be made."),
    (
        (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO),
        "Something else is in its place: remove or rename it, or choose another path.",
    ),
    ((errno.ELOOP,), "It is a link that leads to itself, or one where none belongs: remove it."),
    ((errno.ENAMETOOLONG,), "Choose a shorter path."),
    ((errno.EMFILE, errno.ENFILE), "Too many files are open: raise the limit, for example with ulimit -n 4096."),
    ((errno.EIO, errno.ESTALE, errno.ENODEV), "Check the disk that it lies on."),
)
_NEVER = 0o002
"""Not even with a umask of 0 is anything written that everybody on the machine may change."""


def canonical_json(value: Any) -> bytes:
    """Serialise to the one byte string that equal values share: sorted keys, no spaces, no NaN.

    Raises ``ValueError`` for NaN or infinity, which JSON cannot hold.
    """
    return _utf8(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False))


def pretty_json(value: Any) -> bytes:
    """Serialise for people to read: sorted keys, two-space indent, final newline."""
    return _utf8(json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _utf8(text: str) -> bytes:
    # Names of files that are not UTF-8 hold surrogates. Written as \\udc80, which is how JSON writes them too, they
    # stay valid UTF-8, and reading gives the same name.
    return text.encode(errors="backslashreplace")


def sha256_bytes(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, read in 1 MiB pieces.

    Raises ``ResvitError`` where it is no file that can be read, or one of more than 64 GiB.
    """
    with open_outside(path) as stream:
        require_size(stream, FILE_MOST, str(path))
        return sha256_stream(stream)


def sha256_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left in a stream as 64 hexadecimal digits, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


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
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) or _on_the_way(error, path):
            raise ResvitError(
                f"{path} cannot be written: {os.strerror(error.errno or 0)}.", _remedy(error), ExitCode.SYSTEM
            ) from error
        raise


def refused(error: OSError) -> ResvitError:
    """What the operating system refused where nobody nearer could say: the file, why, and what to do about it."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    what = f"{' and '.join(names)} cannot be used: {reason}." if names else f"The operating system refused: {reason}."
    return ResvitError(what, _remedy(error), ExitCode.SYSTEM)


def _remedy(error: OSError) -> str:
    return next((fix for numbers, fix in _REMEDIES if error.errno in numbers), "Check the path, permissions and disk.")


def _on_the_way(error: OSError, path: Path) -> bool:
    """Whether the error is about a folder that leads to ``path``, and not about some other file read meanwhile."""
    named = error.filename if isinstance(error.filename, str) else ""
    return bool(named) and (Path(named) in (path, *path.parents) or Path(named).parent == path.parent)


@contextlib.contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, it becomes ``path`` in one step.

    A kill at any moment leaves the old file or the new one, never a part of either. The file has ``mode``, or what the
    umask leaves, and is never writable by everybody.
    """
    with explain_os_errors(path):
        make_folder(path.parent, None if mode is None else OPEN_FOLDER)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(mode if mode is not None else 0o666 & ~_umask())
            _sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write ``data`` so that ``path`` holds all of it or is left as it was; ``mode`` as in ``atomic_file``."""
    with atomic_file(path, mode) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; when the block ends well, it becomes ``path`` in one step.

    A complete ``path`` that exists already is replaced. Nothing in it is writable by everybody.
    """
    with explain_os_errors(path):
        make_folder(path.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield partial
            partial.chmod(0o777 & ~_umask())
            for file in partial.rglob("*"):
                if not file.is_symlink():
                    file.chmod(stat.S_IMODE(file.stat().st_mode) & ~_NEVER)
                if file.is_file():
                    _sync(file)
            remove(path)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def held_lock(path: Path, mode: int) -> Iterator[None]:
    """Hold the file of :func:`open_lock`; waits for whoever has it. Raises as that does."""
    lock = open_lock(path, mode)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def cache_folder(name: str) -> Path:
    """Where things of one kind are kept that cost nothing but time when they are removed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resvit" / name


def open_lock(path: Path, mode: int) -> int:
    """The descriptor of a file that one process holds at a time; it is made with ``mode`` where it is missing.

    Raises:
        ResvitError: SYSTEM where something else is in its place, or it may not be written.
    """
    with explain_os_errors(path):
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
        kind = os.fstat(lock).st_mode
        if stat.S_ISREG(kind):
            return lock
        os.close(lock)
        raise ResvitError(
            f"{path} is {kind_of_file(kind)}, where a file belongs.", "Remove it: it is made anew.", ExitCode.SYSTEM
        )


def remove(path: Path) -> None:
    """Remove what lies at ``path``, whatever it is; a link goes, and what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path, mode: int | None = None) -> None:
    """Make a folder and those on the way to it; what is there already stays as it is.

    Those that are made have ``mode``, or what the umask leaves, and are never writable by everybody.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(0o755, exist_ok=True)
        folder.chmod(mode if mode is not None else 0o777 & ~_umask())
    path.mkdir(exist_ok=True)  # raises where it is no folder


def open_modes(folder: Path) -> None:
    """Give everything below ``folder``, and it itself, the modes ``OPEN_FILE`` and ``OPEN_FOLDER``."""
    for at, _, files in os.walk(folder):
        Path(at).chmod(OPEN_FOLDER)
        for name in files:
            (Path(at) / name).chmod(OPEN_FILE)


def _umask() -> int:
    """The bits that a new file does not get."""
    current = os.umask(0)
    os.umask(current)
    return current | _NEVER


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _free_mib(path: Path) -> int:
    folder = path if path.is_dir() else path.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20
