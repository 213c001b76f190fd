"""Reading COCO's detection format: images, categories and boxes out of one JSON file.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014; the format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resvit_calibrate.readers.boxes.table import BoxTable
from resvit_calibrate.readers.folders import name_inside, printable, relative_inside
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside, text_from_outside

FIX = (
    "COCO's detection format is an object with `images` (id, file_name, width, height), `categories` (id, name) and "
    "`annotations` (image_id, category_id, bbox [x, y, width, height], iscrowd)."
)
_OUTSIDE = 0.5
_LARGEST = 2**53
MOST_BYTES = 8 << 30
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,15})(\.0*)?")
_DECIMAL = re.compile(r"-?[0-9]{1,16}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?")


class _Box(NamedTuple):
    """What is kept of an annotation while the file is read: outlines are most of such a file."""

    image: Any
    category: Any
    bbox: Any
    crowd: Any
    around: bool = False
    """Whether the box is that around the outline."""


def read_coco(path: Path) -> BoxTable:
    """Read an annotation file.

    Numbers may be written as texts, and ``iscrowd`` may be null or missing for 0. A category without annotations that
    is another's supercategory, as Roboflow writes it, is no class. An annotation without ``bbox`` has the box around
    its outline, and is left out where it has none either. Boxes are cut at the image's edges where the file
    says how large it is; those of which nothing is left, and those for images that the file does not list, are left
    out and counted in ``notes``.

    Raises ``ResvitError`` for what is not JSON, with the line; for entries that are missing or of a wrong type;
    for ids that are given twice; for names of files that lead out of the folder; and for annotations whose
    category does not exist.
    """
    found = parsed(path, _kept)
    ids, names, sizes = images_of(path, found["images"])
    class_ids, class_names, groups = categories_of(path, found["categories"], _used(found["annotations"]))
    notes = []
    if groups:
        notes.append(
            f"{path} has categories that no annotation is of and that others name as their supercategory: "
            f"{shortened(groups)}; they are left out and take no class number"
        )
    twice = len(names) - len(set(names))
    if twice:
        notes.append(f"{path} lists {twice} files more than once: their boxes are on one entry or the other")
    listed = found["annotations"]
    around = sum(isinstance(entry, _Box) and entry.around for entry in listed)
    if around:
        notes.append(f"{path} has {around} annotations without a box, which have those around their outlines")
    bare = sum(isinstance(entry, _Box) and _is_bare(entry) for entry in listed)
    if bare:
        notes.append(f"{path} has {bare} annotations without a box and an outline, which are left out")
    image, classes, boxes, crowd, strays = _annotations(path, listed, ids, class_ids)
    if strays:
        notes.append(f"{path} has {strays} annotations of images that it does not list; they are left out")
    boxes, kept, outside = _cut(boxes, sizes[image])
    if outside:
        notes.append(f"{path} has {outside} boxes that reach beyond their image; they are cut at its edges")
    if not kept.all():
        holders = [names[number] for number in dict.fromkeys(image[~kept].tolist())]
        notes.append(
            f"{path} has {int((~kept).sum())} boxes without any area inside their image, which are left out "
            f"(in {shortened(holders)})"
        )
    order = np.argsort(image[kept], kind="stable")
    counts = np.bincount(image[kept], minlength=len(names))
    return BoxTable(
        path=path,
        file_names=tuple(names),
        sizes=sizes,
        boxes=boxes[kept][order].astype(np.float32),
        classes=classes[kept][order],
        crowd=crowd[kept][order],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        class_names=class_names,
        class_ids=class_ids,
        notes=tuple(notes),
    )


def parsed(path: Path, kept: Callable[[dict[str, Any]], Any]) -> dict[str, list[Any]]:
    """The three lists of a file, each object as ``kept`` leaves it. Raises ``ResvitError`` where one is missing."""
    try:
        text = text_from_outside(read_outside(path, MOST_BYTES), str(path), FIX)
        found = json.loads(text, object_hook=kept)
    except json.JSONDecodeError as error:
        raise ResvitError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.", FIX
        ) from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets in brackets without end.
        raise ResvitError(f"{path} is not usable JSON: {error}.", FIX) from error
    if not isinstance(found, dict):
        what = "a list, as files of results are" if isinstance(found, list) else "not an object"
        raise ResvitError(f"{path} is {what}.", FIX)
    for name in ("images", "categories", "annotations"):
        if not isinstance(found.get(name), list):
            raise ResvitError(f"{path} has no list `{name}`; it has {', '.join(sorted(found)) or 'nothing'}.", FIX)
    return found


def _kept(entry: dict[str, Any]) -> _Box | dict[str, Any]:
    if "image_id" in entry and ("bbox" in entry or "segmentation" in entry):
        box = entry.get("bbox")
        around = _box_around(entry.get("segmentation")) if box is None or box == [] else None
        kept = box if around is None else around
        return _Box(entry["image_id"], entry.get("category_id"), kept, entry.get("iscrowd", 0), around is not None)
    entry.pop("segmentation", None)
    return entry


def _box_around(outline: Any) -> list[float] | None:
    """x, y, width and height of polygons or of run lengths that are not compressed; None of anything else."""
    if isinstance(outline, dict):
        return _box_of_runs(outline.get("counts"), outline.get("size"))
    if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
        return None
    values = [[_number(value) for value in polygon] for polygon in outline]
    xs = [value for polygon in values for value in polygon[::2]]
    ys = [value for polygon in values for value in polygon[1::2]]
    if not xs or len(xs) != len(ys) or None in xs or None in ys:
        return None
    across, down = [x for x in xs if x is not None], [y for y in ys if y is not None]
    return [min(across), min(down), max(across) - min(across), max(down) - min(down)]


def _box_of_runs(counts: Any, size: Any) -> list[float] | None:
    """The box of runs that go down the columns, the first of them of the background."""
    sides = [whole_number(side) for side in size] if isinstance(size, list) and len(size) == 2 else [None]
    height = sides[0]
    runs = [whole_number(run) for run in counts] if isinstance(counts, list) else []
    lengths = [run for run in runs if run is not None and 0 <= run < _LARGEST]
    if height is None or not 0 < height < _LARGEST or not lengths or len(lengths) != len(runs):
        return None
    place, boxes = 0, []
    for number, length in enumerate(lengths):
        first, last = place, place + length - 1
        place += length
        if number % 2 and length:
            whole = first // height != last // height
            rows = (0, height - 1) if whole else (first % height, last % height)
            boxes.append((first // height, rows[0], last // height, rows[1]))
    if not boxes:
        return None
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes) + 1, max(box[3] for box in boxes) + 1
    return [float(left), float(top), float(right - left), float(bottom - top)]


def images_of(path: Path, entries: list[Any]) -> tuple[dict[Any, int], list[str], npt.NDArray[np.int64]]:
    """Which image an id is, the names of their files, and their sizes [N, 2], 0 where nothing says."""
    ids: dict[Any, int] = {}
    names: list[str] = []
    sizes = np.zeros((len(entries), 2), np.int64)
    repeated = []
    folders = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    for number, entry in enumerate(entries):
        where = f"images[{number}] of {path}"
        if not isinstance(entry, dict):
            raise ResvitError(f"{where} is not an object.", FIX)
        identity = id_of(entry.get("id"), f"{where}: id")
        if identity in ids:
            repeated.append(str(identity))
        ids[identity] = number
        name = entry.get("file_name")
        here = relative_inside(name, *folders) if isinstance(name, str) else name
        names.append(name_inside(here, f"{where}: file_name", FIX))
        for side, name in enumerate(("height", "width")):
            if entry.get(name) is None:
                continue
            size = whole_number(entry[name])
            if size is None or not 0 < size < 2**31:
                raise ResvitError(f"{where}: {name} is {shown(entry[name])}.", FIX)
            sizes[number, side] = size
    if repeated:
        raise ResvitError(
            f"{path} gives {len(repeated)} image ids more than once: {shortened(repeated)}.",
            "Give every image its own id; files that were joined must be numbered anew.",
        )
    sizes[(sizes == 0).any(axis=1)] = 0
    return ids, names, sizes


def _is_bare(entry: _Box) -> bool:
    return entry.bbox is None or entry.bbox == []


def _used(annotations: list[Any]) -> set[int | None]:
    """The categories that annotations are of; what is wrong with them is said later."""
    return {whole_number(entry.category) for entry in annotations if isinstance(entry, _Box)}


def categories_of(
    path: Path, entries: list[Any], used: set[int | None]
) -> tuple[tuple[int, ...], tuple[str, ...], list[str]]:
    """Ids in rising order and names of the classes, and the names of those that only group others."""
    names: dict[int, str] = {}
    above: dict[int, str] = {}
    for number, entry in enumerate(entries):
        where = f"categories[{number}] of {path}"
        identity = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if identity is None or abs(identity) >= _LARGEST:
            raise ResvitError(f"{where} has no whole number as its id.", FIX)
        if identity in names:
            raise ResvitError(f"{path} gives the category id {identity} more than once.", FIX)
        names[identity] = printable(str(entry.get("name", identity)))
        above[identity] = printable(str(entry.get("supercategory")))
    groups = {
        identity
        for identity, name in names.items()
        if identity not in used and any(above[other] == name for other in names if other != identity)
    }
    ids = tuple(sorted(names.keys() - groups))
    if not ids:
        raise ResvitError(f"{path} has no categories.", FIX)
    return ids, tuple(names[identity] for identity in ids), [names[identity] for identity in sorted(groups)]


def _annotations(
    path: Path, entries: list[Any], images: dict[Any, int], class_ids: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_], int]:
    """Which image each annotation is of, its class, its box as x1, y1, x2, y2, whether it is a crowd; the strays."""
    numbers = {identity: number for number, identity in enumerate(class_ids)}
    image: list[int] = []
    classes: list[int] = []
    boxes: list[Any] = []
    crowd: list[bool] = []
    strays = 0
    for number, entry in enumerate(entries):
        where = f"annotations[{number}] of {path}"
        if not isinstance(entry, _Box):
            raise ResvitError(f"{where} has no `bbox` or no `image_id`.", FIX)
        place = images.get(id_of(entry.image, f"{where}: image_id"))
        if place is None:
            strays += 1
            continue
        if _is_bare(entry):
            continue
        category = whole_number(entry.category)
        if category not in numbers:
            raise ResvitError(
                f"{where} is of the category {shown(entry.category)}, which does not exist; there are "
                f"{shortened(list(map(str, class_ids)))}.",
                "Add it to `categories`, or correct the annotation.",
            )
        sides = [_number(side) for side in entry.bbox] if isinstance(entry.bbox, list) else []
        if len(sides) != 4 or None in sides:
            raise ResvitError(f"{where}: bbox is {shown(entry.bbox)}, not four numbers.", FIX)
        many = (
            0
            if entry.crowd is None
            else int(entry.crowd)
            if isinstance(entry.crowd, bool)
            else whole_number(entry.crowd)
        )
        if many not in (0, 1):
            raise ResvitError(f"{where}: iscrowd is {shown(entry.crowd)}, not 0 or 1.", FIX)
        image.append(place)
        classes.append(numbers[category])
        boxes.append(sides)
        crowd.append(bool(many))
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    # A width below zero would otherwise look like a box that reaches to the left.
    corners[~((corners[:, 2:] > 0).all(axis=1) & np.isfinite(corners).all(axis=1))] = np.nan
    corners[:, 2:] += corners[:, :2]
    return np.array(image, np.int64), np.array(classes, np.int64), corners, np.array(crowd, np.bool_), strays


def _cut(
    boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], int]:
    """Boxes [A, 4] held to their images [A, 2], which of them have an area then, and how many were cut."""
    limits = np.where(sizes > 0, sizes, np.inf)[:, [1, 0, 1, 0]]
    held = np.clip(boxes, np.where(np.isfinite(limits), 0.0, -np.inf), limits)
    # As they are stored: a sliver can lose its area to rounding.
    small = held.astype(np.float32)
    kept = np.isfinite(small).all(axis=1) & (small[:, 2] > small[:, 0]) & (small[:, 3] > small[:, 1])
    outside = (np.abs(held[kept] - boxes[kept]) > _OUTSIDE).any(axis=1)
    return held, kept, int(outside.sum())


def shown(value: Any) -> str:
    """A value as it stands in a file, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def id_of(value: Any, where: str) -> int | str:
    """An id as it is compared: a whole number, also where it is written as a text, or any other text."""
    number = whole_number(value)
    if number is not None:
        return number
    if isinstance(value, str):
        return value
    raise ResvitError(f"{where} is {shown(value)}, not a whole number or a text.", FIX)


def _number(value: Any) -> float | None:
    """A number of a box, also where it is written as a text.

    NaN and infinity are numbers too: such a box has no area, and is counted with those.
    """
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return float(value)
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else None


def whole_number(value: Any) -> int | None:
    """A whole number, also where it is written as a text or with a fraction of zero; None for anything else."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if _WHOLE.fullmatch(value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
