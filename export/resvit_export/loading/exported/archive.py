"""The members of an archive: which there may be, and their bytes. No library but Python's own sees the file."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_export.loading.exported.errors import NotAllowedError, quoted

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
TENSOR_FILES = {"weights": "weight", "constants": "tensor"}
"""Kinds of tensors and what their members' names begin with."""
_MEMBERS = re.compile(
    r"data/weights/(weight_\d{1,7}|model_weights_config\.json)|data/constants/(tensor_\d{1,7}|model_constants_config\.json)"
    r"|models/model\.json|archive_format|archive_version|byteorder"
)
_UNREAD = re.compile(r"data/sample_inputs/model\.pt|extra/.*|\.data/\w+|version|\.\w+", re.DOTALL)
"""What torch writes besides, and nothing here needs."""
_SAID = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
_JSON_LIMIT = 128 << 20  # bytes; the largest networks' graphs take about 10 MiB
_SAMPLES_LIMIT = 1 << 30  # bytes
_MEMBER_LIMIT = 100_000
_PIECE = 1 << 24  # bytes


@dataclass(frozen=True)
class Archive:
    """An open archive. All reading raises ``NotAllowedError`` where a member is absent, damaged or too large."""

    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]
    """By name without the archive's own."""

    def require_known_members(self) -> None:
        """Refuse members that are no graph, tensor or label: libraries, pickles, objects of custom classes."""
        for name in self.members:
            if not (_MEMBERS.fullmatch(name) or _UNREAD.fullmatch(name)):
                raise NotAllowedError(f"it holds {quoted(name)}")
        for name, said in _SAID.items():
            if name in self.members and (given := self._read(name, 64)) != said:
                raise NotAllowedError(f"its {name} is {quoted(given)} and not {quoted(said)}")
        if MODEL not in self.members:
            raise NotAllowedError(f"it has no {MODEL} (a format older than torch 2.8 is pickled as a whole)")

    def sample_inputs(self) -> bytes:
        """The pickle of sample inputs as it is, empty where there is none."""
        return self._read(SAMPLES, _SAMPLES_LIMIT) if SAMPLES in self.members else b""

    def json(self, name: str) -> Any:
        """The value of a JSON member, of any form; no key twice, no NaN."""
        data = self._read(name, _JSON_LIMIT)
        try:
            return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise NotAllowedError(f"its {name} is no JSON that can be read: {quoted(str(error))}") from error

    def size(self, name: str) -> int:
        """The bytes of a member."""
        return self._info(name).file_size

    def fill(self, name: str, buffer: memoryview) -> None:
        """Read a member into ``buffer``, which is as large as it."""
        with _reading(name), self.file.open(self._info(name)) as member:
            filled = 0
            while piece := member.read(_PIECE):
                buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
        if filled != len(buffer):
            raise NotAllowedError(f"its {name} is shorter than it says")

    def _read(self, name: str, limit: int) -> bytes:
        if (size := self._info(name).file_size) > limit:
            raise NotAllowedError(f"its {name} has {size:,} bytes, and {limit:,} at most are read")
        with _reading(name):
            return self.file.read(self._info(name))

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self.members:
            raise NotAllowedError(f"it has no {name}")
        return self.members[name]


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an archive as ``torch.export.save`` lays it out: one folder, nothing compressed, nothing twice.

    Raises ``NotAllowedError`` for any other; which members there are is not looked at.
    """
    with path.open("rb") as raw:
        # What stands before an archive is invisible in it, and can make the same file a library or a program.
        if raw.read(4) != b"PK\x03\x04":
            raise NotAllowedError("it does not begin as an archive")
        with _reading("its end"):
            file = zipfile.ZipFile(raw)
        with file:
            yield Archive(file, _members(file, path.stat().st_size))


def _members(file: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    infos = file.infolist()
    if len(infos) > _MEMBER_LIMIT:
        raise NotAllowedError(f"it has {len(infos):,} members, and {_MEMBER_LIMIT:,} at most are read")
    for info in infos:
        root, _, name = info.filename.partition("/")
        if root != infos[0].filename.partition("/")[0] or not name or name in members:
            raise NotAllowedError(f"its member {quoted(info.filename)} lies where torch writes none")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise NotAllowedError(f"its member {quoted(name)} is compressed or encrypted")
        members[name] = info
    # Members that share bytes would make a small file a large one.
    if sum(info.file_size for info in infos) > size:
        raise NotAllowedError("its members overlap")
    return members


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise NotAllowedError(f"it is truncated or damaged at {quoted(name)}: {quoted(str(error))}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
