"""Images from the user's own loader: a Python callable that gives batches, preprocessed as in training."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.image_set import Batch, ImageSet, digest_of
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL, TargetOptions, require_known_classes
from resvit_calibrate.readers.user.batch import SHAPE, Item, items_of
from resvit_calibrate.readers.user.code import module_from
from resvit_calibrate.readers.user.kept_stream import KeptStream, first_item
from resvit_calibrate.readers.user.objects import (
    Kind,
    Peeked,
    batches_from,
    is_picture,
    item_of,
    kind_of,
    parts_of,
    peeked,
)
from resvit_calibrate.readers.user.pictures import DatasetPixels
from resvit_calibrate.readers.user.targeted import TargetedDataset, is_targeted
from resvit_calibrate.readers.user.torchvision_import import import_beside_torchvision
from resvit_engines.errors import ResvitError
from resvit_engines.outside import expanded, leads_to_file
from resvit_engines.progress import Reporter

Split = Literal["calibration", "validation"]
_PATTERN = re.compile(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
_ENDLESS = 5_000_000


def _kept(text: str, made: Any, most: int, reporter: Reporter) -> KeptStream:
    """The first pictures of a stream; of what can be gone through once, those that were kept the first time."""
    if not isinstance(made, Peeked):
        return KeptStream(text, made, most, reporter)
    kept = made.kept if isinstance(made.kept, KeptStream) else KeptStream(text, made, most, reporter)
    made.kept = kept
    return kept


class Factory:
    """A callable named by the user; ``splits`` tells whether it knows calibration from validation."""

    def __init__(self, text: str, function: Callable[..., Iterable[Any]], options: TargetOptions = AS_USUAL) -> None:
        self.text = text
        self.options = options
        self._function = function
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            parameters = ()  # type: ignore[assignment]  # a built-in without a signature takes no split
        self.splits = any(p.name == "split" or p.kind is p.VAR_KEYWORD for p in parameters)
        self._made: dict[Split, Any] = {}
        self.notes: tuple[str, ...] = ()
        """Which of several ways what it gave is read."""

    @property
    def name(self) -> str:
        """Its file or module and its own name, without a path."""
        return self.text.replace("\\", "/").rpartition("/")[2]

    def images(self, split: Split, preprocess: Preprocess) -> Iterator[Item]:
        """Call it and pass on one image at a time, with its label or target."""
        expected = (preprocess.channels, *preprocess.size)
        for batch in self._items(split):
            yield from items_of(self.text, batch, expected, self.options)

    def gives_pictures(self) -> bool:
        """Whether it gives pictures to be prepared here, and not the network's input.

        Raises ``ResvitError`` where it gives no images, and where one part is pictures and the other is not.
        """
        kinds = [kind_of(self.text, self._given(split)) for split in self._parts]
        shown = [self._shows(split, kind) for split, kind in zip(self._parts, kinds, strict=True)]
        if len(set(shown)) > 1:
            raise ResvitError(
                f"{self.text} gives pictures for one split, and the network's input for the other.",
                "Give both in one form: nobody could tell whether they went through the same.",
            )
        if not shown[0] and kinds[0] is not Kind.BATCHES:
            self.notes = (
                f"{self.name} gives {kinds[0].value} of ready arrays: they are taken as the network's input, and "
                "nothing is resized or normalised here",
            )
        return shown[0]

    def pictures(self, most: int, reporter: Reporter) -> tuple[DatasetPixels, DatasetPixels | None]:
        """The pictures of both parts; of each that is a stream, the first ``most``. Raises as ``gives_pictures``."""
        pools = []
        for split in self._parts:
            made = self._given(split)
            if kind_of(self.text, made) is Kind.STREAM:
                with self._explained():
                    made = _kept(self.text, made, most, reporter)
            pools.append(self._pool(self._named(split), made))
        return pools[0], pools[1] if len(pools) > 1 else None

    @property
    def _parts(self) -> tuple[Split, ...]:
        return ("calibration", "validation") if self.splits else ("calibration",)

    def _shows(self, split: Split, kind: Kind) -> bool:
        """Whether a part is pictures, by its first item."""
        made = self._given(split)
        if isinstance(made, Peeked):
            return made.pictures
        if kind is Kind.STREAM:
            with self._explained():
                item = first_item(self.text, made)
        elif kind is Kind.ITEMS:
            item = item_of(self.text, made, 0)
        else:
            return False
        return is_picture(parts_of(self.text, item, 0).image)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell what the user's own code raises as what it is."""
        try:
            yield
        except (ResvitError, MemoryError):
            raise
        except Exception as error:
            raise ResvitError(f"{self.text} failed: {type(error).__name__}: {error}", SHAPE) from error

    def _pool(self, name: str, made: Any) -> DatasetPixels:
        known = parts_of(self.text, item_of(self.text, made, 0), 0).known
        if is_targeted(known):
            return TargetedDataset(self.text, name, made, self.options)
        return DatasetPixels(self.text, name, made)

    def _named(self, split: Split) -> str:
        return f"{self.name} ({split})" if self.splits else self.name

    def _items(self, split: Split) -> Iterator[Any]:
        try:
            with self._explained():
                yield from batches_from(self.text, self._given(split))
        finally:
            if not hasattr(self._made.get(split), "__getitem__"):
                self._made.pop(split, None)  # what can be gone through once is asked for again

    def _given(self, split: Split) -> Any:
        """What the function returns, which is asked once for what can be gone through again."""
        if split not in self._made:
            with self._explained():
                self._made[split] = peeked(self._function(split=split) if self.splits else self._function())
        return self._made[split]


