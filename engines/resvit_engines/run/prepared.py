"""Pictures as the network reads them, prepared as the bundle's manifest says: what was validated, by the same code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ResvitError
from resvit_engines.outside import read_outside
from resvit_engines.pictures.decode import SUFFIXES, eight_bits, reason
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_engines.pictures.sizes import Size
from resvit_engines.run.feeds import Array
from resvit_engines.run.npy import read_array, read_entry

_PICTURE_MOST = 1 << 30
"""Bytes of one picture file."""
_TOGETHER_MOST = 4 << 30
"""Bytes of all prepared images, and of an .npz file's."""
_NAMED = 5


class Listed(NamedTuple):
    """Picture files in the order in which they are prepared, and the names of what else lies beside them."""

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


NONE = Listed((), ())


def listed(source: Path) -> Listed:
    """The picture file ``source``, or the picture files of this folder in the order of their names.

    Nothing is listed of arrays, ``.npy`` and ``.npz``. Hidden files are passed over, folders inside are left out.

    Raises:
        ResvitError: INPUT for a folder without pictures.
    """
    if not source.is_dir():
        return Listed(() if source.suffix.lower() in (".npy", ".npz") else (source,), ())
    try:
        beside = sorted(file for file in source.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise ResvitError(f"{source} cannot be read: {error.strerror}.", "Give a folder that may be read.") from error
    files = tuple(file for file in beside if file.name.lower().endswith(SUFFIXES) and not file.is_dir())
    left_out = tuple(file.name for file in beside if file not in files)
    if not files:
        holds = f", but {', '.join(left_out[:_NAMED])}" if left_out else ""
        raise ResvitError(
            f"The folder {source} holds no pictures{holds}.",
            f"Give a folder of files that end in {', '.join(SUFFIXES)}.",
        )
    return Listed(files, left_out)


def images_from(source: Path, preprocess: Mapping[str, Any] | None, pictures: Listed | None = None) -> Array:
    """Images [N, C, h, w] from ``source``: an ``.npy`` of prepared ones, or what becomes them as ``preprocess`` says.

    That is a picture, a folder of pictures, or an ``.npz`` whose ``images`` [N, H, W] or [N, H, W, C] are not prepared,
    as for calibration. ``preprocess`` is the entry of that name in the bundle's manifest. ``pictures`` is
    ``listed(source)`` where that is known already, so that rows and names stay together.

    Raises:
        ResvitError: INPUT where it does not say how pictures are prepared, or one cannot be read; MISSING without
            Pillow, where pixels have to be decoded or change.
    """
    if source.suffix.lower() == ".npy":
        return read_array(source, "input")
    if source.suffix.lower() == ".npz":
        how = preprocess_from(preprocess)
        return _prepared_array(read_entry(source, "images", _TOGETHER_MOST), how, f"images of {source}")
    files = (pictures or listed(source)).files
    how = preprocess_from(preprocess)
    _require_room(len(files), how)
    return np.stack([_prepared(file, how) for file in files])


def preprocess_at(manifest: Manifest, size: Size | None, said: str = "--size") -> Mapping[str, Any] | None:
    """How pictures become input of a ``size``, or without one of the usual size; ``said`` is what it was given by.

    Raises:
        ResvitError: INPUT for a size that the bundle is not for.
    """
    if size is None or manifest.preprocess is None:
        return manifest.preprocess
    require_size(manifest, size, said)
    return {**manifest.preprocess, "size": list(size)}


def require_size(manifest: Manifest, size: Size, said: str = "--size") -> None:
    """Refuse images of a size that a bundle's engine is not built for, on whatever it runs; raises INPUT."""
    sizes = manifest.build.sizes if manifest.build else None
    if sizes is not None and not sizes.holds(size):
        raise ResvitError(
            f"The bundle is for images of {sizes} pixels (height x width), and these are {size[0]}x{size[1]}.",
            "Give images within, or build it with another --input-shape.",
        )
    if sizes is None and manifest.input is not None and manifest.input.shape[2:] != size:
        raise ResvitError(
            f"The bundle is for images of one size, {'x'.join(map(str, manifest.input.shape[2:]))} (height x width), "
            f"and not {size[0]}x{size[1]}.",
            f"Leave {said} out, or build it for a range: --input-shape 3x320..640x320..640.",
        )


def preprocess_from(preprocess: Mapping[str, Any] | None) -> PicturePreprocess:
    """The entry of that name of a bundle's manifest; raises INPUT where the maker's own code prepared the images."""
    if preprocess is None or "factory" in preprocess:
        by = f"by the maker's own code, {preprocess['factory']}" if preprocess else "by code that it does not name"
        raise ResvitError(
            f"The bundle does not say how pictures become input: its images were prepared {by}.",
            "Prepare them by that code and give them as .npy, float32 [N, C, H, W].",
        )
    return PicturePreprocess.from_json(preprocess)


def _require_room(count: int, how: PicturePreprocess) -> None:
    if 4 * how.channels * how.size[0] * how.size[1] * count > _TOGETHER_MOST:
        raise ResvitError(
            f"{count} pictures are more than {_TOGETHER_MOST >> 30} GiB when they are prepared.",
            "Give them in several parts, one after the other.",
        )


def _prepared(file: Path, how: PicturePreprocess) -> Array:
    data = read_outside(file, _PICTURE_MOST)
    try:
        return how.prepare(data)
    except ResvitError as error:
        raise ResvitError(f"{file}: {error.problem}", error.fix, error.code) from error
    except MemoryError:
        raise
    # A damaged file makes Pillow's many decoders raise nearly anything: OSError, SyntaxError, struct.error…
    except Exception as error:
        raise ResvitError(
            f"{file} cannot be read as a picture: {reason(error)}.", "Give pictures, or prepared images as .npy."
        ) from error


def _prepared_array(images: Array, how: PicturePreprocess, where: str) -> Array:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ResvitError(
            f"{where} have the shape {list(images.shape)}.",
            "Write pictures as [N, H, W] or [N, H, W, 1 or 3], and images that are prepared as .npy.",
        )
    _require_room(len(images), how)
    try:
        return np.stack([how.apply(eight_bits(image, how.white)) for image in images])
    except ValueError as error:
        raise ResvitError(f"{where}: {error}.", "Write them as they were for calibration.") from error
