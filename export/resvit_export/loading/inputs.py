"""What a network reads: the image, and whatever else; and what the user says of it with ``--shape``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size, SizeRange, sizes_from_spans

IMAGE = "input"
"""What the image is called in every graph that is written here."""
TYPES = ("float32", "int64", "int32", "bool")
_EXAMPLE = "Write it as in --shape pixel_values=1..8x3x224x224 or --shape sizes=1x2:int64."
_SPAN = re.compile(r"\d{1,9}(?:\.\.\d{1,9}){0,2}")
_FORM = re.compile(r"(?P<name>[A-Za-z_][\w.:/]*)=(?P<sizes>[\d.]+(?:x[\d.]+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class NetworkInput:
    """One input: its name, its shape without the batch, and the type of its numbers, one of ``TYPES``."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def is_image(self) -> bool:
        """Whether it could be the image: floats [B, C, H, W]."""
        return len(self.shape) == 3 and self.dtype == "float32"

    def at_size(self, size: Size) -> NetworkInput:
        """The same image with another height and width."""
        return replace(self, shape=(self.shape[0], *size))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    def __str__(self) -> str:
        return f"{self.name} [B{''.join(f', {size}' for size in self.shape)}] {self.dtype}"


@dataclass(frozen=True)
class ShapeWish:
    """One ``--shape``: an input, and the batches that it is to have (smallest, best, largest).

    ``sizes`` are there where the image is to have a range of them; ``input`` then has the usual one.
    """

    input: NetworkInput
    batch: tuple[int, int, int]
    sizes: SizeRange | None = None


def shape_wish(text: str) -> ShapeWish:
    """Read ``NAME=BATCHxSIZExSIZE…[:TYPE]``; the batch is N, LOW..HIGH or LOW..BEST..HIGH.

    So may be height and width of an image, ``NAME=BATCHxCHANNELSxHEIGHTxWIDTH``.

    Raises:
        ResvitError: for another form, a range that is neither the batch's nor of an image's height or width, a size of
            0, or a type that is not known.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ResvitError(f"The shape '{text}' is not NAME=BATCHxSIZExSIZE….", _EXAMPLE)
    first, *others = match["sizes"].split("x")
    sizes = None
    if any(".." in size for size in others):
        if len(others) != 3 or ".." in others[0] or not all(map(_SPAN.fullmatch, others)):
            raise ResvitError(
                f"The shape '{text}' leaves a size open that is neither the batch nor height or width of an image.",
                "Write --shape images=1x3x320..640x320..640 for an image, and give a number for everything else.",
            )
        sizes = sizes_from_spans(*others[1:])
        others = [others[0], *map(str, sizes.usual)]
    numbers = [int(size) if size.isdigit() else 0 for size in others]
    if 0 in numbers:
        raise ResvitError(f"The shape '{text}' has a size that is no number above 0.", _EXAMPLE)
    dtype = match["dtype"] or "float32"
    if dtype not in TYPES:
        near = difflib.get_close_matches(dtype, TYPES, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ResvitError(f"The shape '{text}' has the unknown type {dtype}.", f"{hint}Choose {', '.join(TYPES)}.")
    if sizes is not None and dtype != "float32":
        raise ResvitError(f"The shape '{text}' has a range of sizes, and is no image of floats.", _EXAMPLE)
    return ShapeWish(NetworkInput(match["name"], tuple(numbers), dtype), _batch(text, first), sizes)


def shape_wishes(texts: Iterable[str]) -> tuple[ShapeWish, ...]:
    """Read all of them; raises ``ResvitError`` for a name that comes twice and batches that differ."""
    wishes = tuple(shape_wish(text) for text in texts)
    names = [wish.input.name for wish in wishes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ResvitError(f"--shape names the input {twice[0]} twice.", "Give one shape for each input.")
    if len(wishes) > 1 and any(wish.sizes for wish in wishes):
        raise ResvitError(
            "A range of sizes was asked for, and the network reads more than one image alone.",
            "Name one size for each input, and build one engine for each size that is needed.",
        )
    if len({wish.batch for wish in wishes}) > 1:
        told = ", ".join(f"{w.input.name}: {'..'.join(map(str, dict.fromkeys(w.batch)))}" for w in wishes)
        raise ResvitError(
            f"The inputs have different batches ({told}).", "Every input has one entry for each image: one batch."
        )
    return wishes


def in_order(inputs: Sequence[NetworkInput]) -> tuple[NetworkInput, ...]:
    """The image first, called ``input``; the others as they are called.

    Raises:
        ResvitError: where none of them is an image.
    """
    image = next((item for item in inputs if item.is_image), None)
    if image is None:
        raise ResvitError(
            f"None of the network's inputs is an image: {', '.join(map(str, inputs)) or 'it has none'}.",
            "One must be float32 [B, C, H, W], with the batch as its first axis.",
        )
    others = [item for item in inputs if item is not image]
    if any(item.name == IMAGE for item in others):
        raise ResvitError(
            f"The network calls another input than its image '{IMAGE}', which is the image's name in every graph here.",
            "Rename it in the network's forward.",
        )
    return (NetworkInput(IMAGE, image.shape), *others)


def random_feeds(
    inputs: Sequence[NetworkInput], batch: int, random: np.random.Generator
) -> dict[str, npt.NDArray[Any]]:
    """Arrays that any network can read: normal floats; ones where integers are masks, sizes or numbers."""
    return {
        item.name: random.standard_normal((batch, *item.shape), dtype=np.float32)
        if item.dtype == "float32"
        else np.ones((batch, *item.shape), np.dtype(item.dtype))
        for item in inputs
    }


def require_fed(inputs: Sequence[NetworkInput], given: Mapping[str, npt.NDArray[Any]], data: str) -> None:
    """Raise ``ResvitError`` unless a batch of the data has all that the network reads, and nothing else."""
    wanted = {item.name: item for item in inputs}
    for name, item in wanted.items():
        if name not in given:
            raise ResvitError(
                f"The network reads {item}, and the data gives nothing of that name ({data}).",
                "Give it by a factory: --data file.py:function, which yields dictionaries with `images` and "
                f"`inputs`: {{'{name}': an array [B, …]}}.",
            )
        array = given[name]
        if array.shape[1:] != item.shape or not np.can_cast(array.dtype, np.dtype(item.dtype), "same_kind"):
            raise ResvitError(
                f"The network reads {item}, and the data gives {array.dtype} {list(array.shape)} ({data}).",
                "Give it in that shape and type.",
            )
    if unknown := [name for name in given if name not in wanted]:
        raise ResvitError(
            f"The data gives {', '.join(unknown)}, which the network does not read ({data}).",
            f"It reads {', '.join(map(str, inputs))}.",
        )


def _batch(text: str, sizes: str) -> tuple[int, int, int]:
    parts = sizes.split("..")
    if all(part.isdigit() for part in parts) and len(parts) <= 3:
        low, high = int(parts[0]), int(parts[-1])
        best = int(parts[1]) if len(parts) == 3 else high
        if 1 <= low <= best <= high:
            return low, best, high
    raise ResvitError(
        f"The batch '{sizes}' in the shape '{text}' is neither a number nor LOW..HIGH or LOW..BEST..HIGH in rising "
        "order.",
        _EXAMPLE,
    )
