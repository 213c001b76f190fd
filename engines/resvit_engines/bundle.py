"""The bundle: one file that holds everything a device needs, the same bytes for the same content.

A ``.resvit`` file is a plain zip, stored without compression (engines and weights hardly compress, and stored bytes
depend on no zlib), with fixed timestamps and order. Its first member, ``manifest.json``, holds the digest and size
of every other. Any unzip reads it; this module also refuses what is damaged, foreign or hostile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_directory, atomic_file, pretty_json, sha256_bytes, sha256_file

MANIFEST = "manifest.json"
FORMAT = "resvit-bundle"
FORMAT_VERSION = 1
_RESERVED = ("format", "format_version", "files")
_MANIFEST_LIMIT = 16 << 20
_MEMBERS_LIMIT = 10_000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_UNIX = 3
_CHUNK = 1 << 20
# What zipfile raises for damage; the last four come from headers that contradict themselves.
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, struct.error, OverflowError, RuntimeError, ValueError)
_FIX_DAMAGED = "Copy the bundle again, and compare its sha256sum with the original's."


def write_bundle(path: Path, manifest: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """Write ``manifest`` and ``files`` (name in the bundle → content) to ``path``; the same inputs give the same bytes.

    Returns the manifest as written, with ``format``, ``format_version`` and ``files`` added.

    Raises:
        ResvitError: INPUT for a name that could leave the folder, a missing file, or one that changes meanwhile.
    """
    if taken := [key for key in _RESERVED if key in manifest]:
        raise ResvitError(f"The manifest may not set {', '.join(taken)}.", "The bundle fills these in itself.")
    _check_names([MANIFEST, *files], f"{path.name} cannot be written")
    ordered = sorted(files.items())
    full = {
        **manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": [_entry(name, content) for name, content in ordered],
    }
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        head = pretty_json(full)
        _add(archive, MANIFEST, head, sha256_bytes(head), len(head))
        for (name, content), entry in zip(ordered, full["files"], strict=True):
            _add(archive, name, content, entry["sha256"], entry["bytes"])
    return full


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a bundle's manifest. The other files are not looked at: see ``verify_bundle``.

    Raises:
        ResvitError: INPUT where ``path`` is no bundle, is damaged or truncated, or is of a newer format.
    """
    with _opened(path) as archive:
        return _manifest(archive, path)


def verify_bundle(path: Path) -> dict[str, Any]:
    """Check every file's size and digest against the manifest, and that nothing else is in the bundle.

    Returns the manifest.

    Raises:
        ResvitError: INPUT, naming the file that is damaged, missing or uninvited.
    """
    with _opened(path) as archive:
        manifest = _manifest(archive, path)
        for entry, info in _members(archive, manifest, path):
            with archive.open(info) as stream:
                _copy(stream, None, entry, path)
    return manifest


def extract_bundle(path: Path, into: Path) -> dict[str, Any]:
    """Unpack into the new folder ``into``, checking every file on the way; on any fault nothing is left there.

    Returns the manifest.

    Raises:
        ResvitError: INPUT as ``verify_bundle``, and where ``into`` exists and is not an empty folder.
    """
    if into.is_symlink() or (into.exists() and (not into.is_dir() or any(into.iterdir()))):
        raise ResvitError(f"{into} exists already and is not an empty folder.", "Name a folder that is not there yet.")
    with _opened(path) as archive:
        manifest = _manifest(archive, path)
        members = list(_members(archive, manifest, path))
        with atomic_directory(into) as partial:
            (partial / MANIFEST).write_bytes(archive.read(MANIFEST))
            for entry, info in members:
                file = partial / PurePosixPath(entry["path"])
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as stream, file.open("xb") as out:
                    _copy(stream, out, entry, path)
    return manifest


def _entry(name: str, content: Path | bytes) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"path": name, "bytes": len(content), "sha256": sha256_bytes(content)}
    if not content.is_file():
        raise ResvitError(f"{content}, which belongs into the bundle as {name}, is not there.", "Run its stage again.")
    return {"path": name, "bytes": content.stat().st_size, "sha256": sha256_file(content)}


