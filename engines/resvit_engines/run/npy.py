"""Arrays from ``.npy`` files that others wrote, and from entries of ``.npz`` files.

A file is taken as numpy.save writes it (NEP 1): its header must be the three fields with their plain values, and the
file must hold as much as the header says. Nothing in it is executed, and no more memory is taken than the file has.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import cast

import numpy as np

from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError
from resvit_engines.outside import open_outside
from resvit_engines.run.feeds import Array

_MAGIC = b"\x93NUMPY"
_HEADER_MOST = 64 << 10
_DIMENSIONS_MOST = 32
_NAMED = 8
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, OSError, RuntimeError, ValueError)
"""What reading a damaged archive raises; RuntimeError where it is encrypted, or packed in a way that is not known."""
_ITEM = (
    rb"(?:'descr':\s*'([<>|=]?[fiub][0-9]{1,2})'|'fortran_order':\s*(True|False)"
    rb"|'shape':\s*\(((?:\s*[0-9]{1,18}L?\s*,)*(?:\s*[0-9]{1,18}L?)?)\s*\))"
)
_HEADER = re.compile(rb"\{\s*" + _ITEM + rb"\s*,\s*" + _ITEM + rb"\s*,\s*" + _ITEM + rb"\s*,?\s*\}\s*")


def read_array(path: Path, what: str) -> Array:
    """An array [N, …] of numbers from an ``.npy`` file.

    Raises:
        ResvitError: INPUT where it is missing, damaged, or no array of numbers; SYSTEM where memory does not suffice.
    """
    if not os.path.lexists(path):
        raise ResvitError(f"There is no {what} file {path}.", "Check the path.")
    with open_outside(path) as stream:
        return _array(stream, os.fstat(stream.fileno()).st_size, str(path))


def read_entry(path: Path, entry: str, most: int) -> Array:
    """The array ``entry`` [N, …] of numbers, of at most ``most`` bytes, from an ``.npz`` file.

    Raises:
        ResvitError: INPUT where it is missing, damaged, larger, or no array of numbers; SYSTEM as ``read_array``.
    """
    fix = "Write it with numpy.savez(path, images=…)."
    try:
        with open_outside(path) as stream, zipfile.ZipFile(stream) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if entry not in names:
                shown = ", ".join(sorted(names)[:_NAMED]) or "nothing"
                raise ResvitError(f"{path} has no entry `{entry}`; it has {shown}.", fix)
            size = archive.getinfo(f"{entry}.npy").file_size
            if size > most:
                raise ResvitError(f"{entry} of {path} takes {size} bytes; {most} are read at most.", "Give fewer.")
            with archive.open(f"{entry}.npy") as packed:
                return _array(cast("io.BufferedIOBase", packed), size, f"{entry} of {path}")
    except _DAMAGED as error:
        raise ResvitError(f"{path} cannot be read as an .npz file: {error}.", fix) from error


def _array(stream: io.BufferedIOBase, size: int, where: str) -> Array:
    """The array that ``stream`` holds in its ``size`` bytes; ``where`` names it in errors."""

    def refused(why: str) -> ResvitError:
        return ResvitError(f"{where} cannot be read as an .npy file: {why}.", "Save it with numpy.save.")

    head = stream.read(8)
    if len(head) < 8 or head[:6] != _MAGIC:
        raise refused("it does not begin as one")
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    header = _HEADER.fullmatch(stream.read(min(length, _HEADER_MOST)))
    fields = [group for group in header.groups() if group is not None] if header else []
    # One of each: a field that comes twice leaves another out.
    order = [index % 3 for index, group in enumerate(header.groups()) if group is not None] if header else []
    if sorted(order) != [0, 1, 2]:
        raise ResvitError(
            f"{where} holds no array of numbers [N, …]: its header says neither type nor shape of one.",
            "Save it with numpy.save.",
        )
    kind, fortran, sizes = (fields[order.index(index)].decode() for index in range(3))
    shape = tuple(int(size.strip().rstrip("L")) for size in sizes.split(",") if size.strip())
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise refused(f"there is no type {kind}") from error
    if not 0 < len(shape) <= _DIMENSIONS_MOST:
        raise ResvitError(f"{where} holds no array of numbers [N, …].", "Save it with numpy.save.")
    held = size - stream.tell()
    if math.prod(shape) * dtype.itemsize > held:
        raise refused(f"an array {list(shape)} of {dtype} takes more than the {held} bytes that it holds")
    try:
        array = np.empty(shape, dtype, "F" if fortran == "True" else "C")
    except (MemoryError, ValueError) as error:
        raise OutOfMemoryError(
            f"{where} does not fit into the memory of this machine.", "Give fewer at once.", ExitCode.SYSTEM
        ) from error
    flat = array.reshape(-1, order="A").view(np.uint8) if array.size else np.empty(0, np.uint8)
    if stream.readinto(flat.data) != flat.nbytes:
        raise refused("it ends before its array does")
    return array
