"""Which pictures the names in a file of annotations are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from resvit_calibrate.readers.folders import name_inside
from resvit_calibrate.readers.lists.places import named_in, none_is_there, note_of_missing, place_of


class Located(NamedTuple):
    """The folder of pictures, the file of each name that is there, and what to say of those that are not."""

    root: Path
    files: dict[str, str]
    notes: tuple[str, ...]


def located(path: Path, names: Sequence[str], fix: str, otherwise: Sequence[str] = ()) -> Located:
    """Find pictures as those of lists are found: beside the file, in ``images``, in a folder called like it, or below.

    Where none is there, they are looked for under the names that they have ``otherwise``, one for each. Raises
    ``ResvitError`` for names that lead out of the folder, and where no picture is there.
    """
    place, hits = place_of(path, names)
    called = dict(zip(names, names, strict=True))
    if not hits and otherwise:
        there, hits = place_of(path, otherwise)
        if hits:
            place, called = there, dict(zip(names, otherwise, strict=True))
    files, missing = {}, []
    for name, other in called.items():
        file = place.file_of(name_inside(named_in(path, other), f"a picture's name in {path}", fix))
        if file is None:
            missing.append(name)
        else:
            files[name] = file
    if not files:
        raise none_is_there(path, place.folder, missing, fix)
    return Located(place.folder, files, note_of_missing(path, missing))
