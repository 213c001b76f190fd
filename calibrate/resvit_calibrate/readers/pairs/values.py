"""What the pixels of a file hold, where its name says that it is a mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import file_bytes
from resvit_engines.pictures.decode import opened

Held: TypeAlias = Literal["numbers", "colours", "picture"]

OBJECT = 255
"""The value of the object in a mask of two classes as painting programs write it; the background is 0."""
FEW = 32
"""Values or colours of a mask at most; a picture of as many pixels has more."""
_MOST_CLASSES = 256
PIXELS = 64
"""Of a picture with fewer, few values say nothing."""
LARGEST = 1 << 26
"""Pixels of a file beyond which it is not looked into."""
_SAMPLED = 32
_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N")


def held_by(path: Path) -> Held:
    """Class numbers, a few flat colours, or neither; a file that cannot be decoded is no mask."""
    try:
        with opened(file_bytes(path)) as image:
            if image.format in ("JPEG", "MPO", "JPEG2000") or image.width * image.height > LARGEST:
                return "picture"
            if image.mode in (*_GREY, "P"):
                values = np.unique(np.asarray(image))
                few = len(values) <= FEW or (image.mode == "P" and len(values) <= _MOST_CLASSES)
                return "numbers" if few and image.width * image.height >= PIXELS else "picture"
            colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
            return "colours" if len(colours) >= PIXELS and len(np.unique(colours, axis=0)) <= FEW else "picture"
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a damaged file makes Pillow's decoders raise nearly anything
        return "picture"


def are_binary(paths: Sequence[Path]) -> bool:
    """Whether grey masks hold 0 and 255 alone, by some of them: the object is 255, and none is unlabelled."""
    some = [paths[int(place)] for place in np.linspace(0, len(paths) - 1, min(_SAMPLED, len(paths)))]
    objects = 0
    for path in some:
        values = _grey(path)
        if values is None or not np.isin(values, (0, OBJECT)).all():
            return False
        objects += OBJECT in values
    return objects > 0


def _grey(path: Path) -> npt.NDArray[np.generic] | None:
    """The values that a grey file holds; None for all others, and those that cannot be decoded."""
    try:
        with opened(file_bytes(path)) as image:
            if image.mode not in _GREY[1:] or image.format == "JPEG" or image.width * image.height > LARGEST:
                return None
            return np.unique(np.asarray(image))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - as above
        return None
