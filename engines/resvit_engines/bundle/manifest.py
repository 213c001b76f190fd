"""The manifest of a bundle: what it must look like before anything in it is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from resvit_engines.bundle.zip_layout import NAME_LIMIT
from resvit_engines.errors import ResvitError

MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
FORMAT = "resvit-bundle"
FORMAT_VERSION = 2
FIX_DAMAGED = "Copy the bundle again, and compare its sha256sum with the original's."
_MEMBERS_LIMIT = 10_000
_DIGEST = re.compile(r"[0-9a-f]{64}")


def manifest_from_bytes(data: bytes, what: object) -> dict[str, Any]:
    """Parse a manifest and check its form; ``what`` names the bundle in messages.

    Raises:
        ResvitError: INPUT where it is none, is of another format, or its list of files is malformed.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"The {MANIFEST} of {what} does not read: {error}.", FIX_DAMAGED) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ResvitError(f"{what} is a zip file, but no bundle of resvit-export.", "Give the path of a .resvit file.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ResvitError(
            f"{what} has bundle format {manifest.get('format_version')}; this program reads {FORMAT_VERSION}.",
            "Use the version of resvit-export that wrote it, or a newer one.",
        )
    entries = manifest.get("files")
    if not _well_formed(entries):
        raise ResvitError(f"The {MANIFEST} of {what} lists its files wrongly.", FIX_DAMAGED)
    check_names([MANIFEST, SIGNATURE, *(entry["path"] for entry in manifest["files"])], f"{what} is refused")
    release_of(manifest, what)
    return manifest


def release_of(manifest: Mapping[str, Any], what: object) -> int:
    """The number of the release, which only grows: a device takes no lower one than it has had. 1 unless given."""
    release = manifest.get("release", 1)
    if not isinstance(release, int) or isinstance(release, bool) or not 0 <= release < 1 << 53:
        raise ResvitError(f"{what} has the release {release!r}, which is no whole number.", "Give one, such as 7.")
    return release


def check_names(names: Sequence[str], refused: str) -> None:
    """Names are plain relative POSIX paths that mean the same file on every system, each once, none inside another.

    Raises:
        ResvitError: INPUT, beginning with ``refused``.
    """
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        odd = any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 200 for part in parts)
        if odd or re.search(r"[\\:\x00-\x1f\x7f\ud800-\udfff]", name) or len(name.encode()) > NAME_LIMIT:
            raise ResvitError(f"{refused}: the name {name[:200]!r} is not a plain relative path.", FIX_DAMAGED)
        if name.casefold() in seen:
            raise ResvitError(f"{refused}: the name {name!r} comes twice.", FIX_DAMAGED)
        seen.add(name.casefold())
    for name in names:
        if any(str(parent) in seen for parent in PurePosixPath(name.casefold()).parents):
            raise ResvitError(f"{refused}: {name!r} lies inside another file.", FIX_DAMAGED)


def _well_formed(entries: object) -> bool:
    """Whether this is a sorted list of names, sizes and digests."""
    return (
        isinstance(entries, list)
        and len(entries) <= _MEMBERS_LIMIT
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("path"), str)
            and type(entry.get("bytes")) is int
            and 0 <= entry["bytes"] < 1 << 53
            and isinstance(entry.get("sha256"), str)
            and _DIGEST.fullmatch(entry["sha256"]) is not None
            for entry in entries
        )
        and [entry["path"] for entry in entries] == sorted(entry["path"] for entry in entries)
    )
