"""A kernel as TensorRT must know it: arguments, grid, output shapes; before it is compiled and after.

Sizes that depend on the input shapes are :class:`Extent`: simple enough for a C++ plugin to evaluate, for TensorRT's
symbolic shapes to express, and for anyone to check by hand. The order of a kernel's arguments is TensorRT's for
ahead-of-time plugins: tensor inputs, extra 32-bit integers, tensor outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LAUNCH_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that every launch has on every GPU; for more, it must ask, which TensorRT does not promise."""
ITEM_SIZES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int32": 4, "bool": 1}
"""Bytes of one element, by the element types of kernel arguments; fp8 is E4M3."""


class Term(NamedTuple):
    """One factor: dimension ``axis`` of tensor input ``input``, divided by ``divisor`` and rounded up."""

    input: int
    axis: int
    divisor: int = 1


@dataclass(frozen=True)
class Extent:
    """``factor`` times the product of all ``terms``. A constant has no terms."""

    factor: int = 1
    terms: tuple[Term, ...] = ()

    def at(self, shapes: Sequence[Sequence[int]]) -> int:
        """The number, for given input shapes."""
        return self.factor * math.prod(-(-shapes[t.input][t.axis] // t.divisor) for t in self.terms)

    def flat(self) -> list[int]:
        """As whole numbers in a row: factor, number of terms, then input, axis and divisor of each."""
        return [self.factor, len(self.terms), *(number for term in self.terms for number in term)]


def dim(input: int, axis: int, *, factor: int = 1, divisor: int = 1) -> Extent:  # noqa: A002
    """``factor * ceil(shape[input][axis] / divisor)``."""
    return Extent(factor, (Term(input, axis, divisor),))


def product(*extents: Extent) -> Extent:
    """The product of several."""
    return Extent(math.prod(e.factor for e in extents), tuple(term for e in extents for term in e.terms))


class Result(NamedTuple):
    """One tensor output: its element type and the size of each dimension."""

    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Launch:
    """What both sides of a launch agree on; the same for every GPU but for ``grid``, which follows the tiles."""

    inputs: tuple[str, ...]
    """Element types of the tensor inputs, all in dense row-major order."""
    scalars: tuple[Extent, ...]
    """The extra int32 arguments."""
    outputs: tuple[Result, ...]
    grid: tuple[Extent, Extent, Extent]


@dataclass(frozen=True)
class Source:
    """A kernel to compile: a Triton function with all its choices made.

    ``module`` is the Triton module in ``kernels.triton`` (``attention``), ``function`` the jitted function
    in it. ``arguments`` gives its run-time parameters in order, each with Triton's type: tensor inputs, scalars,
    tensor outputs. ``constants`` gives every other parameter; a tensor that is absent is the constant None.
    """

    module: str
    function: str
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    launch: Launch


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, ready to be carried in a graph: PTX, how to launch it, and what for.

    ``sm`` and ``ptx_version`` ("8.5") are what it was compiled for; ``shared_bytes`` is its dynamic shared memory.
    """

    entry: str
    ptx: str
    sm: int
    ptx_version: str
    threads: int
    shared_bytes: int
    launch: Launch