def is_factory_name(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:name`` or ``file.py:name``."""
    return _PATTERN.fullmatch(text) is not None


def factory_from(text: str, options: TargetOptions = AS_USUAL) -> Factory | None:
    """Import ``package.module:name`` or ``file.py:name``; None where ``text`` has not that form."""
    function = function_from(text, SHAPE)
    return None if function is None else Factory(text, function, options)


def function_from(text: str, wanted: str) -> Callable[..., Any] | None:
    """Import the function ``package.module:name`` or ``file.py:name``; None where ``text`` has not that form.

    Raises ``ResvitError`` where it can't be imported, or is no function: then with ``wanted``, what it should be.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    module, name = match["module"], match["name"]
    if module.endswith(".py") and not leads_to_file(expanded(module)):
        raise ResvitError(f"The file {module} does not exist.", "Check the path before the colon.")
    try:
        loaded = _imported(module)
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
        raise ResvitError(f"{text} is not a function: {module} {what}.", wanted)
    found: Callable[..., Any] = function
    return found


def _imported(place: str) -> ModuleType:
    """Import the user's module, which may import torchvision where that does not import by itself."""
    try:
        return module_from(place)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import_beside_torchvision("torchvision", "host")
        return module_from(place)


class _Seen(NamedTuple):
    """What must be the same each time that an image comes."""

    content: bytes
    label: int | None
    about: bytes


class StreamImageSet(ImageSet):
    """Images ``start`` to ``stop`` of what a factory gives, less those left out.

    It is read once when it is opened, to count and digest, and again for every pass; each pass is checked
    against the first, since a comparison needs the same images every time.
    """

    def __init__(self, factory: Factory, split: Split, preprocess: Preprocess, stop: int | None) -> None:
        self._factory = factory
        self._split: Split = split
        self.preprocess, self.factory, self.notes = preprocess, factory.name, factory.notes
        self._kept: dict[int, _Seen] = {}
        tasks: set[str | None] = set()
        self.lowest, self.highest = float("inf"), float("-inf")
        classes: dict[str, tuple[int, ...]] = {}
        for position, item in enumerate(factory.images(split, preprocess)):
            if position == stop:
                break
            if position == _ENDLESS:
                raise ResvitError(f"{factory.text} gave {_ENDLESS} images and goes on.", "Let it end.")
            self._kept[position] = _seen(item)
            tasks.add(item.task)
            self.lowest = min(self.lowest, float(item.image.min()))
            self.highest = max(self.highest, float(item.image.max()))
            if item.target is not None:
                classes[f"image {position}"] = item.classes
        if len(tasks) > 1:
            told = ", ".join(sorted(task for task in tasks if task))
            what = f"labels or targets for some images only ({told})" if None in tasks else f"targets for {told}"
            raise ResvitError(f"{factory.text} gave {what}.", SHAPE)
        self.task = next(iter(tasks), None)
        self.num_classes = require_known_classes(classes, factory.options.classes, factory.text) if classes else None
        self._describe()

    def _describe(self) -> None:
        self.contents = tuple(seen.content for seen in self._kept.values())
        self.digest = digest_of(self.contents, self.labels, [seen.about for seen in self._kept.values()])
        self.description = f"{len(self)} images of {self.factory} ({self._split})"

    def _only(self, kept: dict[int, _Seen], split: Split) -> StreamImageSet:
        other = StreamImageSet.__new__(StreamImageSet)
        other._factory, other._split, other.preprocess, other._kept = self._factory, split, self.preprocess, kept
        other.factory = self.factory
        other.notes = self.notes
        other.lowest, other.highest = self.lowest, self.highest
        other.task, other.num_classes = self.task, self.num_classes
        other._describe()
        return other

    def without(self, contents: frozenset[bytes]) -> StreamImageSet:
        """Leave out the images whose digest is in ``contents``."""
        kept = {position: found for position, found in self._kept.items() if found.content not in contents}
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
        found = [seen.label for seen in self._kept.values() if seen.label is not None]
        return np.array(found, np.int64) if found else None

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Call the factory again and stream its images, ``batch_size`` at a time.

        Raises ``ResvitError`` where an image is not the one that was there when the set was opened.
        """
        if batch_size < 1:
            raise ResvitError(f"A batch size of {batch_size} cannot be used.", "Choose 1 or more.")
        last = max(self._kept, default=-1)
        ready: list[Item] = []
        position = -1
        for position, item in enumerate(self._factory.images(self._split, self.preprocess)):
            if position > last:
                break
            if position not in self._kept:
                continue
            if _seen(item) != self._kept[position]:
                raise self._changed(f"image {position} differs from the one that it gave before")
            # A loader may fill the same buffer again.
            kept = {name: value.copy() for name, value in item.inputs.items()}
            ready.append(dataclasses.replace(item, image=item.image.copy(), inputs=kept))
            if len(ready) == batch_size:
                yield batch_of(ready)
                ready = []
        if position < last:
            raise self._changed(f"it ended after {position + 1} images where it gave {last + 1} before")
        if ready:
            yield batch_of(ready)

    def _changed(self, how: str) -> ResvitError:
        return ResvitError(
            f"{self._factory.text} does not give the same images each time: {how}.",
            "Switch off its shuffling and random augmentation: both networks must see the same images.",
        )


def _seen(item: Item) -> _Seen:
    return _Seen(item.content, item.label, item.about)


def batch_of(items: Sequence[Item]) -> Batch:
    """Put images together that all have a label, all have a target, or all have neither."""
    labels = [item.label for item in items if item.label is not None]
    targets = tuple(item.target for item in items if item.target is not None)
    geometry = tuple(item.geometry for item in items if item.geometry is not None)
    return Batch(
        np.stack([item.image for item in items]),
        np.array(labels, np.int64) if labels else None,
        targets or None,
        geometry if len(geometry) == len(items) else None,
        {name: np.stack([item.inputs[name] for item in items]) for name in items[0].inputs},
    )


def items_in(batch: Batch) -> Iterator[Item]:
    """The images of a batch one by one, each with what is known of it."""
    for index, image in enumerate(batch.images):
        yield Item(
            image,
            None if batch.labels is None else int(batch.labels[index]),
            None if batch.targets is None else batch.targets[index],
            None if batch.geometry is None else batch.geometry[index],
            {name: value[index] for name, value in batch.inputs.items()},
        )


def in_batches_of(size: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same images in batches of ``size``, the last one perhaps smaller."""
    waiting: list[Item] = []
    for batch in batches:
        if not waiting and len(batch.images) == size:
            yield batch
            continue
        for item in items_in(batch):
            waiting.append(item)
            if len(waiting) == size:
                yield batch_of(waiting)
                waiting = []
    if waiting:
        yield batch_of(waiting)
