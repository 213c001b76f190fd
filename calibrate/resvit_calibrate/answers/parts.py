"""Answers that are kept while the rest is still asked: a validation that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from resvit_calibrate.readers.user.code import Reads, changed_since
from resvit_engines.errors import ResvitError
from resvit_engines.files import pretty_json, remove, sha256_bytes, sha256_file, write_atomic
from resvit_engines.outside import read_outside
from resvit_engines.records import Record, record_from_file

FOLDERS_MOST = 8
"""Unfinished askings of which parts are kept beside each other; of more, the oldest go."""
_PART_MOST = 16 << 30
"""Bytes of the longest part that is read."""


class _Saved(Protocol):
    """Answers that write themselves."""

    def __len__(self) -> int: ...

    def save(self, path: Path) -> None: ...


@dataclass(frozen=True)
class PartRecord:
    """What is known of one part: its images ``first`` to ``last`` - 1, and the digest of the file with the answers.

    ``left_out`` are the images that broke while they were decoded, by their place in the set, with the reason.
    ``reads`` and ``unseen`` are what the user's metric had read by then (see ``Reads``).
    """

    key: str
    first: int
    last: int
    sha256: str
    left_out: Mapping[int, str]
    reads: Mapping[str, str]
    unseen: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        left_out = {str(place): reason for place, reason in self.left_out.items()}
        return {**vars(self), "left_out": left_out, "reads": dict(self.reads), "unseen": list(self.unseen)}

    @classmethod
    def from_json(cls, record: Record) -> PartRecord:
        """Read what ``to_json`` wrote; ``ResvitError`` INPUT, naming the key, for anything else."""
        left_out = record.texts_by_name("left_out")
        for place in left_out:
            if not place.isascii() or not place.isdecimal() or len(place) > 12:
                raise record.refusal("left_out", "an object of places and reasons")
        first = record.whole("first")
        return cls(
            key=record.sha256("key"),
            first=first,
            last=record.whole("last", first + 1),
            sha256=record.sha256("sha256"),
            left_out={int(place): reason for place, reason in left_out.items()},
            reads=record.texts_by_name("reads"),
            unseen=record.texts("unseen"),
        )


@dataclass(frozen=True)
class PartFiles:
    """One part as the bytes of its two files: the answers to the images from number ``first`` on, and their record."""

    first: int
    answers: bytes
    record: bytes


class Parts:
    """The parts of one network's answers, in a folder of their own; ``key`` says what they are answers of and to.

    Each part is a file of answers, which its record, written behind it, makes one. Together they take the room that the
    answers take in the end, and are removed when these are there.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def read(self, load: Callable[[bytes, str], Any]) -> list[tuple[PartRecord, Any]]:
        """The parts from the first image on, each with its answers as ``load`` reads them.

        What is damaged, of another key, or was made with a file that is not the same now is left, with all behind it:
        those images are asked again.
        """
        found: list[tuple[PartRecord, Any]] = []
        same: dict[str, str] = {}
        end = 0
        while (part := self._whole(end, same)) is not None:
            record, data = part
            try:
                answers = load(data, str(self._answers_at(end)))
            except ResvitError:
                break
            if len(answers) != record.last - record.first:
                break
            found.append((record, answers))
            end = record.last
        return found

    def kept(self) -> list[PartRecord]:
        """All parts that are whole, wherever they begin; what ``read`` would leave is none."""
        names = [path.stem for path in self.folder.glob("*.json")]
        firsts = sorted(int(name) for name in names if name.isascii() and name.isdecimal() and len(name) <= 12)
        same: dict[str, str] = {}
        parts = (self._whole(first, same) for first in firsts)
        return [part[0] for part in parts if part is not None]

    def _whole(self, first: int, same: dict[str, str]) -> tuple[PartRecord, bytes] | None:
        """The part that begins there with its bytes, unless it is damaged, of another key, or not of today's files.

        ``same`` are files that were found to be as they were, by digest, and gets those of this part.
        """
        if not (place := self._record_at(first)).exists():
            return None
        try:
            record = PartRecord.from_json(record_from_file(place))
            data = read_outside(self._answers_at(first), _PART_MOST)
            if record.key != self.key or record.first != first or sha256_bytes(data) != record.sha256:
                return None
            if changed_since({name: d for name, d in record.reads.items() if same.get(name) != d}) is not None:
                return None
        except ResvitError:
            return None
        same |= record.reads
        return record, data

    def write(self, answers: _Saved, first: int, left_out: Mapping[int, str], reads: Reads | None) -> None:
        """Keep the answers to the images from number ``first`` on.

        Raises:
            ResvitError: SYSTEM where the disk is full or the folder may not be written.
        """
        if not self.folder.exists():
            _make_room(self.folder.parent)
        place = self._answers_at(first)
        with contextlib.suppress(FileNotFoundError):
            self._record_at(first).unlink()  # the answers beside it are about to be others
        answers.save(place)
        read, unseen = (dict(reads.digests), tuple(sorted(reads.unseen))) if reads else ({}, ())
        last = first + len(answers)
        record = PartRecord(self.key, first, last, sha256_file(place), dict(left_out), read, unseen)
        write_atomic(self._record_at(first), pretty_json(record.to_json()))

    def files(self, first: int) -> PartFiles:
        """The part that begins with image ``first``, to be taken by a store elsewhere."""
        return PartFiles(first, self._answers_at(first).read_bytes(), self._record_at(first).read_bytes())

    def take(self, part: PartFiles) -> None:
        """Keep a part that was answered elsewhere; ``read`` checks it. Raises as ``write``."""
        if not self.folder.exists():
            _make_room(self.folder.parent)
        write_atomic(self._answers_at(part.first), part.answers)
        write_atomic(self._record_at(part.first), part.record)

    def remove(self) -> None:
        """Remove all parts, and the folder of all unfinished askings where it is empty then."""
        remove(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _record_at(self, first: int) -> Path:
        return self.folder / f"{first:09}.json"

    def _answers_at(self, first: int) -> Path:
        return self.folder / f"{first:09}.npz"


def _make_room(place: Path) -> None:
    """Leave the newest folders in ``place``, and room for one more."""
    with contextlib.suppress(FileNotFoundError):
        folders = sorted((path for path in place.iterdir()), key=lambda path: path.lstat().st_mtime)
        for folder in folders[: max(len(folders) - FOLDERS_MOST + 1, 0)]:
            remove(folder)
