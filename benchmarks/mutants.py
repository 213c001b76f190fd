"""Data with something changed in it, and a watch on what reading it does."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CANARY = "resvit_canary"
"""A module that there is not: whoever looks for it, executed what the data says."""
PIECES = (
    b"\0", b"\n", b"\r\n", b" ", b":", b",", b"=", b"#", b'"', b"'", b"[", b"]", b"{", b"}", b"[" * 200,
    b"{\"a\":" * 200,
    b"../", b"/etc/passwd", b"\\", b"\x1b]0;owned\x07", "\u202e".encode(), b"\xef\xbb\xbf", b"\xff\xfe", b"\xff" * 8,
    b"\x7f\xff\xff\xff", b"-1", b"0", b"9" * 400, b"1e999", b"NaN", b"null", b"true", CANARY.encode(), b"PK\x03\x04",
)  # fmt: skip
TEXTS = (
    *("", " ", ".", "..", "../../x", "/etc/passwd", "C:\\x", "a/b", "-rf", "$(id)", "`id`", "x" * 5000, "\x00", "\n"),
    *("\x1b]0;owned\x07\x1b[2J", "\u202eb", "\ud800", "\udc80", "NaN", "1", "true", "none", "%s%n", "{}", CANARY),
)
VALUES: tuple[Any, ...] = (
    *TEXTS, None, True, False, 0, 1, -1, 2, 7, 255, 65536, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0,
    1e300, [], {}, [[]], [None], [0], {"a": 1}, {"": []}, [1.5, "x", None], ["a"] * 50,
)  # fmt: skip
"""What may stand anywhere in JSON that others wrote."""


def of_bytes(data: bytes, dice: random.Random, pieces: Sequence[bytes] = PIECES, most: int = 1 << 22) -> bytes:
    """``data`` with up to four places changed: a byte, a piece put in, a stretch left out, doubled, moved or zeroed."""
    for _ in range(dice.choice((1, 1, 2, 3, 4))):
        reach = len(data) + 1 if dice.random() < 0.5 else min(len(data) + 1, 1500)  # headers come first
        at, end = sorted(dice.randrange(reach) for _ in range(2))
        data = dice.choice(
            (
                data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
                data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
                data[:at] + dice.choice(pieces) + data[at:],
                data[:at] + data[end:],
                data[:end] + data[at:],
                data[:at] + data[end:] + data[at:end],
                data[:at] + bytes(end - at) + data[end:],
                data[:end],
            )
        )[:most]
    return data


def of_document(document: Any, dice: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """A JSON value with up to three places changed: another value, another name, one left out, or one added."""
    document = copy.deepcopy(document)
    for _ in range(dice.choice((1, 1, 2, 3))):
        holders = list(_holders(document))
        if not holders:
            return dice.choice(values)
        holder = dice.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        value = copy.deepcopy(dice.choice(values))
        how = dice.randrange(6) if keys else 5
        if how < 3:
            holder[dice.choice(keys)] = value
        elif how == 3:
            del holder[dice.choice(keys)]
        elif isinstance(holder, dict) and how == 4:
            holder[dice.choice(TEXTS)] = holder.pop(dice.choice(keys))
        elif isinstance(holder, dict):
            holder[dice.choice(TEXTS)] = value
        else:
            holder.insert(dice.randrange(len(holder) + 1), value)
    return document


def of_json(data: bytes, dice: random.Random) -> bytes:
    """JSON with places changed, as a document or as bytes."""
    if dice.random() < 0.3:
        return of_bytes(data, dice)
    text = json.dumps(of_document(json.loads(data), dice), ensure_ascii=dice.random() < 0.5)
    return text.encode(errors="surrogatepass")


def of_archive(data: bytes, dice: random.Random) -> bytes:
    """A zip archive with bytes changed, or a whole one of changed members."""
    if dice.random() < 0.4:
        return of_bytes(data, dice)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, contextlib.suppress(ValueError), zipfile.ZipFile(out, "w") as new:
        chosen = dice.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == chosen:
                content = of_json(content, dice) if content[:1] in b"{[" and content else of_bytes(content, dice)
                if dice.random() < 0.15:
                    continue
            kind = zipfile.ZIP_DEFLATED if dice.random() < 0.1 else zipfile.ZIP_STORED
            with contextlib.suppress(UserWarning, UnicodeError):
                new.writestr("a" + dice.choice(TEXTS) if dice.random() < 0.03 else name, content, kind)
    return out.getvalue()


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _holders(part)


_WRITES = re.compile(r"os\.(remove|rename|rmdir|mkdir|link|symlink|chmod|chown|truncate)|shutil\.rmtree")
_RUNS = re.compile(
    r"subprocess\..*|socket\.connect|pty\..*|os\.(system|exec|fork|forkpty|posix_spawn|spawn)|ctypes\.dlopen"
)


def _whole(arguments: tuple[Any, ...]) -> str:
    """The path that an audit event is about, below the open folder that it is relative to, if there is one."""
    name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else repr(arguments[0])
    holder = arguments[-1] if isinstance(arguments[-1], int) else -1
    relative = not name.startswith("/") and holder >= 0
    return f"{os.readlink(f'/proc/self/fd/{holder}')}/{name}" if relative else name  # noqa: PTH115


_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []
_installed: list[bool] = []


@contextlib.contextmanager
def listening(watcher: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Let ``watcher`` hear every audit event of this process; Python has no way to take a hook out again."""
    if not _installed:
        sys.addaudithook(lambda event, arguments: [each(event, arguments) for each in _watchers] and None)
        _installed.append(True)
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def watched(folder: Path, seen: list[str], libraries: Sequence[str] = ()) -> Iterator[None]:
    """Note in ``seen`` what is written outside of ``folder``, what is executed, and a look for ``CANARY``.

    Shared ``libraries`` that are loaded by name when they are first needed are not noted.
    """
    inside = (str(folder), "/dev/null")

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, mode, flags = arguments
            write = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if write and isinstance(name, (str, bytes, Path)) and not os.fsdecode(name).startswith(inside):
                seen.append(f"open {name!r:.200} {mode}")
        elif event == "import":
            if CANARY in str(arguments[0]):
                seen.append(f"import {arguments[0]!r:.200}")
        elif _WRITES.fullmatch(event):
            if not _whole(arguments).startswith(inside):
                seen.append(f"{event} {arguments[:2]!r:.200}")
        elif _RUNS.fullmatch(event) and not any(name in str(arguments[0]) for name in libraries):
            seen.append(f"{event} {arguments[:2]!r:.200}")

    with listening(note):
        yield
