"""Recognising what the user named as data: a folder of one of seven kinds, a file, or a factory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.images.pixels import ArrayPixels, FilePixels, Pixels
from resvit_calibrate.images.targets import TargetOptions
from resvit_calibrate.readers import depth, fashion_mnist, masks
from resvit_calibrate.readers.boxes.coco import annotation_files, open_coco, unused_files
from resvit_calibrate.readers.boxes.table import BoxPixels, with_classes_of_both, with_shared_classes
from resvit_calibrate.readers.boxes.voc import pixels_from_voc
from resvit_calibrate.readers.boxes.yolo import is_yolo, yolo_file, yolo_from_file, yolo_from_folder
from resvit_calibrate.readers.folders import note_of_unused, pixels_from_folder, split_folders
from resvit_calibrate.readers.layouts import Layout, layouts_in, refuse_unread, require_read, unused_parts
from resvit_calibrate.readers.mixtures import refuse_masks
from resvit_calibrate.readers.npz import pixels_from_npz
from resvit_calibrate.readers.paired import IMAGES, Part, read_class_names, shortened
from resvit_calibrate.readers.texts import BESIDE, pixels_from_list, pixels_from_texts_beside, text_lists, texts_beside
from resvit_calibrate.readers.texts import ENDINGS as LISTS
from resvit_calibrate.readers.user.loader import Factory, factory_from, is_factory_name
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter

Kind = Literal["folder", "coco", "yolo", "voc", "masks", "depth", "text"]
KINDS = (
    "Give `fashion-mnist`, a folder (class folders, images and masks, images and depth, boxes as COCO, YOLO or "
    "VOC have them, or pictures with a list of their texts), an .npz file, or file.py:factory."
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
    if path is not None and (kind == "text" or (kind is None and path.suffix.lower() in LISTS)):
        return Pools(pixels_from_list(path), None)
    if path is not None and path.suffix.lower() in (".yaml", ".yml"):
        return Pools(*yolo_from_file(path))
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
    """What a folder holds, by what it contains.

    Raises ``ResvitError`` where that could be two things, and for a layout that is known and not read.
    """
    found: list[tuple[Kind, str]] = []
    annotations = annotation_files(root)
    if annotations is not None:
        found.append(("coco", str(annotations[0].relative_to(root))))
    if lists := text_lists(root):
        found.append(("text", str(lists[0].relative_to(root))))
    elif texts_beside(root):
        found.append(("text", f"texts beside its pictures ({BESIDE})"))
    layouts = layouts_in(root)
    described = yolo_file(root)
    if described is not None:
        found.append(("yolo", described.name))
    for layout in layouts:
        if layout.kind in ("masks", "depth", "voc") or (layout.kind == "yolo" and described is None):
            found.append((layout.kind, layout.words))
    if not found and is_yolo(root):
        found.append(("yolo", "text files with boxes beside its pictures"))
    if len({kind for kind, _ in found}) > 1:
        raise ResvitError(
            f"{root} could be several kinds of data: it holds {', '.join(what for _, what in found)}.",
            f"Say which: {' or '.join(dict.fromkeys(f'`{kind}:{root}`' for kind, _ in found))}.",
        )
    if found:
        return found[0][0]
    for layout in layouts:
        require_read(layout, root)
    return "folder"


def same_numbering(train: Pixels, validation: Pixels, reporter: Reporter | None = None) -> tuple[Pixels, Pixels]:
    """Number the classes of two sources alike, where both say what their classes are.

    Classes follow the source that has all of the other's; ``reporter`` hears where that changes validation. Raises
    ``ResvitError`` where neither has, and for COCO files and masks that do not agree.
    """
    if isinstance(train, BoxPixels) and isinstance(validation, BoxPixels):
        return with_shared_classes(train, validation)
    names, others = train.class_names, validation.class_names
    if train.task != validation.task or not names or not others or names == others:
        return train, validation
    more, fewer = (names, others) if set(others) <= set(names) else (others, names)
    if train.task != "classification" or not set(fewer) <= set(more):
        alone = [name for name in fewer if name not in more], [name for name in more if name not in fewer]
        raise ResvitError(
            f"{train.name} and {validation.name} do not have the same classes: "
            + (f"{shortened(alone[0])} and {shortened(alone[1])} are in one only." if any(alone) else "order differs."),
            "Use the same classes in both, or say the network's with --classes FILE (a name a line, or JSON).",
        )
    if more is names and reporter is not None:
        reporter.warn(f"{validation.name} lacks some of the classes of {train.name}; labels follow {train.name}")
    for pool in (train, validation):
        _renumber(pool, more)
    return train, validation


def _renumber(pool: Pixels, names: tuple[str, ...]) -> None:
    """Number the labels of images as ``names`` does, which has all of their classes."""
    if pool.labels is not None:
        pool.labels = np.array([names.index(name) for name in pool.class_names], np.int64)[pool.labels]
    pool.class_names, pool.num_classes = names, len(names)


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
    if isinstance(pool, BoxPixels):
        return pool.renumbered(images.class_ids or tuple(range(len(known))), known)
    if pool.labels is not None:
        _renumber(pool, known)
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
    if kind == "text":
        return _text_pools(root)
    if kind == "yolo":
        described = yolo_file(root)
        return Pools(*(yolo_from_file(described) if described is not None else yolo_from_folder(root)))
    if kind == "folder":
        return _class_pools(root, split_folders(root), told=told)
    layout = _layout_of(root, kind)
    if kind == "voc":
        return _voc_pools(layout, root)
    pools = [_paired(part, layout, root, options) for part in layout.parts]
    if len(pools) > 1:
        pools[0].notes += unused_parts(layout, root)
    return Pools(pools[0], pools[1] if len(pools) > 1 else None)


def _class_pools(root: Path, parts: tuple[Path, Path] | None, *, told: bool) -> Pools:
    for part in parts or (root,):
        if not told:
            refuse_unread(part)
        refuse_masks(part, told=told)
    if parts is None:
        return Pools(pixels_from_folder(root), None)
    train, validation = (pixels_from_folder(part) for part in parts)
    train.notes += note_of_unused(root, [part.name for part in parts])
    return Pools(train, validation)


def _coco_pools(root: Path, *, any_name: bool) -> Pools:
    found = annotation_files(root, any_name=any_name)
    if found is None:
        raise ResvitError(
            f"{root} holds no annotations.json and no instances_*.json.", "Name the file itself: `coco:FILE.json`."
        )
    train = open_coco(found[0])
    if found[1] is None:
        return Pools(train, None)
    train.notes += unused_files(root, (found[0], found[1]))
    return Pools(train, open_coco(found[1]))


def _voc_pools(layout: Layout, root: Path) -> Pools:
    """The pictures of VOC's XML files; classes that occur in one part alone are classes of both."""
    pools = [pixels_from_voc(part) for part in layout.parts]
    if len(pools) == 1:
        return Pools(pools[0], None)
    pools[0].notes += unused_parts(layout, root)
    return Pools(*with_classes_of_both(*pools))


