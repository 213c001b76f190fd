"""Which channel of a reshaped and transposed tensor a value of its source lands in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Digit:
    """One digit of a mixed-radix number: (flat index // stride) % size."""

    size: int
    stride: int


Axis: TypeAlias = tuple[Digit, ...]
"""An axis as digits of the source's flat index, the most significant first."""
Layout: TypeAlias = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class ChannelMap:
    """From a flat index of the source tensor to the channel of the tensor made from it."""

    channels: int
    axis: Axis

    def of(self, flat: NDArray[np.int64]) -> NDArray[np.int32]:
        """The channels [N] of the values at these flat indices [N]."""
        channel = np.zeros(flat.shape, np.int32)
        for digit in self.axis:
            # NumPy divides by a scalar with SIMD, and takes no such care of the remainder.
            above = flat // digit.stride if digit.stride > 1 else flat
            channel = channel * np.int32(digit.size) + (above - above // digit.size * digit.size).astype(np.int32)
        return channel


def plain_layout(shape: Sequence[int]) -> Layout:
    """The layout of a source tensor itself: every axis one digit."""
    return tuple((Digit(size, math.prod(shape[axis + 1 :])),) for axis, size in enumerate(shape))


def transposed(layout: Layout, perm: Sequence[int]) -> Layout:
    """The layout behind an ONNX Transpose; without ``perm`` the axes are reversed."""
    return tuple(layout[axis] for axis in (perm or range(len(layout))[::-1]))


def reshaped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout behind a Reshape to ``shape``; None where a new axis begins in the middle of a digit."""
    digits = [digit for axis in layout for digit in axis if digit.size > 1]
    result: list[Axis] = []
    for size in shape:
        axis: list[Digit] = []
        missing = size
        while missing > 1:
            if not digits:
                return None
            digit = digits.pop(0)
            taken = math.gcd(digit.size, missing)
            if taken not in (digit.size, missing):
                return None
            rest = digit.size // taken
            axis.append(Digit(taken, digit.stride * rest))
            if rest > 1:
                digits.insert(0, Digit(rest, digit.stride))
            missing //= taken
        result.append(_merged(axis))
    return None if digits else tuple(result)


def channel_map(layout: Layout, axis: int) -> ChannelMap | None:
    """The map for one axis of a layout; None where there is no such axis."""
    if not -len(layout) <= axis < len(layout):
        return None
    digits = layout[axis]
    return ChannelMap(math.prod(digit.size for digit in digits), digits)


def _merged(axis: list[Digit]) -> Axis:
    """Neighbouring digits that are one."""
    merged: list[Digit] = []
    for digit in axis:
        if merged and merged[-1].stride == digit.size * digit.stride:
            merged[-1] = Digit(merged[-1].size * digit.size, digit.stride)
        else:
            merged.append(digit)
    return tuple(merged)
