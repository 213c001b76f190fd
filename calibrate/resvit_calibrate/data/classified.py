"""Pictures with a class each: folders of them, lists, and what beside them says which number each class has."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from resvit_calibrate.data.numbering import with_classes
from resvit_calibrate.images.class_list import ClassList, class_list_from_file, class_list_from_names
from resvit_calibrate.images.pixels import FilePixels, Pixels
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    class_names,
    files_below,
    is_image,
    note_of_unused,
    pixels_from_folder,
    split_folders,
)
from resvit_calibrate.readers.layouts import note_of_same_folders, refuse_unread
from resvit_calibrate.readers.lists.classes import pixels_from_class_list
from resvit_calibrate.readers.lists.imagenet import pixels_from_synsets, synset_file, synset_names
from resvit_calibrate.readers.lists.kinds import class_lists
from resvit_calibrate.readers.lists.tiny_imagenet import is_tiny_imagenet, pixels_from_tiny_imagenet
from resvit_calibrate.readers.mixtures import refuse_masks
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file

_NUMBERED = ("class_to_idx.json", "label2id.json", "id2label.json", "idx_to_class.json", "class_indices.json")
_NAMED = ("classes.txt", "class_names.txt", "labels.txt")
TRAINING_FOLDERS = (*TRAINING_NAMES, "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train")
_BOTH = "Say which: `csv:{0}` for the lists, `folder:{1}` for the folders."


def pools_of_folders(root: Path, *, told: bool) -> tuple[Pixels, Pixels | None]:
    """Class folders, or ``train`` and ``val`` of them; ``told``: the user says that these are.

    Raises ``ResvitError`` where there is no picture, and where they are masks or folders above the data.
    """
    parts = split_folders(root)
    for part in parts or (root,):
        if not told:
            refuse_unread(part)
        refuse_masks(part, told=told)
    pools: list[Pixels] = [
        pixels_from_tiny_imagenet(part) if is_tiny_imagenet(part) else pixels_from_folder(part)
        for part in parts or (root,)
    ]
    if parts is not None:
        there = [name for name in class_names(root) if next(files_below(root, name, is_image), None) is not None]
        pools[0].notes += note_of_unused(root, [part.name for part in parts], there)
    elif not told:
        pools[0].notes += note_of_same_folders(root)
    numbered = [_numbered_beside(pool, root) for pool in pools]
    return numbered[0], numbered[1] if parts is not None else None


def lists_in(root: Path, *, told: bool = False) -> dict[str, Path]:
    """The lists of classes that a folder's pictures are read by, by the part that each is of; none where none is.

    A list that says of class folders what these say themselves is none, unless the user says that it is (``told``). In
    a folder with ``train`` and ``val`` they may lie in these. Raises ``ResvitError`` where a list cannot be read,
    contradicts the folders, or is one of several.
    """
    found = class_lists(root)
    parts = split_folders(root)
    if not found and parts is not None:
        for part, side in zip(parts, ("train", "val"), strict=True):
            inside = list(class_lists(part).values())
            if len(inside) == 1:
                found[side] = inside[0]
    synsets = synset_file(root)
    if synsets is not None and not {"val", "all"} & found.keys():
        found["synsets"] = synsets
    if not told and found.keys() == {"all"} and _says_what_folders_say(found["all"]):
        return {}
    return found


def pools_of_lists(root: Path) -> tuple[Pixels, Pixels | None]:
    """Pictures of a folder by its lists; class folders to train with may stand beside a list to validate with.

    Raises ``ResvitError`` where the folder has no list of classes.
    """
    lists = lists_in(root, told=True)
    checked = next((side for side in ("val", "synsets", "test") if side in lists), None)
    taught = next((side for side in ("train", "all") if side in lists), None)
    if checked is None and taught is None:
        raise ResvitError(
            f"{root} has no list of classes.",
            "Put a file such as `labels.csv` into it, with the columns `file` and `label`, or name the list itself.",
        )
    if checked is None:
        return pools_of_one_list(lists[str(taught)])
    validation = (
        _numbered_beside(pixels_from_synsets(root), root) if checked == "synsets" else _whole(lists[checked], root)
    )
    train = _whole(lists[taught], root) if taught is not None else _taught_folders(root)
    if train is None:
        return validation, None
    used = [lists[side].name for side in (taught, checked) if side is not None]
    train.notes += note_of_unused(root, used, [path.name for path in lists.values()])
    return train, validation


def pools_of_one_list(path: Path) -> tuple[Pixels, Pixels | None]:
    """Pictures by one list, with two parts where a column says so."""
    first, second = pixels_from_class_list(path)
    return _numbered_beside(first, path.parent), _numbered_beside(second, path.parent) if second is not None else None


def _taught_folders(root: Path) -> Pixels | None:
    """The class folders to train with, where there are some beside a list to validate with."""
    folder = next((root / name for name in TRAINING_FOLDERS if (root / name).is_dir()), None)
    own = pixels_from_folder(folder) if folder is not None else None
    return _numbered_beside(own, root) if own is not None and own.labels is not None else None


def _whole(path: Path, root: Path) -> Pixels:
    first, second = pixels_from_class_list(path)
    if second is not None:
        raise ResvitError(
            f"{path} is a list of one part by its name, and has a column that divides it.",
            f"Name the list itself, `csv:{path}`, or leave the column out.",
        )
    return _numbered_beside(first, root)


def _numbered_beside(pool: Pixels, root: Path) -> Pixels:
    """Number the classes as a file beside the data does, where it has all of them; a note says where that is so."""
    if pool.labels is None or not len(pool.labels):
        return pool
    highest = int(pool.labels.max())
    for name in (*_NUMBERED, *_NAMED):
        path = root / name
        if not leads_to_file(path):
            continue
        listed = _class_list(path)
        if listed is None:
            continue
        used = (
            sorted({pool.class_names[number] for number in np.unique(pool.labels).tolist()}) if pool.class_names else []
        )
        if not pool.class_names and highest < len(listed.names) and listed.whole:
            pool.class_names, pool.num_classes = listed.names, len(listed.names)
            return pool
        if used and all(listed.number_of(item) is not None for item in used):
            before = pool.class_names
            pool = with_classes(pool, listed, None)
            if pool.class_names != before:
                pool.notes = (*pool.notes, f"classes are numbered as {path} says")
            return pool
        if name not in ("labels.txt",):
            lacking = next((item for item in used if listed.number_of(item) is None), f"number {highest}")
            pool.notes = (*pool.notes, f"{path} lacks the class {lacking}, and is not used to number classes")
    return _as_synsets(pool, root)


def _as_synsets(pool: Pixels, root: Path) -> Pixels:
    """ImageNet's classes in the order of its synsets, also where some do not occur."""
    synsets = synset_names(root)
    if not synsets or pool.labels is None or pool.class_names == synsets:
        return pool
    if not pool.class_names and int(pool.labels.max()) < len(synsets):
        pool.class_names, pool.num_classes = synsets, len(synsets)
    elif pool.class_names and {*pool.class_names} <= {*synsets}:
        listed = class_list_from_names("the synsets", dict(enumerate(synsets)))
        return with_classes(pool, listed, None)
    return pool


