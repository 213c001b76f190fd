"""Pictures of a stream, which gives them one after the other: its first ones, each kept under its number."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from resvit_calibrate.readers.user.objects import array_of, class_names_of, parts_of
from resvit_calibrate.readers.user.pictures import values_of
from resvit_engines.errors import ResvitError
from resvit_engines.files import explain_os_errors
from resvit_engines.progress import Reporter

MOST = 10_000
"""Pictures that are taken of a stream where nobody says how many are wanted."""


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class KeptStream(Sequence[Any]):
    """The first ``most`` items of a stream of pictures, as (picture [H, W, C], what is known of it or None).

    Values lie in a nameless file, so that each is asked for once however often it is read, and memory holds none.
    Raises ``ResvitError`` for items that are no pictures, a stream that fails, and a full disk.
    """

    def __init__(self, text: str, made: Any, most: int, reporter: Reporter) -> None:
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - kept as long as its pictures are read
        self._items: list[tuple[_Place, Any]] = []
        self.classes = class_names_of(made)
        told = f"pictures of {text}"
        for position, item in enumerate(reporter.track(itertools.islice(iter(made), most), told, most)):
            image, known = parts_of(text, item, position)
            of_pixels = known is not None and not isinstance(known, (dict, str)) and array_of(known).ndim > 1
            kept = self._keep(array_of(known)) if of_pixels else known
            self._items.append((self._keep(values_of(text, image, position)), kept))
        count = len(self._items)
        ends = f"the first {count} pictures, for more are not asked" if count == most else f"{count} pictures"
        self.told = f"{ends}, of a stream ({getattr(made, 'name', type(made).__name__)})"

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> tuple[npt.NDArray[Any], Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[npt.NDArray[Any], Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place, known = self._items[index]
        return self._read(place), self._read(known) if isinstance(known, _Place) else known

    def _keep(self, values: npt.NDArray[Any]) -> _Place:
        with explain_os_errors(Path(tempfile.gettempdir())):
            start = self._spool.seek(0, 2)
            self._spool.write(np.ascontiguousarray(values).data)
        return _Place(start, values.shape, values.dtype)

    def _read(self, place: _Place) -> npt.NDArray[Any]:
        self._spool.seek(place.start)
        size = int(np.prod(place.shape)) * place.dtype.itemsize
        return np.frombuffer(self._spool.read(size), place.dtype).reshape(place.shape)


def first_item(text: str, made: Any) -> Any:
    """The first item of a stream; raises ``ResvitError`` where it has none."""
    for item in made:
        return item
    raise ResvitError(f"{text} gave a stream that ends before its first item.", "Check what it is a part of.")
