"""Masks that lie among pictures or in folders beside theirs, found by what the names of both have in common.

CamVid's ``train`` and ``trainannot``, Carvana's ``train`` and ``train_masks`` (``1_mask.gif``), ISIC's
``…_Input`` and ``…_GroundTruth``, DeepGlobe's ``1_sat.jpg`` and ``1_mask.png`` in one folder, and their like.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resvit_calibrate.readers.colours import colour_table
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    class_names,
    files_below,
    is_image,
    is_visible,
    part_folders,
    part_of_folder,
    split_folders,
)
from resvit_calibrate.readers.paired import Part
from resvit_calibrate.readers.pairs.values import held_by
from resvit_engines.errors import ResvitError

SUFFIXES = (".png", ".bmp", ".gif", ".pgm", ".tif", ".tiff")
"""How masks end: other kinds of pictures change the numbers that they store."""
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
TO_PNG = (
    "Write them as PNG. Of two classes that is `mogrify -threshold 50% -format png *.jpg` in their folder (0 is then "
    "the background, 255 the object); of more, export them again."
)
_OF_PICTURES = ("", "_images", "_image", "_imgs", "_img", "_input", "_inputs")
FOLDERS_OF_MASKS_END = (
    *("annot", "masks", "labels", "_annot", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_annotations"),
    *("_groundtruth", "_ground_truth", "_targets", "_segmentation"),
)
"""What names of folders end in, in lower case, without what they have in common with those of pictures."""
_PICTURES_END = ("", "_sat", "_image", "_img", "_rgb")
MASKS_END = (
    *("_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_groundtruth", "_ground_truth"),
    *("_annotation", "_manual1"),
)
"""What the names of masks end in beside pictures, in lower case and without the files' endings."""
_STARTS = (("img_", "mask_"), ("image_", "mask_"), ("img_", "label_"), ("image_", "label_"), ("img", "mask"))
_NUMBERED = re.compile(r"task[0-9]+(-[0-9]+)*")
_WORD = re.compile(rf"(?<![a-z])({'|'.join((*TRAINING_NAMES, *VALIDATION_NAMES))})")
_LISTED, _LOOKED_AT = 200_000, 6
_MOST, _LEAST = 0.9, 0.1
"""So many of the masks belong to a picture, and so many of the pictures have one."""


class _Around(NamedTuple):
    """What stands around the common part of two names: a picture's start and end, and a mask's."""

    images_start: str = ""
    images_end: str = ""
    others_start: str = ""
    others_end: str = ""


def parts_by_names(root: Path, *, told: bool = False) -> tuple[Part, ...]:
    """Pictures with masks by their names, in one part or two; none where there are none.

    Where both lie in several folders that could be classes, there are none unless the user says so (``told``).

    Raises:
        ResvitError: for masks as JPEG, and masks in colours without a table of these.
    """
    parts = _of_folders(root) or _of_one_folder(root, told=told)
    for part in parts:
        _require_readable(part, root)
    return parts


def _of_folders(root: Path) -> tuple[Part, ...]:
    """Parts of which pictures lie in one folder and masks in another beside it."""
    names = class_names(root)
    common = {_common(name, _OF_PICTURES): name for name in reversed(names)}
    found: dict[str, Part] = {}
    for name in names:
        for end in FOLDERS_OF_MASKS_END:
            stem = _common(name, (end,)) if name.lower().endswith(end) else ""
            first = common.get(stem) if stem else None
            if first is None or first == name:
                continue
            around = _around(_stems(root, first), _stems(root, name))
            if around is not None:
                found.setdefault(_part_of(first), _part(root, first, name, around))
    train = next((found[side] for side in (*TRAINING_NAMES, "") if side in found), None)
    second = next((found[side] for side in VALIDATION_NAMES if side in found), None)
    return tuple(part for part in (train, second) if part is not None)


def _of_one_folder(root: Path, *, told: bool) -> tuple[Part, ...]:
    """Parts of which pictures and masks lie in one folder."""
    halves = split_folders(root) or tuple(part_folders(root).values())[:1]
    found = []
    for folder in (*halves, root) if len(halves) < 2 else halves:
        if not told and _has_class_folders(folder):
            continue
        stems = _stems(folder, ".")
        around = _around_in_one(stems)
        if around is not None:
            found.append(_part(folder, ".", ".", around))
        if len(halves) < 2 and found:
            break
    return tuple(found)


def _has_class_folders(root: Path) -> bool:
    held = [name for name in class_names(root) if next(files_below(root, name, is_image), None) is not None]
    return len(held) > 1


def _part(root: Path, first: str, second: str, around: _Around) -> Part:
    return Part(
        root,
        first,
        second,
        around.images_end,
        around.others_end,
        images_start=around.images_start,
        others_start=around.others_start,
    )


