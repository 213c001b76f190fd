"""Where the pictures of a list lie, and which file each of its names is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from resvit_calibrate.readers.folders import class_names, is_image, name_inside, relative_inside
from resvit_calibrate.readers.lists.rows import FIX
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file, leads_to_folder

_PICTURES = ("images", "imgs", "image")
_FOLDERS_OF_LISTS = ("labels", "annotations", "lists", "splits", "meta")
_IMAGENET = ("ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "ILSVRC2012_img_val")
PROBED = 50
_MOST_FOLDERS = 64


class Place:
    """One folder in which names of a list are looked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stems: dict[str, dict[str, list[str]]] = {}

    def file_of(self, name: str) -> str | None:
        """The file that a name is, relative to the folder; one without an ending is found by its stem.

        Raises ``ResvitError`` where several files have that stem.
        """
        if leads_to_file(self.folder / name):
            return name
        path = PurePosixPath(name)
        if is_image(path.name):
            return None
        above = str(path.parent)
        if above not in self._stems:
            self._stems[above] = _stems_in(self.folder / above)
        found = self._stems[above].get(path.name, [])
        if len(found) > 1:
            raise ResvitError(
                f"{name} could be {found[0]} or {found[1]} of {self.folder / above}.",
                "Write the ending into the list, or keep one of the two.",
            )
        return str(path.parent / found[0]) if found else None


def place_of(path: Path, names: Sequence[str]) -> tuple[Place, int]:
    """The folder that has most of some names of a list, the first of those that people use, and how many it has."""
    probes = [named_in(path, name) for name in names[:: max(1, len(names) // PROBED)] if name]
    chosen, most = Place(path.parent), 0
    for folder in _places(path):
        place = Place(folder)
        hits = sum(_is_there(place, name) for name in probes)
        if hits > most:
            chosen, most = place, hits
        if hits == len(probes):
            break
    return chosen, most


def named_in(path: Path, name: str) -> str:
    """What a list calls a picture, relative to its folder where it is an absolute path into it."""
    above = [path.parent.parent] if path.parent.name.lower() in _FOLDERS_OF_LISTS else []
    return relative_inside(name, path.parent, *above)


def none_is_there(path: Path, folder: Path, missing: Collection[str], fix: str) -> ResvitError:
    """The refusal of a list of which no picture is where its pictures are looked for."""
    told = f"No file of {len(missing)} that {path} lists is in {folder}: {shortened(list(missing))}."
    return ResvitError(told, fix)


def note_of_missing(path: Path, missing: Collection[str]) -> tuple[str, ...]:
    """That a list names pictures that are not there; nothing where all are."""
    shown = shortened(sorted(missing))
    return (f"{len(missing)} files that {path} lists are not there and are left out: {shown}",) if missing else ()


def _places(path: Path) -> Iterator[Path]:
    base, tag = path.parent, path.stem
    bases = [base, base.parent] if base.name.lower() in _FOLDERS_OF_LISTS else [base]
    for folder in bases:
        below = [name for name in _folders_in(folder) if name not in (tag, *_PICTURES)]
        own = [name for name in below if name.lower() in tag.lower()]
        parts = (tag, *own, *(f"{name}/{tag}" for name in _PICTURES), *_PICTURES, *_IMAGENET, *below[:_MOST_FOLDERS])
        # As archives leave them that were unpacked into a folder of their own name.
        parts += tuple(f"{name}/{name}" for name in below[:_MOST_FOLDERS])
        yield from (folder / part for part in parts if leads_to_folder(folder / part))
        yield folder
    yield base.parent


def _folders_in(folder: Path) -> tuple[str, ...]:
    try:
        return class_names(folder)
    except ResvitError:
        return ()


def _is_there(place: Place, name: str) -> bool:
    try:
        return place.file_of(name_inside(name, "a file", FIX)) is not None
    except ResvitError:
        return False


def _stems_in(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    try:
        for entry in os.scandir(folder):
            if is_image(entry.name):
                found.setdefault(PurePosixPath(entry.name).stem, []).append(entry.name)
    except OSError:
        return {}
    return found
