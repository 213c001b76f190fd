"""Tar files of pictures as webdataset writes them, read where they lie: nothing is unpacked.

Members of one name up to its first dot are one sample (https://github.com/webdataset/webdataset): ``0001.jpg`` with
``0001.cls`` (a class by number or name) or ``0001.json`` (an object with ``label``). Where each member lies is kept in
memory, its bytes are read when they are asked for.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from resvit_calibrate.images.pixels import FILE_MOST, BrokenImage, FilePixels
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    counted,
    is_image,
    part_of_folder,
    split_folders,
)
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import expanded, json_from_outside, leads_to_folder, open_outside, text_from_outside

ENDING = ".tar"
_PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_HELD_BACK = re.compile(rf"(?<![a-z])({'|'.join(VALIDATION_NAMES)})")
_MOST_SHARDS, _MOST_MEMBERS = 100_000, 50_000_000
_ABOUT_MOST = 1 << 20
_CLASS_KEYS = ("label", "class", "cls", "class_id", "class_name", "target")
_FIX = (
    "Write plain tar files (not compressed) whose members belong together by name: NAME.jpg with NAME.cls, the class's "
    "number, or NAME.json, an object with `label`."
)


class _Member(NamedTuple):
    """Where the bytes of a member lie."""

    shard: int
    start: int
    size: int


class ShardPixels(FilePixels):
    """Pictures in tar files, each read from where it lies."""

    def __init__(self, name: str, shards: Sequence[Path], members: Sequence[_Member], titles: Sequence[str]) -> None:
        super().__init__(name, shards[0].parent, tuple(titles), None)
        self._shards, self._members = shards, members

    def bytes_of(self, index: int) -> bytes:
        """The bytes of one member."""
        try:
            return _bytes_at(self._shards, self._members[index], FILE_MOST)
        except ResvitError as error:
            raise BrokenImage(error.problem) from error


def named_shards(text: str) -> tuple[Path, ...]:
    """The tar files that ``train-{0000..0007}.tar`` or ``train-*.tar`` names, or one; none where a text names others.

    Raises ``ResvitError`` for a range that is none, and a compressed file.
    """
    if text.lower().endswith(_PACKED):
        raise ResvitError(f"{text} is compressed, and pictures are read from where they lie.", "Decompress it first.")
    found = _RANGE.search(text)
    if "*" in text and text.lower().endswith(ENDING):
        pattern = expanded(text)
        there = leads_to_folder(pattern.parent) and "*" not in str(pattern.parent)
        return tuple(sorted(pattern.parent.glob(pattern.name))[:_MOST_SHARDS]) if there else ()
    if found is None or not text.lower().endswith(ENDING):
        return (Path(text).expanduser(),) if text.lower().endswith(ENDING) else ()
    first, last = int(found.group(1)), int(found.group(2))
    if not 0 <= last - first < _MOST_SHARDS:
        raise ResvitError(f"{text} names {last - first + 1} files.", "Write the first and the last: {0000..0007}.")
    width = len(found.group(1))
    names = [f"{text[: found.start()]}{number:0{width}}{text[found.end() :]}" for number in range(first, last + 1)]
    return tuple(Path(name).expanduser() for name in names)


def shards_in(root: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The tar files of a folder, to train with and to validate with; all are the first where no name says which.

    They may lie in folders for both. Both are empty where the folder has pictures of its own, or no tar file.
    """
    halves = split_folders(root)
    if halves is not None:
        first, second = (_tars(half) for half in halves)
        return (first, second) if first and second else ((), ())
    found = _tars(root)
    train = tuple(path for path in found if any(name in path.name.lower() for name in TRAINING_NAMES))
    held = tuple(path for path in found if path not in train and _HELD_BACK.search(path.name.lower()))
    return (train, held) if train and held else (found, ())


def pixels_from_shards(shards: Sequence[Path], name: str) -> ShardPixels:
    """The pictures of tar files, each with its class where it has one.

    Raises ``ResvitError`` for what is no tar file or is cut short, a sample of two pictures, and samples without class.
    """
    pictures: list[_Member] = []
    titles: list[str] = []
    labels: list[str | None] = []
    left_out: Counter[str] = Counter()
    bare: list[str] = []
    for number, shard in enumerate(shards):
        for key, sample in _samples(shard, number).items():
            own = [ending for ending in sample if is_image(f"x.{ending}")]
            if len(own) > 1:
                raise ResvitError(f"{shard} has {key}.{own[0]} and {key}.{own[1]}: two pictures of one sample.", _FIX)
            about = next((ending for ending in ("cls", "json") if ending in sample), None)
            left_out.update(f".{ending}" for ending in sample if ending not in (*own, about))
            if not own:
                bare.append(f"{shard.name}/{key}")
                continue
            pictures.append(sample[own[0]])
            titles.append(f"{shard.name}/{key}.{own[0]}")
            labels.append(_class_in(shards, sample[about], f"{key}.{about} of {shard}") if about else None)
    if not pictures:
        raise ResvitError(f"{shortened([str(shard) for shard in shards])} holds no pictures.", _FIX)
    pixels = ShardPixels(name, shards, pictures, titles)
    notes = [f"members of {name} that are not read: {counted(left_out)}"] if left_out else []
    if bare:
        notes.append(f"{len(bare)} samples of {name} have no picture and are left out: {shortened(bare)}")
    pixels.notes = tuple(notes)
    if len(shards) == 1 and not any(labels):
        folders = _class_folders(titles, shards[0].name)
        if folders:
            labels = list(folders)
            said = shortened(sorted(set(folders)))
            pixels.notes += (f"{name} says no classes, and its pictures lie in folders: {said} are read as classes",)
    _label(pixels, labels)
    return pixels


