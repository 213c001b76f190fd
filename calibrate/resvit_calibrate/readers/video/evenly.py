"""Taking from a sequence of unknown length: evenly spread, and nothing twice that looks the same."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from resvit_engines.pictures.decode import pillow

_T = TypeVar("_T")

GRID = 32
"""Cells along each side: two frames are compared by the mean colour of each cell."""
DIFFERENT = 8
"""Of 255 levels: frames in which no cell differs by more show the same."""
MOST = 512
LEAST = 8
"""Fewer different frames than these tell nothing of what a network will see."""
CANDIDATES = 4096
"""About so many frames are compared, whatever the length of the film."""
SAME = f"no cell of a {GRID}x{GRID} grid of mean colours differs by more than {DIFFERENT} of 255"

_BOX = 4
"""Pillow's number for the mean of all pixels in a cell."""


def mean_colours(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Mean colours uint8 [GRID, GRID, 3] of the cells of a picture uint8 [H, W, 1 or 3]."""
    picture = pillow().fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))
    return np.asarray(picture.resize((GRID, GRID), _BOX), np.uint8)


class Evenly(Generic[_T]):
    """Holds at most ``most`` of the items offered: different ones, at numbers that are multiples of ``step``.

    ``step`` doubles whenever more would be held, and every other item is given back.
    """

    def __init__(self, most: int, step: int = 1) -> None:
        self.most, self.step = most, max(step, 1)
        self.looked, self.alike = 0, 0
        self._held: list[tuple[int, _T]] = []
        self._marks: list[npt.NDArray[np.int16]] = []

    def wants(self, number: int) -> bool:
        """Whether item ``number`` of the sequence is one to look at."""
        return number % self.step == 0

    def shows_something_new(self, mark: npt.NDArray[np.uint8]) -> bool:
        """Whether mean colours [GRID, GRID, 3] are like those of nothing that is held; counts those that are."""
        self.looked += 1
        own = mark.astype(np.int16)
        new = not any(int(np.abs(own - other).max()) <= DIFFERENT for other in reversed(self._marks))
        self.alike += not new
        return new

    def hold(self, number: int, mark: npt.NDArray[np.uint8], item: _T) -> list[_T]:
        """Take an item; returns those that are given back for it."""
        self._held.append((number, item))
        self._marks.append(mark.astype(np.int16))
        given: list[_T] = []
        while len(self._held) > self.most:
            self.step *= 2
            kept = [at for at, (place, _) in enumerate(self._held) if self.wants(place)]
            given += [one for place, one in self._held if not self.wants(place)]
            self._held = [self._held[at] for at in kept]
            self._marks = [self._marks[at] for at in kept]
        return given

    @property
    def items(self) -> list[_T]:
        """What is held, in order."""
        return [item for _, item in self._held]
