"""Images that can be read one by one, by their number, with what is known of them: arrays and files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.targets import Target
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside

if TYPE_CHECKING:
    from PIL.Image import Image

_FILE_MOST = 2 << 30
"""Bytes of the largest picture's file."""
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})


_ORIENTATION = 0x0112  # EXIF's tag
WHITE = 0xFFFF
"""The pixel of a 16-bit image that is white, where nothing else is said."""


class Decoding(NamedTuple):
    """What an image file leaves open: whether it is turned as its EXIF orientation says, and which pixel is white."""

    upright: bool = True
    white: int = WHITE
    """Of 16-bit grey images; 4095 where a camera or scanner stored 12 bits."""


AS_USUAL = Decoding()


class BrokenImage(Exception):  # noqa: N818 - a finding about the data, caught and counted
    """One image cannot be read; the text says why."""


class Look(NamedTuple):
    """What can be told of an image without decoding it."""

    content: bytes
    """SHA-256 of the image's bytes."""
    colour: bool
    target: bytes = b""
    """SHA-256 of what is known to be in the image; empty where that is nothing, or a label."""
    classes: tuple[int, ...] = ()
    """The classes that a mask holds, in order."""
    turned: bool = False
    """Whether its EXIF orientation is other than upright."""
    brightest: int = 0
    """Of an image of 16 bits the largest pixel, as far as Pillow tells it; 0 for all others."""


class Pixels(Protocol):
    """N images with random access. ``native_size`` is (height, width) where all images share it.

    ``task`` says what is known of each: ``classification`` where it has a label, ``detection``,
    ``segmentation`` or ``depth`` where it has a target, None where nothing is known. ``class_ids`` are the
    numbers that the data gives its classes, where it has others than 0, 1, 2….
    """

    name: str
    task: str | None
    labels: npt.NDArray[np.int64] | None
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    num_classes: int | None
    native_size: tuple[int, int] | None
    notes: tuple[str, ...]
    """What the user should be told about how the data was understood."""

    def __len__(self) -> int: ...

    def title(self, index: int) -> str:
        """Name one image, for messages."""
        ...

    def look(self, index: int) -> Look:
        """Digest one image's bytes; raise ``BrokenImage`` where they are not an image."""
        ...

    def read(self, index: int, decoding: Decoding = AS_USUAL) -> npt.NDArray[np.uint8]:
        """Decode one image: uint8 [H, W, 1 or 3]; raise ``BrokenImage`` where that fails."""
        ...

    def target(self, index: int, height: int, width: int) -> Target | None:
        """What is in one image of this size, in its own pixels; raise ``BrokenImage`` where it does not fit."""
        ...


class Untargeted:
    """What images have of which only the labels are known."""

    task: str | None = None
    class_ids: tuple[int, ...] = ()
    num_classes: int | None = None

    def target(self, index: int, height: int, width: int) -> Target | None:
        """There is none."""
        del index, height, width
        return None


