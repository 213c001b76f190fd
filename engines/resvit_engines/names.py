"""Names that become paths: of bundles, models and targets, of files in a bundle, a stage or a job.

Whoever makes a path of a name that stands in a file asks here first. Imports the standard library and ``errors`` only,
and reads on Python 3.8 too, as ``machine`` does.
"""

from __future__ import annotations

import re

from resvit_engines.errors import ResvitError

NAME_MOST = 100
"""Characters of the longest name."""
FILE_NAME_MOST = 200
"""Bytes of the longest file name: file systems hold 255, and temporary names put some around it."""
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_MOST - 1}}}")
# Separators of any system, a drive's colon, control characters, and surrogates, which UTF-8 cannot hold.
_NO_FILE = re.compile(r"[/\\:\x00-\x1f\x7f\ud800-\udfff]")


def is_name(text: object) -> bool:
    """Whether this can name a bundle, a model or a target, and so a folder and a file on every system."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def require_name(text: object, what: str, most: int = NAME_MOST) -> str:
    """``text`` where it ``is_name`` of at most ``most`` characters; ``what`` begins the message.

    Raises:
        ResvitError: INPUT for anything else.
    """
    if isinstance(text, str) and is_name(text) and len(text) <= most:
        return text
    raise ResvitError(
        f"{what} {text!r:.210} is no name: folders and files are called by it.",
        f"Use 1 to {most} letters, digits, dots, dashes and underscores of ASCII, the first a letter or digit.",
    )


def is_file_name(text: object) -> bool:
    """Whether this names one file in whatever folder it is put, and leads to no other."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and not _NO_FILE.search(text)
        and len(text.encode()) <= FILE_NAME_MOST
    )


def is_relative_path(text: str, most: int = 1024) -> bool:
    """Whether this is a path of file names, joined by slashes, in at most ``most`` bytes: it stays in its folder."""
    return all(map(is_file_name, text.split("/"))) and len(text.encode()) <= most
