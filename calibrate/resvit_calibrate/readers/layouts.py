"""How people lay out images beside what is known of them: by the names of folders, and by what lies in them.

Known are Cityscapes (https://www.cityscapes-dataset.com), PASCAL VOC (http://host.robots.ox.ac.uk/pascal/VOC/),
ADE20K as of the scene parsing benchmark (http://sceneparsing.csail.mit.edu), YOLO's text files, and two plain folders.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from resvit_calibrate.readers import depth, masks
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    class_names,
    ending_of,
    files_below,
    note_of_unused,
    split_folders,
)
from resvit_calibrate.readers.paired import Part
from resvit_engines.errors import ResvitError

Known: TypeAlias = Literal["masks", "depth", "yolo", "voc", "unread"]

_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "rgb")
_DEPTHS = ("depth", "depths")
_ABOUT = (
    *("masks", "mask", "annotations", "annotation", "annots", "labels", "label", "segmentationclass", "gtfine"),
    *("gtcoarse", "gt", "groundtruth", "ground_truth", "seg", "segmentation", "segmentations", "labeltxt", "ann"),
    *_DEPTHS,
)
"""Names of folders, in lower case, that hold what is known of the pictures in the folder beside them."""
_TAILS = ("annot", "_labels", "_label", "_masks", "_mask", "_annotations", "_gt", "_seg", "_depth", "masks", "labels")
"""What names of folders or files end in beside others of the same name without it: CamVid's `trainannot`."""
_SAMPLED = 200
_PARTS = (*TRAINING_NAMES, *VALIDATION_NAMES)
_CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13} | {
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18
}  # fmt: skip
"""From `labelIds` to the numbers that networks are trained with (cityscapesscripts/helpers/labels.py)."""


@dataclass(frozen=True)
class Layout:
    """What a folder holds: its ``kind``, in words, and one part or one for training and one for validation.

    ``moved`` gives the class of each value of masks where the two differ.
    """

    kind: Known
    words: str
    parts: tuple[Part, ...]
    moved: dict[int, int] | None = None


def layouts_in(root: Path) -> list[Layout]:
    """Every layout of two folders that ``root`` has, in itself or in its parts for training and validation."""
    halves = split_folders(root)
    if halves is not None and (inside := _pairs_in(halves[0])):
        names = {half: {(first.lower(), second.lower()) for first, second in _pairs_in(half)} for half in halves}
        return [
            _layout(
                (halves[0].joinpath(first), halves[0].joinpath(second)),
                tuple(Part(half, *_named_like(half, first, second)) for half in halves)
                if (first.lower(), second.lower()) in names[halves[1]]
                else (Part(halves[0], first, second),),
            )
            for first, second in inside
        ]
    return [_layout((root / first, root / second), _parts(root, first, second)) for first, second in _pairs_in(root)]


def unused_parts(layout: Layout, root: Path) -> tuple[str, ...]:
    """That ``root`` has more parts than the two that are used: folders, or lists of names; none where it has not."""
    first, second = layout.parts
    if first.listed is not None and second.listed is not None:
        there = [file.name for file in sorted(first.listed.parent.glob("*.txt")) if file.stem in _PARTS]
        return note_of_unused(root, [first.listed.name, second.listed.name], there)
    if first.root != second.root:
        return note_of_unused(root, [first.root.name, second.root.name])
    used = [Path(part.images).name for part in layout.parts]
    return note_of_unused(root / Path(first.images).parent, used)


