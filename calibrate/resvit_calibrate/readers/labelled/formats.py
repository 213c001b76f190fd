"""The formats of annotations that are read: which of them a folder or a file holds, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeGuard, get_args

from resvit_calibrate.images.pixels import FilePixels
from resvit_calibrate.images.targets import TargetOptions
from resvit_calibrate.readers.boxes.coco import part_of_file
from resvit_calibrate.readers.folders import TRAINING_NAMES, VALIDATION_NAMES, note_of_unused, split_folders
from resvit_calibrate.readers.labelled import (
    box_list,
    createml,
    cvat,
    kitti,
    label_studio,
    labelme,
    supervisely,
    via,
)
from resvit_calibrate.readers.labelled.recognise import Format, formats_in, is_of
from resvit_calibrate.readers.labelled.regions import Labelled, pixels_of
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError

Labels: TypeAlias = Literal["labelme", "via", "createml", "cvat", "kitti", "supervisely", "label-studio", "boxes"]
ENDINGS = (".json", ".xml", ".csv", ".tsv")
"""How files end that hold the annotations of many pictures."""
_MOST_FILES = 200


class _Reader(NamedTuple):
    """What files of a kind are like, and how they are read: each by itself, or all of a folder."""

    forms: tuple[Format, ...]
    of_file: Callable[[Path], Labelled] | None = None
    of_folder: Callable[[Path], Labelled] | None = None


_READERS: dict[Labels, _Reader] = {
    "labelme": _Reader((labelme.FORMAT,), of_folder=labelme.labelme_in),
    "via": _Reader((via.FORMAT, via.CSV_FORMAT), via.via_from),
    "createml": _Reader((createml.FORMAT,), createml.createml_from),
    "label-studio": _Reader((label_studio.FORMAT,), label_studio.label_studio_from),
    "supervisely": _Reader((supervisely.FORMAT,), of_folder=supervisely.supervisely_in),
    "cvat": _Reader((cvat.FORMAT,), cvat.cvat_from),
    "kitti": _Reader((kitti.FORMAT,), of_folder=kitti.kitti_in),
    "boxes": _Reader((box_list.FORMAT,), box_list.boxes_from),
}
_KIND_OF = {form: kind for kind, reader in _READERS.items() for form in reader.forms}


def labels_in(root: Path) -> dict[Labels, tuple[str, Path]]:
    """What a folder holds of these formats, in itself or up to three folders below: in words, and a file of each.

    The first is the one that is taken where nobody says which.
    """
    found: dict[Labels, tuple[str, Path]] = {}
    for form, file in formats_in(root, tuple(_KIND_OF)):
        found.setdefault(_KIND_OF[form], (form.what, file))
    return {kind: found[kind] for kind in _READERS if kind in found}


def labels_of(path: Path) -> Labels | None:
    """The format of a file with the annotations of many pictures; None of another file."""
    kinds = (kind for kind, reader in _READERS.items() if reader.of_file and any(is_of(path, f) for f in reader.forms))
    return next(kinds, None)


def is_labels(kind: str | None) -> TypeGuard[Labels]:
    """Whether a kind of data is one of these formats."""
    return kind in get_args(Labels)


def open_labels(path: Path, kind: Labels, options: TargetOptions) -> tuple[FilePixels, FilePixels | None]:
    """The pictures of a folder or a file: to train with and to validate with, where it has both.

    Raises:
        ResvitError: where there is nothing of the format, several files that are not two parts, and what the format's
            reader and ``pixels_of`` raise.
    """
    parts = _parts(path, _READERS[kind])
    if not parts:
        what = _READERS[kind].forms[0].what
        raise ResvitError(f"{path} holds nothing that looks like {what}.", "Name the folder or the file itself.")
    pools = pixels_of(parts, options)
    return pools[0], pools[1] if len(pools) > 1 else None


def notes_of_others(root: Path, taken: str) -> tuple[str, ...]:
    """That a folder holds annotations of other formats than the one that is taken; none where it does not."""
    others = [(kind, *held) for kind, held in labels_in(root).items() if kind != taken]
    return tuple(
        f"{root} also holds {what} ({file.relative_to(root)}), which are not used: `{kind}:{root}` takes them"
        for kind, what, file in others
    )


def _parts(path: Path, reader: _Reader) -> list[Labelled]:
    if not path.is_dir():
        if reader.of_file is None:
            raise ResvitError(f"{path} is about one picture.", f"Name the folder: {path.parent}.")
        return [reader.of_file(path)]
    halves = split_folders(path)
    if halves is not None and all(_files(half, reader) for half in halves):
        inner = [_of_one(half, reader) for half in halves]
        notes = note_of_unused(path, [half.name for half in halves])
        return [_with_notes(inner[0], notes), inner[1]]
    if reader.of_folder is not None:
        return [reader.of_folder(path)] if _files(path, reader) else []
    files = _files(path, reader)
    taught = [file for file in files if part_of_file(file) in TRAINING_NAMES]
    for name in VALIDATION_NAMES:
        checked = [file for file in files if part_of_file(file) == name]
        if len(taught) == len(checked) == 1:
            names = [taught[0].name, checked[0].name]
            notes = note_of_unused(path, names, [file.name for file in files])
            return [_with_notes(reader.of_file(taught[0]), notes), reader.of_file(checked[0])] if reader.of_file else []
    return [_of_one(path, reader)] if files else []


def _of_one(root: Path, reader: _Reader) -> Labelled:
    """The only part of a folder. Raises ``ResvitError`` where several files could be it."""
    if reader.of_file is None:
        assert reader.of_folder is not None
        return reader.of_folder(root)
    files = _files(root, reader)
    if len(files) > 1:
        raise ResvitError(
            f"{root} has {len(files)} files as {reader.forms[0].what}: "
            f"{shortened([str(file.relative_to(root)) for file in files])}.",
            f"Name the one to use, {files[0]}, and another one for validation if there is one.",
        )
    return reader.of_file(files[0])


def _files(root: Path, reader: _Reader) -> list[Path]:
    """The files of a format in a folder; of one that has a file for each picture, some of them."""
    most = {} if reader.of_file is None else {"of_a_kind": _MOST_FILES}
    return [file for _, file in formats_in(root, reader.forms, **most)]


def _with_notes(part: Labelled, notes: tuple[str, ...]) -> Labelled:
    return Labelled(part.path, part.root, part.pictures, part.classes, (*part.notes, *notes), part.relative)
