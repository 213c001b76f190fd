"""Pictures of text lines with what is written in them: a list of files and texts, or a text file beside each picture.

Lists are read as recognisers' trainers write them: ``file TAB text`` (PaddleOCR), ``file, "text"`` (ICDAR),
``file,text``, ``file text``, CSV with a header (the ``metadata.csv`` of Hugging Face's image folders), with semicolons
as Excel writes it too, and JSON by line. Lines that begin with ``#`` in front of the first picture are remarks.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from resvit_calibrate.images.pixels import UNSEEN, FilePixels, Look
from resvit_calibrate.images.targets import Target, TextTarget, digest_of_target
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    ending_of,
    files_below,
    is_image,
    name_inside,
    notes_of,
    relative_inside,
    split_folders,
)
from resvit_calibrate.readers.lists.kinds import says
from resvit_calibrate.readers.lists.places import PROBED, none_is_there, note_of_missing
from resvit_calibrate.readers.lists.rows import ENDINGS, first_rows, is_of_regions, text_columns
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, leads_to_file, read_outside, text_from_outside

BESIDE = ".gt.txt"
"""What Tesseract's and Calamari's trainers call the text of a picture."""
_STEM = re.compile(r"(?:rec_?gt|gt|labels?|texts?|metadata|transcriptions?|annotations?)?[_-]?([a-z]*)", re.IGNORECASE)
_OF_TEXTS = re.compile(r"(?:rec_?gt|gt|texts?|transcriptions?)(?:[_-].*)?", re.IGNORECASE)
_MOST_BYTES = 1 << 30
_LOOKED_AT = 2000
_FOLDERS = ("", "images", "imgs", "image")
_ICDAR = re.compile(r'(\S.*?\.[A-Za-z0-9]{2,5}),\s*"(.*)"\s*')
_COMMA = re.compile(r"(\S+?\.[A-Za-z0-9]{2,5}),\s*(.*)")
_SPACED = re.compile(r"(\S+\.[A-Za-z0-9]{2,5})(?:\s+(.*))?")
_NAME = re.compile(r"\s*\"?([^\t;,\"]+?\.[A-Za-z0-9]{2,5})(?=[\"\t;, ]|$)")
_MARK = re.compile(r'\s*(?:"(?:[^"]|"")*"|[^\t;,"]*)\s*([\t;,])')
_FIX = (
    "Write one line for each picture: its file, a tab, and its text; or CSV with the columns file_name and text. "
    "Files are relative to the list's folder. A folder's list is called labels, gt, rec_gt, texts, annotations or "
    "metadata; name another one itself, as text:FILE."
)


class TextPixels(FilePixels):
    """Picture files, each with what is written in it."""

    def __init__(self, name: str, root: Path, rows: dict[str, str], notes: tuple[str, ...] = ()) -> None:
        super().__init__(name, root, tuple(rows), None, notes=notes)
        self.task = "text"
        self.texts = tuple(rows.values())

    def look(self, index: int) -> Look:
        """Digest the file and its text."""
        return super().look(index)._replace(target=digest_of_target(TextTarget(self.texts[index])))

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> Target:
        """The text of one picture."""
        del height, width, seen  # the texts are in memory
        return TextTarget(self.texts[index])


def text_lists(root: Path) -> tuple[Path, ...]:
    """The list of a folder, or those for training and for validation, in itself or in its parts; empty without any.

    A list is a file called as ``_STEM`` says (``labels``, ``gt``, ``rec_gt``) or by a part's name, whose first
    lines name pictures that are there. Where its texts are numbers as classes have, it is none.

    Raises ``ResvitError`` for a list of pictures that cannot be read, and one called as lists of texts are whose
    pictures are not there: without it, its pictures would be taken for ones of which nothing is known.
    """
    halves = split_folders(root)
    if halves is not None and all(len(text_lists(half)) == 1 for half in halves):
        return tuple(text_lists(half)[0] for half in halves)
    parts: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        named = _STEM.fullmatch(path.stem)
        fits = named is not None and path.name.lower().endswith(ENDINGS) and path.is_file()
        if not fits or named is None or not _lists_pictures(path):
            continue
        part = named.group(1).lower()
        side = "train" if part in TRAINING_NAMES else "val" if part in VALIDATION_NAMES else "all" if not part else ""
        if side:
            parts.setdefault(side, path)
    if {"train", "val"} <= parts.keys():
        return parts["train"], parts["val"]
    return tuple(itertools.islice((parts[side] for side in ("all", "train", "val") if side in parts), 1))


def texts_beside(root: Path, end: str = BESIDE) -> bool:
    """Whether pictures of a folder have files of texts beside them."""
    names = list(itertools.islice(files_below(root, ".", lambda name: name.lower().endswith(end)), _LOOKED_AT))
    return any(_picture_of(root, PurePosixPath(name), end) is not None for name in names)


def pixels_from_list(path: Path) -> TextPixels:
    """Pictures and texts by a list. Raises ``ResvitError`` for lines that are none, and pictures that are not there."""
    rows: dict[str, str] = {}
    missing: set[str] = set()
    folder = _folder_of(path) or path.parent
    for number, name, text in _rows(path):
        where = f"line {number} of {path}"
        inside = _inside(name, where, path)
        if rows.get(inside, text) != text:
            raise ResvitError(f"{where} gives {inside} another text than a line before.", "Keep one of the two.")
        rows[inside] = text
        if not leads_to_file(folder / inside):
            missing.add(inside)
    if not rows:
        raise ResvitError(f"{path} lists no picture.", _FIX)
    if len(missing) == len(rows):
        raise none_is_there(path, folder, sorted(missing), _FIX)
    for name in missing:
        del rows[name]
    return TextPixels(path.parent.name, folder, rows, (*note_of_missing(path, missing), *_notes_of(rows, path)))


def pixels_from_texts_beside(root: Path) -> TextPixels:
    """Pictures with ``NAME.gt.txt`` or ``NAME.txt`` beside each. Raises ``ResvitError`` where there is none."""
    left_out: Counter[str] = Counter()
    rows: dict[str, str] = {}
    alone: list[str] = []
    for name in sorted(files_below(root, ".", is_image, left_out)):
        stem = PurePosixPath(name).with_suffix("")
        files = [root / f"{stem}{end}" for end in (BESIDE, ".txt")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            alone.append(name)
        else:
            rows[name] = _decoded(file).rstrip("\r\n")
    if not rows:
        raise ResvitError(f"No picture of {root} has a text beside it (NAME{BESIDE} or NAME.txt).", _FIX)
    del left_out[".txt"]
    notes = list(notes_of(root, +left_out))
    if alone:
        notes.append(f"{len(alone)} pictures of {root} have no text beside them and are left out: {shortened(alone)}")
    return TextPixels(root.name, root, rows, (*notes, *_notes_of(rows, root)))


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, file and text of every line that is not empty."""
    text = _decoded(path)
    ending = ending_of(path.name)
    if ending == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield (number, *_of_json(line, f"line {number} of {path}"))
    elif ending == ".csv":
        yield from _of_csv(text, path)
    else:
        begun = False
        columns: tuple[int, int] | None = None
        for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
            remark = not begun and line.lstrip().startswith("#") and not is_image(line.partition("\t")[0].strip())
            if not line.strip() or remark:
                continue
            if not begun:
                begun, columns = True, text_columns(line.split("\t"))
                if columns is not None:
                    continue
            yield (number, *_of_line(line, f"line {number} of {path}", columns))


