"""Images and labels from a NumPy ``.npz`` file, without loading the images and without pickle."""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from resvit_calibrate.images.pixels import ArrayPixels
from resvit_calibrate.images.targets import AS_USUAL, TargetOptions
from resvit_calibrate.readers import npz_targets
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.files import explain_os_errors

_FIX = (
    "Write it with numpy.savez(path, images=…, labels=…): images uint8 [N, H, W] or [N, H, W, 1 or 3] (or "
    "uint16 or floating-point, with --preprocess white=… where white is not 65535 or 1), labels integers [N]; or, "
    "instead of labels, masks integers [N, H, W], depth metres [N, H, W], or boxes [A, 4] "
    "with box_classes [A] and box_offsets [N + 1]; val_images and the like may follow."
)


def pixels_from_npz(path: Path, options: TargetOptions = AS_USUAL) -> tuple[ArrayPixels, ArrayPixels | None]:
    """Open ``images`` and what is known of them, and ``val_images`` and the like where they exist.

    The images are mapped into memory, compressed ones from a nameless temporary file, so that memory stays
    small whatever the size of the file. Raises ``ResvitError`` for a file, an entry, a type or a shape that
    cannot be used.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.removesuffix(".npy") for name in archive.namelist()}
            if "images" not in entries:
                raise ResvitError(f"{path} has no entry `images`; it has {', '.join(sorted(entries))}.", _FIX)
            names: tuple[str, ...] = ()
            if "class_names" in entries:
                names = npz_targets.class_names(_mapped(archive, "class_names", path), path)
            validation = None
            if "val_images" in entries:
                validation = _pair(archive, path, entries, "val_", options, names)
            first = _pair(archive, path, entries, "", options, names)
            first.notes += _note_of_unread(path, entries)
            return first, validation
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise ResvitError(f"{path} is not a usable .npz file: {error}.", _FIX) from error
    except OSError as error:
        raise ResvitError(f"{path} cannot be read: {error.strerror or error}.", _FIX) from error


def _pair(
    archive: zipfile.ZipFile,
    path: Path,
    entries: set[str],
    prefix: str,
    options: TargetOptions,
    names: tuple[str, ...],
) -> ArrayPixels:
    images = _mapped(archive, f"{prefix}images", path)
    where = f"{prefix}images of {path}"
    if images.dtype != np.uint8 and images.dtype.kind != "f" and images.dtype.newbyteorder("=") != np.uint16:
        raise ResvitError(f"{where} is of type {images.dtype}, not uint8, uint16 or floating-point.", _FIX)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape:
        raise ResvitError(f"{where} has the shape {list(images.shape)}, which is not one of images.", _FIX)
    name = f"{path.name} ({prefix}images)"
    known = [kind for kind in ("labels", *npz_targets.KINDS) if f"{prefix}{kind}" in entries]
    if len(known) > 1:
        raise ResvitError(
            f"{path} holds {' and '.join(prefix + kind for kind in known)}: more than one thing to be right about.",
            "Write one of them into a file of its own, with the images.",
        )
    if known and known[0] != "labels":
        arrays = {
            entry: _mapped(archive, f"{prefix}{entry}", path)
            for entry in npz_targets.ENTRIES
            if f"{prefix}{entry}" in entries
        }
        return npz_targets.pixels_from_arrays(name, images, known[0], arrays, options, names)
    labels = None
    if known:
        labels = _labels(_mapped(archive, f"{prefix}labels", path), len(images), f"{prefix}labels of {path}")
        if names and int(labels.max()) >= len(names):
            raise ResvitError(
                f"{prefix}labels of {path} holds {labels.max()}, but {len(names)} classes have names.", _FIX
            )
    return ArrayPixels(name, images, labels, names)


def _note_of_unread(path: Path, entries: set[str]) -> tuple[str, ...]:
    """That the file holds more than is read, such as a third part, or labels under another name; none if not."""
    prefixes = [prefix for prefix in ("", "val_") if f"{prefix}images" in entries]
    read = {f"{prefix}{entry}" for prefix in prefixes for entry in ("images", "labels", *npz_targets.ENTRIES)}
    left = sorted(entries - read - {"class_names"})
    used = " and ".join(f"{prefix}images" for prefix in prefixes)
    return (f"of {path} {used} and what belongs to them are read, {shortened(left)} not",) if left else ()


def _labels(values: npt.NDArray[Any], count: int, where: str) -> npt.NDArray[np.int64]:
    if values.shape == (count, 1):
        values = values[:, 0]
    if values.dtype.kind not in "iu" or values.shape != (count,):
        raise ResvitError(
            f"{where} has type {values.dtype} and shape {list(values.shape)}; {count} integers are needed.", _FIX
        )
    if int(values.min()) < 0 or int(values.max()) > np.iinfo(np.int32).max:
        raise ResvitError(f"{where} has the label {values.min() if values.min() < 0 else values.max()}.", _FIX)
    return values.astype(np.int64)


def _mapped(archive: zipfile.ZipFile, entry: str, path: Path) -> npt.NDArray[Any]:
    info = archive.getinfo(f"{entry}.npy")
    with archive.open(info) as packed:
        shape, fortran, dtype = _header(packed)
        if dtype.hasobject:
            raise ResvitError(
                f"{entry} of {path} is an array of Python objects, which would need pickle to run code.", _FIX
            )
        count = math.prod(shape)
        if not count:
            return np.empty(shape, dtype)
        order: Literal["C", "F"] = "F" if fortran else "C"
        if info.compress_type == zipfile.ZIP_STORED:
            if info.file_size - packed.tell() != count * dtype.itemsize:
                raise ResvitError(f"{entry} of {path} is cut short.", _FIX)
            start = _data_offset(path, info) + packed.tell()
            return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)
        with explain_os_errors(Path(tempfile.gettempdir())):
            spool = tempfile.TemporaryFile()  # noqa: SIM115 - the map below keeps it open
            shutil.copyfileobj(packed, spool, 1 << 20)
            spool.flush()
        if spool.tell() != count * dtype.itemsize:
            raise ResvitError(f"{entry} of {path} is cut short.", _FIX)
        return np.memmap(spool, dtype=dtype, mode="r", shape=shape, order=order)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: after its local header, whose name and extra field vary in length."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version} is for structured types")
    try:
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    # NumPy parses the header as Python, and whatever that raises has no end: TokenError, SyntaxError, TypeError…
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if any(not isinstance(side, int) or side < 0 for side in shape):
        raise ValueError(f"its header tells the shape {list(shape)}")
    return shape, fortran, dtype
