"""A camera's frames, checked; and the way from places in a network's input back to the frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.maps import between
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.pictures.sizes import MOST_PIXELS
from resvit_engines.run.feeds import Array

Frame = npt.NDArray[np.uint8]
Order = Literal["rgb", "bgr"]
ORDERS: tuple[Order, ...] = ("rgb", "bgr")
_AS_ARRAY = "Give a frame as a NumPy array of uint8, [height, width, 3], or a list of them."


def frames_of(given: object, order: Order) -> list[Frame]:
    """The frames uint8 [H, W, 3] in RGB order, or [H, W, 1], of one or several that were ``given``.

    ``given`` is one frame [H, W, 3], or [H, W] and [H, W, 1] where it is grey, a list of frames of any sizes, or an
    array [N, H, W, 3]. ``order`` is theirs.

    Raises:
        ResvitError: INPUT for anything else, saying what it is.
    """
    several = given if is_several(given) else [given]
    assert isinstance(several, (Sequence, np.ndarray))
    if len(several) == 0:
        raise ResvitError("No frame was given.", _AS_ARRAY)
    numbered = len(several) > 1
    return [_frame(one, f"Frame {at}" if numbered else "The frame", order) for at, one in enumerate(several)]


def is_several(given: object) -> bool:
    """Whether a list of frames was given, or an array of them."""
    return isinstance(given, (list, tuple)) or (isinstance(given, np.ndarray) and given.ndim == 4)


def _frame(given: Any, what: str, order: Order) -> Frame:
    if not isinstance(given, np.ndarray):
        raise ResvitError(f"{what} is a {type(given).__module__}.{type(given).__name__}.", _AS_ARRAY)
    given = given.view(np.ndarray)  # a matrix keeps two axes whatever is asked of it
    if given.dtype != np.uint8:
        raise ResvitError(
            f"{what} holds {given.dtype.name}, where pixels are uint8 from 0 to 255.",
            "Give it as the camera does: scaling and normalising is done here.",
        )
    if given.ndim not in (2, 3) or (given.ndim == 3 and given.shape[2] not in (1, 3)):
        first = given.ndim == 3 and given.shape[0] in (1, 3)
        raise ResvitError(
            f"{what} has the shape {list(given.shape)}.",
            "Put the channels last: frame.transpose(1, 2, 0)." if first else _AS_ARRAY,
        )
    if not all(1 <= side <= MOST_PIXELS for side in given.shape[:2]):
        raise ResvitError(
            f"{what} has {given.shape[0]} x {given.shape[1]} pixels.", f"Give 1 to {MOST_PIXELS} pixels a side."
        )
    frame: Frame = given[:, :, None] if given.ndim == 2 else given
    turned: Frame = frame[:, :, ::-1]
    return turned if order == "bgr" and frame.shape[2] == 3 else frame


@dataclass(frozen=True)
class Placement:
    """Where a frame of ``frame`` (height, width) lies in an input of ``size``: resized to ``placed``, at ``corner``."""

    frame: tuple[int, int]
    size: tuple[int, int]
    placed: tuple[int, int]
    corner: tuple[int, int]

    @classmethod
    def of(cls, frame: Frame, how: PicturePreprocess) -> Placement:
        """As ``how`` prepares this frame; raises INPUT for a frame that it does not take."""
        tall, wide, top, left = how.placed(frame.shape[0], frame.shape[1])
        return cls((frame.shape[0], frame.shape[1]), how.size, (tall, wide), (top, left))

    def boxes(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Boxes [M, 4] in pixels of the input as such in pixels of the frame, cut at its edges."""
        (top, left), (height, width) = self.corner, self.frame
        scale = np.array([width / self.placed[1], height / self.placed[0]] * 2)
        moved = (boxes.astype(np.float64) - np.array([left, top] * 2)) * scale
        return np.asarray(np.clip(moved, 0.0, np.array([width, height] * 2)), np.float32)

    def labels(self, classes: npt.NDArray[np.int16], unseen: int) -> npt.NDArray[np.int16]:
        """A map of classes of the input as one of the frame: each pixel gets the class of where its centre lies."""
        (rows, seen), (columns, across) = (self._places(axis) for axis in (0, 1))
        down, right = (
            np.floor(np.where(there, at, 0.0)).astype(np.int64) for at, there in ((rows, seen), (columns, across))
        )
        found = classes[down[:, None], right[None]]
        return np.where(seen[:, None] & across[None], found, np.int16(unseen))

    def values(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A map of numbers of the input as one of the frame, interpolated bilinearly; NaN where the input ends."""
        (rows, seen), (columns, across) = (self._places(axis) for axis in (0, 1))
        tall = between(values, rows, 0)
        found = between(tall, columns, 1)
        return np.asarray(np.where(seen[:, None] & across[None], found, np.nan), np.float32)

    def _places(self, axis: int) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Where the centres of the frame's rows or columns lie in the input, and whether that is inside."""
        step = self.placed[axis] / self.frame[axis]
        at = (np.arange(self.frame[axis]) + 0.5) * step + self.corner[axis]
        return at, (at >= 0) & (at < self.size[axis])
