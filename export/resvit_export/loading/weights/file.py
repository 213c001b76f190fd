"""A checkpoint's file as tensors and plain values: the one place where such files are read.

Whatever is wrong with a file, it ends here as one kind of error that says what the file is and what to do.
"""

from __future__ import annotations

import argparse
import datetime
import io
import pathlib
import pickle
import struct
import types
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_export.loading.weights.pickle_bounds import PickleBoundsError, require_bounded_pickle
from resvit_export.loading.weights.regular_file import require_file
from resvit_export.loading.weights.shards import ENDING, read_shards

_LEGACY_PICKLES = 5
"""Magic number, protocol, the machine, the content, and the order of the storages: before PyTorch 1.6, one by one."""
_SAVE = "Where it was trained, save the weights alone: torch.save(model.state_dict(), path), or use safetensors."
_AGAIN = "The file is truncated, damaged or of another kind; copy or download it again."
_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b"}
_NUMBERS |= {"u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B", "b1": "<?"}


class _Dtype:
    """Stands for NumPy's dtype in a pickle: its own would take any state from the file, down to its element's size."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """The byte order and whatever else: nothing of it is believed."""


def _number(dtype: object, data: object) -> int | float | bool | None:
    """Stands for NumPy's scalars, such as a best accuracy: the number alone, None for what is no plain number."""
    form = _NUMBERS.get(str(dtype.code)) if isinstance(dtype, _Dtype) else None
    if form is None or not isinstance(data, bytes) or len(data) != struct.calcsize(form):
        return None
    value: int | float | bool = struct.unpack(form, data)[0]
    return value