def _common(name: str, ends: Iterable[str]) -> str:
    """What a folder's name says without one of the ends, in lower case."""
    lower = name.lower()
    end = max((end for end in ends if lower.endswith(end)), key=len, default="")
    return _NUMBERED.sub("task", lower[: len(lower) - len(end)])


def _part_of(name: str) -> str:
    found = part_of_folder(name)
    if found is None:
        word = _WORD.search(name.lower())
        found = word.group(1) if word is not None else ""
    return found


def _stems(root: Path, folder: str) -> dict[str, list[str]]:
    """The pictures of a folder, by their paths in it without an ending: of one name there may be several."""
    found: dict[str, list[str]] = {}
    base = root / folder
    count = 0
    for above, below, files in os.walk(base):
        below[:] = sorted(filter(is_visible, below))
        inner = os.path.relpath(above, base)
        inside, whole = ("", "") if inner == "." else (f"{inner}/", f"{inner}/")
        whole = whole if folder == "." else f"{folder}/{inside}"
        for name in filter(is_image, files):
            found.setdefault(f"{inside}{name.rpartition('.')[0]}", []).append(f"{whole}{name}")
            count += 1
        if count >= _LISTED:
            break
    return found


def _around(images: dict[str, list[str]], masks: dict[str, list[str]]) -> _Around | None:
    """How names of two folders differ, where nearly all masks are of a picture."""
    ends = itertools.product(("", *_PICTURES_END[1:]), ("", *_ends_in(masks)))
    for around in (*(_Around("", first, "", second) for first, second in ends), *_with_starts()):
        both = _bare(masks, around.others_start, around.others_end) & _bare(
            images, around.images_start, around.images_end
        )
        if masks and images and len(both) >= _MOST * len(masks) and len(both) >= _LEAST * len(images):
            return around
    return None


def _around_in_one(files: dict[str, list[str]]) -> _Around | None:
    """How names of pictures and masks in one folder differ, where some of them are both of one thing."""
    ends = itertools.product(_PICTURES_END, _ends_in(files))
    for around in (*(_Around("", first, "", second) for first, second in ends), *_with_starts()):
        masks = _bare(files, around.others_start, around.others_end)
        others = {stem for stem in files if not _fits(stem, around.others_start, around.others_end)}
        if not masks:
            continue
        both = masks & _bare(others, around.images_start, around.images_end)
        if both and len(both) >= _MOST * len(masks) and len(both) >= _LEAST * len(others):
            return around
    return None


def _with_starts() -> Iterator[_Around]:
    return (_Around(first, "", second, "") for first, second in _STARTS)


def _ends_in(files: Iterable[str]) -> list[str]:
    """Those of the known ends of masks that occur, as they are written."""
    found: dict[str, None] = {}
    for stem in files:
        for end in MASKS_END:
            if stem.lower().endswith(end):
                found.setdefault(stem[len(stem) - len(end) :])
    return list(found)


def _bare(stems: Iterable[str], start: str, end: str) -> set[str]:
    """What is left of names that begin and end in this way."""
    found = set()
    for stem in stems:
        if _fits(stem, start, end):
            above, slash, name = stem.rpartition("/")
            found.add(f"{above}{slash}{name.removeprefix(start).removesuffix(end)}")
    return found


def _fits(stem: str, start: str, end: str) -> bool:
    name = stem.rpartition("/")[2]
    return len(name) > len(start) + len(end) and name.startswith(start) and name.endswith(end)


def _require_readable(part: Part, root: Path) -> None:
    """Look at some of the masks, which must hold numbers, or colours that a table gives classes."""
    files = [
        file
        for stem, several in _stems(part.root, part.others).items()
        for file in several
        if _fits(stem, part.others_start, part.others_end)
    ]
    where = part.root if part.others == "." else part.root / part.others
    jpeg = [file for file in files if file.lower().endswith(JPEG)]
    if 2 * len(jpeg) > len(files):
        raise ResvitError(f"{where} holds masks as JPEG ({jpeg[0]}), which changes the numbers that it stores.", TO_PNG)
    some = _spread([file for file in files if file.lower().endswith(SUFFIXES)])
    held = [held_by(part.root / file) for file in some]
    if "picture" in held:
        raise ResvitError(
            f"{where} has {some[held.index('picture')]}, which is called like a mask of a picture and holds neither "
            "class numbers nor a few colours.",
            f"Put pictures into `images` and masks of the same names into `masks`, and name the folder above; or say "
            f"`folder:{root}` if all of them are pictures.",
        )
    if "colours" in held and colour_table(part.root, root) is None:
        raise ResvitError(
            f"{where} has masks in colours ({some[held.index('colours')]}), and no table says which class each is.",
            f"Put class_dict.csv into {root}, a line for each class: `road,128,64,128`.",
        )


def _spread(files: Sequence[str]) -> list[str]:
    ordered = sorted(files)
    return [ordered[int(place)] for place in np.linspace(0, len(ordered) - 1, min(_LOOKED_AT, len(ordered)))]
