"""The data's classes under the network's numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from resvit_calibrate.images.class_list import REMEDY, ClassList
from resvit_calibrate.images.image_set import ImageSet
from resvit_calibrate.images.pixels import Pixels
from resvit_calibrate.readers.boxes.table import BoxPixels, with_shared_classes
from resvit_calibrate.readers.folders import order_note
from resvit_calibrate.readers.masks import MaskPixels
from resvit_calibrate.readers.npz_targets import TargetArrays
from resvit_calibrate.readers.paired import shortened
from resvit_calibrate.readers.user.targeted import TargetedDataset
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter


def with_classes(pool: Pixels, classes: ClassList | None, known: ClassList | None) -> Pixels:
    """Number the classes of ``pool`` as ``classes`` says, else as the model's own names do where they have all of them.

    Classes without a name in the data are called by their numbers: a list that has those numbers moves them, else they
    are the network's. Raises ``ResvitError`` where ``classes`` lacks one that is there.
    """
    if pool.task not in ("classification", "detection", "segmentation"):
        return pool
    chosen = classes
    if chosen is None and known is not None and pool.class_names:
        used = [pool.class_names[number] for number in _used(pool)]
        if all(known.number_of(name) is not None for name in used):
            chosen = known
    if chosen is None:
        note = order_note(pool.name, pool.class_names) if pool.task == "classification" else None
        pool.notes = (*pool.notes, note) if note else pool.notes
        return pool
    names = pool.class_names
    if not names:
        if "0" not in chosen.numbers and "1" not in chosen.numbers:
            pool.class_names = chosen.names
            return pool
        numbered = {name: number for name, number in chosen.numbers.items() if name.isascii() and name.isdecimal()}
        return _moved(pool, {int(name): number for name, number in numbered.items()}, chosen)
    present = _used(pool)
    places = chosen.require([names[number] for number in present], pool.name)
    return _moved(pool, {number: places[place] for place, number in enumerate(present)}, chosen)


def _used(pool: Pixels) -> list[int]:
    """The classes that images have; of masks all that have a name, since nobody has looked yet."""
    if pool.labels is not None:
        return sorted(set(np.unique(pool.labels).tolist()))
    if isinstance(pool, BoxPixels):
        return sorted(set(np.unique(pool.table.classes).tolist()))
    return list(range(len(pool.class_names)))


def _moved(pool: Pixels, moved: Mapping[int, int], classes: ClassList) -> Pixels:
    if pool.labels is not None:
        lost = sorted(set(np.unique(pool.labels).tolist()) - moved.keys())
        if lost:
            raise ResvitError(f"{pool.name} has the label {lost[0]}, which {classes.source} does not have.", REMEDY)
        pool.labels = np.vectorize(moved.__getitem__, otypes=[np.int64])(pool.labels)
    elif isinstance(pool, BoxPixels):
        pool = pool.moved(moved, classes.names)
    elif isinstance(pool, MaskPixels):
        before = pool.moved or {number: number for number in moved}
        pool.moved = {value: moved[number] for value, number in before.items() if number in moved}
    elif isinstance(pool, (TargetArrays, TargetedDataset)):
        pool.move(moved)
    pool.class_names, pool.class_ids = classes.names, ()
    pool.num_classes = len(classes.names) if classes.whole else None
    return pool


def same_numbering(train: Pixels, validation: Pixels, reporter: Reporter | None = None) -> tuple[Pixels, Pixels]:
    """Number the classes of two sources alike, where both say what their classes are.

    Classes follow the source that has all of the other's; ``reporter`` hears where that changes validation. Raises
    ``ResvitError`` where neither has, and for COCO files and masks that do not agree.
    """
    if isinstance(train, BoxPixels) and isinstance(validation, BoxPixels):
        return with_shared_classes(train, validation)
    names, others = train.class_names, validation.class_names
    if train.task != validation.task or not names or not others or names == others:
        return train, validation
    more, fewer = (names, others) if set(others) <= set(names) else (others, names)
    if train.task != "classification" or not set(fewer) <= set(more):
        alone = [name for name in fewer if name not in more], [name for name in more if name not in fewer]
        raise ResvitError(
            f"{train.name} and {validation.name} do not have the same classes: "
            + (f"{shortened(alone[0])} and {shortened(alone[1])} are in one only." if any(alone) else "order differs."),
            "Use the same classes in both, or say the network's with --classes FILE (a name a line, or JSON).",
        )
    if more is names and reporter is not None:
        reporter.warn(f"{validation.name} lacks some of the classes of {train.name}; labels follow {train.name}")
    for pool in (train, validation):
        _renumber(pool, more)
    return train, validation


def numbered_like(pool: Pixels, images: ImageSet) -> Pixels:
    """Number the classes of ``pool`` as ``images`` does, where both say what theirs are called.

    Raises ``ResvitError`` where ``pool`` has classes that ``images`` lacks: training would teach wrong answers.
    """
    names, known = pool.class_names, images.class_names
    if not names or not known or names == known or pool.task != images.task:
        return pool
    missing = [name for name in names if name not in known]
    if missing or pool.task == "segmentation":
        raise ResvitError(
            f"The classes of {pool.name} are not those of the validation images: "
            + (f"{', '.join(missing[:5])} are unknown there." if missing else "their order differs."),
            "Use the same classes, in the same order, in both.",
        )
    if isinstance(pool, BoxPixels):
        return pool.renumbered(images.class_ids or tuple(range(len(known))), known)
    if pool.labels is not None:
        _renumber(pool, known)
    return pool


def _renumber(pool: Pixels, names: tuple[str, ...]) -> None:
    """Number the labels of images as ``names`` does, which has all of their classes."""
    if pool.labels is not None:
        pool.labels = np.array([names.index(name) for name in pool.class_names], np.int64)[pool.labels]
    pool.class_names, pool.num_classes = names, len(names)