def _add(archive: zipfile.ZipFile, name: str, content: Path | bytes, sha256: str, size: int) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = _UNIX
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = size  # decides on zip64 before the first byte
    digest = hashlib.sha256()
    with archive.open(info, "w") as out:
        if isinstance(content, bytes):
            digest.update(content)
            out.write(content)
        else:
            with content.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != sha256:
        raise ResvitError(
            f"The source of {name} changed while it was being bundled.", "Run again when nothing writes to it."
        )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise ResvitError(f"There is no bundle {path}.", "Give the path of a .resvit file.")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except PermissionError as error:
        raise ResvitError(f"{path} cannot be read: {error}.", "Check its permissions.", ExitCode.SYSTEM) from error
    except _ZIP_ERRORS as error:
        raise ResvitError(f"{path} is not a whole bundle: {error}.", _FIX_DAMAGED) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to where a damaged header points
            raise
        raise ResvitError(f"{path} is not a whole bundle: its headers are damaged.", _FIX_DAMAGED) from error


def _manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    infos = archive.infolist()
    if not infos or infos[0].filename != MANIFEST:
        raise ResvitError(f"{path} is a zip file, but no bundle: it does not begin with {MANIFEST}.", _FIX_DAMAGED)
    if infos[0].file_size > _MANIFEST_LIMIT or infos[0].compress_type != zipfile.ZIP_STORED:
        raise ResvitError(f"{path} has an oversized or compressed {MANIFEST}.", _FIX_DAMAGED)
    try:
        manifest = json.loads(archive.read(infos[0]))
    except (ValueError, RecursionError) as error:
        raise ResvitError(f"The {MANIFEST} of {path} does not read: {error}.", _FIX_DAMAGED) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ResvitError(f"{path} is a zip file, but no bundle of resvit-export.", "Give the path of a .resvit file.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ResvitError(
            f"{path} has bundle format {manifest.get('format_version')}; this program reads {FORMAT_VERSION}.",
            "Use the version of resvit-export that wrote it, or a newer one.",
        )
    if not _well_formed(manifest.get("files")):
        raise ResvitError(f"The {MANIFEST} of {path} lists its files wrongly.", _FIX_DAMAGED)
    return manifest


def _well_formed(entries: object) -> bool:
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for entry in entries
    )


def _members(
    archive: zipfile.ZipFile, manifest: dict[str, Any], path: Path
) -> Iterator[tuple[dict[str, Any], zipfile.ZipInfo]]:
    """Pair the manifest's files with the zip's, after everything that can be checked before reading was checked."""
    entries: list[dict[str, Any]] = manifest["files"]
    infos = archive.infolist()
    names = [info.filename for info in infos]
    refused = f"{path} is refused"
    if len(infos) > _MEMBERS_LIMIT:
        raise ResvitError(f"{refused}: it holds more than {_MEMBERS_LIMIT} files.", _FIX_DAMAGED)
    _check_names(names, refused)
    listed = [MANIFEST, *(entry["path"] for entry in entries)]
    _check_names(listed, refused)
    if odd := sorted({*names} ^ {*listed}):
        raise ResvitError(f"{refused}: {odd[0]!r} is in the zip or in its manifest, but not in both.", _FIX_DAMAGED)
    by_name = dict(zip(names, infos, strict=True))
    # Stored members cannot claim more bytes than the file has, so no small file unpacks to a large one.
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ResvitError(f"{refused}: its files claim more bytes than it has.", _FIX_DAMAGED)
    for entry in entries:
        info = by_name[entry["path"]]
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ResvitError(f"{refused}: {info.filename!r} is a link, compressed or encrypted.", _FIX_DAMAGED)
        if info.file_size != entry["bytes"]:
            raise _damaged(path, entry["path"])
        yield entry, info


def _check_names(names: list[str], refused: str) -> None:
    """Names are plain relative POSIX paths that mean the same file on every system, each once, none inside another."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f\x7f]", name):
            raise ResvitError(f"{refused}: the name {name!r} is not a plain relative path.", _FIX_DAMAGED)
        if name.casefold() in seen:
            raise ResvitError(f"{refused}: the name {name!r} comes twice.", _FIX_DAMAGED)
        seen.add(name.casefold())
    for name in names:
        if any(str(parent) in seen for parent in PurePosixPath(name.casefold()).parents):
            raise ResvitError(f"{refused}: {name!r} lies inside another file.", _FIX_DAMAGED)


def _copy(stream: Any, out: BinaryIO | None, entry: dict[str, Any], path: Path) -> None:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        if out is not None:
            out.write(chunk)
    if digest.hexdigest() != entry["sha256"]:
        raise _damaged(path, entry["path"])


def _damaged(path: Path, name: str) -> ResvitError:
    return ResvitError(f"{name} in {path} is damaged: it is not what the manifest says.", _FIX_DAMAGED)
