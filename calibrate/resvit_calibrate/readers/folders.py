"""A folder of class folders as labelled images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from resvit_calibrate.images.pixels import FilePixels
from resvit_engines.errors import ResvitError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_NAMES = ("val", "valid", "validation", "test")
_LAYOUT = (
    "Give a folder with one sub-folder of images for each class, or one with `train` and `val` inside; "
    f"images end in {', '.join(_SUFFIXES)}."
)


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """Find ``train`` and ``val`` (or ``valid``, ``validation``, ``test``) inside ``root``, or None."""
    train = root / "train"
    for name in VALIDATION_NAMES:
        if train.is_dir() and (root / name).is_dir():
            return train, root / name
    return None


def class_names(root: Path) -> tuple[str, ...]:
    """Sub-folders of ``root`` sorted by name: class 0 is the first, as in torchvision and timm."""
    with _explained(root):
        return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and _visible(entry.name)))


def pixels_from_folder(root: Path, names: tuple[str, ...] | None = None) -> FilePixels:
    """List the images of ``root``; ``names`` numbers the classes where another folder decides that.

    A folder without sub-folders is a set without labels. Raises ``ResvitError`` where there is no image.
    """
    own = class_names(root)
    names = own if names is None else names
    with _explained(root):
        loose = sorted(e.name for e in os.scandir(root) if e.is_file() and is_image(e.name))
    if not own:
        if not loose:
            raise ResvitError(f"The folder {root} holds no images.", _LAYOUT)
        return FilePixels(root.name, root, loose, None)
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for name in own:
        found = sorted(files_below(root, name, is_image))
        files += found
        labels += [names.index(name)] * len(found)
        if not found:
            empty.append(name)
    if not files:
        raise ResvitError(f"The folder {root} and its sub-folders hold no images.", _LAYOUT)
    notes = []
    if empty:
        notes.append(f"{root} has class folders without images, which still count as classes: {', '.join(empty)}")
    if loose:
        notes.append(f"{root} has {len(loose)} images outside of its class folders, which are left out")
    if all(name.isdecimal() for name in own) and list(own) != sorted(own, key=int):
        notes.append(f"{root} numbers its classes in the order of names, so that class {own[1]!r} is number 1")
    return FilePixels(root.name, root, files, np.array(labels, np.int64), class_names=names, notes=tuple(notes))


def shared_class_names(calibration: Path, validation: Path) -> tuple[str, ...] | None:
    """The class list that covers both folders, or None where neither has all of the other's."""
    first, second = class_names(calibration), class_names(validation)
    if set(second) <= set(first):
        return first
    return second if set(first) <= set(second) else None


def files_below(root: Path, name: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Paths of the files below ``root/name`` whose names fit, relative to ``root``; links are followed once."""
    seen: set[tuple[int, int]] = set()
    with _explained(root):
        for folder, below, files in os.walk(root / name, followlinks=True, onerror=_raise):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            # Sorted, so that a folder reached twice through links is always met on the same path first.
            below[:] = sorted(filter(_visible, below))
            for file in files:
                if _visible(file) and fits(file):
                    yield os.path.relpath(Path(folder, file), root)


def _visible(name: str) -> bool:
    return not name.startswith(".")


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return _visible(name) and name.lower().endswith(_SUFFIXES)


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
