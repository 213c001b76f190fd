"""Images to calibrate with and images to validate on, from whatever the user has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resvit_calibrate.data.first_look import open_sources, require_classes, require_usable
from resvit_calibrate.data.naming import KINDS, is_factory, require_source
from resvit_calibrate.data.numbering import numbered_like, same_numbering, with_classes
from resvit_calibrate.data.pixel_doubts import require_readable, with_white
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.data.training_images import TrainingImages
from resvit_calibrate.images.class_list import ClassList
from resvit_calibrate.images.image_set import Batch, DataSpec, ImageSet
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.pixels import Pixels
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.sampling import divide, stratified
from resvit_calibrate.images.targets import AS_USUAL, TargetOptions
from resvit_calibrate.readers.user.loader import Factory, StreamImageSet
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter

_BELOW_ZERO = 0.2
"""A black pixel below this, normalised, tells values that are normalised from those that are not."""

__all__ = [
    "Batch",
    "DataSpec",
    "ImageSet",
    "Preprocess",
    "TargetOptions",
    "TrainingImages",
    "is_factory",
    "open_image_sets",
    "open_sources",
    "open_training_images",
    "require_source",
    "require_usable",
]


def open_image_sets(
    spec: DataSpec,
    preprocess: Preprocess,
    reporter: Reporter = SILENT,
    sources: tuple[Pools | Factory, Pools | Factory] | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Open the calibration and the validation set: seeded, stratified by class, and without a common image.

    An image whose bytes are on both sides is dropped from calibration. Warns once where images are fewer
    than asked for, are broken, or are not in the network's colours. Raises ``ResvitError`` where the data is
    missing or unusable, and where validation has neither labels nor targets, or labels of only one class.
    Where it cannot be told how pixels are to be read, ``doubt`` of the sets says so. ``sources`` are what
    ``open_sources`` opened already; they serve once.
    """
    calibration, validation = _opened(spec, sources or open_sources(spec, reporter), preprocess, reporter)
    _require(validation, "validation")
    _require(calibration, "calibration")
    for note in dict.fromkeys(_about_factory(calibration) + _about_factory(validation)):
        reporter.warn(note)
    with_white((calibration, validation), reporter)
    if validation.task is None and spec.unlabelled:
        reporter.warn(
            f"nothing is known of the validation images ({validation.description}): accuracy cannot be judged; the "
            "verdict goes by --metric, or without one by how near the outputs and their decisions stay to the float "
            "network's"
        )
    elif validation.task in (None, "classification"):
        require_classes(validation.labels, validation.description, spec, validation.class_names)
    if calibration.task == validation.task == "segmentation":
        # Where only the masks themselves show how many classes there are, one side may lack the last.
        most = max(calibration.num_classes or 0, validation.num_classes or 0)
        calibration.num_classes = validation.num_classes = most or None
    if validation.task == "segmentation" and (validation.num_classes or 0) < 2:
        raise ResvitError(
            f"All labelled pixels of the masks are of one class ({validation.description}).",
            "A mask's value is its class, and 255 means `unlabelled`: write 0 and 1 for background and object, or give "
            "the task's option `classes` if these images really show only one.",
        )
    found = len(calibration)
    calibration = calibration.without(frozenset(validation.contents))
    validation.shared = found - len(calibration)
    if validation.shared:
        reporter.warn(
            f"{validation.shared} of {found} calibration images are also among the validation images "
            "and were left out of calibration"
        )
    if not len(calibration):
        raise ResvitError(
            "Every calibration image is also a validation image.",
            "Give other images for one of the two, or leave validation_data out to have the data divided.",
        )
    _warn(spec, calibration, validation, reporter)
    for images, what in ((calibration, "calibration"), (validation, "validation")):
        _say_what_contradicts(images, what, reporter)
    doubt = require_readable(spec, preprocess, calibration, validation, reporter)
    calibration.doubt = validation.doubt = doubt
    return calibration, validation


