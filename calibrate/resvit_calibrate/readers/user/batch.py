"""What a user's loader may give for one batch, taken apart into images with what is known of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import BrokenImage
from resvit_calibrate.images.targets import (
    BoxTarget,
    DepthTarget,
    Geometry,
    MaskTarget,
    Target,
    TargetOptions,
    TextTarget,
    digest_of_target,
    in_view,
)
from resvit_calibrate.readers.depth import metres
from resvit_calibrate.readers.masks import classes_of, seen_in
from resvit_engines.errors import ResvitError

SHAPE = (
    "Let it return an iterable of (images, labels): float32 [B, C, H, W] as the network reads them, and int [B]; or, "
    "in the place of labels, masks int [B, H, W], depths float [B, H, W], B texts, or one dictionary per image with "
    "`boxes` [M, 4] (x1, y1, x2, y2 in pixels of the input) and `classes` [M]."
)
_KINDS = ("labels", "masks", "depth", "texts", "targets")
_ALSO = {"images": ("pixel_values", "image", "img"), "labels": ("label", "target")}
_OTHERS = ("geometry", "inputs")
_PER_IMAGE = ("boxes", "mask", "depth", "text")
TASKS: dict[type[Target], str] = {BoxTarget: "detection", MaskTarget: "segmentation", DepthTarget: "depth"} | {
    TextTarget: "text"
}


@dataclass(frozen=True, eq=False)
class Item:
    """One image float32 [C, H, W] as the network reads it, and its label or target."""

    image: npt.NDArray[np.float32]
    label: int | None = None
    target: Target | None = None
    geometry: Geometry | None = None
    inputs: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """What the network reads beside the image, by name, without the batch's axis."""

    @property
    def task(self) -> str | None:
        """What is known of it."""
        if self.target is not None:
            return TASKS[type(self.target)]
        return None if self.label is None else "classification"

    @property
    def content(self) -> bytes:
        """SHA-256 of the image and of what is read beside it."""
        digest = hashlib.sha256(self.image.tobytes())
        for name, value in self.inputs.items():
            digest.update(name.encode() + value.tobytes())
        return digest.digest()

    @property
    def about(self) -> bytes:
        """SHA-256 of the target; empty where there is none."""
        return b"" if self.target is None else digest_of_target(self.target)

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes in its mask or of its boxes, in order."""
        if isinstance(self.target, MaskTarget):
            return seen_in(self.target.classes)
        return tuple(np.unique(self.target.classes).tolist()) if isinstance(self.target, BoxTarget) else ()


def items_of(text: str, batch: Any, expected: tuple[int, ...], options: TargetOptions) -> Iterator[Item]:
    """Take one batch apart: images [B, *expected], alone, as a pair with what is known, or in a dictionary.

    Raises ``ResvitError`` for types and shapes that do not fit, naming the factory ``text``.
    """
    second, geometry, inputs = None, None, {}
    if isinstance(batch, Mapping):
        whole = _called_as_usual(batch)
        batch, second, geometry = _from_mapping(text, whole)
        inputs = _inputs(text, whole.get("inputs"), len(batch))
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        batch, second = batch
    images = _images(text, batch, expected)
    size = (expected[1], expected[2])
    known = _known(text, second, len(images), size, options)
    places = [None] * len(images) if geometry is None else geometry
    for index, (image, what, place) in enumerate(zip(images, known, places, strict=True)):
        label, target = (what, None) if what is None or isinstance(what, int) else (None, what)
        yield Item(image, label, target, place, {name: values[index] for name, values in inputs.items()})


def _called_as_usual(batch: Mapping[Any, Any]) -> dict[Any, Any]:
    """Under the names that are known here, what other libraries' loaders call otherwise."""
    found = dict(batch)
    for usual, names in _ALSO.items():
        others = [name for name in names if name in found]
        if usual not in found and len(others) == 1:
            found[usual] = found.pop(others[0])
    return found


