"""The sizes of images that a network takes: one, or a range from the smallest to the largest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from resvit_engines.errors import ResvitError

Size = tuple[int, int]
"""(height, width) in pixels."""

MOST_PIXELS = 1 << 15
"""Of one side: a thousand times what trained networks read ends in a memory error, not in an engine."""
SIZES_EXAMPLE = "Write it as in --input-shape 3x224x224, or 3x320..640x320..640 for a range of sizes."
_SPAN = re.compile(r"[1-9]\d{0,8}(?:\.\.[1-9]\d{0,8}){0,2}")


@dataclass(frozen=True)
class SizeRange:
    """(height, width) of the smallest, the usual and the largest image, height and width independent of each other.

    Calibration sees all three, and so do the checks; accuracy is judged, and engines are tuned, at the usual one.

    Raises:
        ResvitError: INPUT where the sides are not in rising order, from 1 to ``MOST_PIXELS``.
    """

    smallest: Size
    usual: Size
    largest: Size

    def __post_init__(self) -> None:
        for low, usual, high in self.spans:
            if not 1 <= low <= usual <= high <= MOST_PIXELS:
                raise ResvitError(
                    f"The size {self} (height x width) is not from 1 to {MOST_PIXELS} pixels a side, in rising order.",
                    "Give the smallest before the largest, as in 320..640, or 320..512..640 with the usual size.",
                )

    @property
    def spans(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Smallest, usual and largest height, and the same of the width."""
        (low, usual, high), (left, middle, right) = zip(self.smallest, self.usual, self.largest, strict=True)
        return (low, usual, high), (left, middle, right)

    @property
    def all(self) -> tuple[Size, ...]:
        """The usual size, the smallest and the largest, each once."""
        return tuple(dict.fromkeys((self.usual, self.smallest, self.largest)))

    @property
    def checked(self) -> tuple[Size, ...]:
        """The sizes that a network is checked at: all of them, and one as low as none and as wide as any."""
        return tuple(dict.fromkeys((*self.all, (self.smallest[0], self.largest[1]))))

    @property
    def is_one(self) -> bool:
        """Whether there is one size only."""
        return self.smallest == self.largest

    def holds(self, size: Size) -> bool:
        """Whether a size lies within."""
        return all(low <= side <= high for side, (low, _, high) in zip(size, self.spans, strict=True))

    def numbers(self) -> list[int]:
        """Smallest, usual and largest, height before width: what ``sizes_from_numbers`` reads."""
        return [*self.smallest, *self.usual, *self.largest]

    def __str__(self) -> str:
        return "x".join("..".join(map(str, dict.fromkeys(span))) for span in self.spans)


def sizes_from_numbers(numbers: Sequence[int]) -> SizeRange:
    """What ``SizeRange.numbers`` gave.

    Raises:
        ResvitError: INPUT where these are not six numbers of such a range.
    """
    if len(numbers) != 6:
        raise ResvitError(f"A range of sizes has six numbers, and here are {len(numbers)}.", SIZES_EXAMPLE)
    low, left, usual, middle, high, right = numbers
    return SizeRange((low, left), (usual, middle), (high, right))


def shape_from_text(text: str) -> tuple[int, SizeRange]:
    """Channels and sizes of ``CHANNELSxHEIGHTxWIDTH``; a side is N, LOW..HIGH (usual: HIGH) or LOW..USUAL..HIGH.

    Raises:
        ResvitError: INPUT for any other text.
    """
    parts = re.split("[x,]", text.strip())
    if len(parts) != 3 or not all(map(_SPAN.fullmatch, parts)):
        raise ResvitError(f"The input shape '{text}' is not CHANNELSxHEIGHTxWIDTH.", SIZES_EXAMPLE)
    if ".." in parts[0]:
        raise ResvitError(
            f"The input shape '{text}' leaves the channels open: the weights of the first layer are for one number.",
            SIZES_EXAMPLE,
        )
    return int(parts[0]), sizes_from_spans(parts[1], parts[2])


def sizes_from_spans(height: str, width: str) -> SizeRange:
    """The range that two texts such as ``320..640`` say; raises ``ResvitError`` as ``SizeRange``."""
    sides = []
    for text in (height, width):
        numbers = [int(number) for number in text.split("..")]
        sides.append((numbers[0], numbers[1] if len(numbers) == 3 else numbers[-1], numbers[-1]))
    (low, usual, high), (left, middle, right) = sides
    return SizeRange((low, left), (usual, middle), (high, right))


def size_from_text(text: str) -> Size:
    """(height, width) of ``HEIGHTxWIDTH``.

    Raises:
        ResvitError: INPUT for any other text.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})[x,]([1-9]\d{0,8})", text.strip())
    if match is None:
        raise ResvitError(f"The size '{text}' is not HEIGHTxWIDTH.", "Write it as in --size 480x640.")
    return int(match[1]), int(match[2])


def in_multiples(sizes: SizeRange, step: int) -> SizeRange:
    """The same range with every side rounded down to a multiple of ``step``, or up to the first one."""
    sides = [[max(side // step, 1) * step for side in size] for size in (sizes.smallest, sizes.usual, sizes.largest)]
    smallest, usual, largest = ((height, width) for height, width in sides)
    return dataclasses.replace(sizes, smallest=smallest, usual=usual, largest=largest)
