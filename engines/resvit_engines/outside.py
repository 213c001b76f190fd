"""Reading what others wrote: every file and every JSON text within bounds of size, depth and time.

``open_outside`` opens plain files alone: a pipe, a socket or a device (``/dev/zero``) would wait or never end.
``read_outside`` takes no more than it is told, however large a file grows meanwhile. ``json_from_outside`` is the one
parser of JSON that was written elsewhere. Each raises ``ResvitError`` and nothing else for what a file can cause.

Imports the standard library and ``errors`` only, and reads on Python 3.8 too, as ``machine`` does.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError

TEXT_MOST = 64 << 20
"""Bytes of the longest text that is read at once, such as a record, a recipe or a list of layers."""
FILE_MOST = 64 << 30
"""Bytes of the largest file that is read from its beginning to its end, such as one of weights."""
_PIECE = 1 << 20
DEPTH_MOST = 64
"""How deep lists and objects may lie in each other."""
MAKE_AGAIN = "It is damaged, or of another version: make it again with this one."
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expanded(path: str | Path) -> Path:
    """A path with ``~`` and ``~user`` as the folder that they stand for.

    Raises:
        ResvitError: INPUT where nobody has that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ResvitError(f"{path} leads nowhere: {error}", "Write the whole path.") from error


def leads_to_file(path: Path) -> bool:
    """Whether a plain file is at ``path``; not where no file system could hold such a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def leads_to_folder(path: Path) -> bool:
    """Whether a folder is at ``path``; not where no file system could hold such a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def open_at_once(path: Path) -> io.BufferedReader:
    """Open for reading in binary whatever is no folder, without waiting: neither a pipe's writer nor a line is needed.

    Raises what ``open`` raises. Whether it is a plain file is told by ``os.fstat`` of what was opened.
    """
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))


def kind_of_file(mode: int) -> str:
    """What something with this ``st_mode`` is where it is no plain file: a folder, a pipe, a socket or a device."""
    return next((words for test, words in _KINDS if test(mode)), "no file")


def open_outside(path: Path, what: str = "") -> io.BufferedReader:
    """Open a plain file for reading in binary; never waits for somebody to write to it. ``what`` names it in errors.

    Raises:
        ResvitError: INPUT where there is none or it is something else, SYSTEM where it may not be read.
    """
    name = what or str(path)
    try:
        stream = open_at_once(path)
    except FileNotFoundError as error:
        problem = f"{what[0].upper()}{what[1:]} does not exist." if what else f"There is no file {path}."
        raise ResvitError(problem, "Check the path.") from error
    except PermissionError as error:
        raise ResvitError(
            f"{name} cannot be read: {error.strerror}.", "Change its permissions.", ExitCode.SYSTEM
        ) from error
    except IsADirectoryError as error:
        raise _no_plain_file(name, stat.S_IFDIR) from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file system can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResvitError(f"{name} cannot be read: {reason}.", "Give the path of a file.") from error
    mode = os.fstat(stream.fileno()).st_mode
    if not stat.S_ISREG(mode):
        stream.close()
        raise _no_plain_file(name, mode)
    return stream


def require_size(stream: io.BufferedReader, most: int, name: str) -> None:
    """Refuse an opened file of more than ``most`` bytes; ``name`` stands for it in errors. Raises ``ResvitError``."""
    size = os.fstat(stream.fileno()).st_size
    if size > most:
        raise ResvitError(
            f"{name} is longer than the {_size(most)} that such a file may have.", "Give the file that was meant."
        )


def _no_plain_file(name: str, mode: int) -> ResvitError:
    return ResvitError(f"{name} is {kind_of_file(mode)}, and not a file.", "Give the path of a file.")


def read_to_end(stream: io.BufferedReader, most: int) -> bytes:
    """The rest of an opened file: ``most`` bytes and one more, where it has them, by which the caller sees its excess.

    Memory is taken for what the file holds: ``read(most)`` would reserve ``most`` bytes before it looks.
    """
    parts: list[bytes] = []
    wanted, left = os.fstat(stream.fileno()).st_size + 1, most + 1
    while left and (part := stream.read(min(max(wanted, _PIECE), left))):
        parts.append(part)
        left -= len(part)
        wanted = _PIECE
    return b"".join(parts)


def read_outside(path: Path, most: int = TEXT_MOST, what: str = "") -> bytes:
    """The whole content of a plain file of at most ``most`` bytes; ``what`` names it in errors.

    Raises:
        ResvitError: as ``open_outside``; INPUT where it is longer, SYSTEM where the disk fails.
    """
    name = what or str(path)
    with open_outside(path, what) as stream:
        try:
            require_size(stream, most, name)
            data = read_to_end(stream, most)
        except OSError as error:
            raise ResvitError(
                f"{name} cannot be read: {error.strerror}.", "Check the disk that it lies on.", ExitCode.SYSTEM
            ) from error
    if len(data) > most:
        raise ResvitError(
            f"{name} is longer than the {_size(most)} that such a file may have.", "Give the file that was meant."
        )
    return data


def text_from_outside(data: bytes, where: str, fix: str = MAKE_AGAIN) -> str:
    """``data`` as UTF-8 text, with or without a byte order mark; ``where`` names it in errors.

    Raises:
        ResvitError: INPUT, with ``fix``, where it is none.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ResvitError(
            f"{where} is UTF-16, as Windows' PowerShell writes with `>`.",
            "Save it as UTF-8: in an editor, or with `| Out-File -Encoding utf8`.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ResvitError(f"{where} is not UTF-8: line {line} holds other bytes.", fix) from error


def json_from_outside(data: bytes, where: str, fix: str = MAKE_AGAIN) -> Any:
    """Parse JSON as RFC 8259 has it, no deeper than ``DEPTH_MOST``; ``where`` names it in errors.

    Raises:
        ResvitError: INPUT, with ``fix``, where it is anything else.
    """
    text = text_from_outside(data, where, fix)
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        deep = _deeper_than(value, DEPTH_MOST)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise ResvitError(f"{where} does not read as JSON: {error}.", fix) from error
    if deep:
        raise ResvitError(f"{where} does not read: it nests lists and objects more than {DEPTH_MOST} deep.", fix)
    return value


def number_from_environment(name: str, usual: float, most: float = 1e6) -> float:
    """The number above 0 that an environment variable holds, ``usual`` where it is not set or empty.

    Raises:
        ResvitError: INPUT where it holds anything else.
    """
    text = os.environ.get(name, "")
    if not text.strip():
        return usual
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise ResvitError(f"{name} is {text!r}, and not a number above 0, up to {most:g}.", f"Set it, or unset {name}.")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _deeper_than(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        holders = [item for item in level if isinstance(item, (dict, list))]
        if not holders:
            return False
        level = [inner for item in holders for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, (dict, list)) for item in level)


def _size(count: int) -> str:
    if count >= 1 << 30:
        return f"{count >> 30} GiB"
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count} bytes"
