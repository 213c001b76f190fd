"""Images with boxes, as every reader of boxes gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import UNSEEN, BrokenImage, FilePixels, Look
from resvit_calibrate.images.targets import BoxTarget, digest_of_target, in_view
from resvit_engines.errors import ResvitError

_SAME_CATEGORIES = "Give both the same list of classes, even where one has no box of some."


class Box(NamedTuple):
    """One box: class, x1, y1, x2, y2, and whether it is around many objects, or is not to be counted."""

    number: int
    corners: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True, eq=False)
class BoxTable:
    """N images with A boxes; image i has those from ``offsets[i]`` to ``offsets[i + 1]``.

    ``path`` says where they were read. ``file_names`` are relative and never lead upwards. ``sizes`` int64 [N, 2] are
    height and width, 0 where nothing says. ``boxes`` float32 [A, 4] are x1, y1, x2, y2 in the image's pixels, or where
    they are ``relative`` in shares of its width and height, each with an area; ``classes`` int64 [A] count from 0 in
    the order of the data's own numbers, which are ``class_ids``. ``class_names`` are empty where nothing says.
    """

    path: Path
    file_names: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    notes: tuple[str, ...]
    relative: bool = False


def table_of(
    path: Path,
    rows: Sequence[tuple[str, tuple[int, int], Sequence[Box]]],
    class_names: tuple[str, ...],
    notes: Sequence[str],
    *,
    relative: bool = False,
) -> BoxTable:
    """A table of images, each with its (height, width), 0 where unknown, and its boxes, whose classes count from 0."""
    boxes = [box for _, _, found in rows for box in found]
    classes = np.array([box.number for box in boxes], np.int64)
    count = len(class_names) or (int(classes.max()) + 1 if len(classes) else 0)
    return BoxTable(
        path=path,
        file_names=tuple(name for name, _, _ in rows),
        sizes=np.array([size for _, size, _ in rows], np.int64).reshape(-1, 2),
        boxes=np.array([box.corners for box in boxes], np.float32).reshape(-1, 4),
        classes=classes,
        crowd=np.array([box.crowd for box in boxes], np.bool_),
        offsets=np.concatenate([[0], np.cumsum([len(found) for _, _, found in rows])]).astype(np.int64),
        class_names=class_names,
        class_ids=tuple(range(count)),
        notes=tuple(notes),
        relative=relative,
    )


class BoxPixels(FilePixels):
    """Images, each with its boxes."""

    def __init__(self, table: BoxTable, root: Path) -> None:
        super().__init__(
            table.path.name, root, table.file_names, None, class_names=table.class_names, notes=table.notes
        )
        self.task = "detection"
        gapless = table.class_ids == tuple(range(len(table.class_ids)))
        self.class_ids = () if gapless else table.class_ids
        self.table = table

    def look(self, index: int) -> Look:
        """Digest the file's bytes and the boxes."""
        height, width = self.table.sizes[index].tolist()
        size = (height, width) if height else None
        return super().look(index)._replace(target=digest_of_target(self._boxes(index)), annotated=size)

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> BoxTarget:
        """The boxes of one image, in its pixels."""
        del seen  # the boxes are in memory
        said = tuple(self.table.sizes[index].tolist())
        if said not in ((0, 0), (height, width)):
            raise BrokenImage(f"is {height}x{width} pixels, but annotated as {said[0]}x{said[1]}")
        target = self._boxes(index)
        if self.table.relative:
            size = np.array([width, height] * 2, np.float32)
            target = dataclasses.replace(target, boxes=target.boxes * size)
        return in_view(target, height, width)

    def renumbered(self, ids: tuple[int, ...], names: tuple[str, ...]) -> BoxPixels:
        """The same images, with the classes of another file that has at least these.

        Raises ``ResvitError`` where it lacks one, or calls it something else.
        """
        other = dict(zip(ids, names, strict=False))
        for identity, name in zip(self.table.class_ids, self.class_names, strict=False):  # without names: by number
            if other.get(identity) != name:
                raise ResvitError(
                    f"{self.table.path} calls category {identity} {name!r}, which is "
                    f"{repr(other[identity]) if identity in other else 'unknown'} in the other annotations.",
                    _SAME_CATEGORIES,
                )
        moved = np.array([ids.index(identity) for identity in self.table.class_ids], np.int64)
        return self._numbered(moved, ids, names)

    def moved(self, numbers: Mapping[int, int], names: tuple[str, ...]) -> BoxPixels:
        """The same images, each class under another number; ids go, since these are the network's own numbers."""
        places = np.array([numbers.get(number, 0) for number in range(len(self.table.class_ids))], np.int64)
        ids = tuple(range(len(names)))
        return self._numbered(places, ids, names)

    def _numbered(self, places: npt.NDArray[np.int64], ids: tuple[int, ...], names: tuple[str, ...]) -> BoxPixels:
        # The notes are those of now: more may have been said than the table's own.
        classes = places[self.table.classes]
        table = dataclasses.replace(self.table, classes=classes, class_ids=ids, class_names=names, notes=self.notes)
        return self.with_table(table)

    def with_table(self, table: BoxTable) -> BoxPixels:
        """The same pictures with other boxes."""
        return BoxPixels(table, self.root)

    def _boxes(self, index: int) -> BoxTarget:
        part = slice(int(self.table.offsets[index]), int(self.table.offsets[index + 1]))
        return BoxTarget(self.table.boxes[part], self.table.classes[part], self.table.crowd[part])


def with_shared_classes(first: BoxPixels, second: BoxPixels) -> tuple[BoxPixels, BoxPixels]:
    """Number both files' classes alike, by the one that has all of the other's.

    Raises ``ResvitError`` where neither has, or one id has two names: boxes would be called wrong.
    """
    if first.table.class_ids == second.table.class_ids and first.class_names == second.class_names:
        return first, second
    fewer, more = sorted((first, second), key=lambda pixels: len(pixels.table.class_ids))
    same = fewer.renumbered(more.table.class_ids, more.class_names)
    return (same, more) if fewer is first else (more, same)


def with_classes_of_both(first: BoxPixels, second: BoxPixels) -> tuple[BoxPixels, BoxPixels]:
    """Number the classes of both by all names that either has, in their order as texts where these differ."""
    if first.class_names == second.class_names:
        return first, second
    names = tuple(sorted({*first.class_names, *second.class_names}))

    def renamed(pixels: BoxPixels) -> BoxPixels:
        return pixels.moved({number: names.index(name) for number, name in enumerate(pixels.class_names)}, names)

    return renamed(first), renamed(second)
