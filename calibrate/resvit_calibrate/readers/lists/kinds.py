"""What a list says of its pictures: a class or a text of each, or nothing; and which lists a folder has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from resvit_calibrate.readers.folders import TRAINING_NAMES, VALIDATION_NAMES, is_image, name_inside
from resvit_calibrate.readers.lists.places import PROBED, place_of
from resvit_calibrate.readers.lists.rows import (
    CLASS_TITLES,
    ENDINGS,
    FIX,
    Row,
    columns_of,
    file_columns,
    first_rows,
    is_of_boxes,
    is_of_regions,
    undecoded_rows,
)
from resvit_engines.errors import ResvitError

Saying: TypeAlias = Literal["csv", "text", "names"]

_LOOKED_AT = 2000
_CLASSES_SLACK = 20
_MOST_LISTS = 200
_IDS_LEAST, _NAME_MOST = 8, 255
_OF_TEXTS = re.compile(r"(rec_?gt|gt|texts?|transcriptions?)([_-].*)?", re.IGNORECASE)
_NO_LISTS = re.compile(r"^\.|submission|^class(es|_names)\.txt$|synset|\.gt\.txt$")
_WNID = re.compile(r"n[0-9]{8}")
_WORDS = re.compile(r"[^\W_]([\w .&'()/-]{0,60})", re.UNICODE)


def says(path: Path) -> tuple[Saying, ...]:
    """What a list can be taken for: classes (``csv``), texts, or names of pictures alone; several where in doubt.

    Empty where it is no list of pictures that are there. Raises ``ResvitError`` for one that is and cannot be read.
    """
    rows = first_rows(path, _LOOKED_AT)
    if not rows:
        _refuse_undecoded(path)
        return ()
    if is_of_regions(rows[0]):
        return ()
    try:
        columns = columns_of(rows, str(path))
    except ResvitError:
        # Of boxes, or of columns that nothing names: only a list of pictures is refused for that.
        fields = rows[min(1, len(rows) - 1)].fields[:8]
        boxes = is_of_boxes(rows[0])
        named = any((boxes or is_image(field)) and place_of(path, [field])[1] for field in fields if field)
        if path.suffix.lower() != ".txt" and (named or _names_pictures(path, rows)):
            raise
        return ()
    rows = rows[1:] if columns.said else rows
    names = [row.fields[columns.file] for row in rows if len(row.fields) > columns.file]
    hits = place_of(path, names)[1] if names else 0
    if not hits and names and all(is_image(PurePosixPath(name).name) for name in names[:PROBED]):
        _refuse_elsewhere(path, names)
    # Lines of other files begin with a number or a word too, as which a picture or two may be called.
    if not hits or (2 * hits <= min(len(names), PROBED) and not any(map(is_image, names))):
        return ()
    if columns.text is not None:
        return ("text",)
    if columns.shares or (columns.number, columns.name) != (None, None):
        return ("csv",)
    if columns.either is None:
        return ("names",)
    values = [row.fields[columns.either] for row in rows if len(row.fields) > columns.either]
    title = columns.titles[columns.either].strip().lower() if columns.said else ""
    if title not in CLASS_TITLES and _are_ids(values):
        raise ResvitError(
            f"{path} gives each of its pictures another number ({', '.join(values[:3])}, …): these are numbers of "
            "pictures and no classes.",
            "Name the folder of pictures where its folders are the classes, or a list of files and classes; "
            f"`csv:{path}` if they are classes.",
        )
    return ("csv",) if columns.sure else _by_values(path, values, labelled=columns.said)


def _names_pictures(path: Path, rows: Sequence[Row]) -> bool:
    """Whether a column that is called so names pictures that are there, most of them; they may lack their endings."""
    for column in file_columns(rows[0]):
        names = [row.fields[column] for row in rows[1:] if len(row.fields) > column]
        if names and 2 * place_of(path, names)[1] > min(len(names), PROBED):
            return True
    return False


def _refuse_elsewhere(path: Path, names: Sequence[str]) -> None:
    """Refuse a list whose absolute paths are those of another machine, where its pictures lie here."""
    bare = [PurePosixPath(name.replace("\\", "/")).name for name in names]
    if place_of(path, bare)[1]:
        name_inside(names[0], f"{path} lists pictures that are here under other paths: the file", FIX)


def _refuse_undecoded(path: Path) -> None:
    """Refuse a list of pictures that is no UTF-8 text; what is none is left alone."""
    found = undecoded_rows(path, PROBED)
    if found is None:
        return
    rows = [[field for field in row.fields if 0 < len(field) < _NAME_MOST] for row in found[0]]
    if path.suffix.lower() == ".txt":
        rows = [[field for field in row if is_image(field)] for row in rows]
    if 2 * sum(any(place_of(path, [field])[1] for field in row) for row in rows) > len(rows):
        raise found[1]


def _are_ids(values: Sequence[str]) -> bool:
    """Whether whole numbers go up one by one, as pictures are numbered."""
    told = [value.strip() for value in values]
    if len(told) < _IDS_LEAST or not all(value.isdecimal() and len(value) < _NAME_MOST for value in told):
        return False
    numbers = sorted(map(int, told))
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def class_lists(root: Path) -> dict[str, Path]:
    """The lists of classes that a folder holds: ``train``, ``val`` and ``test`` by their names, else ``all``.

    Raises ``ResvitError`` where two are of the same part, or one cannot be read.
    """
    found: dict[str, Path] = {}
    inside = sorted(root.iterdir())
    pictures = {path.stem for path in inside if is_image(path.name)}
    lists = [path for path in inside if path.name.lower().endswith(ENDINGS) and path.stem not in pictures]
    for path in lists[:_MOST_LISTS]:
        if _NO_LISTS.search(path.name.lower()) or not path.is_file() or "csv" not in says(path):
            continue
        part = part_of(path.stem)
        if part in found:
            raise ResvitError(
                f"{root} has {found[part].name} and {path.name}, and each could be its list of classes.",
                f"Name the one to use: `csv:{path}`, say.",
            )
        found[part] = path
    return found


def part_of(name: str) -> str:
    """Which part a name is of: ``train``, ``val``, ``test``, or ``all``."""
    lower = name.lower()
    if any(word in lower for word in TRAINING_NAMES):
        return "train"
    if any(re.search(rf"(?<![a-z]){word}(?![a-z])", lower) for word in VALIDATION_NAMES if not word.startswith("test")):
        return "val"
    return "test" if re.search(r"(?<![a-z])test", lower) else "all"


def _by_values(path: Path, values: Sequence[str], *, labelled: bool) -> tuple[Saying, ...]:
    """Classes come again and again, texts mostly not; classes by number are about as many as the highest says.

    ``labelled``: the column has a name, such as `label`, which people give to either.
    """
    told = [value.strip() for value in values if value.strip()]
    if not told:
        return ("text",)
    if all(len(value) < 20 and value.isdecimal() and str(int(value)) == value for value in told):
        # What meters and plates show goes far beyond.
        few = max(map(int, told)) <= 2 * len(values) + _CLASSES_SLACK
        return ("csv",) if few else ("csv", "text") if labelled else ("text",)
    if all(map(_WNID.fullmatch, told)):
        return ("csv",)
    different = len(set(told))
    if labelled:
        return ("csv",) if 2 * different <= len(told) else ("csv", "text")
    if _OF_TEXTS.fullmatch(path.stem) or not all(map(_WORDS.fullmatch, told)) or 3 * different > 2 * len(told):
        return ("text",)
    return ("csv",) if 4 * different <= len(told) else ("csv", "text")
