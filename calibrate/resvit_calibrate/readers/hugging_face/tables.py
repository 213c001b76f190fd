"""Pictures in arrow and parquet files, by row: arrow files are mapped, of parquet what is asked for is unpacked."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import FILE_MOST, BrokenImage, FilePixels, file_bytes
from resvit_calibrate.readers.hugging_face.columns import Columns, columns_of
from resvit_calibrate.readers.hugging_face.places import Found
from resvit_calibrate.readers.hugging_face.reference import Wanted
from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_engines.files import explain_os_errors

if TYPE_CHECKING:
    import pyarrow as pa

_AGAIN = "Write it again with `save_to_disk`, or copy it again: it is damaged or not whole."
_ROWS = 64
_HIGHEST = 1e9
_MOST_ROWS = 1 << 31


class TablePixels(FilePixels):
    """Pictures of a column, in the order of files and rows."""

    def __init__(self, name: str, root: Path, files: Sequence[_File], roots: Sequence[Path], columns: Columns) -> None:
        super().__init__(name, root, _Titles(files), None, notes=columns.notes)
        self._files, self._roots = files, roots
        self._starts = list(itertools.accumulate((file.rows for file in files), initial=0))

    @property
    def first(self) -> Path:
        """The first file."""
        return self._files[0].path

    def fetch(self, numbers: Sequence[int]) -> None:
        """Unpack these rows of parquet files, each group of rows once."""
        by_file: dict[int, list[int]] = {}
        for number in numbers:
            place = bisect.bisect_right(self._starts, number) - 1
            by_file.setdefault(place, []).append(number - self._starts[place])
        for place, rows in by_file.items():
            self._files[place].fetch(rows)

    def bytes_of(self, index: int) -> bytes:
        """The bytes of one picture's file, as the row holds them or where it says that they lie."""
        place = bisect.bisect_right(self._starts, index) - 1
        with _told_as_broken():
            value = self._files[place].value(index - self._starts[place])
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes) and data:
            if len(data) > FILE_MOST:
                raise BrokenImage("it is longer than 2 GiB")
            return data
        if not isinstance(path, str) or not path:
            raise BrokenImage("the row holds no picture")
        return file_bytes(self._outside(path))

    def _outside(self, path: str) -> Path:
        """A picture that a row names by its path: it lies in the data set's own folder, or in the cache."""
        named = self.root / path
        real = named.resolve()
        if not any(real.is_relative_to(root.resolve()) for root in self._roots):
            raise ResvitError(
                f"{self.name} holds no pictures but their paths, which lead out of it: {path}.",
                "Name the folder of these pictures itself, or let `save_to_disk` put them into a data set.",
            )
        return real


