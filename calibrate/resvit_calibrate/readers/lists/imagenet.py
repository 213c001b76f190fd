"""ImageNet's validation pictures as they are shipped, all in one folder, with the file of their synsets beside.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015. Synsets are numbered in the order of
their names, as in folders of them. Lists with a picture's name in each line are read as any other list is.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import numpy as np

from resvit_calibrate.images.pixels import FilePixels
from resvit_calibrate.readers.folders import class_names, files_below, is_image
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file, read_outside, text_from_outside

_PICTURE = re.compile(r"ILSVRC20[0-9]{2}_val_([0-9]{8})", re.IGNORECASE)
_WNID = re.compile(r"n[0-9]{8}")
_IN_ORDER = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt", "validation_synset_labels.txt")
_MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt", "imagenet_lsvrc_2015_synsets.txt", "synsets.txt")
_BY_THE_KIT = "ILSVRC2012_validation_ground_truth.txt"
_FOLDERS = ("val", "validation", "ILSVRC2012_img_val", "images", ".")
_FIX = (
    "Put `LOC_val_solution.csv`, `imagenet_2012_validation_synset_labels.txt` (a synset a line, in the order of the "
    "pictures) or Caffe's list of files and class numbers beside them."
)


def synset_file(root: Path) -> Path | None:
    """The file that gives the synsets of a folder's pictures in order, which lies in it or beside it; None without.

    Raises ``ResvitError`` where there is only the development kit's, whose numbers are its own.
    """
    found = next((root / name for name in _IN_ORDER if leads_to_file(root / name)), None)
    if found is None and leads_to_file(root / _BY_THE_KIT) and _pictures(root) is not None:
        raise ResvitError(
            f"{root / _BY_THE_KIT} has the numbers of the development kit, which are not those that networks answer: "
            "only its meta.mat says which synset each is.",
            _FIX,
        )
    return found if found is not None and _pictures(root) is not None else None


def synset_names(root: Path) -> tuple[str, ...]:
    """The synsets that a mapping beside the data lists, in order; none where there is no such file."""
    for name in _MAPPINGS:
        path = root / name
        if leads_to_file(path):
            lines = text_from_outside(read_outside(path), str(path), _FIX).split("\n")
            synsets = tuple(line.split()[0] for line in lines if line.strip())
            return synsets if synsets and all(map(_WNID.fullmatch, synsets)) and len({*synsets}) == len(synsets) else ()
    return ()


def pixels_from_synsets(root: Path) -> FilePixels:
    """The pictures of a flat folder, each with the synset in the line of its number.

    Raises ``ResvitError`` for lines that are no synset, and a picture beyond the last line.
    """
    path, folder = synset_file(root), _pictures(root)
    if path is None or folder is None:
        raise ResvitError(f"{root} has no pictures of ImageNet's validation set with their synsets.", _FIX)
    lines = text_from_outside(read_outside(path), str(path), _FIX).rstrip().split("\n")
    wrong = next((number for number, line in enumerate(lines, 1) if not _WNID.fullmatch(line.strip())), None)
    if wrong is not None:
        raise ResvitError(f"Line {wrong} of {path} is no synset: {lines[wrong - 1][:40]!r}.", _FIX)
    names = synset_names(root) or tuple(sorted({line.strip() for line in lines}))
    places = {name: number for number, name in enumerate(names)}
    files, labels = [], []
    for file in sorted(files_below(folder, ".", is_image)):
        found = _PICTURE.match(PurePosixPath(file).stem)
        if found is None:
            continue
        line = int(found.group(1))
        if not 1 <= line <= len(lines):
            raise ResvitError(f"{path} has {len(lines)} lines, and none for {file}.", _FIX)
        synset = lines[line - 1].strip()
        if synset not in places:
            raise ResvitError(f"Line {line} of {path} has {synset}, which the list of synsets beside it lacks.", _FIX)
        files.append(file)
        labels.append(places[synset])
    return FilePixels(folder.name, folder, tuple(files), np.array(labels, np.int64), class_names=names)


def _pictures(root: Path) -> Path | None:
    """The folder right below ``root``, or itself, in which ImageNet's validation pictures lie without sub-folders."""
    for name in _FOLDERS:
        folder = root / name
        if not folder.is_dir():
            continue
        found = next((entry for entry in sorted(folder.iterdir())[:50] if _PICTURE.match(entry.name)), None)
        if found is not None and (name == "." or not class_names(folder)):
            return folder
    return None
