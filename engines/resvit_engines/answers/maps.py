"""From what a network says on a coarse grid to every pixel of its input: classes and depths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resvit_engines.answers.options import Array, chosen_output, require_between, require_choice, shapes_of
from resvit_engines.errors import ResvitError


@dataclass(frozen=True)
class SegmentationOptions:
    """``output``: the output with the scores [B, K, h, w] or the class numbers [B, h, w]; None for the only one."""

    output: str | None = None


@dataclass(frozen=True)
class DepthOptions:
    """``output``: the output [B, 1, h, w] or [B, h, w]; None for the only one.

    ``inverted``: the network gives 1 / depth. ``align``: ``median`` scales each image's depths so that their median
    is the known one, for networks that know depth up to a factor. Pixels whose known depth is outside of
    ``min_depth`` to ``max_depth`` (metres) do not count, and the answers are held to these.
    """

    output: str | None = None
    inverted: bool = False
    align: str = "none"
    min_depth: float = 0.001
    max_depth: float = 1e6

    def __post_init__(self) -> None:
        require_choice("depth", "align", self.align, ("none", "median"))
        require_between("depth", "min_depth", self.min_depth, 1e-9, 1e6)
        require_between("depth", "max_depth", self.max_depth, self.min_depth, 1e9)


def masks_name(options: SegmentationOptions, outputs: Mapping[str, Array]) -> str:
    """Which output has the masks. Raises ``ResvitError`` where that is not clear, saying which there are."""
    wanted = options.output
    maps = [name for name, value in outputs.items() if value.ndim in (3, 4)]
    if wanted is None and len(maps) == 1:
        return maps[0]
    if wanted is None or wanted not in maps:
        asked = f"none of them is {wanted}" if wanted else "which one holds the masks is not said"
        raise ResvitError(
            f"Segmentation needs scores [B, classes, h, w] or class numbers [B, h, w]; the network has "
            f"{shapes_of(outputs)}, and {asked}.",
            "Name one with --task-option output=NAME.",
        )
    return wanted


def require_masks(output: Array, size: tuple[int, int]) -> None:
    """Raise ``ResvitError`` for an output that holds no masks of an input of ``size`` (height, width)."""
    height, width = output.shape[-2:]
    whole = size[0] % height == 0 and size[1] % width == 0 and size[0] * width == size[1] * height
    if not whole or (output.ndim == 4 and output.shape[1] < 2) or (output.ndim == 3 and (height, width) != size):
        raise ResvitError(
            f"The segmentation output has the shape {list(output.shape)} for images of {size[0]} x {size[1]}.",
            "It must be scores [B, two or more classes, h, w] with h and w whole fractions of the input's, or "
            "class numbers at the input's size.",
        )


def label_map(one: Array, size: tuple[int, int]) -> npt.NDArray[np.int16]:
    """The class of every pixel of ``size``, of one image's scores [K, h, w] or class numbers [h, w]."""
    return classes_at(one, size) if one.ndim == 3 else one.astype(np.int16)


def depths_name(options: DepthOptions, outputs: Mapping[str, Array]) -> str:
    """Which output has the depths. Raises ``ResvitError`` where that is not clear, saying which there are."""
    maps = [
        name
        for name, value in outputs.items()
        if value.dtype.kind == "f" and (value.ndim == 3 or (value.ndim == 4 and value.shape[1] == 1))
    ]
    return chosen_output(maps, options.output, outputs, "Depth needs an output [B, 1, h, w] or [B, h, w]")


def as_depths(found: Array, options: DepthOptions) -> Array:
    """A map as the network gives it as depths, in its own unit; those below or above the limits are still there."""
    return np.asarray(1.0 / np.maximum(found, 1.0 / options.max_depth)) if options.inverted else found


def classes_at(scores: Array, size: tuple[int, int]) -> npt.NDArray[np.int16]:
    """The class of the largest of the scores [K, h, w] at every pixel of ``size`` (height, width): int16.

    Scores of another size are interpolated bilinearly between the centres of cells, as PyTorch does with
    ``align_corners=False``, before the largest is taken: what segmentation networks that answer on a coarser
    grid are scored with. One class is held at full size at a time.
    """
    if scores.shape[1:] == size:
        return np.asarray(scores.argmax(axis=0), np.int16)
    best = np.full(size, -np.inf, np.float32)
    found = np.zeros(size, np.int16)
    for number, plane in enumerate(scores):
        large = map_at(plane, size)
        better = large > best
        found[better] = number
        np.maximum(best, large, out=best)
    return found


def map_at(values: Array, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """One map [h, w], interpolated in the same way to ``size`` (height, width)."""
    if values.shape == size:
        return values.astype(np.float32)
    rows, columns = ((np.arange(large) + 0.5) * small / large for small, large in zip(values.shape, size, strict=True))
    return between(between(values.astype(np.float32), rows, 0), columns, 1)


def between(values: npt.NDArray[np.float32], places: Array, axis: int) -> npt.NDArray[np.float32]:
    """Rows or columns at ``places``, of which a cell's centre is a half, from the two nearest.

    Each element by itself, and not by a product of matrices, whose rounding differs from machine to machine: a device,
    in Python and in C++, gives what was validated.
    """
    at = np.clip(places - 0.5, 0, values.shape[axis] - 1)
    low = np.minimum(at.astype(np.int64), max(values.shape[axis] - 2, 0))
    high = np.minimum(low + 1, values.shape[axis] - 1)
    share = (at - low).astype(np.float32)
    share = share[:, None] if axis == 0 else share[None]
    return np.asarray(np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share, np.float32)