class _File:
    """One arrow file, mapped into memory, or one parquet file, whose rows are unpacked once each when asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._parquet: pq.ParquetFile | None = None
        self._spool: Any = None
        self._places: dict[int, tuple[int, int, str | None]] = {}
        self._lock = threading.Lock()
        with _told(path):
            if path.suffix.lower() == ".parquet":
                self._parquet = pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
                self.schema: pa.Schema = self._parquet.schema_arrow
                self.rows = int(self._parquet.metadata.num_rows)
                groups = [self._parquet.metadata.row_group(n).num_rows for n in range(self._parquet.num_row_groups)]
                self._groups = list(itertools.accumulate(groups, initial=0))
            else:
                self._table = _arrow(path)
                self.schema, self.rows = self._table.schema, self._table.num_rows
        if not 0 <= self.rows < _MOST_ROWS:
            raise ResvitError(f"{path} says that it has {self.rows} rows.", _AGAIN)
        self._column: pa.ChunkedArray | None = None

    def use(self, image: str) -> None:
        """Choose the column of pictures; its offsets are checked, so that no row leads out of the file."""
        self.image = image
        if self._parquet is None:
            with _told(self.path):
                self._column = self._table.column(image)
                self._column.validate(full=True)
                self._chunks = list(itertools.accumulate((len(c) for c in self._column.chunks), initial=0))

    def column(self, column: str) -> pa.ChunkedArray:
        """A whole column of numbers, texts or objects."""
        with _told(self.path):
            if self._parquet is None:
                found = self._table.column(column)
            else:
                found = self._parquet.read(columns=[column]).column(column)
            found.validate(full=True)
            return found

    def value(self, row: int) -> Any:
        """What the column of pictures holds in a row: bytes, or a dictionary of bytes and path."""
        if self._column is not None:
            chunk = bisect.bisect_right(self._chunks, row) - 1
            return self._column.chunk(chunk)[row - self._chunks[chunk]].as_py()
        if row not in self._places:
            self.fetch([row])
        start, size, path = self._places[row]
        with self._lock:
            self._spool.seek(start)
            return {"bytes": self._spool.read(size), "path": path}

    def fetch(self, rows: Sequence[int]) -> None:
        """Copy the pictures of these rows of a parquet file into a nameless file; others are passed over."""
        if self._parquet is None:
            return
        with self._lock, _told(self.path):
            missing = sorted({row for row in rows if row not in self._places})
            by_group: dict[int, list[int]] = {}
            for row in missing:
                by_group.setdefault(bisect.bisect_right(self._groups, row) - 1, []).append(row)
            for group, wanted in by_group.items():
                self._unpack(group, wanted)

    def _unpack(self, group: int, wanted: list[int]) -> None:
        assert self._parquet is not None
        first, waiting = self._groups[group], iter(wanted)
        row = next(waiting, None)
        batches = self._parquet.iter_batches(_ROWS, row_groups=[group], columns=[self.image], use_threads=False)
        for batch in batches:
            column = batch.column(0)
            column.validate(full=True)
            while row is not None and row < first + len(column):
                value = column[row - first].as_py()
                data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                self._keep(row, data or b"", path)
                row = next(waiting, None)
            first += len(column)
            if row is None:
                return
        raise ResvitError(f"{self.path} ends before its row {row}.", _AGAIN)

    def _keep(self, row: int, data: bytes, path: str | None) -> None:
        with explain_os_errors(Path(tempfile.gettempdir())):
            if self._spool is None:
                self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - kept as long as its pictures are read
            start = self._spool.seek(0, 2)
            self._spool.write(data)
        self._places[row] = (start, len(data), path)


class _Titles(Sequence[str]):
    """What a row is called, made when it is asked for: a data set may have millions."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files
        self._starts = list(itertools.accumulate((file.rows for file in files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = bisect.bisect_right(self._starts, index) - 1
        return f"row {index - self._starts[place]} of {self._files[place].path.name}"


def pixels_from_tables(found: Found, part: str, wanted: Wanted) -> tuple[TablePixels, Columns, list[Any]]:
    """The pictures of one part, with their classes where a column has them; and what it has of boxes, row by row.

    Raises ``ResvitError`` where pyarrow is missing, a file is damaged, columns are missing or ambiguous, or some rows
    have no class.
    """
    _require_pyarrow()
    files = [_File(path) for path in found.parts[part]]
    columns = columns_of(files[0].schema, wanted)
    for file in files:
        lacking = [
            name
            for name in (columns.image, columns.label, columns.objects)
            if name is not None and name not in file.schema.names
        ]
        if lacking:
            raise ResvitError(f"{file.path} lacks the column {lacking[0]!r} that {files[0].path} has.", _AGAIN)
        file.use(columns.image)
    rows = sum(file.rows for file in files)
    if part in found.counts and found.counts[part] != rows:
        raise ResvitError(f"{found.name} ({part}) has {rows} rows where {found.counts[part]} are described.", _AGAIN)
    if not rows:
        raise ResvitError(f"{found.name} ({part}) has no rows.", "Choose another part, or another data set.")
    name = found.name if len(found.parts) == 1 else f"{found.name} ({part})"
    pixels = TablePixels(name, files[0].path.parent, files, found.roots, columns)
    if columns.label is not None:
        _label(pixels, columns, [file.column(columns.label) for file in files], wanted.label is not None)
    if columns.objects is None:
        return pixels, columns, []
    return pixels, columns, [item for file in files for item in file.column(columns.objects).to_pylist()]


def _label(pixels: TablePixels, columns: Columns, values: Sequence[pa.ChunkedArray], asked: bool) -> None:
    """Classes of every row; ``asked``: the user names their column, so that it must hold some."""
    said = [item for part in values for item in part.to_pylist()]
    absent = [row for row, item in enumerate(said) if _is_absent(item)]
    if len(absent) == len(said):
        pixels.notes += (f"no picture of {pixels.name} has a class in {columns.label!r}: nothing is known of them",)
        return
    if absent:
        raise ResvitError(
            f"{len(absent)} of {len(said)} rows of {pixels.name} have no class in {columns.label!r}, the first is row "
            f"{absent[0]}.",
            "Leave them out: `dataset.filter(lambda row: row['label'] >= 0)`, then `save_to_disk`.",
        )
    names = columns.names
    if isinstance(said[0], float):
        if (fraction := _first_fraction(said)) is not None:
            told = f"the column {columns.label!r} of {pixels.name} holds {fraction!r}, which is no class"
            if asked:
                raise ResvitError(f"{told[0].upper()}{told[1:]}.", "Choose another with `label=`, or leave it out.")
            pixels.notes += (f"{told}: nothing is known of its pictures",)
            return
        said = [int(item) for item in said]
    if isinstance(said[0], str):
        names = tuple(sorted(set(said)))
        places = {name: number for number, name in enumerate(names)}
        labels: npt.NDArray[np.int64] = np.array([places[item] for item in said], np.int64)
    else:
        labels = np.array(said, np.int64)
    if labels.min() < 0 or labels.max() > (len(names) - 1 if names else np.iinfo(np.int32).max):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        told = f", and {len(names)} classes have names" if names else ""
        raise ResvitError(f"{pixels.name} holds the class {wrong} in {columns.label!r}{told}.", _AGAIN)
    pixels.labels, pixels.task = labels, "classification"
    pixels.class_names, pixels.num_classes = names, len(names) or None


def _first_fraction(said: Sequence[Any]) -> Any:
    """The first of numbers with a point that is no whole number; None where all are, as pandas makes of classes."""
    fits = (isinstance(item, float) and item.is_integer() and abs(item) < _HIGHEST for item in said)
    return next((item for item, whole in zip(said, fits, strict=True) if not whole), None)


def _is_absent(item: Any) -> bool:
    return item is None or item == -1 or (isinstance(item, float) and math.isnan(item))


def _arrow(path: Path) -> pa.Table:
    """An arrow file of either form: a stream, as ``datasets`` writes it, or a file with an index."""
    import pyarrow as pa

    with path.open("rb") as stream:
        indexed = stream.read(6) == b"ARROW1"
    source = pa.memory_map(str(path), "r")
    opened = pa.ipc.open_file(source) if indexed else pa.ipc.open_stream(source)
    return opened.read_all()


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ResvitError(
            f"Reading a data set of Hugging Face's needs pyarrow: {error}.",
            "pip install 'resvit-export[datasets]'.",
            ExitCode.MISSING,
        ) from error


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        text = first_line(error)
        raise ResvitError(f"{path} cannot be read: {text}.", _AGAIN) from error


@contextlib.contextmanager
def _told_as_broken() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise BrokenImage(str(error)[:200]) from error
