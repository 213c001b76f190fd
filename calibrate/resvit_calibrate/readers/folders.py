"""A folder of class folders as labelled images."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from resvit_calibrate.images.pixels import FilePixels
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_folder, open_outside
from resvit_engines.pictures.decode import RAW_SUFFIXES, SUFFIXES, begins_as_picture

_ENDINGS_SHOWN = 5
_LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")
"""Folders of archivers, servers and systems, which hold no data."""
TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
_PART = re.compile(rf"({'|'.join((*TRAINING_NAMES, *VALIDATION_NAMES))})([-_ ]?20[0-9]{{2}})?")
"""A part's name, whatever its case, also with a year as COCO's have it: `train2017`."""
_LAYOUT = (
    "Give a folder with one sub-folder of images for each class, or one with `train` and `val` inside; "
    f"images end in {', '.join(SUFFIXES)}."
)


def part_of_folder(name: str) -> str | None:
    """Which of ``TRAINING_NAMES`` and ``VALIDATION_NAMES`` a folder is called, whatever its case; None for others."""
    found = _PART.fullmatch(name.lower())
    return found.group(1) if found is not None else None


def part_folders(root: Path) -> dict[str, Path]:
    """The folders of ``root`` that are called like parts, by the parts' names; of several of one name, one."""
    if not leads_to_folder(root):
        return {}
    found: dict[str, Path] = {}
    for name in sorted(class_names(root), key=lambda name: (name != name.lower(), len(name), name)):
        if (part := part_of_folder(name)) is not None:
            found.setdefault(part, root / name)
    return found


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """Find ``train`` (or ``training``) and ``val`` (``valid``, ``dev``, ``test``, …) in ``root``, or None."""
    found = part_folders(root)
    first = next((found[name] for name in TRAINING_NAMES if name in found), None)
    second = next((found[name] for name in VALIDATION_NAMES if name in found), None)
    return (first, second) if first is not None and second is not None else None


def note_of_unused(root: Path, used: Iterable[str], there: Iterable[str] | None = None) -> tuple[str, ...]:
    """That ``root`` has other parts than those that are ``used``; none where it has not.

    The parts that are ``there`` are folders of the names that parts have, where nothing else is said.
    """
    if there is None:
        there = [path.name for path in part_folders(root).values()]
    taken = tuple(used)
    left = [name for name in there if name not in taken]
    return (f"{root} is divided: {' and '.join(taken)} are used, {', '.join(left)} not",) if left else ()


def class_names(root: Path) -> tuple[str, ...]:
    """Sub-folders of ``root`` sorted by name as texts: class 0 is the first, as in torchvision's ``ImageFolder``.

    timm sorts numbers within names by their value (``2`` before ``10``): ``order_note`` says where that differs.
    """
    with _explained(root):
        return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and is_visible(entry.name)))


def pixels_from_folder(root: Path) -> FilePixels:
    """List the images of ``root``.

    A folder without sub-folders is a set without labels. Raises ``ResvitError`` where there is no image.
    """
    own = class_names(root)
    left_out: Counter[str] = Counter()
    with _explained(root):
        beside = sorted(e.name for e in os.scandir(root) if e.is_file() and is_visible(e.name))
    loose = [name for name in beside if is_image(name)]
    if not own:
        hidden = [name for name in beside if not is_image(name) and _is_picture_inside(root / name)]
        loose = sorted(loose + hidden)
        left_out.update(ending_of(name) for name in beside if name not in {*loose})
        if not loose:
            raise ResvitError(f"The folder {root} holds no images{_but(left_out)}.", _LAYOUT)
        said = (*notes_of(root, left_out), *_note_of_content(hidden), *_note_of_left_behind(root))
        return FilePixels(root.name, root, loose, None, notes=said)
    files: list[str] = []
    labels: list[int] = []
    empty = []
    hidden = []
    for number, name in enumerate(own):
        found = []
        for file in sorted(files_below(root, name, lambda _: True)):
            if is_image(PurePosixPath(file).name) or _is_picture_inside(root / file):
                found.append(file)
                hidden += [] if is_image(PurePosixPath(file).name) else [file]
            else:
                left_out[ending_of(file)] += 1
        files += found
        labels += [number] * len(found)
        if not found:
            empty.append(name)
    if not files:
        raise ResvitError(f"The folder {root} and its sub-folders hold no images{_but(left_out)}.", _LAYOUT)
    notes = [*notes_of(root, left_out), *_note_of_content(hidden), *_note_of_left_behind(root)]
    if empty:
        notes.append(f"{root} has class folders without images, which still count as classes: {', '.join(empty)}")
    if loose:
        notes.append(f"{root} has {len(loose)} images outside of its class folders, which are left out")
    return FilePixels(root.name, root, files, np.array(labels, np.int64), class_names=own, notes=tuple(notes))


def order_note(where: str, names: tuple[str, ...]) -> str | None:
    """That the order of names is not that of the numbers in them, with the first class of which that is true."""
    if list(names) != sorted(names):
        return None  # an order of the data's own, such as Fashion-MNIST's
    by_value = sorted(names, key=_natural)
    for number, (name, other) in enumerate(zip(names, by_value, strict=True)):
        if name != other:
            return (
                f"{where} numbers its classes in the order of names, as torchvision does, so that class {name!r} is "
                f"number {number}; a trainer that sorts by value (timm) has {other!r} there: say which with --classes"
            )
    return None


