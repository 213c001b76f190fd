"""Recognising what the user named as data: a folder of one of four kinds, a file, or a factory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.images.pixels import ArrayPixels, FilePixels, Pixels
from resvit_calibrate.images.targets import TargetOptions
from resvit_calibrate.readers import depth, fashion_mnist, masks
from resvit_calibrate.readers.coco import CocoPixels, annotation_files, open_coco, with_shared_classes
from resvit_calibrate.readers.folders import pixels_from_folder, shared_class_names, split_folders
from resvit_calibrate.readers.npz import pixels_from_npz
from resvit_calibrate.readers.paired import IMAGES, read_class_names
from resvit_calibrate.readers.user_loader import Factory, factory_from, is_factory_name
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter

Kind = Literal["folder", "coco", "masks", "depth"]
KINDS = (
    "Give `fashion-mnist`, a folder (class folders, images and masks, images and depth, or COCO's annotations), "
    "an .npz file, or file.py:factory."
)


@dataclass(frozen=True)
class Pools:
    """Where images can be taken from; ``validation`` is None where both sides share one pool."""

    calibration: Pixels
    validation: Pixels | None


def require_source(data: str) -> None:
    """Refuse at once, without reading any image, what names no data: so that no long work is done for nothing.

    Raises ``ResvitError`` for a path that does not exist and is no factory's name.
    """
    if data == "fashion-mnist":
        return
    kind, text = _split(data)
    if existing(text) is None and (kind is not None or ":" not in data):
        raise ResvitError(f"The data {text!r} does not exist.", KINDS)


def is_factory(data: str) -> bool:
    """Whether ``data`` names a function that gives preprocessed images, without importing it."""
    return _split(data)[0] is None and existing(data) is None and is_factory_name(data)


def open_source(data: str, options: TargetOptions) -> Pools | Factory:
    """Open what the user named, without reading any image.

    Raises ``ResvitError`` for what does not exist, cannot be used, or could be two kinds of data.
    """
    if data == "fashion-mnist":
        train, test = (
            ArrayPixels(f"fashion-mnist ({split})", *fashion_mnist.read_split(split), fashion_mnist.CLASS_NAMES)
            for split in fashion_mnist.SPLITS
        )
        return Pools(train, test)
    kind, text = _split(data)
    path = existing(text)
    if path is not None and path.is_dir():
        return _folder_pools(path, kind, options)
    if path is not None and (kind == "coco" or (kind is None and path.suffix.lower() == ".json")):
        return Pools(open_coco(path), None)
    if path is not None and kind is None and path.suffix != ".py":
        return Pools(*pixels_from_npz(path, options))
    if kind is not None:
        what = "is a file, not a folder" if path is not None else "does not exist"
        raise ResvitError(f"The data {text!r} {what}.", KINDS)
    factory = factory_from(data, options)
    if factory is None:
        what = "is a Python file without a function" if path is not None else "does not exist"
        raise ResvitError(f"The data {data!r} {what}.", KINDS)
    return factory


def kind_of_folder(root: Path) -> Kind:
    """What a folder holds, by what it contains. Raises ``ResvitError`` where that could be two things."""
    found: list[tuple[Kind, str]] = []
    annotations = annotation_files(root)
    if annotations is not None:
        found.append(("coco", str(annotations[0].relative_to(root))))
    others: tuple[tuple[Kind, tuple[str, ...]], ...] = (("masks", masks.FOLDERS), ("depth", depth.FOLDERS))
    for kind, names in others:
        folder = _other_folder(root, names)
        if folder is not None:
            found.append((kind, f"{IMAGES} and {folder}"))
    if len(found) > 1:
        raise ResvitError(
            f"{root} could be several kinds of data: it holds {', '.join(what for _, what in found)}.",
            f"Say which: {' or '.join(f'`{kind}:{root}`' for kind, _ in found)}.",
        )
    return found[0][0] if found else "folder"


def same_numbering(
    data: str, validation_data: str, first: Pools, second: Pools, reporter: Reporter
) -> tuple[Pools, Pools]:
    """Number the classes of two separate sources alike, where both say what their classes are.

    Class folders follow the calibration images' where those have all. Raises ``ResvitError`` for COCO files
    that do not agree.
    """
    train, validation = first.calibration, second.validation or second.calibration
    if isinstance(train, CocoPixels) and isinstance(validation, CocoPixels):
        train, validation = with_shared_classes(train, validation)
        return Pools(train, None), Pools(validation, None)
    if train.task != "classification" or validation.task != "classification":
        return first, second
    roots = [root for root in (existing(_split(text)[1]) for text in (data, validation_data)) if root is not None]
    if len(roots) < 2 or not all(root.is_dir() for root in roots):
        return first, second
    one, two = ((split_folders(root) or (root, root))[side] for side, root in enumerate(roots))
    names = shared_class_names(one, two)
    if not names or names == validation.class_names:
        return first, second
    reporter.warn(f"{two} lacks some of the classes of {one}; labels follow {one}")
    return first, Pools(pixels_from_folder(two, names), None)


def numbered_like(pool: Pixels, images: ImageSet) -> Pixels:
    """Number the classes of ``pool`` as ``images`` does, where both say what theirs are called.

    Raises ``ResvitError`` where ``pool`` has classes that ``images`` lacks: training would teach wrong answers.
    """
    names, known = pool.class_names, images.class_names
    if not names or not known or names == known or pool.task != images.task:
        return pool
    missing = [name for name in names if name not in known]
    if missing or pool.task == "segmentation":
        raise ResvitError(
            f"The classes of {pool.name} are not those of the validation images: "
            + (f"{', '.join(missing[:5])} are unknown there." if missing else "their order differs."),
            "Use the same classes, in the same order, in both.",
        )
    if isinstance(pool, CocoPixels):
        return pool.renumbered(images.class_ids or tuple(range(len(known))), known)
    if pool.labels is not None:
        pool.labels = np.array([known.index(name) for name in names], np.int64)[pool.labels]
        pool.class_names, pool.num_classes = known, len(known)
    return pool


def existing(text: str) -> Path | None:
    """The file or folder that ``text`` names, if there is one; it may be the name of something else."""
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except PermissionError as error:
        raise ResvitError(f"{text} cannot be read: {error.strerror}.", "Change its permissions.") from error
    except (OSError, RuntimeError, ValueError):
        return None


def same_source(data: str, validation_data: str) -> bool:
    """Whether both name the same data, though perhaps in other words."""
    if data == validation_data:
        return True
    (kind, text), (other_kind, other_text) = _split(data), _split(validation_data)
    first, second = existing(text), existing(other_text)
    return kind == other_kind and first is not None and second is not None and first.samefile(second)


def _split(data: str) -> tuple[Kind | None, str]:
    """Take ``coco:`` and the like off a name; a path that exists as it stands has none."""
    for kind in get_args(Kind):
        if data.startswith(f"{kind}:") and existing(data) is None:
            return kind, data.removeprefix(f"{kind}:")
    return None, data


def _folder_pools(root: Path, kind: Kind | None, options: TargetOptions) -> Pools:
    told = kind is not None
    kind = kind or kind_of_folder(root)
    if kind == "coco":
        return _coco_pools(root, any_name=told)
    parts = split_folders(root)
    if kind == "folder":
        return _class_pools(root, parts)
    pools = [_paired(part, root, kind, options) for part in parts or (root,)]
    return Pools(pools[0], pools[1] if len(pools) > 1 else None)


def _class_pools(root: Path, parts: tuple[Path, Path] | None) -> Pools:
    if parts is None:
        return Pools(pixels_from_folder(root), None)
    names = shared_class_names(*parts)
    if names is None:
        raise ResvitError(
            f"{parts[0]} and {parts[1]} each have classes that the other lacks.",
            "Use the same class folders in both.",
        )
    train, validation = (pixels_from_folder(part, names or None) for part in parts)
    return Pools(train, validation)


def _coco_pools(root: Path, *, any_name: bool) -> Pools:
    found = annotation_files(root, any_name=any_name)
    if found is None:
        raise ResvitError(
            f"{root} holds no annotations.json and no instances_*.json.", "Name the file itself: `coco:FILE.json`."
        )
    train = open_coco(found[0])
    return Pools(train, None) if found[1] is None else Pools(*with_shared_classes(train, open_coco(found[1])))


def _paired(part: Path, root: Path, kind: Kind, options: TargetOptions) -> FilePixels:
    names = masks.FOLDERS if kind == "masks" else depth.FOLDERS
    found = [name for name in names if (part / name).is_dir()]
    if not found or not (part / IMAGES).is_dir():
        raise ResvitError(
            f"{part} has no folder {names[0] if (part / IMAGES).is_dir() else IMAGES}.",
            f"Put pictures into {part / IMAGES} and files of the same names into {part / names[0]}.",
        )
    if kind == "depth":
        return depth.pixels_from_depth(part, found[0], options)
    return masks.pixels_from_masks(part, found[0], options, read_class_names(part) or read_class_names(root))


def _other_folder(root: Path, names: tuple[str, ...]) -> str | None:
    """Which of ``names`` lies beside ``images``, in the folder itself or in its part for training."""
    parts = split_folders(root)
    for part in (root, parts[0]) if parts else (root,):
        for name in names:
            if (part / IMAGES).is_dir() and (part / name).is_dir():
                return name
    return None
