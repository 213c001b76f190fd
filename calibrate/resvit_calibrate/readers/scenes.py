"""Scenes made of real Fashion-MNIST items, with exact boxes and masks: for detection and segmentation, offline.

Every scene follows from its split, seed and number alone. Scenes to train on hold items of the training split
only, and scenes to test with items of the test split only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.targets import BoxTarget, MaskTarget, Target
from resvit_calibrate.readers.fashion_mnist import CLASS_NAMES, SPLITS, Split, read_split
from resvit_engines.errors import ResvitError

SIZES = (96, 160)
"""Least and greatest edge of a scene in pixels."""
MASK_CLASSES = ("background", *CLASS_NAMES)
VALIDATION = 1000
"""How many test scenes accuracy is measured on."""
MEAN, STD = 0.2860, 0.3530
"""Of Fashion-MNIST's pixels scaled to 0..1, as the nano hybrids expect them."""

_ITEMS = (2, 6)
_EDGES = (24, 56)  # pixels of the square of 28x28 that an item comes in
_VISIBLE = 0.5  # what later items leave of each item, at least
_INSIDE = 0.7  # what of an item is inside the scene, at least
_TRIES = 12
_OPAQUE = 12  # the background of an item is 0, and a little more where it was resized
_CALIBRATION, _TRAINING, _BATCH = 512, 8000, 32
_NOT_TRAINED = 1_000_000_007
"""A seed for scenes that no training with a small seed has seen."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene of M items.

    ``pixels`` uint8 [H, W]; ``instances`` int16 [H, W] is the number of the item that is seen at each pixel, -1 for
    the background; ``classes`` int64 [M] are the items' classes, 0 to 9.
    """

    pixels: npt.NDArray[np.uint8]
    instances: npt.NDArray[np.int16]
    classes: npt.NDArray[np.int64]

    def boxes(self) -> BoxTarget:
        """The extent of what is seen of each item, in order."""
        corners = np.array([_extent(self.instances == item) for item in range(len(self.classes))], np.float32)
        return BoxTarget(corners.reshape(-1, 4), self.classes, np.zeros(len(self.classes), np.bool_))

    def mask(self) -> MaskTarget:
        """The class at each pixel as in ``MASK_CLASSES``: 0 for the background, 1 to 10 for the items'."""
        of_item = np.concatenate([self.classes + 1, [0]]).astype(np.int16)
        return MaskTarget(of_item[self.instances])


@dataclass(frozen=True)
class Scenes:
    """As many scenes as wanted, by number.

    ``heights`` and ``widths`` are the least and the greatest in pixels. Raises ``ResvitError`` for sizes beyond
    ``SIZES`` and for a negative seed.
    """

    split: Split
    seed: int = 0
    heights: tuple[int, int] = (96, 96)
    widths: tuple[int, int] = (96, 96)

    def __post_init__(self) -> None:
        for low, high in (self.heights, self.widths):
            if not SIZES[0] <= low <= high <= SIZES[1]:
                raise ResvitError(
                    f"Scenes of {low} to {high} pixels cannot be made.", f"Choose from {SIZES[0]} to {SIZES[1]}."
                )
        if self.seed < 0:
            raise ResvitError(f"The seed {self.seed} is negative.", "Choose 0 or more.")

    def scene(self, number: int) -> Scene:
        """Make scene ``number``, from 0 on. Raises ``ResvitError`` where Fashion-MNIST is missing."""
        items, classes = _items(self.split)
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), number])
        height, width = (int(random.integers(low, high + 1)) for low, high in (self.heights, self.widths))
        pixels = _background(random, height, width)
        instances = np.full((height, width), -1, np.int16)
        chosen: list[int] = []
        areas: list[int] = []
        for _ in range(int(random.integers(_ITEMS[0], _ITEMS[1] + 1))):
            index = int(random.integers(len(items)))
            for _ in range(_TRIES):
                drawn, covered, whole = _placed(items[index], random, height, width)
                left = np.bincount(instances[(instances >= 0) & ~covered], minlength=len(areas))
                area = int(covered.sum())
                if area >= max(_INSIDE * whole, 1) and (left >= _VISIBLE * np.array(areas)).all():
                    pixels[covered] = drawn[covered]
                    instances[covered] = len(chosen)
                    chosen.append(index)
                    areas.append(area)
                    break
        return Scene(np.rint(pixels).astype(np.uint8), instances, classes[chosen])

    def scenes(self, first: int, count: int) -> Iterator[Scene]:
        """Scenes ``first`` to ``first + count - 1``."""
        return (self.scene(number) for number in range(first, first + count))


