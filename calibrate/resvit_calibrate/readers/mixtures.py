"""Telling masks from pictures by their pixels, so that no mask is ever calibrated on as if it were a picture."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import file_bytes
from resvit_calibrate.readers.folders import class_names, files_below, is_image
from resvit_calibrate.readers.pairs.names import MASKS_END
from resvit_calibrate.readers.pairs.values import FEW, LARGEST, PIXELS
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import opened

_HIGHEST = 150
"""The highest class of a mask of whole numbers (ADE20K's), 255 for unlabelled aside."""
_OF_A_FOLDER, _OF_ALL, _LISTED = 6, 512, 5000
_TAILS = (*MASKS_END, "_labelids", "_labeltrainids", "_instanceids", "_depth", "_color_mask")
"""What names of files about pictures end in, also of those that are read by other layouts alone."""
_MIXED_SHARE = 0.1
_FIX = (
    "Put pictures into `images` and masks of the same names into `masks`, side by side, and name the folder above; or "
    "take away what are no pictures."
)


class _Look(enum.IntEnum):
    PICTURE = 0
    FLAT = 1
    """Very few colours, as a drawing has, or a mask in colours."""
    NUMBERS = 2
    """Small whole numbers, or a palette of few colours."""


def refuse_masks(root: Path, *, told: bool = False) -> None:
    """Look at some files of class folders, and refuse them where some are masks of the others, or all are masks.

    ``told``: the user says that they are class folders, so that all of them may look like masks, as drawings do.

    Raises:
        ResvitError: with the folder or the file, and how to lay them out.
    """
    folders = class_names(root) or (".",)
    of_each = max(1, min(_OF_A_FOLDER, _OF_ALL // len(folders)))
    looks: dict[str, _Look] = {}
    stems: dict[str, set[str]] = {}
    for name in folders:
        files = sorted(itertools.islice(files_below(root, name, is_image), _LISTED))
        _refuse_names(root, files)
        if files:
            chosen = [files[int(place)] for place in np.linspace(0, len(files) - 1, min(of_each, len(files)))]
            looks[name] = min(_look(root / file) for file in chosen)
            stems[name] = {PurePosixPath(file).stem for file in files}
    pictures = [name for name, look in looks.items() if look is _Look.PICTURE]
    for name, look in looks.items():
        about = next((other for other in pictures if len(stems[name] & stems[other]) * 2 >= len(stems[name])), None)
        mixed = bool(pictures) if look is _Look.NUMBERS else about is not None
        if look is not _Look.PICTURE and mixed:
            raise ResvitError(
                f"The files of {root / name} look like masks (few colours, or small whole numbers), and those of "
                f"{root / (about or pictures[0])} like pictures: masks are never calibrated on.",
                _FIX,
            )
    masks = [name for name, look in looks.items() if look is _Look.NUMBERS]
    if masks and len(masks) == len(looks) and not told:
        raise ResvitError(
            f"The files of {root / masks[0]} look like masks (a palette of few colours, or small whole numbers), and "
            f"there are no others in {root}: masks are never calibrated on.",
            f"Name the folder that holds the pictures too; or say `folder:{root}` if these are drawings, in classes.",
        )


def _refuse_names(root: Path, files: Sequence[str]) -> None:
    """Refuse pictures with files of the same name and `_mask` or the like beside them."""
    stems = {PurePosixPath(file).with_suffix("").as_posix().lower(): file for file in files}
    about = [(stems[stem + tail], stems[stem]) for stem in stems for tail in _TAILS if stem + tail in stems]
    if len(about) > _MIXED_SHARE * len(stems):
        raise ResvitError(
            f"{root / about[0][0]} lies beside {about[0][1]}, and {len(about) - 1} more such files: by their names "
            "they are about the pictures, and no pictures.",
            f"{_FIX} Masks among pictures in several folders are read as `masks:{root}`.",
        )
    twice: dict[str, list[str]] = {}
    for file in files:
        twice.setdefault(PurePosixPath(file).with_suffix("").as_posix(), []).append(file)
    doubled = [pair for pair in twice.values() if len(pair) > 1]
    if len(doubled) > _MIXED_SHARE * len(twice):
        looks = [[_look(root / file) for file in pair] for pair in doubled[:_OF_A_FOLDER]]
        if all(min(pair) is _Look.PICTURE and max(pair) is not _Look.PICTURE for pair in looks):
            raise ResvitError(
                f"{root} has {doubled[0][0]} and {doubled[0][1]}, one a picture and one like a mask of it, and "
                f"{len(doubled) - 1} more such pairs.",
                _FIX,
            )


def _look(path: Path) -> _Look:
    """What one file looks like; one that cannot be decoded is left to whoever reads it."""
    try:
        with opened(file_bytes(path)) as image:
            if image.format in ("JPEG", "MPO", "JPEG2000") or image.width * image.height > LARGEST:
                return _Look.PICTURE
            palette = image.mode == "P"
            if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N"):
                return _Look.FLAT if _flat(_packed(np.asarray(image.convert("RGB")))) else _Look.PICTURE
            values = np.asarray(image)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a damaged file makes Pillow's decoders raise nearly anything
        return _Look.PICTURE
    if not _flat(values):
        return _Look.PICTURE
    found = np.unique(values).astype(np.int64)
    others = found[(found != 0) & (found != 255)]
    small = others.size > 0 and int(others.max()) <= _HIGHEST and image.mode != "1"
    return _Look.NUMBERS if palette or small else _Look.FLAT


def _packed(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """One number for each colour: [H, W] from [H, W, 3]."""
    return np.asarray(colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1], np.int64))


def _flat(values: npt.NDArray[np.generic]) -> bool:
    return values.size >= PIXELS and len(np.unique(values)) <= FEW
