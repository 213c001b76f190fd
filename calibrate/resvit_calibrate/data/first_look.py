"""What data tell by themselves, before there is a network: whether there are any, labels, and readable images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from resvit_calibrate.data.naming import KINDS, same_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.pixels import BrokenImage, Pixels
from resvit_calibrate.readers.user.kept_stream import MOST
from resvit_calibrate.readers.user.loader import Factory
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter

_TRIED = 8
"""Images that are read of each side. Where one of a hundred is broken, half of so few never are."""


def open_sources(spec: DataSpec, reporter: Reporter = SILENT) -> tuple[Pools | Factory, Pools | Factory]:
    """What calibration and what validation images come from: the same where one source is divided.

    Raises ``ResvitError`` as ``open_source``.
    """
    wanted = spec.validation_images or MOST
    first = open_source(spec.data, spec.reading, spec.objects, reporter, spec.calibration_images + wanted)
    if spec.validation_data is None or same_source(spec.data, spec.validation_data):
        return first, first
    return first, open_source(spec.validation_data, spec.reading, spec.objects, reporter, wanted)


def require_usable(sources: Sequence[Pools | Factory], spec: DataSpec) -> None:
    """Refuse what no network could be calibrated with or judged by, reading a few images of each side.

    Of a loader of the user's nothing is read: it is asked once, when the size of its arrays is known.

    Raises:
        ResvitError: for data without an image, images that are broken, and validation without labels or of one class.
    """
    first, second = sources
    if isinstance(first, Pools):
        _require_readable(first.calibration, "calibration")
    if not isinstance(second, Pools):
        return
    validation = second.validation or second.calibration
    _require_readable(validation, "validation")
    if validation.task in (None, "classification"):
        require_classes(validation.labels, validation.name, spec, validation.class_names)


def require_classes(
    labels: npt.NDArray[np.int64] | None, description: str, spec: DataSpec, names: Sequence[str] = ()
) -> None:
    """Refuse validation images without labels, and those all of one class, where a network is judged by classes.

    ``names`` are the classes' by number, where they have any.
    """
    if labels is None and spec.unlabelled:
        return
    if labels is None:
        raise ResvitError(
            f"The validation images have no labels ({description}).",
            "Accuracy cannot be measured without: sort them into class folders, put a list of classes, masks, depths "
            "or COCO's annotations beside them, or add `labels` to the .npz; --task auto compares outputs alone.",
        )
    if not spec.unjudged and len(labels) > 1 and len(np.unique(labels)) == 1:
        only = f", {names[int(labels[0])]!r}" if int(labels[0]) < len(names) else ""
        raise ResvitError(
            f"All {len(labels)} validation images are of one class{only} ({description}).",
            "Give images of at least two classes, or a network that always says the same would look right; where "
            "folders are no classes, name the one that holds the pictures.",
        )


def _require_readable(pool: Pixels, what: str) -> None:
    if not len(pool):
        raise ResvitError(f"There is no image for {what} ({pool.name}).", KINDS)
    places = sorted({int(place) for place in np.linspace(0, len(pool) - 1, _TRIED)})
    pool.fetch(places)
    broken = {place: why for place in places if (why := _why_broken(pool, place)) is not None}
    if 2 * len(broken) > len(places):
        shown = "; ".join(f"{pool.title(place)}: {why}" for place, why in list(broken.items())[:3])
        raise ResvitError(
            f"{len(broken)} of {len(places)} images of {pool.name} that were tried cannot be read: {shown}.",
            "Replace or remove the broken files; a few are skipped, this many would make the result wrong.",
        )


def _why_broken(pool: Pixels, place: int) -> str | None:
    try:
        pool.read(place, seen=pool.look(place))
    except BrokenImage as broken:
        return str(broken)
    return None