def _natural(name: str) -> list[tuple[int, int, str]]:
    """``class10`` behind ``class2``, as timm sorts."""
    return [
        (1, int(part), "") if part.isdecimal() else (0, 0, part.lower()) for part in re.split(r"([0-9]+)", name) if part
    ]


def files_below(
    root: Path, name: str, fits: Callable[[str], bool], left_out: Counter[str] | None = None
) -> Iterator[str]:
    """Paths of the files below ``root/name`` whose names fit, relative to ``root``; links are followed once.

    The endings of the others are counted in ``left_out``; hidden files are nobody's.
    """
    seen: set[tuple[int, int]] = set()
    with _explained(root):
        for folder, below, files in os.walk(root / name, followlinks=True, onerror=_raise):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            # Sorted, so that a folder reached twice through links is always met on the same path first.
            below[:] = sorted(filter(is_visible, below))
            for file in files:
                if not is_visible(file):
                    continue
                if fits(file):
                    yield os.path.relpath(Path(folder, file), root)
                elif left_out is not None:
                    left_out[ending_of(file)] += 1


def name_inside(name: object, where: str, fix: str) -> str:
    """A path that a list gives, which stays inside of its folder; what Windows wrote with backslashes is read too.

    ``where`` says whose name it is. Raises ``ResvitError``, with ``fix`` for what is no name at all.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or printable(name) != name:
        raise ResvitError(f"{where} is {name!r}.", fix)
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or not path.name:
        raise ResvitError(
            f"{where} {name!r} leads out of the folder of images.",
            "Write file names relative to the folder of images, without `..`.",
        )
    return str(path)


def relative_inside(name: str, *folders: Path) -> str:
    """An absolute path that a list gives, relative to the first of the folders that it lies in; others as they are."""
    if not name.startswith("/") or "\0" in name:
        return name
    path = PurePosixPath(os.path.normpath(name))
    for folder in folders:
        for base in (plain_path(folder), Path(os.path.realpath(folder))):
            if path.is_relative_to(base) and path != PurePosixPath(base):
                return str(path.relative_to(base))
    return name


def plain_path(path: Path) -> Path:
    """The absolute path without ``..``; links stay, since folders beside them are looked for by their names."""
    return Path(os.path.normpath(path.absolute()))


def printable(text: str) -> str:
    """JSON can hold halves of characters, which no file name has and no terminal shows."""
    return text.encode("utf-8", "replace").decode("utf-8")


def ending_of(name: str) -> str:
    """``.heic`` of ``IMG_1.HEIC``; words where there is none."""
    return Path(name).suffix.lower() or "without an ending"


def counted(left_out: Counter[str]) -> str:
    """``250 (200 .heic, 50 .txt)``."""
    shown = [f"{count} {ending}" for ending, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
    more = f", {len(shown) - _ENDINGS_SHOWN} endings more" if len(shown) > _ENDINGS_SHOWN else ""
    return f"{sum(left_out.values())} ({', '.join(shown[:_ENDINGS_SHOWN])}{more})"


def notes_of(where: Path, left_out: Counter[str]) -> tuple[str, ...]:
    """That files were left out, how many and which; none where there are none."""
    if not left_out:
        return ()
    raw = ", ".join(sorted(ending for ending in left_out if ending in RAW_SUFFIXES))
    said = f"; {raw} are raw files of cameras: develop them to JPEG or PNG to use them" if raw else ""
    return (f"files of {where} that are no images and are left out: {counted(left_out)}{said}",)


def _but(left_out: Counter[str]) -> str:
    return f", but other files: {counted(left_out)}" if left_out else ""


def _note_of_content(hidden: list[str]) -> tuple[str, ...]:
    shown = ", ".join(hidden[:3]) + (", …" if len(hidden) > 3 else "")
    return (f"{len(hidden)} files are pictures by their content, whatever their endings: {shown}",) if hidden else ()


def _is_picture_inside(path: Path) -> bool:
    """Whether a file begins as pictures do, whatever it is called; what a camera's sensor gave is none."""
    if path.name.lower().endswith(RAW_SUFFIXES):
        return False
    try:
        with open_outside(path) as stream:
            return begins_as_picture(stream.read(18))
    except (ResvitError, OSError):
        return False


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name may be data: neither hidden nor left behind by another program."""
    return not name.startswith(".") and name not in _LEFT_BEHIND


def _note_of_left_behind(root: Path) -> tuple[str, ...]:
    """That folders of other programs lie among the data."""
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and _is_left_behind(entry.name))
    return (f"folders of {root} that other programs left there are left out: {', '.join(found)}",) if found else ()


def _is_left_behind(name: str) -> bool:
    return name in _LEFT_BEHIND or name in (".ipynb_checkpoints", ".thumbnails", ".Trashes")


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return is_visible(name) and name.lower().endswith(SUFFIXES)


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Turn an unreadable folder into a problem and a fix."""
    try:
        yield
    except OSError as error:
        raise ResvitError(
            f"The folder {error.filename or root} cannot be read: {error.strerror or error}.", _LAYOUT
        ) from error
