"""What goes into a runner, checked against what the model takes, and cut into batches that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from resvit_engines.errors import ResvitError
from resvit_engines.trt.running import TensorSpec

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = dict[str, Array]
"""Arrays by the name of the input or output that they belong to."""

_PREPARE = "Prepare images as the bundle's manifest.json says under 'preprocess'."


def checked_feeds(arrays: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> tuple[Arrays, int]:
    """The arrays in the types that the model reads, contiguous, and how many images they hold.

    Floats become the model's floats and integers its integers, never one the other: whole numbers where the model
    reads floats are most likely pixels that were not prepared.

    Raises:
        ResvitError: INPUT for names, types and shapes that are not the model's, and for an empty batch.
    """
    declared = ", ".join(map(str, inputs))
    names = [spec.name for spec in inputs]
    for name in [*names, *arrays]:
        if name not in arrays or name not in names:
            trouble = f"needs the input {name!r}" if name in names else f"has no input {name!r}"
            raise ResvitError(
                f"The model {trouble}; given were {sorted(arrays)}.", f"Name the arrays after its inputs: {declared}."
            )
    feeds = {spec.name: _fitting(arrays[spec.name], spec) for spec in inputs}
    counts = {len(feed) for feed in feeds.values()}
    if len(counts) != 1 or 0 in counts:
        told = ", ".join(f"{name}: {len(feed)}" for name, feed in feeds.items())
        raise ResvitError(
            f"The inputs do not hold one and the same number of images ({told}).", "Give at least one image."
        )
    return feeds, counts.pop()


def _fitting(array: Array, spec: TensorSpec) -> Array:
    try:
        array = np.asarray(array)
    except ValueError as error:
        raise ResvitError(f"The input {spec.name!r} is no array: {error}.", _PREPARE) from error
    fits = array.ndim == len(spec.shape) and all(
        want in (-1, have) for have, want in zip(array.shape[1:], spec.shape[1:], strict=True)
    )
    if not fits:
        raise ResvitError(
            f"The input {spec.name!r} has the shape {list(array.shape)}, and the model reads {spec}.", _PREPARE
        )
    if array.dtype != spec.dtype and not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise ResvitError(
            f"The input {spec.name!r} holds {array.dtype.name}, and the model reads {spec.dtype.name}.", _PREPARE
        )
    if array.dtype != spec.dtype and array.dtype.kind != spec.dtype.kind:
        raise ResvitError(
            f"The input {spec.name!r} holds whole numbers ({array.dtype.name}), and the model reads "
            f"{spec.dtype.name}: these look like pixels that were not prepared.",
            _PREPARE,
        )
    return np.ascontiguousarray(array, spec.dtype)


def require_batch(batch: int, bounds: tuple[int, int], label: str) -> None:
    """Refuse a batch that does not run in one piece.

    Raises:
        ResvitError: INPUT, with the batches that do.
    """
    smallest, largest = bounds
    if not smallest <= batch <= largest:
        takes = f"a batch of {smallest}" if smallest == largest else f"batches of {smallest} to {largest}"
        raise ResvitError(f"{label} takes {takes}, not {batch}.", "Give another --batch, or build with this one.")


def pieces(feeds: Arrays, count: int, bounds: tuple[int, int]) -> Iterator[tuple[Arrays, int]]:
    """Cut ``count`` images into batches within ``bounds``, each with how many of its images are real.

    A last batch that is too small is filled up by repeating its final image.
    """
    smallest, largest = bounds
    for start in range(0, count, largest):
        part = {name: value[start : start + largest] for name, value in feeds.items()}
        size = min(largest, count - start)
        if size < smallest:
            part = {
                name: np.concatenate([value, np.repeat(value[-1:], smallest - size, axis=0)])
                for name, value in part.items()
            }
        yield part, size


def run_in_pieces(
    run: Callable[[Arrays], Arrays], arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], bounds: tuple[int, int]
) -> Arrays:
    """Run any number of images through ``run``, which takes batches within ``bounds``; outputs [N, …] as one."""
    feeds, count = checked_feeds(arrays, inputs)
    found: list[tuple[Arrays, int, int]] = []
    for part, size in pieces(feeds, count, bounds):
        found.append((run(part), size, len(part[inputs[0].name])))
    joined: Arrays = {}
    for name, first in found[0][0].items():
        batched = first.ndim > 0 and len(first) == found[0][2]
        joined[name] = np.concatenate([out[name][:size] for out, size, _ in found]) if batched else first
    return joined
