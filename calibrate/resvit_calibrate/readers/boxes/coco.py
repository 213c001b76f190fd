"""Object detection: COCO's annotations and the images that they are of."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from resvit_calibrate.images.targets import TargetOptions
from resvit_calibrate.readers.boxes.coco_file import read_coco
from resvit_calibrate.readers.boxes.coco_masks import coco_masks_from
from resvit_calibrate.readers.boxes.outlines import DrawnMasks
from resvit_calibrate.readers.boxes.panoptic import PREFIX, PanopticMasks, panoptic_from
from resvit_calibrate.readers.boxes.table import BoxPixels
from resvit_calibrate.readers.folders import (
    TRAINING_NAMES,
    VALIDATION_NAMES,
    is_image,
    note_of_unused,
    part_folders,
    split_folders,
)
from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file, open_outside

_NAMES = ("annotations.json", "_annotations.coco.json")
_PREFIX = "instances_"
_KEYS = tuple(re.compile(rb'"%s"\s*:\s*\[' % key) for key in (b"images", b"annotations", b"categories"))
_WORD = re.compile(rf"(?<![a-z])({'|'.join((*TRAINING_NAMES, *VALIDATION_NAMES))})(?![a-z])")
_CHUNK, _OVERLAP = 1 << 20, 64
_MOST_FILES, _MOST_ENTRIES = 50, 100_000
_PROBED = 50


def open_coco(path: Path) -> BoxPixels:
    """Read an annotation file and find its images. Raises ``ResvitError`` where either fails."""
    coco = read_coco(path)
    if not coco.file_names:
        raise ResvitError(f"{path} lists no images.", "Give annotations of at least one image.")
    return BoxPixels(coco, _folder_of_images(coco.path, coco.file_names))


def open_coco_masks(path: Path, options: TargetOptions) -> DrawnMasks:
    """Read an annotation file for its outlines, and find its images. Raises ``ResvitError`` where either fails."""
    masks = coco_masks_from(path, path.parent, options)
    masks.root = _folder_of_images(path, tuple(masks.files))
    return masks


def open_panoptic(path: Path, options: TargetOptions) -> PanopticMasks:
    """Read a panoptic file, and find its images. Raises ``ResvitError`` where either fails."""
    masks = panoptic_from(path, path.parent, options)
    masks.root = _folder_of_images(path, tuple(masks.files))
    return masks


def annotation_files(root: Path, *, any_name: bool = False) -> tuple[Path, Path | None] | None:
    """Find a folder's annotations: one file, or one for training and one for validation; None where there are none.

    Known are ``annotations.json``, ``instances_*.json`` in the folder or in ``annotations`` below it, where there is
    none ``panoptic_*.json`` there, and one of those in each of ``train`` and ``val``; else any ``.json`` there that
    has the three lists of COCO's format; with ``any_name`` any other ``.json`` there.

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
    train = [file for file in found if part_of_file(file) in TRAINING_NAMES]
    for name in VALIDATION_NAMES:
        other = [file for file in found if part_of_file(file) == name]
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
    others = [file.name for file in _files_in(root, any_name=False) if file not in used]
    return note_of_unused(root, [file.name for file in used], others)


def _files_in(root: Path, *, any_name: bool) -> list[Path]:
    below = root / "annotations"
    found = [root / name for name in _NAMES if (root / name).is_file()]
    found += sorted(root.glob(f"{_PREFIX}*.json")) + sorted(below.glob(f"{_PREFIX}*.json"))
    found += [below / name for name in _NAMES if (below / name).is_file()]
    found = found or sorted(root.glob(f"{PREFIX}*.json")) + sorted(below.glob(f"{PREFIX}*.json"))
    if not found:
        there = sorted(root.glob("*.json")) + sorted(below.glob("*.json"))
        # Beside pictures of the same names are files about one picture each, such as labelme's.
        pictures = {path.stem for path in itertools.islice(root.iterdir(), _MOST_ENTRIES) if is_image(path.name)}
        others = [file for file in there if file.stem not in pictures]
        found = [file for file in others[:_MOST_FILES] if _has_lists(file)]
        if not found and any_name:
            found = there
    return found


def _has_lists(path: Path) -> bool:
    """Whether a file has the three lists of COCO's format, without parsing it: it may be of hundreds of MiB."""
    left, before = set(_KEYS), b""
    try:
        with open_outside(path) as stream:
            while left and (data := stream.read(_CHUNK)):
                left -= {key for key in left if key.search(before + data)}
                before = data[-_OVERLAP:]
    except (ResvitError, OSError):
        return False
    return not left


def part_of_file(file: Path) -> str | None:
    """The part that a file of annotations is of by its name, as folders are called; None where none is said."""
    found = _WORD.search(_tag(file).lower())
    return found.group(1) if found is not None else None


def _tag(file: Path) -> str:
    for prefix in (_PREFIX, PREFIX, "person_keypoints_"):
        if file.stem.startswith(prefix):
            return file.stem.removeprefix(prefix)
    return file.stem


def _folder_of_images(path: Path, names: tuple[str, ...]) -> Path:
    """Where most of the images are, out of the places where they lie by convention."""
    here, tags = path.parent, [_tag(path)]
    bases = [here, here.parent] if here.name == "annotations" else [here]
    if (part := part_of_file(path)) is not None:
        tags += [folder.name for base in bases for name, folder in part_folders(base).items() if name == part]
        tags += [
            folder.name for base in bases for name, folder in part_folders(base / "images").items() if name == part
        ]
    parts = [*(form for tag in dict.fromkeys(tags) for form in (tag, f"images/{tag}")), "images", "."]
    places = [base / part for base in bases for part in parts]
    probes = names[:: max(1, len(names) // _PROBED)]
    hits = {place: sum(leads_to_file(place / name) for name in probes) for place in places}
    best = max(hits, key=lambda place: hits[place])
    if not hits[best]:
        raise ResvitError(
            f"None of the images of {path}, such as {probes[0]}, is in {', '.join(str(place) for place in places)}.",
            "Put the images, or a link to their folder, beside the annotations as `images`.",
        )
    return best
