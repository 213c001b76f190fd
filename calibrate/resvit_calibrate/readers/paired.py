"""Images beside files that say something about each of their pixels: the folders `images` and, say, `masks`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import UNSEEN, BrokenImage, FilePixels, Look, file_bytes, require_seen
from resvit_calibrate.images.targets import Target, TargetOptions
from resvit_calibrate.readers.folders import files_below, notes_of
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside
from resvit_engines.pictures.decode import SUFFIXES, opened, reason

IMAGES = "images"
CLASS_NAMES_FILE = "classes.txt"
_NAMED = 3


class Pairs(NamedTuple):
    """Images with their counterparts, as paths relative to ``root``."""

    root: Path
    images: tuple[str, ...]
    others: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Two folders of ``root`` that belong together: pictures, and files about their pixels; both may be one folder.

    ``images_end`` and ``others_end`` are what the names of each end in before the file's ending, where they differ,
    ``images_start`` and ``others_start`` what they start with.
    ``listed`` is a file with the names that belong to this part, where not all do.
    """

    root: Path
    images: str
    others: str
    images_end: str = ""
    others_end: str = ""
    listed: Path | None = None
    images_start: str = ""
    others_start: str = ""
    places: tuple[str, ...] = ("",)
    """Folders of ``root`` that have the two each; usually it has them itself."""


def pairs_in(part: Part, suffixes: tuple[str, ...]) -> Pairs:
    """Match pictures with their counterparts by path and stem: images/a/1.jpg belongs to masks/a/1.png.

    Images without a counterpart, counterparts without an image, and files of other kinds are left out and counted in
    the notes. Raises ``ResvitError`` where two files share a stem and where nothing matches.
    """
    root, left_out = part.root, Counter[str]()
    one_folder = part.images == part.others
    others = _by_stem(part, suffixes, left_out, others=True)
    if one_folder:
        left_out.clear()
    images = _by_stem(part, SUFFIXES, left_out, others=False)
    if one_folder:
        for ending in suffixes:
            del left_out[ending]
    if part.listed is not None:
        named = set(_lines_of(part.listed))
        images, others = ({stem: files[stem] for stem in files if stem in named} for files in (images, others))
    both = sorted(images.keys() & others.keys())
    if not both:
        raise ResvitError(
            f"No image of {root / part.images} has a file of the same name in {root / part.others} "
            f"({len(images)} images, {len(others)} files that end in {', '.join(suffixes)}).",
            f"Name them alike: {part.images}/0001{part.images_end}.jpg belongs to "
            f"{part.others}/0001{part.others_end}{suffixes[0]}.",
        )
    notes = list(notes_of(root, left_out))
    for alone, where, missing in (
        (sorted(images.keys() - others.keys()), part.images, part.others),
        (sorted(others.keys() - images.keys()), part.others, part.images),
    ):
        if alone:
            notes.append(
                f"{len(alone)} files of {root / where} have none of that name in {missing} and are left out: "
                f"{shortened(alone)}"
            )
    return Pairs(root, tuple(images[stem] for stem in both), tuple(others[stem] for stem in both), tuple(notes))


def _by_stem(part: Part, suffixes: tuple[str, ...], left_out: Counter[str], *, others: bool) -> dict[str, str]:
    """The files of one kind by what is common to the names of a pair."""
    folder = part.others if others else part.images
    own, other = (part.images_start, part.images_end), (part.others_start, part.others_end)
    own, other = (other, own) if others else (own, other)
    # In one folder the names alone say which file is which: `1_mask.png` is no picture called `1_mask`.
    more = part.images == part.others and len("".join(other)) > len("".join(own))
    found: dict[str, str] = {}
    for file, below in _files_of(part, folder, suffixes, left_out):
        path = below.with_suffix("")
        if not _fits(path.name, own) or (more and _fits(path.name, other)):
            continue  # another file about the same picture: Cityscapes has four
        stem = str(path.with_name(path.name.removeprefix(own[0]).removesuffix(own[1])))
        if stem in found:
            raise ResvitError(
                f"{part.root} has {found[stem]} and {file}, which have the same name but for their ending.",
                "Keep one of the two: nothing else says which one is meant.",
            )
        found[stem] = file
    return found


def _files_of(
    part: Part, folder: str, suffixes: tuple[str, ...], left_out: Counter[str]
) -> Iterator[tuple[str, PurePosixPath]]:
    """The files of a folder, and of those of its name in other places, with their paths without its name."""
    for place in part.places:
        held = str(PurePosixPath(place, folder))
        for file in sorted(files_below(part.root, held, lambda name: name.lower().endswith(suffixes), left_out)):
            yield file, PurePosixPath(place, PurePosixPath(file).relative_to(held))


def _fits(name: str, around: tuple[str, str]) -> bool:
    """Whether a name has something between its start and its end."""
    start, end = around
    return len(name) > len(start) + len(end) and name.startswith(start) and name.endswith(end)


def _lines_of(path: Path) -> list[str]:
    text = text_from_outside(read_outside(path), str(path), "Write one name a line, without its ending.")
    return [line.split()[0] for line in text.splitlines() if line.strip()]


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
        self.others = pairs.others

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
        about, size = hashlib.sha256(data).digest(), (int(values.shape[0]), int(values.shape[1]))
        return found._replace(target=about, classes=self.seen(values), annotated=size)

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> Target:
        """Read one image's counterpart: [H, W] like the image."""
        data, values = self._read(index)
        require_seen(data, seen.target, str(self.root / self.others[index]))
        require_size(self.others[index], values.shape, height, width)
        return self.made(values)

    def _read(self, index: int) -> tuple[bytes, npt.NDArray[np.generic]]:
        name = self.others[index]
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
