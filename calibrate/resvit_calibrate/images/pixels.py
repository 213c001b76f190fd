"""Images that can be read one by one, by their number, with what is known of them: arrays and files."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.targets import Target
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, read_outside
from resvit_engines.pictures.decode import AS_USUAL, Decoding, decode, deep_values, eight_bits, header_of, reason

FILE_MOST = 2 << 30
"""Bytes of the largest picture's file."""


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
    orientation: int = 1
    """EXIF's, 1 to 8; 1 is upright."""
    stored: tuple[int, int] = (0, 0)
    """Height and width of a file's pixels before they are turned."""
    annotated: tuple[int, int] | None = None
    """Height and width of what boxes or pixels were annotated on, where that is known."""
    brightest: float = 0.0
    """Of an image of more than 8 bits the largest value; 0 for all others."""
    darkest: float = 0.0
    """And the smallest."""
    kind: str = "uint8"
    """NumPy's name for the type of the stored values."""

    @property
    def turned(self) -> bool:
        """Whether its EXIF orientation is other than upright."""
        return self.orientation != 1

    @property
    def annotated_upright(self) -> bool | None:
        """Whether a turned image was annotated upright, False as stored; None where its size does not tell."""
        height, width = self.stored
        if self.orientation < 5 or height == width:
            return None
        return {(width, height): True, (height, width): False}.get(self.annotated or (0, 0))


UNSEEN = Look(b"", colour=False)
"""Of an image that nobody looked at yet: whatever is read is right."""


class Pixels(Protocol):
    """N images with random access. ``native_size`` is (height, width) where all images share it.

    ``task`` says what is known of each: ``classification`` where it has a label, ``detection``,
    ``segmentation``, ``depth`` or ``text`` where it has a target, None where nothing is known. ``class_ids`` are the
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

    def fetch(self, numbers: Sequence[int]) -> None:
        """Hear which images are about to be looked at, where reading them together is cheaper than one by one."""
        ...

    def look(self, index: int) -> Look:
        """Digest one image's bytes; raise ``BrokenImage`` where they are not an image."""
        ...

    def read(self, index: int, decoding: Decoding = AS_USUAL, seen: Look = UNSEEN) -> npt.NDArray[np.uint8]:
        """Decode one image: uint8 [H, W, 1 or 3]; raise ``BrokenImage`` where that fails.

        ``seen`` is what ``look`` told of it; raise ``ResvitError`` where its bytes are not any more those.
        """
        ...

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> Target | None:
        """What is in one image of this size, in its own pixels; raises as ``read``, and where it does not fit."""
        ...


class Untargeted:
    """What images have of which only the labels are known."""

    task: str | None = None
    class_ids: tuple[int, ...] = ()
    num_classes: int | None = None

    def fetch(self, numbers: Sequence[int]) -> None:
        """Each is read by itself."""

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> Target | None:
        """There is none."""
        del index, height, width, seen
        return None


class ArrayPixels(Untargeted):
    """Images of one array [N, H, W] or [N, H, W, C], uint8, uint16 or floating; it may be a memory map."""

    def __init__(
        self,
        name: str,
        images: npt.NDArray[Any],
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
        found = Look(hashlib.sha256(image.tobytes()).digest(), image.shape[2] == 3)
        return found if image.dtype == np.uint8 else with_range(found, image)

    def read(self, index: int, decoding: Decoding = AS_USUAL, seen: Look = UNSEEN) -> npt.NDArray[np.uint8]:
        """One image as 8 bits: uint8 [H, W, C]; raise ``BrokenImage`` where ``decoding`` does not fit its values."""
        image = np.array(self._images[index])  # a map of a file shows what is written there later
        require_seen(image.tobytes(), seen.content, self.title(index))
        try:
            return eight_bits(image, decoding.white)
        except ValueError as error:
            raise BrokenImage(str(error)) from error


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

    def bytes_of(self, index: int) -> bytes:
        """The bytes of one image's file; raise ``BrokenImage`` where they cannot be read.

        What is called ``.json`` is a file of labelme's, with the picture inside.
        """
        data = file_bytes(self.root / self.files[index])
        return picture_in_json(data) if self.files[index].lower().endswith(".json") else data

    def look(self, index: int) -> Look:
        """Digest one file's bytes and read the image's header, and all of it where it has more than 8 bits."""
        data = self.bytes_of(index)
        try:
            header, deep = header_of(data), deep_values(data)
        except (MemoryError, ResvitError):
            raise
        except Exception as error:
            raise BrokenImage(reason(error)) from error
        found = Look(
            hashlib.sha256(data).digest(),
            header.colour,
            orientation=header.orientation,
            stored=(header.height, header.width),
        )
        return found if deep is None else with_range(found, deep)

    def read(self, index: int, decoding: Decoding = AS_USUAL, seen: Look = UNSEEN) -> npt.NDArray[np.uint8]:
        """Decode one file: uint8 [H, W, 1 or 3]."""
        data = self.bytes_of(index)
        require_seen(data, seen.content, str(self.root / self.files[index]))
        try:
            return decode(data, decoding)
        except (MemoryError, ResvitError):
            raise
        # A damaged file makes Pillow's many decoders raise nearly anything: OSError, SyntaxError, struct.error…
        except Exception as error:
            raise BrokenImage(reason(error)) from error


def file_bytes(path: Path) -> bytes:
    """Read one file of at most 2 GiB, without waiting for a pipe; raise ``BrokenImage`` where that fails."""
    try:
        return read_outside(path, FILE_MOST, "it")
    except ResvitError as error:
        gone = isinstance(error.__cause__, FileNotFoundError)
        raise BrokenImage("No such file" if gone else error.problem.removeprefix("it ").rstrip(".")) from error


def picture_in_json(data: bytes) -> bytes:
    """The bytes of the picture in a file of labelme's (``imageData``); raise ``BrokenImage`` where there is none."""
    try:
        held = json_from_outside(data, "it")
    except ResvitError as error:
        raise BrokenImage(error.problem.removeprefix("it ").rstrip(".")) from error
    text = held.get("imageData") if isinstance(held, dict) else None
    if not isinstance(text, str) or not text:
        raise BrokenImage("it holds no picture (`imageData`)")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BrokenImage(f"its `imageData` is no base64: {error}") from error


def require_seen(data: bytes, digest: bytes, name: str) -> None:
    """Refuse ``data`` that has another SHA-256 than ``digest``, which was taken when the images were opened.

    An empty ``digest`` tells nothing. Raises:
        ResvitError: INPUT; the answers would be about other images than the records say.
    """
    if digest and hashlib.sha256(data).digest() != digest:
        raise changed_since_opened(name)


def changed_since_opened(name: str) -> ResvitError:
    """That an image, or what is known of it, is not any more what was digested."""
    return ResvitError(
        f"{name} was changed after the images were opened.",
        "Run the same command again, and let nothing write there meanwhile.",
    )


def with_range(look: Look, values: npt.NDArray[Any]) -> Look:
    """``look`` with the smallest and largest of values that have more than 8 bits."""
    return look._replace(brightest=float(values.max()), darkest=float(values.min()), kind=values.dtype.name)
