"""Boxes in a column of a table: `objects` with `bbox` and `category`, as detection data sets on the hub have them.

Nothing in such a data set says whether four numbers are x, y, width, height or two corners: the pictures' sizes tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from resvit_calibrate.readers.boxes.table import Box, BoxPixels, BoxTable, table_of
from resvit_calibrate.readers.hugging_face.columns import Columns
from resvit_calibrate.readers.hugging_face.reference import BOXES, Wanted
from resvit_calibrate.readers.hugging_face.tables import TablePixels
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.pictures.decode import header_of

_TRIED, _BEYOND = 64, 2.0
_CROWDS = ("iscrowd", "is_crowd", "crowd")
_MOST = 1 << 24
_FIX = "A row's objects have `bbox`, four numbers in pixels, and `category`, a number or a name, for each object."


class TableBoxes(BoxPixels):
    """Pictures of a table, each with its boxes."""

    def __init__(self, table: BoxTable, pictures: TablePixels) -> None:
        super().__init__(table, pictures.root)
        self.name, self._pictures = pictures.name, pictures

    def fetch(self, numbers: Sequence[int]) -> None:
        """Unpack these rows."""
        self._pictures.fetch(numbers)

    def bytes_of(self, index: int) -> bytes:
        """The bytes of one picture."""
        return self._pictures.bytes_of(index)

    def with_table(self, table: BoxTable) -> TableBoxes:
        """The same pictures with other boxes."""
        return TableBoxes(table, self._pictures)


class _Object(NamedTuple):
    numbers: tuple[float, float, float, float]
    category: int | str
    crowd: bool


def with_boxes(pictures: TablePixels, columns: Columns, wanted: Wanted, values: Sequence[Any]) -> TableBoxes:
    """The pictures with the boxes of ``values``, one entry of the column of objects for each.

    Raises ``ResvitError`` for objects that are none, and where the form of boxes cannot be told.
    """
    objects = [_objects_in(value, pictures, row, columns) for row, value in enumerate(values)]
    said = {item.category for row in objects for item in row}
    texts = sorted(category for category in said if isinstance(category, str))
    if not said:
        raise ResvitError(f"No row of {pictures.name} has an object in {columns.objects!r}.", _FIX)
    if texts and len(texts) < len(said):
        raise ResvitError(f"{pictures.name} has categories by name and by number: {shortened(texts)}.", _FIX)
    names = tuple(texts) or columns.names
    highest = max((category for category in said if isinstance(category, int)), default=0)
    if names and highest >= len(names):
        raise ResvitError(f"{pictures.name} has the category {highest}, and {len(names)} have names.", _FIX)
    form = wanted.boxes or _form(pictures, objects, wanted)
    rows, empty = [], Counter[str]()
    for row, found in enumerate(objects):
        title = pictures.title(row)
        boxes = []
        for item in found:
            x, y, second, third = item.numbers
            right, bottom = (second, third) if form == "xyxy" else (x + second, y + third)
            number = names.index(item.category) if isinstance(item.category, str) else item.category
            if right <= x or bottom <= y:
                empty[title] += 1
                continue
            boxes.append(Box(number, (x, y, right, bottom), item.crowd))
        rows.append((title, (0, 0), boxes))
    notes = [*columns.notes, f"boxes of {pictures.name} are read as {_WORDS[form]}"]
    if empty:
        notes.append(
            f"{sum(empty.values())} boxes of {pictures.name} have no area and are left out (in {shortened([*empty])})"
        )
    return TableBoxes(table_of(pictures.first, rows, names, notes), pictures)


_WORDS = dict(zip(BOXES, ("x, y, width, height", "two corners"), strict=True))


def _form(pictures: TablePixels, objects: Sequence[Sequence[_Object]], wanted: Wanted) -> str:
    """What the four numbers are, told by some pictures' sizes: of the two readings one leads out of them."""
    some = [row for row, found in enumerate(objects) if found][:_TRIED]
    pictures.fetch(some)
    fits = dict.fromkeys(BOXES, True)
    shares = True
    for row in some:
        try:
            header = header_of(pictures.bytes_of(row))
        except (MemoryError, ResvitError):
            raise
        except Exception:  # noqa: BLE001, S112 - a damaged picture is counted by whoever reads it
            continue
        sides = {True: (header.width, header.height), False: (header.height, header.width)}
        upright = header.orientation < 5
        width, height = (side + _BEYOND for side in sides[upright])
        for item in objects[row]:
            x, y, second, third = item.numbers
            fits["xywh"] &= second >= 0 <= third and x + second <= width and y + third <= height
            fits["xyxy"] &= second >= x and third >= y and second <= width and third <= height
            shares &= max(item.numbers) <= 1
    told = [form for form, yes in fits.items() if yes]
    if shares:
        raise ResvitError(f"Boxes of {pictures.name} are shares of the pictures' sizes, not pixels.", _FIX)
    if len(told) != 1:
        why = "could be either x, y, width, height or two corners" if told else "do not fit into their pictures"
        raise ResvitError(
            f"Boxes of {pictures.name} {why}.",
            f"Say what they are: `{wanted.saying(boxes='xywh')}`, or `boxes=xyxy` for two corners.",
        )
    return told[0]


def _objects_in(value: Any, pictures: TablePixels, row: int, columns: Columns) -> list[_Object]:
    """The objects of one row: lists of the same length, or a list of objects."""
    if value is None:
        return []
    boxes_key, category_key = columns.object_keys
    if isinstance(value, dict):
        crowds = next((value[key] for key in _CROWDS if isinstance(value.get(key), list)), None)
        boxes, categories = value.get(boxes_key) or [], value.get(category_key) or []
        crowds = crowds if crowds is not None else [0] * len(boxes)
    else:
        boxes = [item.get(boxes_key) for item in value]
        categories = [item.get(category_key) for item in value]
        crowds = [next((item[key] for key in _CROWDS if key in item), 0) for item in value]
    if not len(boxes) == len(categories) == len(crowds):
        raise ResvitError(
            f"Row {row} of {pictures.name} has {len(boxes)} boxes and {len(categories)} categories.", _FIX
        )
    found = []
    for box, category, crowd in zip(boxes, categories, crowds, strict=True):
        numbers = [float(one) for one in box or () if isinstance(one, (int, float)) and math.isfinite(one)]
        named = isinstance(category, str) or (isinstance(category, int) and 0 <= category < _MOST)
        if len(numbers) != 4 or max(map(abs, numbers)) > _MOST or not named:
            raise ResvitError(f"Row {row} of {pictures.name} has the box {box!r} with the category {category!r}.", _FIX)
        found.append(_Object((numbers[0], numbers[1], numbers[2], numbers[3]), category, bool(crowd)))
    return found