def _opened(
    spec: DataSpec, sources: tuple[Pools | Factory, Pools | Factory], preprocess: Preprocess, reporter: Reporter
) -> tuple[ImageSet, ImageSet]:
    first = _numbered(sources[0], spec)
    if sources[1] is sources[0]:
        if isinstance(first, Factory):
            return _streams(first, spec, preprocess)
        if first.validation is None:
            return _divided(first.calibration, spec, preprocess, reporter)
        second: Pools | Factory = first
    else:
        second = _numbered(sources[1], spec)
        if isinstance(first, Pools) and isinstance(second, Pools):
            pair = same_numbering(first.calibration, second.validation or second.calibration, reporter)
            first, second = (Pools(pool, None) for pool in pair)
    calibration: ImageSet
    validation: ImageSet
    if isinstance(first, Factory):
        calibration = StreamImageSet(first, "calibration", preprocess, spec.calibration_images)
    else:
        calibration = _drawn(first.calibration, spec.calibration_images, spec, preprocess, reporter)
    if isinstance(second, Factory):
        validation = StreamImageSet(second, "validation", preprocess, spec.validation_images)
    else:
        pool = second.validation or second.calibration
        validation = _drawn(pool, spec.validation_images, spec, preprocess, reporter)
    return calibration, validation


def _numbered(source: Pools | Factory, spec: DataSpec) -> Pools | Factory:
    """The source with the network's class numbers, where they are known, and the same in both parts."""
    if isinstance(source, Factory):
        return source
    train = with_classes(source.calibration, spec.classes, spec.known_classes)
    if source.validation is None:
        return Pools(train, None)
    return Pools(*same_numbering(train, with_classes(source.validation, spec.classes, spec.known_classes)))


def open_training_images(
    data: str,
    avoid: ImageSet,
    limit: int,
    seed: int,
    preprocess: Preprocess,
    reporter: Reporter = SILENT,
    reading: TargetOptions = AS_USUAL,
    classes: ClassList | None = None,
    known_classes: ClassList | None = None,
    objects: Mapping[str, Any] | None = None,
) -> TrainingImages:
    """Open at most ``limit`` images to train on: none of them is also in ``avoid``, the validation images.

    ``data`` is of the kinds that ``DataSpec`` has; of one with two parts, the first is taken. Labels may be
    missing. ``objects`` are data sets in memory, by name. Classes are numbered as in ``avoid``, which was opened with
    the same class lists. Raises ``ResvitError`` where the data is missing or unusable, is all in ``avoid``, or has
    classes that ``avoid`` does not know.
    """
    source = open_source(data, reading, objects, reporter, limit)
    images: IndexedImageSet | StreamImageSet
    if isinstance(source, Factory):
        images = StreamImageSet(source, "calibration", preprocess, limit)
    else:
        pool = numbered_like(with_classes(source.calibration, classes, known_classes), avoid)
        _tell(pool, reporter)
        chosen = stratified(pool.labels, np.arange(len(pool), dtype=np.int64), limit, seed)
        images = IndexedImageSet(pool, chosen, preprocess, reporter)
    found = len(images)
    _require(images, "training")
    with_white((images,), reporter)
    images = images.without(frozenset(avoid.contents))
    if not len(images):
        raise ResvitError(
            "Every training image is also a validation image.",
            "Give other images for training, or other ones with --validation-data.",
        )
    if len(images) < found:
        reporter.warn(
            f"{found - len(images)} of {found} training images are also among the validation images and were left out"
        )
    for name in images.skipped:
        reporter.warn(f"skipped a broken training image: {name}")
    return TrainingImages(images)


