"""Object detection: COCO's annotations and the images that they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from resvit_calibrate.images.pixels import UNSEEN, BrokenImage, FilePixels, Look
from resvit_calibrate.images.targets import BoxTarget, digest_of_target, in_view
from resvit_calibrate.readers.coco_file import CocoFile, read_coco
from resvit_calibrate.readers.folders import VALIDATION_NAMES, note_of_unused, split_folders
from resvit_engines.errors import ResvitError

_NAMES = ("annotations.json", "_annotations.coco.json")
_PREFIX = "instances_"
_PROBED = 50
_SAME_CATEGORIES = "Give both files the same list of categories, even where one has no box of some."


class CocoPixels(FilePixels):
    """The images of one annotation file, each with its boxes."""

    def __init__(self, coco: CocoFile, root: Path) -> None:
        super().__init__(coco.path.name, root, coco.file_names, None, class_names=coco.class_names, notes=coco.notes)
        self.task = "detection"
        gapless = coco.class_ids == tuple(range(len(coco.class_ids)))
        self.class_ids = () if gapless else coco.class_ids
        self.coco = coco

    def look(self, index: int) -> Look:
        """Digest the file's bytes and the boxes."""
        height, width = self.coco.sizes[index].tolist()
        size = (height, width) if height else None
        return super().look(index)._replace(target=digest_of_target(self._boxes(index)), annotated=size)

    def target(self, index: int, height: int, width: int, seen: Look = UNSEEN) -> BoxTarget:
        """The boxes of one image, in its pixels."""
        del seen  # the boxes are in memory
        said = tuple(self.coco.sizes[index].tolist())
        if said not in ((0, 0), (height, width)):
            raise BrokenImage(f"is {height}x{width} pixels, but annotated as {said[0]}x{said[1]}")
        return in_view(self._boxes(index), height, width)

    def renumbered(self, ids: tuple[int, ...], names: tuple[str, ...]) -> CocoPixels:
        """The same images, with the classes of another file that has at least these.

        Raises ``ResvitError`` where it lacks one, or calls it something else.
        """
        other = dict(zip(ids, names, strict=True))
        for identity, name in zip(self.coco.class_ids, self.class_names, strict=True):
            if other.get(identity) != name:
                raise ResvitError(
                    f"{self.coco.path} calls category {identity} {name!r}, which is "
                    f"{repr(other[identity]) if identity in other else 'unknown'} in the other annotations.",
                    _SAME_CATEGORIES,
                )
        moved = np.array([ids.index(identity) for identity in self.coco.class_ids], np.int64)
        coco = dataclasses.replace(self.coco, classes=moved[self.coco.classes], class_ids=ids, class_names=names)
        return CocoPixels(coco, self.root)

    def moved(self, numbers: Mapping[int, int], names: tuple[str, ...]) -> CocoPixels:
        """The same images, each class under another number; ids go, since these are the network's own numbers."""
        table = np.array([numbers.get(number, 0) for number in range(len(self.coco.class_ids))], np.int64)
        ids = tuple(range(len(names)))
        coco = dataclasses.replace(self.coco, classes=table[self.coco.classes], class_ids=ids, class_names=names)
        return CocoPixels(coco, self.root)

    def _boxes(self, index: int) -> BoxTarget:
        part = slice(int(self.coco.offsets[index]), int(self.coco.offsets[index + 1]))
        return BoxTarget(self.coco.boxes[part], self.coco.classes[part], self.coco.crowd[part])


def open_coco(path: Path) -> CocoPixels:
    """Read an annotation file and find its images. Raises ``ResvitError`` where either fails."""
    coco = read_coco(path)
    if not coco.file_names:
        raise ResvitError(f"{path} lists no images.", "Give annotations of at least one image.")
    return CocoPixels(coco, _folder_of_images(coco))


def with_shared_classes(first: CocoPixels, second: CocoPixels) -> tuple[CocoPixels, CocoPixels]:
    """Number both files' classes alike, by the one that has all of the other's.

    Raises ``ResvitError`` where neither has, or one id has two names: boxes would be called wrong.
    """
    if first.coco.class_ids == second.coco.class_ids and first.class_names == second.class_names:
        return first, second
    fewer, more = sorted((first, second), key=lambda pixels: len(pixels.coco.class_ids))
    same = fewer.renumbered(more.coco.class_ids, more.class_names)
    return (same, more) if fewer is first else (more, same)


def annotation_files(root: Path, *, any_name: bool = False) -> tuple[Path, Path | None] | None:
    """Find a folder's annotations: one file, or one for training and one for validation; None where there are none.

    Known are ``annotations.json``, ``instances_*.json`` in the folder or in ``annotations`` below it, and one of
    those in each of ``train`` and ``val``; with ``any_name`` any other ``.json`` there.

    Raises ``ResvitError`` where there are several that are no such pair.
    """
    parts = split_folders(root)
    if parts is not None:
        sides = [_files_in(part, any_name=any_name) for part in parts]
        if all(len(side) == 1 for side in sides):
            return sides[0][0], sides[1][0]
    found = _files_in(root, any_name=any_name)
    if len(found) < 2:
        return (found[0], None) if found else None
    train = [file for file in found if _tag(file).startswith("train")]
    for name in VALIDATION_NAMES:
        other = [file for file in found if _tag(file).startswith(name) and file not in train]
        if len(train) == len(other) == 1:
            return train[0], other[0]
    raise ResvitError(
        f"{root} has {len(found)} annotation files: {', '.join(str(file.relative_to(root)) for file in found)}.",
        f"Name the one to use, `coco:{found[0]}`, and another one for validation if there is one.",
    )


def unused_files(root: Path, used: tuple[Path, Path]) -> tuple[str, ...]:
    """That a folder has annotations beside those that are used, such as those of a test set; none where it has not."""
    if used[0].parent != used[1].parent:
        return note_of_unused(root, [file.relative_to(root).parts[0] for file in used])
    others = [file.name for file in _files_in(root, any_name=False) if "test" in _tag(file)]
    return note_of_unused(root, [file.name for file in used], others)


def _files_in(root: Path, *, any_name: bool) -> list[Path]:
    below = root / "annotations"
    found = [root / name for name in _NAMES if (root / name).is_file()]
    found += sorted(root.glob(f"{_PREFIX}*.json")) + sorted(below.glob(f"{_PREFIX}*.json"))
    found += [below / name for name in _NAMES if (below / name).is_file()]
    if not found and any_name:
        found = sorted(root.glob("*.json")) + sorted(below.glob("*.json"))
    return found


def _tag(file: Path) -> str:
    return file.stem.removeprefix(_PREFIX)


def _folder_of_images(coco: CocoFile) -> Path:
    """Where most of the images are, out of the places where they lie by convention."""
    here, tag = coco.path.parent, _tag(coco.path)
    bases = [here, here.parent] if here.name == "annotations" else [here]
    places = [base / part for base in bases for part in (tag, f"images/{tag}", "images", ".")]
    probes = coco.file_names[:: max(1, len(coco.file_names) // _PROBED)]
    hits = {place: sum(_exists(place / name) for name in probes) for place in places}
    best = max(hits, key=lambda place: hits[place])
    if not hits[best]:
        raise ResvitError(
            f"None of the images of {coco.path}, such as {probes[0]}, is in "
            f"{', '.join(str(place) for place in places)}.",
            "Put the images, or a link to their folder, beside the annotations as `images`.",
        )
    return best


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be searched
        return False