def _class_folders(titles: Sequence[str], shard: str) -> list[str]:
    """The folder of each member where all lie in several, as class folders that were packed do; none elsewhere."""
    parts = [PurePosixPath(title.removeprefix(f"{shard}/")).parts[:-1] for title in titles]
    depth = 0
    while all(len(part) > depth for part in parts):
        names = {part[depth] for part in parts}
        if len(names) > 1:
            return [] if any(part_of_folder(name) for name in names) else [part[depth] for part in parts]
        depth += 1
    return []


def _label(pixels: ShardPixels, labels: list[str | None]) -> None:
    told = [label for label in labels if label is not None]
    if not told:
        return
    if len(told) < len(labels):
        bare = [title for title, label in zip(pixels.files, labels, strict=True) if label is None]
        raise ResvitError(
            f"{len(bare)} of {len(labels)} samples of {pixels.name} have no class: {shortened(bare)}.", _FIX
        )
    if all(re.fullmatch("[0-9]{1,6}", label) for label in told):
        pixels.labels = np.array([int(label) for label in told], np.int64)
    else:
        pixels.class_names = tuple(sorted(set(told)))
        places = {name: number for number, name in enumerate(pixels.class_names)}
        pixels.labels = np.array([places[label] for label in told], np.int64)
        pixels.num_classes = len(pixels.class_names)
    pixels.task = "classification"


def _samples(shard: Path, number: int) -> dict[str, dict[str, _Member]]:
    """The members of each sample by their endings, in the order of the file."""
    found: dict[str, dict[str, _Member]] = {}
    with open_outside(shard) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        try:
            for member in _members(stream):
                name = PurePosixPath(member.name).name
                stem, _, ending = name.partition(".")
                if not member.isreg() or member.issparse() or not stem or name.startswith("._"):
                    continue
                if member.offset_data + member.size > size:
                    raise ResvitError(f"{shard} is cut short: {member.name[:80]} reaches beyond its end.", _FIX)
                key, ending = str(PurePosixPath(member.name).with_name(stem)), ending.lower()
                if ending in found.setdefault(key, {}):
                    raise ResvitError(f"{shard} has {key[:80]}.{ending[:20]} twice.", _FIX)
                found[key][ending] = _Member(number, member.offset_data, member.size)
        except (ResvitError, MemoryError):
            raise
        # What tarfile raises for a damaged file has no end: TarError, ValueError, EOFError, OverflowError…
        except Exception as error:
            raise ResvitError(f"{shard} is no usable tar file: {error}.", _FIX) from error
    return found


def _members(stream: Any) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for _ in range(_MOST_MEMBERS):
            member = archive.next()
            if member is None:
                # Behind the first member, tarfile takes a header that is damaged or cut short for the end.
                stream.seek(archive.offset)
                if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise ValueError(f"it is damaged or cut short at byte {archive.offset}")
                return
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep every one that it passed
            yield member
    raise ValueError(f"it has more than {_MOST_MEMBERS} members")


def _class_in(shards: Sequence[Path], member: _Member, where: str) -> str | None:
    """The class of a sample as it is written; None of an object that says nothing of it."""
    data = _bytes_at(shards, member, _ABOUT_MOST)
    if where.partition(" of ")[0].endswith(".cls"):
        text = text_from_outside(data, where, _FIX).strip()
        if not text or len(text.splitlines()) > 1:
            raise ResvitError(f"{where} holds no class: {text[:40]!r}.", _FIX)
        return text
    entry = json_from_outside(data, where, _FIX)
    value = next((entry[key] for key in _CLASS_KEYS if key in entry), None) if isinstance(entry, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        raise ResvitError(f"{where} holds no class: {str(value)[:40]!r}.", _FIX)
    return str(value).strip()


def _bytes_at(shards: Sequence[Path], member: _Member, most: int) -> bytes:
    if member.size > most:
        raise ResvitError(f"a member of {shards[member.shard]} is longer than {most >> 20} MiB.", _FIX)
    with open_outside(shards[member.shard]) as stream:
        try:
            stream.seek(member.start)
            return stream.read(member.size)
        except OSError as error:
            raise ResvitError(f"{shards[member.shard]} cannot be read: {error.strerror}.", _FIX) from error


def _tars(root: Path) -> tuple[Path, ...]:
    names = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    found = tuple(entry for entry in names if entry.name.lower().endswith(ENDING) and entry.is_file())
    return () if any(is_image(entry.name) for entry in names) else found