def normalised(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pixels [B, H, W] as the nano hybrids read them: float32 [B, 1, H, W]."""
    ready: npt.NDArray[np.float32] = (pixels[:, None].astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return ready


def detection(split: str = "calibration") -> Iterator[tuple[npt.NDArray[np.float32], list[Target]]]:
    """Batches for ``--data resvit_calibrate.readers.scenes:detection``: 512 scenes to calibrate, 1000 to validate."""
    return _of_split(split, "detection")


def segmentation(split: str = "calibration") -> Iterator[tuple[npt.NDArray[np.float32], list[Target]]]:
    """Batches for ``--data resvit_calibrate.readers.scenes:segmentation``: as ``detection``, with masks."""
    return _of_split(split, "segmentation")


def detection_training() -> Iterator[tuple[npt.NDArray[np.float32], list[Target]]]:
    """Batches for ``--train-data resvit_calibrate.readers.scenes:detection_training``: 8000 training scenes."""
    return batches(Scenes("train"), _TRAINING, "detection")


def segmentation_training() -> Iterator[tuple[npt.NDArray[np.float32], list[Target]]]:
    """Batches for ``--train-data``, with masks."""
    return batches(Scenes("train"), _TRAINING, "segmentation")


def batches(source: Scenes, count: int, task: str) -> Iterator[tuple[npt.NDArray[np.float32], list[Target]]]:
    """The first ``count`` scenes of one size as float32 [B, 1, H, W], with boxes for ``detection``, else masks."""
    for first in range(0, count, _BATCH):
        some = list(source.scenes(first, min(_BATCH, count - first)))
        targets: list[Target] = [scene.boxes() if task == "detection" else scene.mask() for scene in some]
        yield normalised(np.stack([scene.pixels for scene in some])), targets


def _of_split(split: str, task: str) -> Iterator[tuple[npt.NDArray[np.float32], list[Target]]]:
    if split == "calibration":
        return batches(Scenes("train", seed=_NOT_TRAINED), _CALIBRATION, task)
    return batches(Scenes("test"), VALIDATION, task)


@functools.lru_cache(maxsize=2)
def _items(split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    return read_split(split)


def _background(random: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """A gradient between four corners with noise of a strength of its own: float32 [H, W] from 0 to 255."""
    corners = random.uniform(0, 140, (2, 2))
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    top, bottom = (row[0] * (1 - x) + row[1] * x for row in corners)
    noise = random.normal(0, random.uniform(2, 20), (height, width))
    held: npt.NDArray[np.float32] = np.clip(top * (1 - y) + bottom * y + noise, 0, 255).astype(np.float32)
    return held


def _placed(
    item: npt.NDArray[np.uint8], random: np.random.Generator, height: int, width: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], float]:
    """One item at a random place and scale, half of them mirrored.

    Gives its pixels [H, W], which of the scene's it covers, and how many it would cover in a scene without end.
    """
    edge = random.uniform(*_EDGES)
    top, left = random.uniform(-0.2 * edge, height - 0.8 * edge), random.uniform(-0.2 * edge, width - 0.8 * edge)
    if random.random() < 0.5:
        item = item[:, ::-1]
    side = len(item)
    # Where the centres of the scene's pixels lie in the item.
    y, x = ((np.arange(size) + 0.5 - start) * side / edge - 0.5 for size, start in ((height, top), (width, left)))
    drawn = _sampled(item.astype(np.float32), y, x)
    shape = _filled(item > _OPAQUE)
    covered = _sampled(shape.astype(np.float32), y, x) > 0.5
    return drawn, covered, float(shape.sum()) * (edge / side) ** 2


def _sampled(values: npt.NDArray[np.float32], y: npt.NDArray[Any], x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Bilinear values at rows ``y`` and columns ``x``; 0 outside."""
    padded = np.pad(values, 1)
    for axis, at in enumerate((y, x)):
        held = np.clip(at + 1, 0, padded.shape[axis] - 1)
        low = np.minimum(held.astype(np.int64), padded.shape[axis] - 2)
        part = (held - low).astype(np.float32)
        part = part[:, None] if axis == 0 else part
        padded = np.take(padded, low, axis) * (1 - part) + np.take(padded, low + 1, axis) * part
    return padded


def _filled(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Also what has pixels of the mask on all four sides: black buttons belong to a coat."""
    sides = [np.logical_or.accumulate(mask[flip], axis)[flip] for axis, flip in _FLIPS]
    filled: npt.NDArray[np.bool_] = mask | np.logical_and.reduce(sides)
    return filled


_ALL, _REVERSED = slice(None), slice(None, None, -1)
_FLIPS = ((0, (_ALL, _ALL)), (0, (_REVERSED, _ALL)), (1, (_ALL, _ALL)), (1, (_ALL, _REVERSED)))


def _extent(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the edges around a mask's pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
