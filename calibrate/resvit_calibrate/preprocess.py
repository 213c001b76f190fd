"""From a decoded image to what the network reads: resize, crop, normalise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError

if TYPE_CHECKING:
    from PIL.Image import Image

Resize = Literal["stretch", "crop", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ChannelOrder = Literal["rgb", "bgr"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "interpolation": get_args(Interpolation),
    "channel_order": get_args(ChannelOrder),
}


@dataclass(frozen=True)
class Preprocess:
    """What the network was trained to read, and so what calibration, validation and the device must feed it.

    ``size`` is (height, width) in pixels. ``resize``: ``"stretch"`` ignores the aspect ratio; ``"crop"`` keeps
    it, resizes until the image just covers ``size / crop_fraction`` and cuts ``size`` out of the middle, as
    torchvision and timm do; ``"none"`` takes images of exactly ``size`` and refuses all others. ``mean`` and
    ``std`` belong to pixels scaled to 0…1, one value for all channels or one each, in the order in which the
    network reads the channels: after the swap where ``channel_order`` is ``"bgr"``.

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

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _unusable(f"{name} is {getattr(self, name)!r}", f"one of {', '.join(allowed)}")
        size = tuple(self.size)
        if len(size) != 2 or any(_not_positive_int(side) for side in size):
            raise _unusable(f"size is {self.size!r}", "two positive whole numbers, height and width")
        if self.channels not in (1, 3):
            raise _unusable(
                f"channels is {self.channels!r}", "1 or 3; feed other images by a factory, `file.py:factory`"
            )
        if not 0.0 < self.crop_fraction <= 1.0:
            raise _unusable(f"crop_fraction is {self.crop_fraction!r}", "above 0 and at most 1")
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        object.__setattr__(self, "mean", self._per_channel("mean"))
        object.__setattr__(self, "std", self._per_channel("std"))
        if any(value <= 0.0 for value in self.std):
            raise _unusable(f"std is {self.std!r}", "positive")

    def _per_channel(self, name: str) -> tuple[float, ...]:
        values = tuple(float(value) for value in getattr(self, name))
        if len(values) not in (1, self.channels) or not all(map(math.isfinite, values)):
            raise _unusable(f"{name} is {values!r}", f"one finite number, or {self.channels} of them")
        return values * self.channels if len(values) == 1 else values

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that ``from_json`` reads back."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Preprocess:
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
        return np.ascontiguousarray((scaled - mean) / std)

    def fit(self, image: npt.NDArray[np.uint8] | Image) -> npt.NDArray[np.uint8]:
        """Convert the colours, resize and crop: uint8 [h, w, C], still in RGB order."""
        from PIL import Image as Pillow

        if isinstance(image, np.ndarray):
            grey = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
            image = Pillow.fromarray(np.ascontiguousarray(grey))
        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        image = self._resized(image)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def _resized(self, image: Image) -> Image:
        from PIL import Image as Pillow

        height, width = self.size
        if self.resize == "none":
            if image.size != (width, height):
                raise ResvitError(
                    f"An image is {image.height}x{image.width} pixels (height x width), "
                    f"but the preprocessing does no resizing and the network reads {height}x{width}.",
                    "Set resize to `stretch` or `crop`.",
                )
            return image
        filters = {
            "nearest": Pillow.Resampling.NEAREST,
            "bilinear": Pillow.Resampling.BILINEAR,
            "bicubic": Pillow.Resampling.BICUBIC,
            "lanczos": Pillow.Resampling.LANCZOS,
        }
        wanted = (width, height) if self.resize == "stretch" else self._covering(image.width, image.height)
        if image.size != wanted:
            image = image.resize(wanted, filters[self.interpolation])
        left, top = round((wanted[0] - width) / 2), round((wanted[1] - height) / 2)
        return image if wanted == (width, height) else image.crop((left, top, left + width, top + height))

    def _covering(self, width: int, height: int) -> tuple[int, int]:
        """Smallest (width, height) of the same shape that covers ``size / crop_fraction``."""
        want_height, want_width = (math.floor(side / self.crop_fraction) for side in self.size)
        if width * want_height <= height * want_width:
            return want_width, max(want_height, int(want_width * height / width))
        return max(want_width, int(want_height * width / height)), want_height


def _not_positive_int(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, np.integer)) or int(value) <= 0


def _unusable(what: str, allowed: str) -> ResvitError:
    return ResvitError(f"The preprocessing's {what}, which cannot be used.", f"Make it {allowed}.")
