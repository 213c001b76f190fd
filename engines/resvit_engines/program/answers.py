"""What a program gets for a frame: one class for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError
from resvit_engines.run.feeds import Array

UNSEEN = -1
"""The class of a frame's pixels that the network did not see, since the preprocessing cut them off."""


class Class(NamedTuple):
    """A class: its ``number``, what it is called (the number, where no name is known), and how likely it is, 0 to 1."""

    number: int
    name: str
    probability: float


class Box(NamedTuple):
    """A box: left, top, right and bottom in pixels of the frame, ``score`` 0 to 1, and the class."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    number: int
    name: str


@dataclass(frozen=True, eq=False)
class Names:
    """What classes are called: ``known`` by number; all others by their number."""

    known: Mapping[int, str]

    def __getitem__(self, number: int) -> str:
        return self.known.get(number, str(number))


@dataclass(frozen=True, eq=False)
class Classification:
    """``probabilities`` float32 [K] of all classes."""

    probabilities: npt.NDArray[np.float32]
    names: Names

    @property
    def best(self) -> Class:
        """The likeliest class."""
        return self.top(1)[0]

    def top(self, count: int) -> list[Class]:
        """The ``count`` likeliest classes, the likeliest first; raises INPUT where that is no number of classes."""
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 0:
            raise ResvitError(f"{count!r:.100} is no number of classes.", "Give a whole number, such as top(5).")
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [Class(int(k), self.names[int(k)], float(self.probabilities[k])) for k in order]


@dataclass(frozen=True, eq=False)
class Detections:
    """Of M boxes, best first: float32 [M, 4] left, top, right, bottom in pixels of the frame, scores and classes [M].

    Iterating gives each as a ``Box``.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    names: Names

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Box]:
        for box, score, number in zip(self.boxes.tolist(), self.scores.tolist(), self.classes.tolist(), strict=True):
            left, top, right, bottom = box
            yield Box(left, top, right, bottom, score, number, self.names[number])


@dataclass(frozen=True, eq=False)
class Mask:
    """The class of every pixel of the frame, int16 [H, W]; ``UNSEEN`` (-1) of those that were cut off."""

    classes: npt.NDArray[np.int16]
    names: Names


@dataclass(frozen=True, eq=False)
class Depths:
    """The depth of every pixel of the frame in the unit of the training data, float32 [H, W]; NaN where cut off."""

    depths: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Line:
    """The text that was read."""

    text: str


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vector of the frame as the network gives it, float32 [D]."""

    vector: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Outputs:
    """The network's outputs by name, each without the batch's axis, of a network whose task says no more."""

    arrays: Mapping[str, Array]


Answer = Classification | Detections | Mask | Depths | Line | Embedding | Outputs
