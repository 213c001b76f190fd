"""A set of images out of many that can be read one by one, decoded by all cores while it streams."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import Batch, ImageSet, digest_of
from resvit_calibrate.images.pixels import BrokenImage, Look, Pixels
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import Geometry, Target, carried, require_known_classes
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.sizes import Size
from resvit_engines.progress import SILENT, Reporter

_T = TypeVar("_T")
_BROKEN_SHARE = 0.01
_BLOCK = 256


class _Prepared(NamedTuple):
    """One image as the network reads it."""

    number: int
    image: npt.NDArray[np.float32]
    target: Target | None
    geometry: Geometry


class IndexedImageSet(ImageSet):
    """The images number ``indices`` of ``pixels``, in this order.

    Opening digests every image and reads its header; a file that is no image is skipped at once, one that
    breaks while it is decoded is skipped then. Raises ``ResvitError`` when more than 1% are broken.
    """

    def __init__(
        self,
        pixels: Pixels,
        indices: Sequence[int] | npt.NDArray[np.int64],
        preprocess: Preprocess,
        reporter: Reporter = SILENT,
    ) -> None:
        self._pixels = pixels
        self._asked = len(indices)
        self._skipped: dict[int, str] = {}
        self.preprocess = resolved_for(preprocess, pixels.native_size)
        self.task = pixels.task
        self.class_names = pixels.class_names
        self.class_ids = pixels.class_ids
        self.num_classes = pixels.num_classes
        self._looks: dict[int, Look] = {}
        numbers = [int(index) for index in indices]
        pixels.fetch(numbers)
        found = _in_threads(pixels.look, numbers)
        for index, look in reporter.track(found, f"read {pixels.name}", len(numbers)):
            if isinstance(look, BrokenImage):
                self._skipped[index] = str(look)
            else:
                self._looks[index] = look
        self._require_whole()
        if self.task == "segmentation" and self._looks:
            classes = {pixels.title(index): look.classes for index, look in self._looks.items()}
            self.num_classes = require_known_classes(classes, pixels.num_classes, pixels.name)
        self._describe()

    def _describe(self) -> None:
        """Everything that follows from which images are in the set."""
        self.contents = tuple(look.content for look in self._looks.values())
        targets = () if self.task is None else tuple(look.target for look in self._looks.values())
        self.digest = digest_of(self.contents, self.labels, targets)
        self.converted = sum(look.colour != (self.preprocess.channels == 3) for look in self._looks.values())
        self.looks = tuple(self._looks.values())
        count, known = len(self), len(self._pixels)
        of = f"all {count:,}" if count == known else f"{count:,} of {known:,}"
        self.description = f"{of} images of {self._pixels.name}"

    def __len__(self) -> int:
        return len(self._alive())

    def _alive(self) -> list[int]:
        return [index for index in self._looks if index not in self._skipped]

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Labels int64 [N] in the order of ``batches``, or None."""
        return None if self._pixels.labels is None else self._pixels.labels[self._alive()]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Name the images that could not be read, each with the reason."""
        return tuple(f"{self._pixels.title(index)}: {why}" for index, why in sorted(self._skipped.items()))

    def without(self, contents: frozenset[bytes]) -> IndexedImageSet:
        """Leave out the images whose digest is in ``contents``."""
        kept = IndexedImageSet(self._pixels, (), self.preprocess)
        kept._asked, kept._skipped = self._asked, dict(self._skipped)
        kept._looks = {index: look for index, look in self._looks.items() if look.content not in contents}
        kept.num_classes = self.num_classes
        kept._describe()
        return kept

    def at(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> IndexedImageSet:
        """The images at these positions, in this order."""
        alive = self._alive()
        return self._only([alive[position] for position in positions])

    def _only(self, numbers: Sequence[int]) -> IndexedImageSet:
        chosen = IndexedImageSet(self._pixels, (), self.preprocess)
        chosen._asked = self._asked
        chosen._looks = {index: self._looks[index] for index in numbers}
        chosen.num_classes = self.num_classes
        chosen._describe()
        return chosen

    def image(self, index: int) -> npt.NDArray[np.uint8] | None:
        """Read one image: uint8 [H, W, 1 or 3]."""
        return self._read(self._alive()[index])

    def pictures(self, places: Sequence[int]) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Read several images, on all cores; None for one that breaks."""
        alive = self._alive()
        for _, picture in _in_threads(self._read, [alive[place] for place in places]):
            yield None if isinstance(picture, BrokenImage) else picture

    def target(self, index: int) -> Target | None:
        """What is in ``image(index)``, in that image's own pixels, or None."""
        number = self._alive()[index]
        height, width = self._read(number).shape[:2]
        return self._pixels.target(number, height, width, self._looks[number])

    @property
    def left_out(self) -> Mapping[int, str]:
        """The images that broke while they were decoded, by their place in ``contents``, each with the reason."""
        return {place: self._skipped[index] for place, index in enumerate(self._looks) if index in self._skipped}

    def leave_out(self, broken: Mapping[int, str]) -> None:
        """Take it that these images break; places that the set does not have are passed over."""
        numbers = list(self._looks)
        self._skipped |= {numbers[place]: reason for place, reason in broken.items() if place < len(numbers)}
        self._require_whole()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Stream all images in order; memory holds about two batches and the images being decoded."""
        return self.batches_behind(0, batch_size)

    def batches_behind(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Stream all images behind the first ``count``, which are not read."""
        if batch_size < 1:
            raise ResvitError(f"A batch size of {batch_size} cannot be used.", "Choose 1 or more.")
        ready: list[_Prepared] = []
        for index, image in _in_threads(self._prepared, self._alive()[count:], block=batch_size):
            if isinstance(image, BrokenImage):
                self._skipped[index] = str(image)
                self._require_whole()
                continue
            ready.append(image)
            if len(ready) == batch_size:
                yield self._batch(ready)
                ready = []
        if ready:
            yield self._batch(ready)

    def batches_in_sizes(self, sizes: Sequence[Size], batch_size: int) -> Iterator[Batch]:
        """Stream all images in order, batch by batch in another one of ``sizes``."""
        numbers, own = self._alive(), self.preprocess
        block = max(min(batch_size, len(numbers) // len(sizes)), 1)
        starts = range(0, len(numbers), block)
        parts = [(sizes[turn % len(sizes)], numbers[start : start + block]) for turn, start in enumerate(starts)]
        if len(parts) < len(sizes):
            parts = [(size, numbers) for size in sizes]
        for size, chosen in parts:
            part = self._only(chosen)
            # Images that had the usual size already were taken as they are: of another size they are made.
            resize = "stretch" if own.resize == "none" and size != own.size else own.resize
            part.preprocess = dataclasses.replace(own, size=size, resize=resize)
            yield from part.batches(batch_size)
            self._skipped.update(part._skipped)

    def _prepared(self, index: int) -> _Prepared:
        image = self._read(index)
        height, width = image.shape[:2]
        try:
            geometry = self.preprocess.geometry(height, width)
            found = self._pixels.target(index, height, width, self._looks[index])
            target = None if found is None else carried(found, geometry)
            return _Prepared(index, self.preprocess.apply(image), target, geometry)
        except ResvitError as error:
            raise ResvitError(f"{self._pixels.title(index)}: {error.problem}", error.fix) from error

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        """The image whose bytes were digested when the set was opened."""
        return self._pixels.read(index, self.preprocess.decoding, self._looks[index])

    def _batch(self, ready: list[_Prepared]) -> Batch:
        labels = self._pixels.labels
        targets = tuple(item.target for item in ready if item.target is not None)
        return Batch(
            np.stack([item.image for item in ready]),
            None if labels is None else labels[[item.number for item in ready]],
            targets or None,
            tuple(item.geometry for item in ready),
        )

    def _require_whole(self) -> None:
        if len(self._skipped) > _BROKEN_SHARE * self._asked:
            shown = "; ".join(self.skipped[:5])
            raise ResvitError(
                f"More than 1% of {self._asked} images of {self._pixels.name} cannot be read, at least "
                f"{len(self._skipped)}: {shown}.",
                "Replace or remove the broken files; a few are skipped, this many would make the result wrong.",
            )


def resolved_for(preprocess: Preprocess, native_size: tuple[int, int] | None) -> Preprocess:
    """Leave pixels exactly as they are where all images have the network's size already.

    A crop fraction below 1 would otherwise enlarge and cut even those; every other way of resizing leaves them alone.
    """
    cuts = preprocess.resize == "crop" and preprocess.crop_fraction < 1
    return dataclasses.replace(preprocess, resize="none") if cuts and native_size == preprocess.size else preprocess


def _in_threads(
    work: Callable[[int], _T], numbers: Sequence[int], block: int = _BLOCK
) -> Iterator[tuple[int, _T | BrokenImage]]:
    """Do ``work`` on every number, in order, a block at a time: Pillow and hashing leave Python's lock."""

    def attempt(number: int) -> _T | BrokenImage:
        try:
            return work(number)
        except BrokenImage as broken:
            return broken

    cores = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    block = max(block, 2 * cores)
    with ThreadPoolExecutor(max_workers=cores) as threads:
        for start in range(0, len(numbers), block):
            part = numbers[start : start + block]
            yield from zip(part, threads.map(attempt, part), strict=True)