class ArrayPixels(Untargeted):
    """Images of one array, uint8 [N, H, W] or [N, H, W, C]; it may be a memory map."""

    def __init__(
        self,
        name: str,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.labels = labels
        self.task = None if labels is None else "classification"
        self.class_names = class_names
        self.num_classes = len(class_names) or None
        self.native_size: tuple[int, int] | None = (int(images.shape[1]), int(images.shape[2]))
        self.notes: tuple[str, ...] = ()
        self._images = images if images.ndim == 4 else images[..., None]

    def __len__(self) -> int:
        return len(self._images)

    def title(self, index: int) -> str:
        """Name one image by its row."""
        return f"{self.name}[{index}]"

    def look(self, index: int) -> Look:
        """Digest one image's pixels."""
        image = np.ascontiguousarray(self._images[index])
        return Look(hashlib.sha256(image.tobytes()).digest(), image.shape[2] == 3)

    def read(self, index: int, decoding: Decoding = AS_USUAL) -> npt.NDArray[np.uint8]:
        """Copy one image: uint8 [H, W, C]; an array leaves nothing open."""
        del decoding
        return np.array(self._images[index], dtype=np.uint8)


class FilePixels(Untargeted):
    """Image files, decoded by Pillow."""

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        labels: npt.NDArray[np.int64] | None,
        *,
        class_names: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.labels = labels
        self.task = None if labels is None else "classification"
        self.class_names = class_names
        self.num_classes = len(class_names) or None
        self.native_size: tuple[int, int] | None = None
        self.notes = notes
        self.root = root
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def title(self, index: int) -> str:
        """Name one image by its path inside the folder."""
        return self.files[index]

    def look(self, index: int) -> Look:
        """Digest one file's bytes and read the image's header, and all of it where it has 16 bits."""
        data = file_bytes(self.root / self.files[index])
        try:
            with opened(data) as image:
                colour, turned = image.mode not in _GREY_MODES, _is_turned(image)
                brightest = _brightest(image)
        except MemoryError:
            raise
        except Exception as error:
            raise BrokenImage(reason(error)) from error
        return Look(hashlib.sha256(data).digest(), colour, turned=turned, brightest=brightest)

    def read(self, index: int, decoding: Decoding = AS_USUAL) -> npt.NDArray[np.uint8]:
        """Decode one file: uint8 [H, W, 1 or 3]."""
        data = file_bytes(self.root / self.files[index])
        try:
            return decode(data, decoding)
        except MemoryError:
            raise
        # A damaged file makes Pillow's many decoders raise nearly anything: OSError, SyntaxError, struct.error…
        except Exception as error:
            raise BrokenImage(reason(error)) from error


def file_bytes(path: Path) -> bytes:
    """Read one file of at most 2 GiB, without waiting for a pipe; raise ``BrokenImage`` where that fails."""
    try:
        return read_outside(path, _FILE_MOST, "it")
    except ResvitError as error:
        gone = error.problem.startswith("There is no file")
        raise BrokenImage("No such file" if gone else error.problem.removeprefix("it ").rstrip(".")) from error


def decode(data: bytes, decoding: Decoding = AS_USUAL) -> npt.NDArray[np.uint8]:
    """Decode an image file's bytes: uint8 [H, W, 1] for grey, [H, W, 3] for everything else.

    Pixels of 16-bit grey up to ``white`` are divided evenly among 0 to 255, and all above are 255: with the usual
    white they keep their high byte, as Pillow does for 16-bit colour. Transparency is dropped and palettes are looked
    up, as ``Image.convert("RGB")`` and so torchvision's and timm's datasets do. Of a moving image, the first is taken.
    """
    from PIL import ImageOps

    with opened(data) as image:
        if image.mode == "F":
            raise ValueError("it holds floating-point pixels")
        if decoding.white != WHITE and _is_deep_colour(image):
            raise ValueError("of 16-bit colour only the high byte is read, and another white cannot be said")
        image.load()
        upright = ImageOps.exif_transpose(image) if decoding.upright else image
        if upright.mode.startswith("I"):
            deep = np.asarray(upright).astype(np.int64)
            if deep.min() < 0 or deep.max() > 0xFFFF:
                raise ValueError("it holds pixels of more than 16 bits")
            return np.minimum(deep * 256 // (decoding.white + 1), 255).astype(np.uint8)[:, :, None]
        if upright.mode in _GREY_MODES:
            return np.array(upright.convert("L"), dtype=np.uint8)[:, :, None]
        if "transparency" in upright.info:
            # The same colours by way of RGBA, without Pillow's warning about it.
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"), dtype=np.uint8)


def _is_turned(image: Image) -> bool:
    # Of a PNG, Pillow would decode everything to look for EXIF data behind the pixels.
    if image.format == "PNG" and "exif" not in image.info:
        return False
    return image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _is_deep_colour(image: Image) -> bool:
    # Pillow has no mode for it: the raw mode of what it is about to decode tells it.
    return not image.mode.startswith("I") and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _brightest(image: Image) -> int:
    if _is_deep_colour(image):
        return int(np.asarray(image.convert("RGB")).max()) * 256 + 255
    return int(np.asarray(image).max()) if image.mode.startswith("I") else 0


def opened(data: bytes) -> Image:
    """Open an image file's bytes with Pillow, which reads no more than the header at first."""
    from PIL import Image as Pillow

    if not data:
        raise ValueError("the file is empty")
    return Pillow.open(io.BytesIO(data))


def reason(error: Exception) -> str:
    """Why an image cannot be decoded, in a few words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be recognised"
    return str(error) or type(error).__name__
