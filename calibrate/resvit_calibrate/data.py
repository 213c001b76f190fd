"""Images to calibrate with and images to validate on, from whatever the user has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resvit_calibrate import fashion_mnist
from resvit_calibrate.choose import divide, stratified
from resvit_calibrate.factories import Factory, StreamImageSet, factory_from
from resvit_calibrate.folders import pixels_from_folder, shared_class_names, split_folders
from resvit_calibrate.image_set import Batch, DataSpec, ImageSet
from resvit_calibrate.indexed import IndexedImageSet
from resvit_calibrate.npz import pixels_from_npz
from resvit_calibrate.pixels import ArrayPixels, Pixels
from resvit_calibrate.preprocess import Preprocess
from resvit_calibrate.training import TrainingImages
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter

__all__ = [
    "Batch",
    "DataSpec",
    "ImageSet",
    "Preprocess",
    "TrainingImages",
    "open_image_sets",
    "open_training_images",
    "require_source",
]

_KINDS = "Give `fashion-mnist`, a folder of class folders, an .npz file, or file.py:factory."


@dataclass(frozen=True)
class _Pools:
    """Where images can be taken from; ``validation`` is None where both sides share one pool."""

    calibration: Pixels
    validation: Pixels | None


def open_image_sets(spec: DataSpec, preprocess: Preprocess, reporter: Reporter = SILENT) -> tuple[ImageSet, ImageSet]:
    """Open the calibration and the validation set: seeded, stratified by class, and without a common image.

    An image whose bytes are on both sides is dropped from calibration. Warns once where images are fewer
    than asked for, are broken, or are not in the network's colours. Raises ``ResvitError`` where the data is
    missing or unusable, and where validation has no labels or only one class.
    """
    calibration, validation = _opened(spec, preprocess, reporter)
    _require(validation, "validation")
    _require(calibration, "calibration")
    _require_classes(validation)
    found = len(calibration)
    calibration = calibration.without(frozenset(validation.contents))
    if len(calibration) < found:
        reporter.warn(
            f"{found - len(calibration)} of {found} calibration images are also among the validation images "
            "and were left out of calibration"
        )
    if not len(calibration):
        raise ResvitError(
            "Every calibration image is also a validation image.",
            "Give other images for one of the two, or leave validation_data out to have the data divided.",
        )
    _warn(spec, calibration, validation, reporter)
    return calibration, validation


def _opened(spec: DataSpec, preprocess: Preprocess, reporter: Reporter) -> tuple[ImageSet, ImageSet]:
    first = _source(spec.data)
    if spec.validation_data is None or _same(spec.data, spec.validation_data):
        if isinstance(first, Factory):
            return _streams(first, spec, preprocess)
        if first.validation is None:
            return _divided(first.calibration, spec, preprocess, reporter)
        second: _Pools | Factory = first
    else:
        second = _source(spec.validation_data)
        if isinstance(first, _Pools) and isinstance(second, _Pools):
            second = _renumbered(spec.data, spec.validation_data, second, reporter)
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


def open_training_images(
    data: str, avoid: ImageSet, limit: int, seed: int, preprocess: Preprocess, reporter: Reporter = SILENT
) -> TrainingImages:
    """Open at most ``limit`` images to train on: none of them is also in ``avoid``, the validation images.

    ``data`` is of the kinds that ``DataSpec`` has; of one with two parts, the first is taken. Labels may be
    missing. Raises ``ResvitError`` where the data is missing or unusable, or is all in ``avoid``.
    """
    source = _source(data)
    images: IndexedImageSet | StreamImageSet
    if isinstance(source, Factory):
        images = StreamImageSet(source, "calibration", preprocess, limit)
    else:
        pool = source.calibration
        _tell(pool, reporter)
        chosen = stratified(pool.labels, np.arange(len(pool), dtype=np.int64), limit, seed)
        images = IndexedImageSet(pool, chosen, preprocess, reporter)
    found = len(images)
    _require(images, "training")
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


def require_source(data: str) -> None:
    """Refuse at once, without reading any image, what names no data: so that no long work is done for nothing.

    Raises ``ResvitError`` for a path that does not exist and is no factory's name.
    """
    if data != "fashion-mnist" and _existing(data) is None and ":" not in data:
        raise ResvitError(f"The data {data!r} does not exist.", _KINDS)


def _source(data: str) -> _Pools | Factory:
    """Recognise what the user named."""
    if data == "fashion-mnist":
        train, test = (
            ArrayPixels(f"fashion-mnist ({split})", *fashion_mnist.read_split(split), fashion_mnist.CLASS_NAMES)
            for split in fashion_mnist.SPLITS
        )
        return _Pools(train, test)
    path = _existing(data)
    if path is not None and path.is_dir():
        return _folder_pools(path)
    if path is not None and path.suffix != ".py":
        return _Pools(*pixels_from_npz(path))
    factory = factory_from(data)
    if factory is None:
        what = "is a Python file without a function" if path is not None else "does not exist"
        raise ResvitError(f"The data {data!r} {what}.", _KINDS)
    return factory


def _folder_pools(root: Path) -> _Pools:
    parts = split_folders(root)
    if parts is None:
        return _Pools(pixels_from_folder(root), None)
    names = shared_class_names(*parts)
    if names is None:
        raise ResvitError(
            f"{parts[0]} and {parts[1]} each have classes that the other lacks.",
            "Use the same class folders in both.",
        )
    train, validation = (pixels_from_folder(part, names or None) for part in parts)
    return _Pools(train, validation)


def _renumbered(data: str, validation_data: str, second: _Pools, reporter: Reporter) -> _Pools:
    """Number a separate validation folder's classes by the calibration folder's, where that has them all."""
    roots = [root for root in map(_existing, (data, validation_data)) if root is not None and root.is_dir()]
    if len(roots) < 2:
        return second
    train, validation = ((split_folders(root) or (root, root))[side] for side, root in enumerate(roots))
    names = shared_class_names(train, validation)
    if not names or names == (second.validation or second.calibration).class_names:
        return second
    reporter.warn(f"{validation} lacks some of the classes of {train}; labels follow {train}")
    return _Pools(pixels_from_folder(validation, names), None)


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


def _same(data: str, validation_data: str) -> bool:
    first, second = _existing(data), _existing(validation_data)
    return data == validation_data or (first is not None and second is not None and first.samefile(second))


def _existing(text: str) -> Path | None:
    """The file or folder that ``text`` names, if there is one; it may be the name of something else."""
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except PermissionError as error:
        raise ResvitError(f"{text} cannot be read: {error.strerror}.", "Change its permissions.") from error
    except (OSError, RuntimeError, ValueError):
        return None


def _tell(pool: Pixels, reporter: Reporter) -> None:
    for note in pool.notes:
        reporter.warn(note)


def _require(images: ImageSet, what: str) -> None:
    if not len(images):
        raise ResvitError(f"There is no image for {what} ({images.description}).", _KINDS)


def _require_classes(validation: ImageSet) -> None:
    labels = validation.labels
    if labels is None:
        raise ResvitError(
            f"The validation images have no labels ({validation.description}).",
            "Accuracy cannot be measured without: sort them into class folders, or add `labels` to the .npz.",
        )
    if len(labels) > 1 and len(np.unique(labels)) == 1:
        raise ResvitError(
            f"All {len(labels)} validation images are of one class ({validation.description}).",
            "Give images of at least two classes, or a network that always says the same would look right.",
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