def _from_mapping(text: str, batch: Mapping[Any, Any]) -> tuple[Any, Any, Sequence[Geometry] | None]:
    unknown = [str(key) for key in batch if key not in ("images", *_OTHERS, *_KINDS)]
    if unknown or "images" not in batch:
        raise ResvitError(
            f"{text} gave a dictionary with {', '.join(map(str, batch))}.",
            f"Its entries are `images`, one of {', '.join(f'`{kind}`' for kind in _KINDS)}, `geometry` and `inputs`.",
        )
    found = [kind for kind in _KINDS if batch.get(kind) is not None]
    if len(found) > 1:
        raise ResvitError(
            f"{text} gave {' and '.join(found)} together.", "Give one of them: it decides what is measured."
        )
    geometry = batch.get("geometry")
    if geometry is not None:
        count = len(batch["images"])
        if len(geometry) != count or not all(isinstance(place, Geometry) for place in geometry):
            raise ResvitError(
                f"{text} gave a geometry that is not {count} times a Geometry.",
                "Take it from Preprocess.geometry(height, width), or leave it out.",
            )
    return batch["images"], batch[found[0]] if found else None, geometry


def _inputs(text: str, inputs: Any, count: int) -> dict[str, npt.NDArray[Any]]:
    """What the network reads beside the images: arrays [B, …] by name."""
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        raise ResvitError(
            f"{text} gave inputs that are a {type(inputs).__name__}.",
            "Give a dictionary from the names of the network's further inputs to arrays [B, …].",
        )
    found: dict[str, npt.NDArray[Any]] = {}
    for name, values in inputs.items():
        array = _array(text, values, f"the input {name}")
        if not array.ndim or len(array) != count or array.dtype.kind not in "fiub":
            raise ResvitError(
                f"{text} gave the input {name} of type {array.dtype} and shape {list(array.shape)} for {count} images.",
                "Give numbers with one entry for each image, along the first axis.",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ResvitError(f"{text} gave an input {name} that holds NaN or infinity.", "Check how it is made.")
        found[str(name)] = array
    return found


def _images(text: str, images: Any, expected: tuple[int, ...]) -> npt.NDArray[np.float32]:
    images = _array(text, images, "images")
    if images.dtype.kind in "USO":
        raise ResvitError(f"{text} gave a batch of {images.dtype.type.__name__}, and no images.", SHAPE)
    if images.dtype.kind != "f":
        raise ResvitError(f"{text} gave images of type {images.dtype}, not preprocessed floats.", SHAPE)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ResvitError(
            f"{text} gave images of shape {list(images.shape)}; the network reads "
            f"[B, {', '.join(map(str, expected))}].",
            SHAPE,
        )
    ready: npt.NDArray[np.float32] = np.ascontiguousarray(images, dtype=np.float32)
    if not np.isfinite(ready).all():
        raise ResvitError(f"{text} gave images that hold NaN or infinity.", "Check its preprocessing.")
    return ready


def _known(
    text: str, second: Any, count: int, size: tuple[int, int], options: TargetOptions
) -> Sequence[int | Target | None]:
    """The label or target of every image of a batch."""
    if second is None:
        return [None] * count
    if isinstance(second, (list, tuple)) and second and isinstance(second[0], (Mapping, str, *TASKS)):
        if len(second) != count:
            raise ResvitError(f"{text} gave {len(second)} targets for {count} images.", SHAPE)
        return [target_of(text, one, size, options) for one in second]
    values = _array(text, second, "labels")
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 3 and values.dtype.kind in "iubf" and len(values) == count:
        make = _depth if values.dtype.kind == "f" else _mask
        return [make(text, value, size, options) for value in values]
    if values.shape != (count,) or values.dtype.kind not in "iu" or (values < 0).any():
        raise ResvitError(
            f"{text} gave labels of type {values.dtype} and shape {list(values.shape)} for {count} images; "
            "they must be class numbers from 0.",
            SHAPE,
        )
    return [int(value) for value in values]


def target_of(text: str, one: Any, size: tuple[int, int], options: TargetOptions) -> Target:
    """One image's target, given as one, as a text, as a dictionary, or as an array: a mask, or depths as floats.

    ``size`` is the height and width of what it is about. Raises ``ResvitError`` for what does not fit, naming ``text``.
    """
    if isinstance(one, np.ndarray):
        return _depth(text, one, size, options) if one.dtype.kind == "f" else _mask(text, one, size, options)
    if isinstance(one, (str, TextTarget)):
        return one if isinstance(one, TextTarget) else TextTarget(one)
    if isinstance(one, BoxTarget):
        return _boxes(text, one.boxes, one.classes, one.crowd, size)
    if isinstance(one, MaskTarget):
        return _mask(text, one.classes, size, options)
    if isinstance(one, DepthTarget):
        return _depth(text, one.depth, size, options)
    found = [kind for kind in _PER_IMAGE if isinstance(one, Mapping) and kind in one]
    if len(found) != 1:
        what = ", ".join(map(str, one)) if isinstance(one, Mapping) else type(one).__name__
        raise ResvitError(
            f"{text} gave a target with {what or 'nothing'} for one image.",
            f"Give a dictionary with one of {', '.join(f'`{kind}`' for kind in _PER_IMAGE)}.",
        )
    if found[0] == "text":
        if not isinstance(one["text"], str):
            raise ResvitError(f"{text} gave a text of type {type(one['text']).__name__}.", SHAPE)
        return TextTarget(one["text"])
    if found[0] == "mask":
        return _mask(text, one["mask"], size, options)
    if found[0] == "depth":
        return _depth(text, one["depth"], size, options)
    classes = one.get("classes", one.get("labels"))
    if classes is None:
        raise ResvitError(f"{text} gave boxes without their `classes`.", SHAPE)
    return _boxes(text, one["boxes"], classes, one.get("crowd", one.get("iscrowd")), size)


def _boxes(text: str, boxes: Any, classes: Any, crowd: Any, size: tuple[int, int]) -> BoxTarget:
    corners = _array(text, boxes, "boxes")
    corners = corners.reshape(-1, 4) if not corners.size else corners
    count = len(corners)
    numbers = _array(text, classes, "classes")
    numbers = numbers.astype(np.int64) if not numbers.size else numbers
    marks = np.zeros(count, np.bool_) if crowd is None else _array(text, crowd, "crowd")
    if corners.shape != (count, 4) or corners.dtype.kind not in "iuf" or not np.isfinite(corners).all():
        raise ResvitError(
            f"{text} gave boxes of type {corners.dtype} and shape {list(corners.shape)}; they must be finite "
            "numbers [M, 4].",
            SHAPE,
        )
    if numbers.shape != (count,) or numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise ResvitError(
            f"{text} gave classes of type {numbers.dtype} and shape {list(numbers.shape)} for {count} boxes; they must "
            "be class numbers from 0.",
            SHAPE,
        )
    if marks.shape != (count,) or marks.dtype.kind not in "iubf":
        raise ResvitError(f"{text} gave crowd marks of shape {list(marks.shape)} for {count} boxes.", SHAPE)
    target = BoxTarget(corners.astype(np.float32), numbers.astype(np.int64), marks.astype(np.bool_))
    return in_view(target, *size)


def _mask(text: str, values: Any, size: tuple[int, int], options: TargetOptions) -> MaskTarget:
    mask = _array(text, values, "mask")
    _require_size(text, mask, size, "iub", "mask")
    try:
        return MaskTarget(classes_of(mask, options))
    except BrokenImage as error:
        raise ResvitError(f"{text} gave a mask that cannot be used: {error}.", SHAPE) from error


def _depth(text: str, values: Any, size: tuple[int, int], options: TargetOptions) -> DepthTarget:
    del options
    depth = _array(text, values, "depth")
    _require_size(text, depth, size, "f", "depth")
    return DepthTarget(metres(depth))


def _require_size(text: str, values: npt.NDArray[Any], size: tuple[int, int], types: str, what: str) -> None:
    if values.dtype.kind not in types or values.shape != size:
        raise ResvitError(
            f"{text} gave a {what} of type {values.dtype} and shape {list(values.shape)}; the input is "
            f"{size[0]}x{size[1]}.",
            SHAPE,
        )


def _array(text: str, values: Any, what: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ResvitError(f"{text} gave {what} that are no array: {error}", SHAPE) from error
