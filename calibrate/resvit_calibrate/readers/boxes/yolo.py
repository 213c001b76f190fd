"""YOLO's data: a text file of boxes for each picture, and ``data.yaml`` (https://docs.ultralytics.com/datasets/detect).

A line is ``class x y width height``, the centre and sizes as shares of the picture. Outlines (``class x1 y1 x2 y2 …``,
three points or more, as for segmentation and turned boxes) become the box around them, and key points are dropped.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from resvit_calibrate.readers.boxes.table import Box, BoxPixels, table_of
from resvit_calibrate.readers.boxes.yolo_yaml import data_from_yaml, describes_data, how_it_is_written, names_from_yaml
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    files_below,
    is_image,
    name_inside,
    note_of_unused,
    notes_of,
    part_folders,
    plain_path,
)
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file, read_outside, text_from_outside

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")
_LINE = re.compile(r"\s*(\d{1,6})((?:\s+[-+]?[0-9.]+(?:[eE][-+]?\d+)?)+)\s*")
_SLACK = 0.01
"""By so much of the picture a box may reach beyond it."""
_LISTED_MOST = 10_000_000
_PROBED = 20
_FIX = "A line is `class x y width height`: the class from 0, the centre and sizes as shares (0 to 1) of the picture."
_BOX, _CONFIDENT, _OUTLINE_LEAST = 4, 5, 6


def yolo_file(root: Path) -> Path | None:
    """The ``data.yaml`` of a folder, whatever it is called (``coco8.yaml``); None where it has none.

    Raises ``ResvitError`` where there are several of other names.
    """
    usual = next((root / name for name in DATA_FILES if (root / name).is_file()), None)
    if usual is not None:
        return usual
    others = [path for path in sorted(root.glob("*.y*ml"))[:_PROBED] if describes_data(path)]
    if len(others) > 1:
        raise ResvitError(
            f"{root} has several files as YOLO's data.yaml: {shortened([path.name for path in others])}.",
            f"Name the one that is meant, {others[0]}, say.",
        )
    return others[0] if others else None


def is_yolo(root: Path) -> bool:
    """Whether text files of boxes lie beside the pictures of a folder, as darknet has them."""
    some = itertools.islice(files_below(root, ".", lambda name: name.lower().endswith(".txt")), _PROBED)
    found = [root / name for name in some if PurePosixPath(name).name not in _NAME_FILES]
    beside = [file for file in found if any(file.with_suffix(end).is_file() for end in (".jpg", ".jpeg", ".png"))]
    return bool(beside) and all(_is_boxes(file) for file in beside)


def yolo_from_file(path: Path) -> tuple[BoxPixels, BoxPixels | None]:
    """The pictures that a ``data.yaml`` names, to train with and to validate with.

    Raises ``ResvitError`` for a file that is no YAML or names no pictures, and lines that are no boxes.
    """
    data = data_from_yaml(path)
    train, validation = data.train, data.validation
    if set(train) == set(validation):  # as in samples of a few pictures, such as COCO128: they are divided
        validation = ()
    if not train and not validation:
        raise ResvitError(f"{path} names neither `train` nor `val` pictures that are there.", how_it_is_written(path))
    count, points = data.classes, data.key_point_values
    first = _pixels(train or validation, path, data.names, points, count)
    second = _pixels(validation, path, data.names, points, count) if train and validation else None
    return first, second


def yolo_from_folder(root: Path) -> tuple[BoxPixels, BoxPixels | None]:
    """Pictures with text files of boxes: ``images`` and ``labels``, divided above or below, or side by side.

    Raises ``ResvitError`` as ``yolo_from_file``.
    """
    names = _names_beside(root)
    above, beside = part_folders(root / "images"), part_folders(root)
    sides = []
    for side in (TRAINING_NAMES, VALIDATION_NAMES):
        places = [above[name] for name in side if name in above]
        for folder in (beside[name] for name in side if name in beside):
            places += [place for place in (folder / "images", folder) if place.is_dir()]
        sides.append(next(iter(places), None))
    if sides[0] is None or sides[1] is None:
        folder = root / "images" if (root / "images").is_dir() else root
        return _pixels((folder,), root, names, 0), None
    train, validation = (_pixels((side,), root, names, 0) for side in sides if side is not None)
    used = [
        next(part for part in side.relative_to(root).parts if part != "images") for side in sides if side is not None
    ]
    train.notes = (*train.notes, *note_of_unused(root / "images" if above else root, used))
    return train, validation


def _pixels(
    folders: tuple[Path, ...], where: Path, names: tuple[str, ...], key_point_values: int, classes: int = 0
) -> BoxPixels:
    """The pictures of some folders and lists, each with its boxes; ``classes``: how many there are by ``nc``."""
    root = _common(folders)
    left_out: Counter[str] = Counter()
    pictures = sorted({picture for folder in folders for picture in _pictures(folder, left_out)})
    rows, alone, cut, outlines = [], [], 0, 0
    for picture in pictures:
        label = _label_of(picture)
        boxes: list[Box] = []
        if label is None:
            alone.append(picture.name)
        else:
            for box, outlined in _boxes_in(label, len(names) or classes, key_point_values):
                outlines += outlined
                held = tuple(min(max(value, 0.0), 1.0) for value in box.corners)
                cut += held != box.corners
                if held[2] > held[0] and held[3] > held[1]:
                    boxes.append(box._replace(corners=held))  # type: ignore[arg-type]
        rows.append((str(PurePosixPath(plain_path(picture).relative_to(root))), (0, 0), boxes))
    if not pictures:
        raise ResvitError(f"{where} leads to no pictures ({', '.join(map(str, folders))}).", how_it_is_written(where))
    if not any(boxes for _, _, boxes in rows):
        raise ResvitError(
            f"None of the {len(pictures)} pictures of {root} has a text file with boxes.",
            "Put NAME.txt into `labels` for NAME.jpg in `images`, or beside it.",
        )
    del left_out[".txt"]
    notes = list(notes_of(root, +left_out))
    if alone:
        notes.append(
            f"{len(alone)} pictures of {root} have no text file and are taken to show nothing: {shortened(alone)}"
        )
    if cut:
        notes.append(f"{cut} boxes of {root} reach beyond their picture; they are cut at its edges")
    if outlines:
        notes.append(
            f"{outlines} objects of {root} are outlines or turned boxes (more than four numbers): the upright boxes "
            "around them are read"
        )
    found = BoxPixels(table_of(where, rows, names, notes, relative=True), root)
    if classes and not names:
        found.num_classes = classes
    return found


def _pictures(place: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The pictures of a folder, or those that a list names."""
    if place.is_dir():
        for name in files_below(place, ".", is_image, left_out):
            yield place / PurePosixPath(name)
        return
    lines = _text(place).splitlines()
    for number, line in enumerate(lines[:_LISTED_MOST], 1):
        if not line.strip():
            continue
        path = Path(line.strip().replace("\\", "/"))
        if not path.is_absolute():
            path = place.parent / name_inside(
                line.strip().removeprefix("./"), f"line {number} of {place}", how_it_is_written(place)
            )
        if not leads_to_file(path):
            raise ResvitError(f"line {number} of {place}: there is no {path}.", "Correct the list.")
        yield path