def _divided(pool: Pixels, spec: DataSpec, preprocess: Preprocess, reporter: Reporter) -> tuple[ImageSet, ImageSet]:
    """Take both sets out of one pool."""
    everything = np.arange(len(pool), dtype=np.int64)
    first, second = divide(len(pool), spec.calibration_images, spec.validation_images)
    chosen = stratified(pool.labels, everything, first, spec.seed)
    left = np.setdiff1d(everything, chosen)
    others = left if second == len(left) else stratified(pool.labels, left, second, spec.seed)
    _tell(pool, reporter)
    return (
        IndexedImageSet(pool, chosen, preprocess, reporter),
        IndexedImageSet(pool, others, preprocess, reporter),
    )


def _drawn(pool: Pixels, count: int | None, spec: DataSpec, preprocess: Preprocess, reporter: Reporter) -> ImageSet:
    """Take ``count`` images, or all of them in their own order."""
    _tell(pool, reporter)
    everything = np.arange(len(pool), dtype=np.int64)
    chosen = everything if count is None else stratified(pool.labels, everything, count, spec.seed)
    return IndexedImageSet(pool, chosen, preprocess, reporter)


def _streams(factory: Factory, spec: DataSpec, preprocess: Preprocess) -> tuple[ImageSet, ImageSet]:
    if factory.splits:
        return (
            StreamImageSet(factory, "calibration", preprocess, spec.calibration_images),
            StreamImageSet(factory, "validation", preprocess, spec.validation_images),
        )
    wanted = None if spec.validation_images is None else spec.calibration_images + spec.validation_images
    whole = StreamImageSet(factory, "calibration", preprocess, wanted)
    return whole.divided(*divide(len(whole), spec.calibration_images, spec.validation_images))


def _about_factory(images: ImageSet) -> tuple[str, ...]:
    """How a data set of somebody else's is read, and where it seems to lack the network's normalisation."""
    if not isinstance(images, StreamImageSet):
        return ()
    mean, std = images.preprocess.mean, images.preprocess.std
    low = min(-one / deviation for one, deviation in zip(mean, std, strict=False))
    if low < -_BELOW_ZERO and images.lowest >= 0:
        raw = (
            f"the values of {images.factory} lie from {images.lowest:g} to {images.highest:g}, and none is below 0 as "
            f"the network's own mean ({_numbers(mean)}) and std ({_numbers(std)}) would have it, from {low:.3g} on: "
            "normalise them there as in training, or give the pictures themselves"
        )
        return (*images.notes, raw)
    return images.notes


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def _tell(pool: Pixels, reporter: Reporter) -> None:
    for note in pool.notes:
        reporter.warn(note)


def _require(images: ImageSet, what: str) -> None:
    if not len(images):
        raise ResvitError(f"There is no image for {what} ({images.description}).", KINDS)


def _say_what_contradicts(images: ImageSet, what: str, reporter: Reporter) -> None:
    """Say how many of the same pictures have different classes: one of each is wrong."""
    labels = images.labels
    if labels is None or len(labels) != len(images.contents):
        return
    held: dict[bytes, set[int]] = {}
    for content, label in zip(images.contents, labels.tolist(), strict=True):
        held.setdefault(content, set()).add(label)
    several = sum(len(classes) > 1 for classes in held.values())
    if several:
        reporter.warn(
            f"{several} {what} images are there more than once, under different classes: one of each is wrong"
        )


def _warn(spec: DataSpec, calibration: ImageSet, validation: ImageSet, reporter: Reporter) -> None:
    """Say what differs from what was asked for."""
    wanted = ((calibration, spec.calibration_images), (validation, spec.validation_images))
    for (images, asked), what in zip(wanted, ("calibration", "validation"), strict=True):
        if asked is not None and len(images) < asked:
            reporter.warn(f"{asked} {what} images were asked for, {len(images)} are used: there are no more")
        for name in images.skipped:
            reporter.warn(f"skipped a broken {what} image: {name}")
    converted = calibration.converted + validation.converted
    if converted:
        total = len(calibration) + len(validation)
        kinds = ("grey", "colour") if calibration.preprocess.channels == 3 else ("colour", "grey")
        reporter.warn(f"{converted} of {total} images are {kinds[0]} and are converted to {kinds[1]}")
