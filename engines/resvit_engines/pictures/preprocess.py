"""From a decoded picture to what the network reads: resize, crop, normalise. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import WHITE, Decoding, decode
from resvit_engines.pictures.resample import luma, resized

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

Resize = Literal["stretch", "crop", "letterbox", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ChannelOrder = Literal["rgb", "bgr"]
Padding = Literal["end", "centre"]
Exif = Literal["apply", "ignore"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "interpolation": get_args(Interpolation),
    "channel_order": get_args(ChannelOrder),
    "padding": get_args(Padding),
    "exif": get_args(Exif),
}
_PICTURE_CHANNELS = (1, 3)
_MOST_CHANNELS = 4096
"""Bands of a satellite's camera, frames of a clip: networks read what no picture holds, and a loader feeds it."""
# A picture that is all but a line would have to be enlarged beyond any memory before it is cut.
_MOST_ENLARGED = 64


@dataclass(frozen=True)
class PicturePreprocess:
    """What the network was trained to read, and so what calibration, validation and the device must feed it.

    ``size`` is (height, width) in pixels. ``resize``: ``"stretch"`` ignores the aspect ratio; ``"crop"`` keeps
    it, resizes until the image just covers ``size / crop_fraction`` and cuts ``size`` out of the middle, as
    torchvision and timm do; ``"letterbox"`` keeps it, resizes until the image just fits into ``size`` and fills
    the rest with ``pad_value`` (0 to 255, one for all channels or one each): at the right and the bottom, or on
    both sides where ``padding`` is ``"centre"``; ``"none"`` takes images of exactly ``size`` and refuses all
    others. ``mean`` and ``std`` belong to pixels scaled to 0…1, one value for all channels or one each, in the
    order in which the network reads the channels (``pad_value`` too): after the swap where ``channel_order`` is
    ``"bgr"``. Of image files, ``exif`` says whether they are turned upright as their EXIF orientation says, which
    torchvision and timm do not do, and ``white`` (1 to 65535) which value is white in pixels of more than 8 bits:
    4095 where they hold 12 bits, 1 of floating-point ones from 0 to 1 (see ``decode.eight_bits``).

    Raises ``ResvitError`` for values that no image could be prepared with.
    """

    size: tuple[int, int]
    channels: int = 3
    resize: Resize = "stretch"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_order: ChannelOrder = "rgb"
    padding: Padding = "end"
    pad_value: tuple[float, ...] = (0.0,)
    exif: Exif = "apply"
    white: int = WHITE

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _unusable(f"{name} is {getattr(self, name)!r}", f"one of {', '.join(allowed)}")
        size = tuple(self.size)
        if len(size) != 2 or any(_not_positive_int(side) for side in size):
            raise _unusable(f"size is {self.size!r}", "two positive whole numbers, height and width")
        if _not_positive_int(self.channels) or self.channels > _MOST_CHANNELS:
            raise _unusable(f"channels is {self.channels!r}", f"a whole number from 1 to {_MOST_CHANNELS}")
        if _not_positive_int(self.white) or self.white > WHITE:
            raise _unusable(f"white is {self.white!r}", f"a whole number from 1 to {WHITE}")
        if not 0.0 < self.crop_fraction <= 1.0:
            raise _unusable(f"crop_fraction is {self.crop_fraction!r}", "above 0 and at most 1")
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        if isinstance(self.pad_value, (int, float)):
            object.__setattr__(self, "pad_value", (self.pad_value,))
        object.__setattr__(self, "pad_value", self._per_channel("pad_value"))
        if not all(0.0 <= value <= 255.0 for value in self.pad_value):
            raise _unusable(f"pad_value is {self.pad_value!r}", "from 0 to 255, as pixels are before they are scaled")
        object.__setattr__(self, "mean", self._per_channel("mean"))
        object.__setattr__(self, "std", self._per_channel("std"))
        if any(value <= 0.0 for value in self.std):
            raise _unusable(f"std is {self.std!r}", "positive")

    def _per_channel(self, name: str) -> tuple[float, ...]:
        values = tuple(float(value) for value in getattr(self, name))
        if len(values) not in (1, self.channels) or not all(map(math.isfinite, values)):
            raise _unusable(f"{name} is {values!r}", f"one finite number, or {self.channels} of them")
        return values * self.channels if len(values) == 1 else values

    @property
    def decoding(self) -> Decoding:
        """How image files are decoded."""
        return Decoding(self.exif == "apply", self.white)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that ``from_json`` reads back."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Read ``to_json``'s form; a name that is not a field raises ``ResvitError``."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown or "size" not in plain:
            wrong = f"has unknown entries: {', '.join(unknown)}" if unknown else "has no size"
            raise ResvitError(f"The preprocessing {wrong}.", f"Its entries are {', '.join(sorted(known))}.")
        try:
            return cls(**plain)
        except (TypeError, ValueError) as error:
            raise ResvitError(
                f"The preprocessing cannot be read: {error}.", "Compare it with the recipe's documentation."
            ) from error

    def prepare(self, data: bytes) -> npt.NDArray[np.float32]:
        """Decode a picture file's bytes and prepare it: float32 [C, h, w]. Raises what ``decode`` and ``apply`` do."""
        return self.apply(decode(data, self.decoding))

    def apply(self, image: npt.NDArray[np.uint8] | Image) -> npt.NDArray[np.float32]:
        """Prepare one image: uint8 [H, W], [H, W, 1] or [H, W, 3] (or Pillow's L or RGB) to float32 [C, h, w].

        Grey becomes three equal channels and colour becomes luma (ITU-R 601) where the network wants it so.
        Raises ``ResvitError`` where ``resize`` is ``"none"`` and the image is not of ``size``.
        """
        pixels = self.fit(image)
        if self.channel_order == "bgr":
            pixels = pixels[:, :, ::-1]
        # In float32 and in this order, so that the result equals torchvision's ToTensor and Normalize.
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean = np.asarray(self.mean, np.float32)[:, None, None]
        std = np.asarray(self.std, np.float32)[:, None, None]
        ready = np.ascontiguousarray((scaled - mean) / std)
        if self.resize == "letterbox":
            self._pad(ready, self.placed(*_size_of(image)))
        return ready

    def fit(self, image: npt.NDArray[np.uint8] | Image) -> npt.NDArray[np.uint8]:
        """Convert the colours, resize, crop and pad: uint8 [h, w, C], still in RGB order."""
        if isinstance(image, np.ndarray) and (whole := self._whole(image)) is not None:
            return whole
        if self.channels not in _PICTURE_CHANNELS:
            raise ResvitError(
                f"A picture was given, and the network reads {self.channels} channels.",
                f"Feed it arrays of {self.channels} channels by a factory, `file.py:factory`.",
            )
        return self._resized(self._coloured(image))

    def _whole(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
        """An image of the network's size, of which no pixel changes; None where one does."""
        pixels = image[:, :, None] if image.ndim == 2 else image
        if self.placed(*pixels.shape[:2]) != (*pixels.shape[:2], 0, 0) or pixels.shape[:2] != self.size:
            return None
        if pixels.shape[2] == 1 and self.channels in _PICTURE_CHANNELS:
            return np.repeat(pixels, self.channels, axis=2)
        return pixels if pixels.shape[2] == self.channels else None

    def _coloured(self, image: npt.NDArray[np.uint8] | Image) -> npt.NDArray[np.uint8]:
        """The image with the network's 1 or 3 channels: uint8 [H, W, C]."""
        if not isinstance(image, np.ndarray):
            mode = "L" if self.channels == 1 else "RGB"
            image = np.asarray(image if image.mode == mode else image.convert(mode), dtype=np.uint8)
        pixels = image[:, :, None] if image.ndim == 2 else image
        if pixels.ndim != 3 or pixels.shape[2] not in _PICTURE_CHANNELS:
            raise ResvitError(
                f"A picture has the shape {list(image.shape)}.", "Give pixels as [H, W], [H, W, 1] or [H, W, 3]."
            )
        if pixels.shape[2] == self.channels:
            return pixels
        return luma(pixels) if self.channels == 1 else np.repeat(pixels, 3, axis=2)

    def placed(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The image's height and width once resized, and where its top left corner then lies in the input."""
        want_height, want_width = self.size
        if self.resize == "none":
            if (height, width) != self.size:
                raise ResvitError(
                    f"An image is {height}x{width} pixels (height x width), "
                    f"but the preprocessing does no resizing and the network reads {want_height}x{want_width}.",
                    "Set resize to `stretch`, `crop` or `letterbox`.",
                )
            return height, width, 0, 0
        if self.resize == "stretch":
            return want_height, want_width, 0, 0
        if self.resize == "letterbox":
            scale = min(want_height / height, want_width / width)
            tall, wide = (
                min(most, max(1, round(side * scale))) for side, most in ((height, want_height), (width, want_width))
            )
            if self.padding == "end":
                return tall, wide, 0, 0
            return tall, wide, (want_height - tall) // 2, (want_width - wide) // 2
        wide, tall = self._covering(width, height)
        return tall, wide, -round((tall - want_height) / 2), -round((wide - want_width) / 2)

    def _resized(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Pixels [H, W, C] resized and placed: [h, w, C]."""
        (height, width), (high, across) = self.size, pixels.shape[:2]
        tall, wide, top, left = self.placed(high, across)
        if tall * wide > _MOST_ENLARGED * max(height * width, high * across):
            horizontally, vertically = across / wide, high / tall
            right, bottom = min((width - left) * horizontally, across), min((height - top) * vertically, high)
            box = (-left * horizontally, -top * vertically, right, bottom)
            return resized(pixels, self.size, self.interpolation, box)
        pixels = resized(pixels, (tall, wide), self.interpolation)
        if (tall, wide) == self.size:
            return pixels
        if self.resize == "crop":
            return pixels[-top : height - top, -left : width - left]
        colour = [round(value) for value in self.pad_value]
        if self.channel_order == "bgr":
            colour.reverse()
        sheet = np.empty((height, width, self.channels), np.uint8)
        sheet[...] = colour
        sheet[top : top + tall, left : left + wide] = pixels
        return sheet

    def _pad(self, ready: npt.NDArray[np.float32], placed: tuple[int, int, int, int]) -> None:
        """Fill what is beside the image exactly: as a pixel, a padding of the mean's value would be rounded."""
        tall, wide, top, left = placed
        values = np.array(self.pad_value) / 255.0
        fill = ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)[:, None, None]
        ready[:, :top] = ready[:, top + tall :] = fill
        ready[:, :, :left] = ready[:, :, left + wide :] = fill

    def _covering(self, width: int, height: int) -> tuple[int, int]:
        """Smallest (width, height) of the same shape that covers ``size / crop_fraction``."""
        want_height, want_width = (math.floor(side / self.crop_fraction) for side in self.size)
        if width * want_height <= height * want_width:
            return want_width, max(want_height, int(want_width * height / width))
        return max(want_width, int(want_height * width / height)), want_height


def _size_of(image: npt.NDArray[np.uint8] | Image) -> tuple[int, int]:
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)


def _not_positive_int(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, np.integer)) or int(value) <= 0


def _unusable(what: str, allowed: str) -> ResvitError:
    return ResvitError(f"The preprocessing's {what}, which cannot be used.", f"Make it {allowed}.")