def _label_of(picture: Path) -> Path | None:
    """The text file of a picture: in ``labels`` where its path has ``images`` (the last one), else beside it."""
    parts = list(picture.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        label = Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")
        if label.is_file():
            return label
    beside = picture.with_suffix(".txt")
    return beside if beside.is_file() else None


def _boxes_in(label: Path, classes: int, key_point_values: int) -> Iterator[tuple[Box, bool]]:
    """The boxes of a text file, and whether each is one around an outline."""
    for number, line in enumerate(_text(label).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {label}"
        found = _LINE.fullmatch(line)
        if found is None:
            raise ResvitError(f"{where} is no box: {line.strip()[:60]!r}.", _FIX)
        kind, values = int(found[1]), _numbers(found[2], where)
        if classes and kind >= classes:
            raise ResvitError(
                f"{where} has class {kind}, and there are {classes} classes by data.yaml.",
                "Correct data.yaml or the line.",
            )
        outlined = len(values) >= _OUTLINE_LEAST and not key_point_values
        yield Box(kind, _corners(values, key_point_values, where)), outlined


def _corners(values: list[float], key_point_values: int, where: str) -> tuple[float, float, float, float]:
    if len(values) == _BOX or (key_point_values and len(values) == _BOX + key_point_values):
        x, y, width, height = values[:_BOX]
        if width < 0 or height < 0:
            raise ResvitError(f"{where} has a box of negative size.", _FIX)
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(values) >= _OUTLINE_LEAST and len(values) % 2 == 0 and not key_point_values:
        corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        guess = " (with a confidence, as predictions have?)" if len(values) == _CONFIDENT else ""
        raise ResvitError(f"{where} has {len(values)} numbers behind its class{guess}.", _FIX)
    if min(corners) < -_SLACK or max(corners) > 1 + _SLACK:
        raise ResvitError(
            f"{where} reaches from {min(corners):g} to {max(corners):g}: these are no shares of a picture.", _FIX
        )
    return corners


def _numbers(text: str, where: str) -> list[float]:
    try:
        values = [float(part) for part in text.split()]
    except ValueError as error:
        raise ResvitError(f"{where} is no box: {error}.", _FIX) from error
    if not all(map(math.isfinite, values)):
        raise ResvitError(f"{where} has a number without bounds.", _FIX)
    return values


def _is_boxes(file: Path) -> bool:
    try:
        lines = [line for line in _text(file).splitlines() if line.strip()]
    except ResvitError:
        return False
    return all(_LINE.fullmatch(line) is not None and len(line.split()) > _BOX for line in lines)


def _names_beside(root: Path) -> tuple[str, ...]:
    """The classes by ``data.yaml`` or a file with a name a line, in the folder or beside its labels; none without."""
    described = yolo_file(root)
    if described is not None:
        return names_from_yaml(described)
    for folder in (root, root / "labels", root / "train"):
        for name in _NAME_FILES:
            if (folder / name).is_file():
                return tuple(line.strip() for line in _text(folder / name).splitlines() if line.strip())
    return ()


def _common(folders: tuple[Path, ...]) -> Path:
    """The deepest folder that has all of these: lists may name pictures anywhere in it."""
    places = [folder if folder.is_dir() else folder.parent for folder in folders]
    lists = [folder for folder in folders if folder.is_file()]
    for file in lists:
        places += [picture.parent for picture in _pictures(file, Counter())]
    first = places[0].resolve()
    return next(
        above for above in (first, *first.parents) if all(place.resolve().is_relative_to(above) for place in places)
    )


def _text(path: Path) -> str:
    return text_from_outside(read_outside(path), str(path), _FIX)
