"""Reading files that decide what is trusted: plain files of few bytes that nobody else can change.

Owner and permissions are those of the open file that is read, so that no other file is looked at than is used.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import open_at_once, read_to_end


def read_guarded(path: Path, most: int) -> bytes:
    """The content of a file of at most ``most`` bytes that ``require_guarded`` lets pass.

    Raises:
        ResvitError: UNTRUSTED for anything else, a file that is not there or may not be read among it.
    """
    data, status = read_small(path, most)
    _require_own(path, status)
    return data


def require_guarded(folder: Path) -> None:
    """Refuse a folder in which somebody else than root and who runs this can put or change files.

    Somebody else is its owner, anyone where its mode says so, and its group unless that is its owner's alone; and
    who may rename a folder on the way to it.

    Raises:
        ResvitError: UNTRUSTED.
    """
    _require_own(folder, None)


def read_small(path: Path, most: int) -> tuple[bytes, os.stat_result]:
    """The content of a plain file of at most ``most`` bytes, and what the system says of the file that was read.

    Raises:
        ResvitError: UNTRUSTED where it is no plain file, is longer, is not there or may not be read.
    """
    try:
        with open_at_once(path) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise untrusted(f"{path} is not a plain file.", "Put the file itself there.")
            data = read_to_end(stream, most)
    except (OSError, ValueError) as error:
        lost = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink()
        reason = "it is a link that leads nowhere" if lost else getattr(error, "strerror", None) or str(error)
        raise untrusted(f"{path} cannot be read: {reason}.", "Put a file there that can be read.") from error
    if len(data) > most:
        raise untrusted(f"{path} is longer than the {most >> 10} KiB that it may have.", "Put the right file there.")
    return data, status


def text_from(data: bytes, path: Path) -> list[str]:
    """The lines of a file of plain text: UTF-8 that can be printed, each line ended by a line feed.

    Raises:
        ResvitError: UNTRUSTED for anything else.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise untrusted(f"{path} is not a text file.", "Give a .pub file of resvit-export keygen.") from error
    if text.startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
        raise untrusted(f"{path} begins with a byte order mark.", f"Take it away: sed -i '1s/^...//' {path}")
    if "\r" in text:
        raise untrusted(f"{path} has line ends of Windows.", f"Take them away: sed -i 's/\\r$//' {path}")
    lines = text.split("\n")
    for line in lines:
        if not line.isprintable():
            raise untrusted(f"{path} has a line with control characters: {line[:70]!r}.", "Write it as plain text.")
    return lines


def untrusted(problem: str, fix: str) -> ResvitError:
    """The error for what cannot be trusted."""
    return ResvitError(problem, fix, ExitCode.UNTRUSTED)


def _require_own(path: Path, status: os.stat_result | None) -> None:
    """Refuse what another user owns or can write to, or can exchange; ``status`` is that of an open file."""
    try:
        status = status or path.stat()
        for owner in {status.st_uid, path.lstat().st_uid} - _owners():  # of a link too: it could lead elsewhere
            raise untrusted(
                f"{path} belongs to another user ({_name_of(owner)}), who so decides what is trusted.",
                f"If it is right, take it over: sudo chown {_name_of(os.geteuid())} {path}",
            )
        _require_unwritable(path, status, on_the_way=False)
        for folder in _folders_to(path):
            _require_unwritable(folder, folder.stat(), on_the_way=True)
    except OSError as error:
        raise untrusted(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error


def _require_unwritable(path: Path, status: os.stat_result, *, on_the_way: bool) -> None:
    if on_the_way and status.st_mode & stat.S_ISVTX:
        return  # as of /tmp: only the owner of a file renames or removes it
    if status.st_mode & stat.S_IWOTH:
        raise untrusted(
            f"Anyone on this machine may write to {path}, and so decide what is trusted.", f"Run: chmod o-w {path}"
        )
    if status.st_mode & stat.S_IWGRP and not _is_of_one(status):
        raise untrusted(
            f"Others in its group may write to {path}, and so decide what is trusted.", f"Run: chmod g-w {path}"
        )


def _is_of_one(status: os.stat_result) -> bool:
    """Whether the group is its owner's alone, as many systems make one for each user."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return group.gr_name == owner and set(group.gr_mem) <= {owner}


def _folders_to(path: Path) -> Iterator[Path]:
    """Every folder on the way, as it is named and as links lead."""
    named, real = (Path(function(path)) for function in (os.path.abspath, os.path.realpath))
    yield from dict.fromkeys((*named.parents, *real.parents))


def _owners() -> set[int]:
    """Root, whoever runs this, and who became root by sudo: they decide anyway."""
    by_sudo = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else ""
    return {0, os.geteuid(), *([int(by_sudo)] if by_sudo.isascii() and by_sudo.isdigit() else [])}


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