def _of_line(line: str, where: str, columns: tuple[int, int] | None) -> tuple[str, str]:
    if columns is not None:
        fields = line.split("\t")
        if len(fields) <= max(columns):
            raise ResvitError(f"{where} has {len(fields)} columns.", _FIX)
        return fields[columns[0]].strip(), fields[columns[1]]
    if "\t" in line:
        name, _, text = line.partition("\t")
        return name.strip(), text
    for form in (_ICDAR, _COMMA, _SPACED):
        if (found := form.fullmatch(line)) is not None:
            return found.group(1), found.group(2) or ""
    raise ResvitError(f"{where} is no file and text: {line[:60]!r}.", _FIX)


def _of_csv(text: str, path: Path) -> Iterator[tuple[int, str, str]]:
    mark = _MARK.match(next((line for line in text.splitlines() if line.strip()), ""))
    separator = mark.group(1) if mark is not None else ","
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator, skipinitialspace=True)
    columns: tuple[int, int] | None = None
    try:
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            if columns is None:
                called = text_columns(row)
                columns = called or (0, 1)
                if called is not None:
                    continue
            if len(row) <= max(columns):
                raise ResvitError(f"line {reader.line_num} of {path} has {len(row)} columns.", _FIX)
            yield reader.line_num, row[columns[0]].strip(), row[columns[1]]
    except csv.Error as error:
        raise ResvitError(f"line {reader.line_num} of {path} is no CSV: {error}.", _FIX) from error


