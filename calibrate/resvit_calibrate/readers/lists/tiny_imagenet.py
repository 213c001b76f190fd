"""The validation part of Tiny ImageNet as it is shipped: pictures in ``images``, and their synsets in a list beside.

Le and Yang, "Tiny ImageNet Visual Recognition Challenge", 2015.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from resvit_calibrate.images.pixels import FilePixels
from resvit_calibrate.readers.folders import name_inside
from resvit_calibrate.readers.lists.places import note_of_missing
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file, read_outside, text_from_outside

_LIST = "val_annotations.txt"
_FIX = "A line is the picture, its synset and its box, with tabs between: as the data set is shipped."


def is_tiny_imagenet(part: Path) -> bool:
    """Whether a folder is that part."""
    return leads_to_file(part / _LIST) and (part / "images").is_dir()


def pixels_from_tiny_imagenet(part: Path) -> FilePixels:
    """Its pictures, classes in the order of their names as class folders are.

    Raises ``ResvitError`` for lines that are none, and where no picture is there.
    """
    path = part / _LIST
    said: dict[str, str] = {}
    for number, line in enumerate(text_from_outside(read_outside(path), str(path), _FIX).splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 2 or not fields[1].strip():
            raise ResvitError(f"Line {number} of {path} is {line[:40]!r}.", _FIX)
        said[name_inside(fields[0], f"line {number} of {path}: the file", _FIX)] = fields[1].strip()
    there = [name for name in said if leads_to_file(part / "images" / name)]
    if not there:
        raise ResvitError(f"No picture of {path} is in {part / 'images'}.", _FIX)
    names = tuple(sorted(set(said.values())))
    places = {name: number for number, name in enumerate(names)}
    labels = np.array([places[said[name]] for name in there], np.int64)
    notes = note_of_missing(path, said.keys() - set(there))
    return FilePixels(part.name, part / "images", there, labels, class_names=names, notes=notes)
