"""What the user's name for data stands for: which kind it is of, and whether there is such a thing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from resvit_calibrate.data.classified import lists_in
from resvit_calibrate.data.libraries import has_pictures, has_tables, refuse_elsewhere, require_tables
from resvit_calibrate.data.other_files import refuse_databases, refuse_other_files
from resvit_calibrate.readers.boxes.coco import annotation_files
from resvit_calibrate.readers.boxes.voc import BESIDE as XML_BESIDE
from resvit_calibrate.readers.boxes.voc import voc_parts
from resvit_calibrate.readers.boxes.yolo import is_yolo, yolo_file
from resvit_calibrate.readers.fashion_mnist import SPLITS, find_files
from resvit_calibrate.readers.foreign.annotations import refuse_foreign
from resvit_calibrate.readers.foreign.celeba import refuse_celeba
from resvit_calibrate.readers.foreign.nesting import refuse_nested
from resvit_calibrate.readers.hugging_face.places import ENDINGS as TABLES
from resvit_calibrate.readers.hugging_face.places import is_saved
from resvit_calibrate.readers.hugging_face.reference import wanted_from
from resvit_calibrate.readers.labelled.formats import Labels, labels_in
from resvit_calibrate.readers.layouts import layouts_in, require_read
from resvit_calibrate.readers.lists.rows import ENDINGS as LISTS
from resvit_calibrate.readers.paired import shortened
from resvit_calibrate.readers.shards import named_shards, shards_in
from resvit_calibrate.readers.texts import BESIDE, text_lists, texts_beside
from resvit_calibrate.readers.torchvision_sets import refuse_roots, require_torchvision_set
from resvit_calibrate.readers.user.loader import is_factory_name
from resvit_calibrate.readers.video.container import ENDINGS as FILMS
from resvit_calibrate.readers.video.container import format_of
from resvit_calibrate.readers.video.film import films_below, films_in
from resvit_engines.errors import ResvitError
from resvit_engines.outside import open_outside
from resvit_engines.pictures.decode import begins_as_picture

_Described = Literal["csv", "coco", "yolo", "voc", "masks", "depth", "text", Labels]
Kind = Literal["folder", "tar", "hf-dataset", "torchvision", "video", "frames", _Described]
KINDS = (
    "Give `fashion-mnist`, a folder (class folders, images and masks, images and depth, boxes as COCO, YOLO, VOC or a "
    "tool for labelling have them, pictures with a list of their classes or texts, or tar shards), such a list, an "
    ".npz file, hf-dataset:FOLDER-or-NAME, torchvision:NAME:ROOT, a film, or file.py:factory."
)
OBJECT = "object:"
"""Begins what stands for a data set in memory."""
_TOLD_BY_NAME = (*TABLES, ".json", ".yaml", ".yml", ".py", ".npz", ".xml", *LISTS)


def require_source(data: str) -> None:
    """Refuse at once, without reading any image, what names no data: so that no long work is done for nothing.

    Raises ``ResvitError`` for a path that does not exist and is no factory's name, a file that is of no kind that is
    read, and a folder that could be of two.
    """
    if data == "fashion-mnist":
        for split in SPLITS:
            find_files(split)
        return
    if data.startswith(OBJECT):
        raise ResvitError(
            f"The data {data!r} were an object in Python, which is not there any more.",
            "Run it again from Python, or name data with --data.",
        )
    kind, text = split_kind(data)
    if kind is not None and not text.strip():
        raise ResvitError(f"{data.strip()} names nothing: a path is missing behind the colon.", KINDS)
    if kind == "hf-dataset":
        require_tables(text)
        return
    if kind == "torchvision":
        require_torchvision_set(text)
        return
    if kind is None and existing(data) is None:
        refuse_elsewhere(data)
    shards = named_shards(text) if kind in (None, "tar") else ()
    if missing := [path for path in shards if existing(str(path)) is None]:
        raise ResvitError(f"The data {text!r} does not exist: there is no {missing[0]}.", KINDS)
    if not shards and existing(text) is None and (kind is not None or ":" not in data):
        raise ResvitError(f"The data {text!r} does not exist.", KINDS)
    path = existing(text)
    if path is not None and path.is_dir() and kind is None:
        kind_of_folder(path)
    elif path is not None and kind == "video" and not path.is_dir() and format_of(path) is None:
        raise ResvitError(f"{path} is no film that is known.", f"Films end in {shortened(list(FILMS))}.")
    elif path is not None and kind is None and not shards and path.suffix.lower() not in _TOLD_BY_NAME:
        _require_archive(path)


def _require_archive(path: Path) -> None:
    """Refuse a file that no name tells the kind of and that is no ``.npz`` inside."""
    with open_outside(path) as stream:
        start = stream.read(64)
    if format_of(path) is not None:
        return
    if path.suffix.lower() in FILMS:
        raise ResvitError(
            f"{path} is called like a film and does not begin like one.", "Give a film that a player shows."
        )
    if begins_as_picture(start):
        raise ResvitError(f"{path} is a picture, and data are many.", f"Name the folder that it lies in. {KINDS}")
    refuse_other_files(path, start)
    if not start.startswith(b"PK"):
        raise ResvitError(f"{path} is of no kind of data that is read.", KINDS)


def is_factory(data: str) -> bool:
    """Whether ``data`` names a function that gives preprocessed images, without importing it."""
    return split_kind(data)[0] is None and not named_shards(data) and existing(data) is None and is_factory_name(data)


def kind_of_folder(root: Path) -> Kind:
    """What a folder holds, by what it contains.

    Raises ``ResvitError`` where that could be two things, and for a layout that is known and not read.
    """
    found: list[tuple[Kind, str]] = []
    if is_saved(root):
        return "hf-dataset"
    refuse_roots(root)
    refuse_databases(root)
    refuse_celeba(root)
    annotations = annotation_files(root)
    if annotations is not None:
        found.append(("coco", str(annotations[0].relative_to(root))))
    if listed := lists_in(root):
        found.append(("csv", ", ".join(str(path.relative_to(root)) for path in listed.values())))
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
    if not any(layout.kind == "voc" for layout in layouts) and voc_parts(root):
        found.append(("voc", XML_BESIDE))
    if not found and is_yolo(root):
        found.append(("yolo", "text files with boxes beside its pictures"))
    if len({kind for kind, _ in found}) > 1:
        raise ResvitError(
            f"{root} could be several kinds of data: it holds {', '.join(dict.fromkeys(what for _, what in found))}.",
            f"Say which: {' or '.join(dict.fromkeys(f'`{kind}:{root}`' for kind, _ in found))}.",
        )
    if found:
        # Text files in `labels`, and XML in `annotations`, may be of other formats than of those that lie there mostly.
        other: Kind | None = {"yolo": "kitti", "voc": "cvat"}.get(found[0][0])  # type: ignore[assignment]
        if other is not None and described is None:
            if other in labels_in(root):
                return other
            refuse_foreign(root)
        return found[0][0]
    if shards_in(root)[0]:
        return "tar"
    if has_tables(root):
        return "hf-dataset"
    if films_in(root) and not has_pictures(root):
        return "video"
    if not has_pictures(root) and (below := films_below(root)):
        where = shortened(list(dict.fromkeys(film.parent.name for film in below)))
        raise ResvitError(
            f"{root} holds films in folders below ({where}), and no pictures.",
            f"Name one of these folders, or one film: {below[0]}. A film's folder is no class.",
        )
    if labels := labels_in(root):
        return next(iter(labels))
    refuse_foreign(root)
    for layout in layouts:
        require_read(layout, root)
    refuse_nested(root)
    return "folder"


def existing(text: str) -> Path | None:
    """The file or folder that ``text`` names, if there is one; it may be the name of something else."""
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except PermissionError as error:
        raise ResvitError(f"{text} cannot be read: {error.strerror}.", "Change its permissions.") from error
    except (OSError, RuntimeError, ValueError):
        return None


def absolute_source(data: str, folder: Path) -> str | None:
    """``data`` with its path made absolute where a prefix stands before one that is there; None for all others."""
    for kind in get_args(Kind):
        if data.startswith(f"{kind}:"):
            where = data.removeprefix(f"{kind}:")
            before, behind = "", ""
            if kind == "torchvision":
                before, _, where = where.partition(":")
                before += ":"
                path, colon, part = where.rpartition(":")
                where, behind = (path, f":{part}") if colon and existing(str(folder / where)) is None else (where, "")
            if kind == "hf-dataset":
                path = wanted_from(where).where
                where, behind = path, where.removeprefix(path)
            there = existing(str(folder / Path(where).expanduser()))
            return None if there is None else f"{kind}:{before}{there.resolve()}{behind}"
    return None


def same_source(data: str, validation_data: str) -> bool:
    """Whether both name the same data, though perhaps in other words."""
    if data == validation_data:
        return True
    (kind, text), (other_kind, other_text) = split_kind(data), split_kind(validation_data)
    first, second = existing(text), existing(other_text)
    return kind == other_kind and first is not None and second is not None and first.samefile(second)


def split_kind(data: str) -> tuple[Kind | None, str]:
    """Take ``coco:`` and the like off a name; a path that exists as it stands has none."""
    for kind in get_args(Kind):
        if data.startswith(f"{kind}:") and existing(data) is None:
            return kind, data.removeprefix(f"{kind}:")
    return None, data
