"""A network that answers much better when its images are normalised as others usually are was fed wrongly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resvit_calibrate.answers.classes import INPUT
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.sampling import stratified
from resvit_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Task
    from resvit_calibrate.gate.comparison import Comparison
    from resvit_calibrate.images.image_set import ImageSet
    from resvit_calibrate.runtime.runner import Runner
    from resvit_calibrate.runtime.sessions import Arrays

FEW = 64
"""Images that are asked about: enough to tell a network that knows from one that guesses."""
_FIRST = 16
"""Of a network that is fed rightly, no other normalisation is better on so many: the rest need not be asked about."""
_GAIN = 10.0
"""Hundredths of the metric that another normalisation must win at least."""
_CONFIDENCE = 0.999
"""Of the interval of that gain: nine others are tried, and chance must win with none of them."""

_PIXELS = 1.0 / 255.0
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CAFFE = ((103.939 / 255, 116.779 / 255, 123.68 / 255), (_PIXELS,) * 3)
_PLAIN = ((0.5, 0.5), (0.0, 1.0), (0.0, _PIXELS))
"""Mean and standard deviation of all channels: -1 to 1, 0 to 1, and 0 to 255."""

_NUMBERS = ("what", "unit", "gain", "images")


@dataclass(frozen=True)
class Normalization:
    """What is subtracted from pixels of 0 to 1, what they are divided by, and the order of the channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str

    @classmethod
    def of(cls, preprocess: Preprocess) -> Normalization:
        """That of a preprocessing."""
        return cls(preprocess.mean, preprocess.std, preprocess.channel_order)

    def options(self) -> str:
        """The command line's options that ask for it."""
        shown = {"mean": self.mean, "std": self.std}
        pairs = [f"{name}={','.join(f'{value:.6g}' for value in values)}" for name, values in shown.items()]
        order = [f"channel_order={self.channel_order}"] if len(self.mean) == 3 else []
        return " ".join(f"--preprocess {pair}" for pair in pairs + order)


@dataclass(frozen=True)
class OtherPreprocess:
    """The normalisation under which the network does best: by ``gain`` ``unit`` of its metric, on ``images`` images."""

    normalization: Normalization
    what: str
    unit: str
    gain: float
    images: int

    @property
    def words(self) -> str:
        """What was found and what to do, as the end of a sentence."""
        return (
            f"the float network's {self.what} is {self.gain:.1f} {self.unit} better on {self.images} of these images "
            f"with {self.normalization.options()}; what is measured on input that the network was not trained with "
            "proves nothing: give these options if it was trained so, or correct the data"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        kept = {"mean": list(self.normalization.mean), "std": list(self.normalization.std)}
        order = self.normalization.channel_order
        return {**kept, "channel_order": order, **{name: getattr(self, name) for name in _NUMBERS}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OtherPreprocess:
        """Read what ``to_json`` wrote."""
        mean, std = (tuple(document[name]) for name in ("mean", "std"))
        kept = {name: document[name] for name in _NUMBERS}
        return cls(Normalization(mean, std, document["channel_order"]), **kept)


def usual_normalizations(channels: int) -> tuple[Normalization, ...]:
    """Those that trainers commonly use: ImageNet's, -1 to 1, 0 to 1, 0 to 255, in both orders, and Caffe's."""
    plain = [((mean,) * channels, (std,) * channels) for mean, std in _PLAIN]
    if channels != 3:
        return tuple(Normalization(*values, "rgb") for values in plain)
    both = itertools.product((_IMAGENET, *plain), ("rgb", "bgr"))
    return (*(Normalization(*values, order) for values, order in both), Normalization(*_CAFFE, "bgr"))


def other_preprocess(
    task: Task,
    runner: Runner,
    images: ImageSet,
    batch_size: int,
    stated: Preprocess | None = None,
    reporter: Reporter = SILENT,
) -> OtherPreprocess | None:
    """The usual normalisation under which a float network does much better than under its own; None where none is.

    ``stated`` is what the network itself says of its input, which the images may not go through; it is tried too.
    ``_FIRST`` images, every class its share, are asked about under each, and ``FEW`` where that was better. The best
    must be better by 10 hundredths of the task's metric, and surely so at 99.9% confidence. None also where nothing is
    known of the images, where somebody else's code prepares them, and where no metric says what is better.
    """
    own = Normalization.of(images.preprocess)
    channels = len(own.mean)
    if images.task is None or task.name == "other" or channels not in (1, 3) or not isinstance(images, IndexedImageSet):
        return None

    def some(count: int) -> IndexedImageSet:
        return images.at(np.sort(stratified(images.labels, np.arange(len(images)), count, 0)))

    def compared(other: Normalization, asked: IndexedImageSet, before: Any) -> Comparison:
        return task.compare(before, task.answers(_fed_with(runner, own, other), asked, batch_size), _CONFIDENCE)

    first = some(_FIRST)
    usual = (*([Normalization.of(stated)] if stated else ()), *usual_normalizations(channels))
    others = [item for item in usual if not _same(item, own)]
    before = task.answers(runner, first, batch_size)
    tried = reporter.track(others, "try usual normalisations", len(others))
    better = [item for item in tried if _better(compared(item, first, before))]
    if not better:
        return None
    few = some(FEW)
    before = task.answers(runner, few, batch_size)
    found = [(item, compared(item, few, before)) for item in better]
    sure = [(item, it) for item, it in found if _better(it) and -it.drop >= _GAIN and it.interval[1] < 0.0]
    if not sure:
        return None
    best, it = min(sure, key=lambda pair: pair[1].drop)
    return OtherPreprocess(best, it.what, it.unit, float(-it.drop), it.images)


def _better(comparison: Comparison) -> bool:
    return not comparison.not_finite and comparison.drop < 0.0


def _same(one: Normalization, other: Normalization) -> bool:
    values = (one.mean + one.std, other.mean + other.std)
    return one.channel_order == other.channel_order and np.allclose(*values, atol=2e-3)


def _fed_with(runner: Runner, own: Normalization, other: Normalization) -> Runner:
    """The network, its images normalised otherwise: from what they were normalised to, which loses nothing."""
    mean, std, to_mean, to_std = (
        np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (own.mean, own.std, other.mean, other.std)
    )

    def answer(arrays: Arrays) -> Arrays:
        pixels = arrays[INPUT] * std + mean
        if own.channel_order != other.channel_order:
            pixels = pixels[:, ::-1]
        return runner({**arrays, INPUT: np.ascontiguousarray((pixels - to_mean) / to_std)})

    return answer
