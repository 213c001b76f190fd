"""KITTI's labels of objects: a text file for each picture (https://www.cvlibs.net/datasets/kitti/eval_object.php).

A line is ``type truncated occluded alpha left top right bottom`` and seven numbers of the object in space, which are
not used. `DontCare` is of no class: what is found there counts for nothing, as in KITTI's own evaluation.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from resvit_calibrate.readers.folders import is_image
from resvit_calibrate.readers.labelled.recognise import NUMBER, folders_in, format_of, is_of
from resvit_calibrate.readers.labelled.regions import OF_NO_CLASS, Labelled, Picture, Region
from resvit_calibrate.readers.labelled.shapes import box_between, name_from, numbers_from
from resvit_calibrate.readers.paired import Part, pairs_in
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside

FORMAT = format_of(".txt", (rb"\A[A-Za-z_]+(?: " + NUMBER + rb"){14,15}\s*$",), "KITTI's labels")
_FIX = "A line is `type truncated occluded alpha left top right bottom` and seven numbers, separated by spaces."
_FIELDS = 15
_PROBED = 20
_WORD = re.compile(r"[A-Za-z_][\w-]*")


def kitti_in(root: Path) -> Labelled:
    """The pictures of a folder with their labels: ``image_2`` and ``label_2``, or any two folders of the same names.

    Raises ``ResvitError`` for lines that are no objects, results with scores, and where no picture has a file.
    """
    labels = next((folder for folder in folders_in(root) if any(is_of(file, FORMAT) for file in _texts(folder))), None)
    if labels is None:
        raise ResvitError(f"{root} has no labels of KITTI's.", _FIX)
    stems = [file.stem for file in _texts(labels)]
    held = {folder: _holds(folder, stems) for folder in folders_in(root)}
    pictures = max(held, key=lambda folder: held[folder])
    if not held[pictures]:
        raise ResvitError(
            f"No picture in {root} has the name of a file in {labels}.", f"{stems[0]}.png belongs to {stems[0]}.txt."
        )
    pairs = pairs_in(Part(root, str(pictures.relative_to(root)), str(labels.relative_to(root))), (".txt",))
    found = []
    for image, other in zip(pairs.images, pairs.others, strict=True):
        path = pairs.root / other
        lines = text_from_outside(read_outside(path), str(path), _FIX).splitlines()
        regions = [_region(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
        found.append(Picture(image, (0, 0), tuple(regions)))
    return Labelled(labels, pairs.root, tuple(found), notes=pairs.notes)


def _texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"))[:_PROBED]


def _holds(folder: Path, stems: list[str]) -> int:
    own = {Path(entry.name).stem for entry in os.scandir(folder) if is_image(entry.name)}
    return sum(stem in own for stem in stems)


def _region(line: str, where: str) -> Region:
    fields = line.split()
    if len(fields) == _FIELDS + 1:
        raise ResvitError(f"{where} ends in a score: these are results of a network.", "Give the labels themselves.")
    if len(fields) != _FIELDS or not _WORD.fullmatch(fields[0]):
        raise ResvitError(f"{where} is no object: {line.strip()[:60]!r}.", _FIX)
    left, top, right, bottom = numbers_from(fields[4:8], 4, where, _FIX)
    name = OF_NO_CLASS if fields[0] == "DontCare" else name_from(fields[0], where, _FIX)
    if right < left or bottom < top:
        raise ResvitError(f"{where} has its right before its left, or its bottom above its top.", _FIX)
    return box_between(name, (left, top), (right, bottom))