def _text_pools(root: Path) -> Pools:
    """Pictures with a list, or two, of their texts, or with texts beside them."""
    lists = text_lists(root)
    halves = split_folders(root)
    if not lists:
        pools = [pixels_from_texts_beside(part) for part in halves or (root,)]
    else:
        pools = [pixels_from_list(path) for path in lists]
    if len(pools) == 1:
        return Pools(pools[0], None)
    if halves is not None:
        pools[0].notes += note_of_unused(root, [part.name for part in halves])
    return Pools(pools[0], pools[1])


def _layout_of(root: Path, kind: Kind) -> Layout:
    """The folder's layout of one kind; raises ``ResvitError`` where it has none, or several."""
    found = [layout for layout in layouts_in(root) if layout.kind == kind]
    if not found:
        about, pictures = {"voc": "Annotations"}.get(kind, kind), (root / IMAGES).is_dir()
        raise ResvitError(
            f"{root} has no folder {about if pictures else IMAGES}.",
            f"Put pictures into {root / IMAGES} and files of the same names into {root / about}.",
        )
    if len(found) > 1:
        raise ResvitError(
            f"{root} has several folders of {kind}: {'; '.join(layout.words for layout in found)}.",
            "Move those away that are not meant.",
        )
    return found[0]


def _paired(part: Part, layout: Layout, root: Path, options: TargetOptions) -> FilePixels:
    if layout.kind == "depth":
        return depth.pixels_from_depth(part, options)
    pixels = masks.pixels_from_masks(part, options, read_class_names(part.root) or read_class_names(root))
    if layout.moved is not None:
        pixels.moved = layout.moved
        pixels.notes = (*pixels.notes, f"the values of {root} are Cityscapes' labelIds, and are read as its trainIds")
    return pixels
