"""How people lay out images beside what is known of them: by the names of folders, and by what lies in them.

Known are Cityscapes (https://www.cityscapes-dataset.com), PASCAL VOC (http://host.robots.ox.ac.uk/pascal/VOC/),
ADE20K as of the scene parsing benchmark (http://sceneparsing.csail.mit.edu), YOLO's text files, and two plain folders.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from resvit_calibrate.readers import depth
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    class_names,
    ending_of,
    files_below,
    note_of_unused,
    part_folders,
    part_of_folder,
    split_folders,
)
from resvit_calibrate.readers.paired import Part
from resvit_calibrate.readers.pairs.names import FOLDERS_OF_MASKS_END, JPEG, TO_PNG, parts_by_names
from resvit_calibrate.readers.pairs.names import SUFFIXES as MASKS
from resvit_engines.errors import ResvitError

Known: TypeAlias = Literal["masks", "depth", "yolo", "voc", "unread"]

_IMAGES = (
    *("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "rgb", "images_png", "img_dir", "inputs", "input"),
)
_DEPTHS = ("depth", "depths")
_ABOUT = (
    *("masks", "mask", "annotations", "annotation", "annots", "labels", "label", "segmentationclass", "gtfine"),
    *("gtcoarse", "gt", "groundtruth", "ground_truth", "seg", "segmentation", "segmentations", "labeltxt", "ann"),
    *("masks_png", "ann_dir", "targets", "target"),
    *_DEPTHS,
)
"""Names of folders, in lower case, that hold what is known of the pictures in the folder beside them."""
_TAILS = (*FOLDERS_OF_MASKS_END, "_depth")
"""What names of folders end in beside others of the same name without it: CamVid's `trainannot`."""
_SAMPLED = 200
_PARTS = (*TRAINING_NAMES, *VALIDATION_NAMES)
_FOLD = re.compile(r"(k?fold|split|cv|part|subset|set)[-_ ]?[0-9]+", re.IGNORECASE)
_PIECE = re.compile(r"(.*\w)[-_ ]*part[-_ ]?[0-9]+", re.IGNORECASE)
_CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13} | {
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18
}  # fmt: skip
"""From `labelIds` to the numbers that networks are trained with (cityscapesscripts/helpers/labels.py)."""
_LOVEDA = ("background", "building", "road", "water", "barren", "forest", "agricultural")
"""Its classes from value 1 on; 0 is without data (https://github.com/Junjue-Wang/LoveDA)."""
_LOVEDA_PLACES, _LOVEDA_FOLDERS = ("urban", "rural"), ("images_png", "masks_png")


@dataclass(frozen=True)
class Numbering:
    """The class of each value of masks; values that ``moved`` lacks are unlabelled. ``said`` tells it to the user."""

    moved: Mapping[int, int]
    said: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What a folder holds: its ``kind``, in words, and one part or one for training and one for validation.

    ``numbering`` says which class each value of masks is, where the two differ.
    """

    kind: Known
    words: str
    parts: tuple[Part, ...]
    numbering: Numbering | None = None
    ending: str = ""
    """How most files of the second folder end."""


def layouts_in(root: Path, *, told: bool = False) -> list[Layout]:
    """Every layout of two folders that ``root`` has, in itself or in its parts for training and validation.

    ``told``: the user says that there is one, so that masks may lie among pictures in what could be class folders.
    """
    if (loveda := _loveda(root)) is not None:
        return [loveda]
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
    pairs = _pairs_in(root)
    if not pairs and (parts := parts_by_names(root, told=told)):
        return [Layout("masks", words_of(parts[0]), parts)]
    return [_layout((root / first, root / second), _parts(root, first, second)) for first, second in pairs]


def words_of(part: Part) -> str:
    """Where pictures and masks of a part are that were found by their names."""
    if part.images != part.others:
        return f"{part.images} and {part.others}"
    return f"pictures and masks of the same names ({part.others_start}…{part.others_end})"


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
    _refuse_folds(root, names)
    _refuse_pieces(root, names)
    for name in names:
        inner = _pairs_in(root / name) if part_of_folder(name) is None else []
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


def _refuse_folds(root: Path, names: Sequence[str]) -> None:
    """Refuse folders of a cross-validation, each with the same classes."""
    if len(names) < 2 or not all(_FOLD.fullmatch(name) for name in names):
        return
    inner = {class_names(root / name) for name in names}
    if len(inner) == 1 and len(first := next(iter(inner))) > 1:
        raise ResvitError(
            f"{root} is divided into {', '.join(names)}, each with the folders {', '.join(first)}: these are folds and "
            "no classes.",
            f"Name one to calibrate with and one to validate on, `--data {root / names[0]} --validation-data "
            f"{root / names[1]}`, or say `folder:{root}` if they are classes.",
        )


def _refuse_pieces(root: Path, names: Sequence[str]) -> None:
    """Refuse pieces of one folder, such as HAM10000's, whose names differ by a number alone."""
    found = [_PIECE.fullmatch(name) for name in names]
    if len(found) > 1 and len({piece.group(1) for piece in found if piece is not None}) == 1 and None not in found:
        raise ResvitError(
            f"{root} is divided into {', '.join(names)}: by their names these are pieces of one folder and no classes.",
            f"Put the pictures, or links to them, into one folder; or say `folder:{root}` if they are classes.",
        )