def _of_json(line: str, where: str) -> tuple[str, str]:
    entry = json_from_outside(line.encode("utf-8", "surrogatepass"), where, _FIX)
    told = {key: value for key, value in entry.items() if isinstance(value, str)} if isinstance(entry, dict) else {}
    columns = text_columns(list(told))
    if columns is None:
        raise ResvitError(f"{where} has no file_name and text.", _FIX)
    name, text = (list(told.values())[column] for column in columns)
    return name, text


def _decoded(path: Path) -> str:
    fix = "Save it as UTF-8: in an editor, or with `iconv -f GB18030 -t UTF-8` where it is in another encoding."
    data = read_outside(path, _MOST_BYTES)
    if _is_wide(data):
        raise ResvitError(f"{path} is UTF-16 without the mark that says so.", "Save it as UTF-8 in an editor.")
    return text_from_outside(data, str(path), fix)


def _is_wide(data: bytes) -> bool:
    """Whether it is UTF-16 without a byte order mark: a name in ASCII has every other byte 0."""
    start = data[:64]
    return len(start) > 3 and 0 in (start[0], start[1]) and 3 * start.count(0) > len(start)


def _lists_pictures(path: Path) -> bool:
    """Whether a file names pictures that are there, and may say what is written in them.

    Raises ``ResvitError`` as ``text_lists``.
    """
    said_texts, said = _OF_TEXTS.fullmatch(path.stem) is not None, says(path)
    first = first_rows(path, 1)
    if ("csv" in said and "text" not in said) or (first and is_of_regions(first[0])):
        return False
    try:
        if _folder_of(path) is not None:
            # A remark above is no name of columns, and hides from ``says`` that texts follow.
            texts = said_texts and any(text for _, _, text in itertools.islice(_rows(path), PROBED))
            return not said or "text" in said or ("names" in said and texts)
        missing = [name for _, name, _ in _rows(path) if is_image(PurePosixPath(name.replace("\\", "/")).name)]
    except ResvitError:
        named = _names_read_somehow(path)
        if any(_folder_with(path, name) for name in named) or (said_texts and any(map(is_image, named))):
            raise
        return False
    if missing and said_texts and "names" not in said:
        raise none_is_there(path, path.parent, missing, _FIX)
    return False


def _folder_of(path: Path) -> Path | None:
    """The folder in which most of the first pictures of a list lie; None where none is there.

    Raises ``ResvitError`` for a list that cannot be read.
    """
    found = Counter[Path]()
    for number, name, _ in itertools.islice(_rows(path), PROBED):
        folder = _folder_with(path, _inside(name, f"line {number} of {path}", path))
        if folder is not None:
            found[folder] += 1
    return max(found, key=lambda folder: found[folder], default=None)


def _folder_with(path: Path, inside: str) -> Path | None:
    """The folder of a list, or one beside it, that has this picture; None where none has."""
    folders = (path.parent / folder for folder in _FOLDERS if is_image(PurePosixPath(inside).name))
    return next((folder for folder in folders if leads_to_file(folder / inside)), None)


def _inside(name: str, where: str, path: Path) -> str:
    """A picture's name relative to the folder of its list; one that is absolute is taken where it lies in there."""
    return name_inside(relative_inside(name, path.parent), f"{where}: the file", _FIX)


def _names_read_somehow(path: Path) -> list[str]:
    """What the first lines of a file begin with, in the encoding that it seems to have, where that is like a file."""
    data = read_outside(path, _MOST_BYTES)
    wide = "utf-16-be" if data.startswith((b"\xfe\xff", b"\0")) else "utf-16-le"
    text = data.decode(wide if _is_wide(data) or data[:2] in (b"\xfe\xff", b"\xff\xfe") else "gb18030", "replace")
    lines = itertools.islice((line for line in text.lstrip("\ufeff").splitlines() if line.strip()), PROBED)
    found = (_NAME.match(line) for line in lines)
    return [match.group(1).replace("\\", "/") for match in found if match is not None and "\0" not in match.group(1)]


def _picture_of(root: Path, text: PurePosixPath, end: str) -> Path | None:
    stem = text.name[: -len(end)]
    folder = root / text.parent
    return next((file for file in folder.glob(f"{_literal(stem)}.*") if is_image(file.name)), None)


def _literal(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _notes_of(rows: dict[str, str], where: Path) -> tuple[str, ...]:
    empty = [name for name, text in rows.items() if not text]
    return (f"{len(empty)} texts of {where} are empty: {shortened(empty)}",) if empty else ()
