"""Images beside files that say something about each of their pixels: the folders `images` and, say, `masks`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import BrokenImage, FilePixels, Look, file_bytes, opened, reason
from resvit_calibrate.images.targets import Target, TargetOptions
from resvit_calibrate.readers.folders import files_below, is_image
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside

IMAGES = "images"
CLASS_NAMES_FILE = "classes.txt"
_NAMED = 3


class Pairs(NamedTuple):
    """Images with their counterparts, as paths relative to ``root``."""

    root: Path
    images: tuple[str, ...]
    others: tuple[str, ...]
    notes: tuple[str, ...]


def pairs_in(root: Path, folder: str, suffixes: tuple[str, ...]) -> Pairs:
    """Match ``root/images`` with ``root/folder`` by path and stem: images/a/1.jpg belongs to masks/a/1.png.

    Images without a counterpart, and counterparts without an image, are left out and counted in the notes.
    Raises ``ResvitError`` where two files share a stem and where nothing matches.
    """
    images = _by_stem(root, IMAGES, is_image)
    others = _by_stem(root, folder, lambda name: name.lower().endswith(suffixes))
    both = sorted(images.keys() & others.keys())
    if not both:
        raise ResvitError(
            f"No image of {root / IMAGES} has a file of the same name in {root / folder} "
            f"({len(images)} images, {len(others)} files that end in {', '.join(suffixes)}).",
            f"Name them alike: {IMAGES}/0001.jpg belongs to {folder}/0001{suffixes[0]}.",
        )
    notes = []
    for alone, where, missing in (
        (sorted(images.keys() - others.keys()), IMAGES, folder),
        (sorted(others.keys() - images.keys()), folder, IMAGES),
    ):
        if alone:
            notes.append(
                f"{len(alone)} files of {root / where} have none of that name in {missing} and are left out: "
                f"{shortened(alone)}"
            )
    return Pairs(root, tuple(images[stem] for stem in both), tuple(others[stem] for stem in both), tuple(notes))


def _by_stem(root: Path, folder: str, fits: Callable[[str], bool]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(files_below(root, folder, fits)):
        stem = str(PurePosixPath(file).relative_to(folder).with_suffix(""))
        if stem in found:
            raise ResvitError(
                f"{root} has {found[stem]} and {file}, which have the same name but for their ending.",
                "Keep one of the two: nothing else says which one is meant.",
            )
        found[stem] = file
    return found


def shortened(names: list[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def read_class_names(root: Path) -> tuple[str, ...]:
    """The lines of ``classes.txt`` in ``root``, class 0 first; none where there is no such file.

    Raises ``ResvitError`` for a file that is not text, is empty or has an empty line between names.
    """
    path = root / CLASS_NAMES_FILE
    if not path.is_file():
        return ()
    fix = "Write one class a line, that of class 0 first."
    lines = [line.strip() for line in text_from_outside(read_outside(path), str(path), fix).rstrip().splitlines()]
    if not lines or not all(lines):
        which = f"line {lines.index('') + 1} of {path} is" if lines else f"{path} is"
        raise ResvitError(f"{which[0].upper()}{which[1:]} empty.", fix)
    return tuple(lines)


class PairedPixels(FilePixels):
    """Image files, each with a file about its pixels; what that file holds is up to ``values``."""

    def __init__(self, pairs: Pairs, task: str, options: TargetOptions, class_names: tuple[str, ...] = ()) -> None:
        super().__init__(pairs.root.name, pairs.root, pairs.images, None, class_names=class_names, notes=pairs.notes)
        self.task = task
        self.options = options
        self._others = pairs.others

    def values(self, data: bytes, path: Path) -> npt.NDArray[np.generic]:
        """Decode the other file's bytes: [H, W]; any exception means that they cannot be used."""
        raise NotImplementedError

    def made(self, values: npt.NDArray[np.generic]) -> Target:
        """Turn decoded values into a target."""
        raise NotImplementedError

    def seen(self, values: npt.NDArray[np.generic]) -> tuple[int, ...]:
        """The classes among decoded values, in order."""
        del values
        return ()

    def look(self, index: int) -> Look:
        """Digest both files, and decode the other one, so that what is wrong with it shows before any work."""
        found = super().look(index)
        data, values = self._read(index)
        return found._replace(target=hashlib.sha256(data).digest(), classes=self.seen(values))

    def target(self, index: int, height: int, width: int) -> Target:
        """Read one image's counterpart: [H, W] like the image."""
        _, values = self._read(index)
        require_size(self._others[index], values.shape, height, width)
        return self.made(values)

    def _read(self, index: int) -> tuple[bytes, npt.NDArray[np.generic]]:
        name = self._others[index]
        path = self.root / name
        try:
            data = file_bytes(path)
            return data, self.values(data, path)
        except MemoryError:
            raise
        except BrokenImage as error:
            raise BrokenImage(f"{name}: {error}") from error
        # As for images: a damaged file makes the decoders raise nearly anything.
        except Exception as error:
            raise BrokenImage(f"{name}: {reason(error)}") from error


def require_size(name: str, shape: tuple[int, ...], height: int, width: int) -> None:
    """Refuse what is not of its image's size: it would lie on the wrong pixels."""
    if shape != (height, width):
        raise BrokenImage(f"{name} is {shape[0]}x{shape[1]} pixels, its image {height}x{width}")


def grey_values(data: bytes, modes: frozenset[str], what: str) -> npt.NDArray[np.generic]:
    """Decode an image file of plain numbers, upright: [H, W]. Raises ``ValueError`` for any other image."""
    from PIL import ImageOps

    with opened(data) as image:
        if image.format == "JPEG":
            raise ValueError(f"JPEG changes the numbers that it stores; write {what} as PNG")
        if image.mode not in modes:
            raise ValueError(f"it is an image of mode {image.mode}; write {what}")
        return np.array(ImageOps.exif_transpose(image))
