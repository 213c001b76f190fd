"""Arrays from ``.npy`` files that others wrote.

A file is taken as numpy.save writes it (NEP 1): its header must be the three fields with their plain values, and the
file must hold as much as the header says. Nothing in it is executed, and no more memory is taken than the file has.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import open_outside
from resvit_engines.run.feeds import Array

_MAGIC = b"\x93NUMPY"
_HEADER_MOST = 64 << 10
_DIMENSIONS_MOST = 32
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

    def refused(why: str) -> ResvitError:
        return ResvitError(f"{path} cannot be read as an .npy file: {why}.", "Save it with numpy.save.")

    if not os.path.lexists(path):
        raise ResvitError(f"There is no {what} file {path}.", "Check the path.")
    with open_outside(path) as stream:
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
                f"{path} holds no array of numbers [N, …]: its header says neither type nor shape of one.",
                "Save it with numpy.save.",
            )
        kind, fortran, sizes = (fields[order.index(index)].decode() for index in range(3))
        shape = tuple(int(size.strip().rstrip("L")) for size in sizes.split(",") if size.strip())
        try:
            dtype = np.dtype(kind)
        except TypeError as error:
            raise refused(f"there is no type {kind}") from error
        if not 0 < len(shape) <= _DIMENSIONS_MOST:
            raise ResvitError(f"{path} holds no array of numbers [N, …].", "Save it with numpy.save.")
        held = os.fstat(stream.fileno()).st_size - stream.tell()
        if math.prod(shape) * dtype.itemsize > held:
            raise refused(f"an array {list(shape)} of {dtype} takes more than the {held} bytes that it holds")
        try:
            array = np.empty(shape, dtype, "F" if fortran == "True" else "C")
        except (MemoryError, ValueError) as error:
            raise ResvitError(
                f"{path} does not fit into the memory of this machine.", "Give fewer at once.", ExitCode.SYSTEM
            ) from error
        flat = array.reshape(-1, order="A").view(np.uint8) if array.size else np.empty(0, np.uint8)
        if stream.readinto(flat.data) != flat.nbytes:
            raise refused("it ends before its array does")
    return array
