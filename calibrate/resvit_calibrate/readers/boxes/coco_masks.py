"""Semantic segmentation from COCO's outlines.

What no outline covers is the background, class 0, and categories follow in the order of their ids; where the first of
them is called so, there is no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from resvit_calibrate.images.targets import MOST_CLASSES, TargetOptions
from resvit_calibrate.readers.boxes.coco_file import FIX, categories_of, id_of, images_of, parsed, shown, whole_number
from resvit_calibrate.readers.boxes.outlines import BACKGROUND, DrawnMasks, require_drawable, usable_outline
from resvit_engines.errors import ResvitError


class _Outline(NamedTuple):
    """What is kept of an annotation."""

    image: Any
    category: Any
    segmentation: Any


def coco_masks_from(path: Path, folder: Path, options: TargetOptions) -> DrawnMasks:
    """The images of an annotation file with masks by its outlines.

    Raises ``ResvitError`` for what is no such file, no outline at all, one that is none, and images without size.
    """
    found = parsed(path, _kept)
    ids, names, sizes = images_of(path, found["images"])
    used = {whole_number(entry.category) for entry in found["annotations"] if isinstance(entry, _Outline)}
    class_ids, titles, _ = categories_of(path, found["categories"], used)
    named = next((place for place, title in enumerate(titles) if title.lower() in BACKGROUND), None)
    if named not in (None, 0):
        raise ResvitError(
            f"{path} has a category called {titles[named or 0]}, which is not the first.", "Give it the lowest id."
        )
    shift = 0 if named == 0 else 1
    class_names = titles if named == 0 else ("background", *titles)
    if len(class_names) >= MOST_CLASSES:
        raise ResvitError(f"{path} has {len(class_names)} categories.", f"Fewer than {MOST_CLASSES} can be read.")
    numbers = {identity: place + shift for place, identity in enumerate(class_ids)}
    outlines: list[list[tuple[int, Any]]] = [[] for _ in names]
    strays = bare = 0
    for number, entry in enumerate(found["annotations"]):
        where = f"annotations[{number}] of {path}"
        if not isinstance(entry, _Outline):
            raise ResvitError(f"{where} has no `image_id`.", FIX)
        place = ids.get(id_of(entry.image, f"{where}: image_id"))
        if place is None or not entry.segmentation:
            strays, bare = strays + (place is None), bare + (place is not None)
            continue
        category = whole_number(entry.category)
        if category not in numbers:
            raise ResvitError(f"{where} is of the category {shown(entry.category)}, which does not exist.", FIX)
        height, width = sizes[place].tolist()
        require_drawable((height, width), f"{names[place]} of {path}")
        outlines[place].append((numbers[category], usable_outline(entry.segmentation, height, width, where)))
    if not any(outlines):
        raise ResvitError(
            f"{path} has no outlines (`segmentation`), which masks are drawn from.",
            "Give annotations with polygons or run lengths, or --task detection for boxes.",
        )
    notes = [
        f"masks are drawn from the outlines of {path}" + ("; what none covers is class 0, background" if shift else "")
    ]
    if strays:
        notes.append(f"{path} has {strays} annotations of images that it does not list; they are left out")
    if bare:
        notes.append(f"{path} has {bare} annotations without an outline, which are left out of the masks")
    sizeless = [place for place in range(len(names)) if not sizes[place].all()]
    kept = [place for place in range(len(names)) if sizes[place].all()]
    if sizeless:
        notes.append(f"{path} gives no size of {len(sizeless)} images without outlines, which are left out")
    return DrawnMasks(
        folder, [names[i] for i in kept], sizes[kept], [outlines[i] for i in kept], class_names, options, tuple(notes)
    )


def _kept(entry: dict[str, Any]) -> _Outline | dict[str, Any]:
    if "image_id" in entry and "category_id" in entry:
        return _Outline(entry["image_id"], entry["category_id"], entry.get("segmentation"))
    return entry