def _class_list(path: Path) -> ClassList | None:
    """A class list; None for a file of lines that may be of something else, and is none."""
    try:
        return class_list_from_file(path)
    except ResvitError:
        if path.name in _NAMED:
            return None
        raise


def _says_what_folders_say(path: Path) -> bool:
    """Whether each picture lies in the folder of its class.

    Raises ``ResvitError`` where most do and some do not: folder and list contradict each other.
    """
    first, second = pixels_from_class_list(path)
    pools = [pool for pool in (first, second) if pool is not None]
    above = [_class_folders(pool) for pool in pools]
    if any(len({*folders}) < 2 for folders in above):
        return False
    for pool, folders in zip(pools, above, strict=True):
        labels = pool.labels if pool.labels is not None else np.zeros(0, np.int64)
        order = sorted({*folders})
        names = pool.class_names or tuple(order)
        said = [names[number] if number < len(names) else str(number) for number in labels.tolist()]
        agree = [name == folder for name, folder in zip(said, folders, strict=True)]
        if all(agree):
            continue
        if 2 * sum(agree) <= len(agree):
            return False
        place = agree.index(False)
        raise ResvitError(
            f"{path} calls {pool.files[place]} {said[place]!r}, and it lies in the folder {folders[place]!r}: "
            f"{len(agree) - sum(agree)} of {len(agree)} contradict each other.",
            _BOTH.format(path, path.parent),
        )
    return True


def _class_folders(pool: FilePixels) -> list[str]:
    """The folder of each picture: the first in its path that is not that of all of them."""
    parts = [PurePosixPath(file).parts[:-1] for file in pool.files]
    depth = 0
    while parts and all(len(part) > depth + 1 for part in parts) and len({part[depth] for part in parts}) == 1:
        depth += 1
    return [part[depth] if len(part) > depth else "" for part in parts]
