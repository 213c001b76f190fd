"""Images from the user's own loader: a Python callable that gives batches, preprocessed as in training."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from resvit_calibrate.image_set import Batch, ImageSet, digest_of
from resvit_calibrate.preprocess import Preprocess
from resvit_engines.errors import ResvitError

Split = Literal["calibration", "validation"]
_PATTERN = re.compile(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
_SHAPE = "Let it return an iterable of (images, labels): float32 [B, C, H, W] as the network reads them, and int [B]."
_ENDLESS = 5_000_000


class Factory:
    """A callable named by the user; ``splits`` tells whether it knows calibration from validation."""

    def __init__(self, text: str, function: Callable[..., Iterable[Any]]) -> None:
        self.text = text
        self._function = function
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            parameters = ()  # type: ignore[assignment]  # a built-in without a signature takes no split
        self.splits = any(p.name == "split" or p.kind is p.VAR_KEYWORD for p in parameters)

    def images(self, split: Split, preprocess: Preprocess) -> Iterator[tuple[npt.NDArray[np.float32], int | None]]:
        """Call it and pass on one image at a time: float32 [C, H, W] and its label."""
        expected = (preprocess.channels, *preprocess.size)
        for item in self._items(split):
            images, labels = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
            yield from _checked(self.text, images, labels, expected)

    def _items(self, split: Split) -> Iterator[Any]:
        try:
            yield from self._function(split=split) if self.splits else self._function()
        except (ResvitError, MemoryError):
            raise
        except Exception as error:
            raise ResvitError(f"{self.text} failed: {type(error).__name__}: {error}", _SHAPE) from error


def factory_from(text: str) -> Factory | None:
    """Import ``package.module:name`` or ``file.py:name``; None where ``text`` has not that form."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    module, name = match["module"], match["name"]
    try:
        loaded = (
            _module_from_file(Path(module).expanduser()) if module.endswith(".py") else importlib.import_module(module)
        )
    except ResvitError:
        raise
    except Exception as error:
        raise ResvitError(
            f"{module} cannot be imported: {type(error).__name__}: {error}",
            "Name a file as ./file.py:factory, or install the package that the module is in.",
        ) from error
    function = getattr(loaded, name, None)
    if not callable(function):
        what = "has nothing of that name" if function is None else f"has a {type(function).__name__} there"
        raise ResvitError(f"{text} is not a function: {module} {what}.", _SHAPE)
    return Factory(text, function)


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise ResvitError(f"The file {path} does not exist.", "Check the path in --data.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ResvitError(f"{path} cannot be imported.", "Check that it is a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(
    text: str, images: Any, labels: Any, expected: tuple[int, ...]
) -> Iterator[tuple[npt.NDArray[np.float32], int | None]]:
    images = np.asarray(images)
    if images.dtype.kind != "f":
        raise ResvitError(f"{text} gave images of type {images.dtype}, not preprocessed floats.", _SHAPE)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ResvitError(
            f"{text} gave images of shape {list(images.shape)}; the network reads "
            f"[B, {', '.join(map(str, expected))}].",
            _SHAPE,
        )
    images = np.ascontiguousarray(images, dtype=np.float32)
    if not np.isfinite(images).all():
        raise ResvitError(f"{text} gave images that hold NaN or infinity.", "Check its preprocessing.")
    if labels is None:
        yield from ((image, None) for image in images)
        return
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise ResvitError(
            f"{text} gave labels of type {labels.dtype} and shape {list(labels.shape)} for {len(images)} images; "
            "they must be class numbers from 0.",
            _SHAPE,
        )
    yield from zip(images, map(int, labels), strict=True)


class StreamImageSet(ImageSet):
    """Images ``start`` to ``stop`` of what a factory gives, less those left out.

    It is read once when it is opened, to count and digest, and again for every pass; each pass is checked
    against the first, since a comparison needs the same images every time.
    """

    def __init__(self, factory: Factory, split: Split, preprocess: Preprocess, stop: int | None) -> None:
        self._factory = factory
        self._split: Split = split
        self.preprocess = preprocess
        self._kept: dict[int, tuple[bytes, int | None]] = {}
        for position, (image, label) in enumerate(factory.images(split, preprocess)):
            if position == stop:
                break
            if position == _ENDLESS:
                raise ResvitError(f"{factory.text} gave {_ENDLESS} images and goes on.", "Let it end.")
            self._kept[position] = (hashlib.sha256(image.tobytes()).digest(), label)
        if len({label is None for _, label in self._kept.values()}) == 2:
            raise ResvitError(f"{factory.text} gave labels for some images only.", _SHAPE)
        self._describe()

    def _describe(self) -> None:
        self.contents = tuple(content for content, _ in self._kept.values())
        self.digest = digest_of(self.contents, self.labels)
        self.description = f"{len(self)} images of {self._factory.text.rpartition('/')[2]} ({self._split})"

    def _only(self, kept: dict[int, tuple[bytes, int | None]], split: Split) -> StreamImageSet:
        other = StreamImageSet.__new__(StreamImageSet)
        other._factory, other._split, other.preprocess, other._kept = self._factory, split, self.preprocess, kept
        other._describe()
        return other

    def without(self, contents: frozenset[bytes]) -> StreamImageSet:
        """Leave out the images whose digest is in ``contents``."""
        kept = {position: found for position, found in self._kept.items() if found[0] not in contents}
        return self._only(kept, self._split)

    def at(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> StreamImageSet:
        """The images at these positions, in the order in which the factory gives them."""
        items = list(self._kept.items())
        return self._only(dict(items[position] for position in sorted(positions)), self._split)

    def divided(self, first: int, second: int) -> tuple[StreamImageSet, StreamImageSet]:
        """The first ``first`` images for calibration, the next ``second`` for validation."""
        items = list(self._kept.items())
        return (
            self._only(dict(items[:first]), "calibration"),
            self._only(dict(items[first : first + second]), "validation"),
        )

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Labels int64 [N] in the order of ``batches``, or None."""
        found = [label for _, label in self._kept.values() if label is not None]
        return np.array(found, np.int64) if found else None

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Call the factory again and stream its images, ``batch_size`` at a time.

        Raises ``ResvitError`` where an image is not the one that was there when the set was opened.
        """
        if batch_size < 1:
            raise ResvitError(f"A batch size of {batch_size} cannot be used.", "Choose 1 or more.")
        last = max(self._kept, default=-1)
        images: list[npt.NDArray[np.float32]] = []
        labels: list[int | None] = []
        position = -1
        for position, (image, label) in enumerate(self._factory.images(self._split, self.preprocess)):
            if position > last:
                break
            if position not in self._kept:
                continue
            if (hashlib.sha256(image.tobytes()).digest(), label) != self._kept[position]:
                raise self._changed(f"image {position} differs from the one that it gave before")
            # A loader may fill the same buffer again.
            images.append(image.copy())
            labels.append(label)
            if len(images) == batch_size:
                yield _batch(images, labels)
                images, labels = [], []
        if position < last:
            raise self._changed(f"it ended after {position + 1} images where it gave {last + 1} before")
        if images:
            yield _batch(images, labels)

    def _changed(self, how: str) -> ResvitError:
        return ResvitError(
            f"{self._factory.text} does not give the same images each time: {how}.",
            "Switch off its shuffling and random augmentation: both networks must see the same images.",
        )


def _batch(images: list[npt.NDArray[np.float32]], labels: list[int | None]) -> Batch:
    numbers = [label for label in labels if label is not None]
    return Batch(np.stack(images), np.array(numbers, np.int64) if numbers else None)
