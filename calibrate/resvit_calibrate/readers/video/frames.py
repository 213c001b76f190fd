"""A folder of pictures that are the frames of a film, in the order of their names."""

from __future__ import annotations

import re
from pathlib import Path

from resvit_calibrate.images.pixels import BrokenImage, FilePixels
from resvit_calibrate.readers.folders import pixels_from_folder
from resvit_calibrate.readers.video.evenly import CANDIDATES, LEAST, MOST, SAME, Evenly, mean_colours
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter


def pixels_from_frames(root: Path, reporter: Reporter = SILENT) -> FilePixels:
    """Pictures of a folder without sub-folders: evenly spread, without those that show the same as another.

    Raises ``ResvitError`` where there are sub-folders, or fewer than ``LEAST`` different pictures.
    """
    every = pixels_from_folder(root)
    if every.labels is not None:
        raise ResvitError(
            f"{root} has sub-folders, and frames of a film lie in one folder.",
            f"Name one of them, `frames:{root}/…`, or class folders without `frames:`.",
        )
    order = sorted(range(len(every)), key=lambda number: _by_value(every.files[number]))
    even: Evenly[int] = Evenly(MOST, len(order) // CANDIDATES)
    broken: list[str] = []
    for place, number in enumerate(reporter.track(order, f"compare the frames of {root.name}", len(order))):
        if not even.wants(place):
            continue
        try:
            small = mean_colours(every.read(number))
        except BrokenImage as error:
            broken.append(f"{every.files[number]}: {error}")
            continue
        if even.shows_something_new(small):
            even.hold(place, small, number)
    files = [every.files[number] for number in even.items]
    notes = [
        f"{root.name}: {len(files)} of {len(order)} frames are used, evenly spread in the order of their names; "
        f"{even.alike} of {even.looked} that were looked at show the same as another and were dropped ({SAME})"
    ]
    if broken:
        notes.append(f"{len(broken)} frames of {root.name} cannot be read and are left out: {broken[0]}")
    if len(files) < LEAST:
        raise ResvitError(
            f"{root} shows {len(files)} different frames, and at least {LEAST} are needed ({'; '.join(notes)}).",
            "Give more of the film, or leave `frames:` out to take all pictures as they are.",
        )
    return FilePixels(root.name, root, files, None, notes=(*every.notes, *notes))


def _by_value(name: str) -> list[tuple[int, int, str]]:
    """``frame10`` behind ``frame9``."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