def refuse_unread(root: Path) -> None:
    """Refuse what would be read as class folders and is not: a folder above data, and pictures beside their masks.

    Raises:
        ResvitError: with the folder to name, or what to do with the other files.
    """
    names = class_names(root)
    for name in names:
        inner = _pairs_in(root / name) if name.lower() not in _PARTS else []
        if inner:
            raise ResvitError(
                f"{root} has no class folders: {root / name} holds {inner[0][0]} and {inner[0][1]}.",
                f"Name the folder itself: {root / name}.",
            )
    lower = {name.lower(): name for name in names}
    beside = [(lower[name], lower[name + tail]) for name in lower for tail in _TAILS if name + tail in lower]
    if beside:
        first, second = beside[0]
        raise ResvitError(
            f"{root} has {second} beside {first}: the files of one are about those of the other, and no classes.",
            f"Lay them out as `{first}/images` and `{first}/masks` (or `depth`), or say `folder:{root}` if these "
            "really are classes.",
        )


def require_read(layout: Layout, root: Path) -> None:
    """Refuse by name what is recognised and not read. Raises ``ResvitError``."""
    if layout.kind == "unread":
        raise ResvitError(
            f"{root} holds {layout.words}, and the files of the latter are not of a kind that is read.",
            f"Masks are {', '.join(masks.SUFFIXES)}, depths {', '.join(depth.SUFFIXES)}, boxes COCO's annotations.json,"
            f" YOLO's text or VOC's XML files; say `folder:{root}` if both are classes.",
        )


def _pairs_in(root: Path) -> list[tuple[str, str]]:
    """Names of folders of pictures with names of folders about them."""
    try:
        names = class_names(root)
    except ResvitError:
        return []
    pictures = [name for name in names if name.lower() in _IMAGES]
    about = sorted((name for name in names if name.lower() in _ABOUT), key=lambda name: _ABOUT.index(name.lower()))
    return [(first, second) for first in pictures[:1] for second in about]


def _named_like(root: Path, first: str, second: str) -> tuple[str, str]:
    return next(
        pair for pair in _pairs_in(root) if (pair[0].lower(), pair[1].lower()) == (first.lower(), second.lower())
    )


def _parts(root: Path, first: str, second: str) -> tuple[Part, ...]:
    """One part, or the two below both folders, or those that PASCAL VOC lists."""
    below = split_folders(root / first)
    if below is not None:
        names = [half.name for half in below]
        if all((root / second / name).is_dir() for name in names):
            return tuple(Part(root, f"{first}/{name}", f"{second}/{name}") for name in names)
    sets = root / "ImageSets" / ("Segmentation" if second.lower() == "segmentationclass" else "Main")
    lists = [sets / f"{name}.txt" for name in ("train", "val")]
    if all(file.is_file() for file in lists):
        return tuple(Part(root, first, second, listed=file) for file in lists)
    return (Part(root, first, second),)


def _layout(folders: tuple[Path, Path], parts: tuple[Part, ...]) -> Layout:
    first, second = folders
    words = f"{first.name} and {second.name}"
    some = list(itertools.islice(files_below(second.parent, second.name, lambda _: True), _SAMPLED))
    endings = Counter(ending_of(name) for name in some)
    most = endings.most_common(1)[0][0] if endings else ""
    moved = None
    if second.name.lower() in ("gtfine", "gtcoarse"):
        parts, moved = _cityscapes(second.name, parts, some)
    if second.name.lower() in _DEPTHS and (most in depth.SUFFIXES or not most):
        kind: Known = "depth"
    elif most in masks.SUFFIXES or (not most and second.name.lower() == "masks"):
        kind = "masks"
    else:
        kinds: dict[str, Known] = {".txt": "yolo", ".xml": "voc"}
        kind = kinds.get(most, "unread")
    return Layout(kind, words, parts, moved)


def _cityscapes(name: str, parts: tuple[Part, ...], some: list[str]) -> tuple[tuple[Part, ...], dict[int, int] | None]:
    """The files with class numbers among the four of each picture: those to train with, else all numbers."""
    trained = any("_labelTrainIds" in file for file in some)
    end = f"_{name}_{'labelTrainIds' if trained else 'labelIds'}"
    if not any(end in file for file in some):
        return parts, None
    ended = tuple(Part(part.root, part.images, part.others, "_leftImg8bit", end) for part in parts)
    return ended, None if trained else _CITYSCAPES
