"""CreateML's annotations: one JSON list (https://developer.apple.com/documentation/createml).

Coordinates are a box's middle, width and height in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resvit_calibrate.readers.labelled.places import located
from resvit_calibrate.readers.labelled.recognise import BEGINS_A_LIST, format_of
from resvit_calibrate.readers.labelled.regions import Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import box_between, name_from, number_from
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside

FORMAT = format_of(
    ".json", (BEGINS_A_LIST, rb'"coordinates"\s*:\s*\{', rb'"annotations?"\s*:'), "CreateML's annotations"
)
_FIX = (
    "CreateML's file is a list of objects with `image` and `annotations` (label, coordinates: x, y of the middle, "
    "width, height, in pixels)."
)
_MOST_BYTES = 1 << 30


def createml_from(path: Path) -> Labelled:
    """The pictures that a file names. Raises ``ResvitError`` for another file, and where no picture is there."""
    entries = json_from_outside(read_outside(path, _MOST_BYTES), str(path), _FIX)
    if not isinstance(entries, list):
        raise ResvitError(f"{path} is no list.", _FIX)
    pictures = []
    for number, entry in enumerate(entries):
        where = f"[{number}] of {path}"
        said = entry if isinstance(entry, dict) else {}
        name = said.get("image", said.get("imagefilename"))
        listed = said.get("annotations", said.get("annotation", []))
        if not isinstance(name, str) or not isinstance(listed, list):
            raise ResvitError(f"{where} has no `image`, or no list of `annotations`.", _FIX)
        regions = tuple(_region(one, f"annotations[{at}] of {where}") for at, one in enumerate(listed))
        pictures.append((name, regions))
    found = located(path, [name for name, _ in pictures], _FIX)
    kept = tuple(Picture(found.files[name], (0, 0), regions) for name, regions in pictures if name in found.files)
    return Labelled(path, found.root, kept, notes=found.notes)


def _region(entry: Any, where: str) -> Region:
    if not isinstance(entry, dict) or not isinstance(entry.get("coordinates"), dict):
        raise ResvitError(f"{where} has no `coordinates`.", _FIX)
    x, y, width, height = (
        number_from(entry["coordinates"].get(key), f"{where}: {key}", _FIX) for key in ("x", "y", "width", "height")
    )
    name = name_from(entry.get("label"), f"{where}: label", _FIX)
    if width < 0 or height < 0:
        raise ResvitError(f"{where} has a box of negative size.", _FIX)
    return box_between(name, (x - width / 2, y - height / 2), (x + width / 2, y + height / 2))