def note_of_same_folders(root: Path) -> tuple[str, ...]:
    """That every class folder has the same folders in it, which may be the classes; none where it is not so."""
    names = class_names(root)
    inner = {class_names(root / name) for name in names}
    if len(names) < 2 or len(inner) != 1 or len(first := next(iter(inner))) < 2:
        return ()
    return (
        f"the classes of {root} are {', '.join(names[:3])}{', …' if len(names) > 3 else ''}; each has the folders "
        f"{', '.join(first[:3])}{', …' if len(first) > 3 else ''}: if these are the classes, name one of the former "
        "as the data",
    )


def require_read(layout: Layout, root: Path) -> None:
    """Refuse by name what is recognised and not read. Raises ``ResvitError``."""
    if layout.kind == "unread" and layout.ending in JPEG:
        raise ResvitError(
            f"{root} holds {layout.words}, and the files of the latter are JPEG, which changes the numbers that masks "
            "store.",
            f"{TO_PNG} Say `folder:{root}` if both are classes.",
        )
    if layout.kind == "unread":
        raise ResvitError(
            f"{root} holds {layout.words}, and the files of the latter are not of a kind that is read.",
            f"Masks are {', '.join(MASKS)}, depths {', '.join(depth.SUFFIXES)}, boxes COCO's annotations.json,"
            f" YOLO's text or VOC's XML files; say `folder:{root}` if both are classes.",
        )


def _pairs_in(root: Path) -> list[tuple[str, str]]:
    """Names of folders of pictures with names of folders about them."""
    names = _names_in(root)
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
        beside = {part_of_folder(name): name for name in class_names(root / second)}
        others = [beside.get(part_of_folder(half.name)) for half in below]
        if None not in others:
            return tuple(
                Part(root, f"{first}/{half.name}", f"{second}/{other}")
                for half, other in zip(below, others, strict=True)
            )
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
    numbering = None
    if second.name.lower() in ("gtfine", "gtcoarse"):
        parts, numbering = _cityscapes(second.name, parts, some)
    if second.name.lower() in _DEPTHS and (most in depth.SUFFIXES or not most):
        kind: Known = "depth"
    elif most in MASKS or (not most and second.name.lower() == "masks"):
        kind = "masks"
    else:
        kinds: dict[str, Known] = {".txt": "yolo", ".xml": "voc"}
        kind = kinds.get(most, "unread")
    return Layout(kind, words, parts, numbering, most)


def _cityscapes(name: str, parts: tuple[Part, ...], some: list[str]) -> tuple[tuple[Part, ...], Numbering | None]:
    """The files with class numbers among the four of each picture: those to train with, else all numbers."""
    trained = any("_labelTrainIds" in file for file in some)
    end = f"_{name}_{'labelTrainIds' if trained else 'labelIds'}"
    if not any(end in file for file in some):
        return parts, None
    ended = tuple(Part(part.root, part.images, part.others, "_leftImg8bit", end) for part in parts)
    return ended, None if trained else Numbering(_CITYSCAPES, "Cityscapes' labelIds, and are read as its trainIds")


def _loveda(root: Path) -> Layout | None:
    """LoveDA's folders: `Train` and `Val`, one of these, or one of the two places in them."""
    halves = [half for half in (split_folders(root) or part_folders(root).values()) if _places_of_loveda(half)]
    folders = halves or ([root] if _places_of_loveda(root) else [])
    parts = tuple(Part(folder, *_LOVEDA_FOLDERS, places=_places_of_loveda(folder)) for folder in folders)
    if not parts and root.name.lower() in _LOVEDA_PLACES and {*_LOVEDA_FOLDERS} <= {*_names_in(root)}:
        parts = (Part(root, *_LOVEDA_FOLDERS),)
    moved = {number + 1: number for number in range(len(_LOVEDA))}
    numbering = Numbering(moved, "LoveDA's: 1 to 7 are read as classes 0 to 6, and 0, no data, is unlabelled", _LOVEDA)
    return Layout("masks", " and ".join(_LOVEDA_FOLDERS), parts, numbering, ".png") if parts else None


def _places_of_loveda(folder: Path) -> tuple[str, ...]:
    named = [name for name in _names_in(folder) if name.lower() in _LOVEDA_PLACES]
    return tuple(name for name in named if {*_LOVEDA_FOLDERS} <= {*_names_in(folder / name)})


def _names_in(folder: Path) -> tuple[str, ...]:
    try:
        return class_names(folder)
    except ResvitError:
        return ()
