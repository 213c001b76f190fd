"""The data's classes under the network's numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from resvit_calibrate.images.class_list import REMEDY, ClassList
from resvit_calibrate.images.pixels import Pixels
from resvit_calibrate.readers.boxes.table import BoxPixels
from resvit_calibrate.readers.folders import order_note
from resvit_calibrate.readers.masks import MaskPixels
from resvit_calibrate.readers.npz_targets import TargetArrays
from resvit_engines.errors import ResvitError


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
    elif isinstance(pool, TargetArrays):
        pool.move(moved)
    pool.class_names, pool.class_ids = classes.names, ()
    pool.num_classes = len(classes.names) if classes.whole else None
    return pool