class LostArray:
    """Stands for NumPy's arrays, such as a confusion matrix: weights are tensors, and nothing of it is kept."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


_SETTINGS: tuple[Any, ...] = (
    *(argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, pathlib.PurePosixPath),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta),
    *((_number, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    *((LostArray, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
    *((_Dtype, "numpy.dtype"), (LostArray, "numpy.ndarray"), _Dtype, LostArray),
)
"""What training scripts save beside the weights; these only keep what they are given."""
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS: the weights themselves are not here", "Run 'git lfs pull'."),
    (b"<!doctype", "is a web page, not weights", "Download the file itself; the page may ask for a login first."),
    (b"<html", "is a web page, not weights", "Download the file itself; the page may ask for a login first."),
    (b"<?xml", "is an XML document, not weights", "Download the file itself; the server may have answered an error."),
    (b"\x1f\x8b", "is compressed by gzip", "Unpack it first (gunzip, or tar xzf) and give what is in it."),
    (b"\xfd7zxz", "is compressed by xz", "Unpack it first (unxz, or tar xJf) and give what is in it."),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", "Unpack it first (unzstd) and give what is in it."),
    (b"bzh", "is compressed by bzip2", "Unpack it first (bunzip2) and give what is in it."),
    (b"\x89hdf", "is an HDF5 file, as Keras writes them", "Give weights that PyTorch can read."),
    (b"\x93numpy", "is an array of NumPy", "Give weights that torch.save or safetensors wrote."),
    (b"gguf", "is a GGUF file of quantised weights", "Give the float weights that it was made from."),
)
"""How files begin that are often taken for checkpoints, in lower case."""


def read_checkpoint(path: Path) -> Any:
    """The content of a file of safetensors or ``torch.save``, told apart by how they begin, never by their names.

    Of an index (``.index.json``) the content of all files that it names.

    Tensors and plain values come back; besides those namespaces, paths and NumPy's numbers are let through, since
    training scripts save their settings and scores beside the weights. Nothing in a file is run.

    Raises:
        ResvitError: for a file that is not there, is empty, damaged or another kind of file, that holds code, or is
            built to exhaust the reader.
    """
    require_file(path, "checkpoint", "--checkpoint")
    try:
        if path.name.endswith(ENDING):
            return read_shards(path, _read_file)
        return _read_file(path)
    except PermissionError as error:
        raise ResvitError(
            f"{path} cannot be read: permission denied.", "Change its permissions.", ExitCode.SYSTEM
        ) from error
    except (ResvitError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise _holds_code(path, error) if _is_about_code(error) else _unreadable(path, error) from error
    except Exception as error:  # what readers of damaged bytes raise has no end
        raise _unreadable(path, error) from error


def _read_file(path: Path) -> Any:
    require_file(path, "checkpoint", "--checkpoint")
    with path.open("rb") as stream:
        return _read(path, stream)


def _read(path: Path, stream: IO[bytes]) -> Any:
    size = path.stat().st_size
    if size == 0:
        raise ResvitError(f"The checkpoint {path} is empty (0 bytes).", "Copy or download the file again.")
    start = stream.read(64)
    stream.seek(0)
    plain = start.lstrip().lower()
    for begin, what, fix in _OTHERS:
        if plain.startswith(begin):
            raise ResvitError(f"{path} {what} ({size:,} bytes).", fix)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_archive(path, stream, size)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path, device="cpu")
    if start[:1] != b"\x80":
        raise ResvitError(
            f"{path} is no known checkpoint format ({size:,} bytes, beginning with {start[:8]!r}).",
            "Give a file of safetensors, or one written by torch.save(model.state_dict(), path).",
        )
    for _ in range(_LEGACY_PICKLES):
        require_bounded_pickle(stream)
    stream.seek(0)
    return _torch_load(stream)


def _read_archive(path: Path, stream: IO[bytes], size: int) -> Any:
    """What ``torch.save`` has written since PyTorch 1.6: one pickle, and the tensors' bytes as they are."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
    names = [member.filename.partition("/")[2] for member in members]
    _refuse_programs(path, names)
    if "data.pkl" not in names:
        told = ", ".join(member.filename[:60] for member in members[:3])
        raise ResvitError(
            f"{path} is no known checkpoint format: a zip archive of {told or 'nothing'}{', …' * (len(members) > 3)}.",
            "Give a file of safetensors, or one written by torch.save; unpack an archive that holds such a file.",
        )
    unpacked = sum(member.file_size for member in members)
    if unpacked > 2 * size + (1 << 20):
        raise ResvitError(
            f"{path} ({size:,} bytes) would unpack to {unpacked:,} bytes; torch.save compresses nothing.", _SAVE
        )
    stream.seek(0)
    # PyTorch's own reader of archives, so that both see the same bytes under that name.
    reader = torch._C.PyTorchFileReader(stream)
    require_bounded_pickle(io.BytesIO(reader.get_record("data.pkl")))
    stream.seek(0)
    return _torch_load(stream)


def _torch_load(stream: IO[bytes]) -> Any:
    with torch.serialization.safe_globals(list(_SETTINGS)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(stream, weights_only=True, map_location="cpu")


def _refuse_programs(path: Path, names: list[str]) -> None:
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise ResvitError(
            f"{path} is a TorchScript program, which cannot be read as weights.",
            "Save the weights with torch.save(model.state_dict(), path), or the program with torch.export.save.",
        )
    if any(name.startswith("models/") for name in names):
        raise ResvitError(
            f"{path} is an exported program, not a checkpoint.",
            "Give it as the model: --model program.pt2.",
        )


def _is_about_code(error: Exception) -> bool:
    return any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL"))


def _holds_code(path: Path, error: Exception) -> ResvitError:
    return ResvitError(
        f"{path} holds more than weights, and loading that would run code from the file: {_refused(error)}.", _SAVE
    )


def _refused(error: Exception) -> str:
    for word in str(error).replace("`", " ").split():
        if "." in word and not word.startswith(("http", "torch.load", "torch.serialization")) and word.count(".") < 8:
            name = word.strip(".,()[]'\"")
            if "." in name and all(part.isidentifier() for part in name.split(".")):
                return f"it refers to {name}"
    return "it refers to Python classes"


def _unreadable(path: Path, error: Exception) -> ResvitError:
    first = first_line(error)
    fix = _SAVE if isinstance(error, PickleBoundsError) else _AGAIN
    return ResvitError(f"{path} cannot be read as a checkpoint ({path.stat().st_size:,} bytes): {first}", fix)
