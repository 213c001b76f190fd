"""What people have as files and is not read, each named for what it is, with what to do instead."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

from resvit_engines.errors import ResvitError
from resvit_engines.outside import leads_to_file

_FUNCTION = "Read it in a function that returns a Dataset, and name that: --data file.py:function (docs/tasks.md)."
_UNPACK = "Unpack it, and name the folder."


class _Other(NamedTuple):
    what: str
    fix: str
    starts: tuple[bytes, ...] = ()
    endings: tuple[str, ...] = ()


_OTHERS = (
    _Other("an HDF5 file", _FUNCTION, (b"\x89HDF\r\n\x1a\n",), (".h5", ".hdf5")),
    _Other("a file of TensorFlow's records", _FUNCTION, (), (".tfrecord", ".tfrecords", ".tfrec")),
    _Other("a database of SQLite's", _FUNCTION, (b"SQLite format 3\0",), ()),
    _Other("a pickle, which would run code to be read", _FUNCTION, (), (".pkl", ".pickle")),
    _Other("a file of MATLAB's", _FUNCTION, (b"MATLAB 5.0",), (".mat",)),
    _Other("one NumPy array without labels", "Write it with numpy.savez(path, images=…, labels=…).", (b"\x93NUMPY",)),
    _Other("an archive", _UNPACK, (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c"), (".rar", ".7z")),
    _Other(
        "compressed",
        f"{_UNPACK} Tar files are read as they are.",
        (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"),
    ),
    _Other("a network and no images", "Name it with --model.", (), (".onnx", ".pt2", ".engine", ".plan", ".trt")),
    _Other("weights and no images", "Name them with --checkpoint.", (), (".pt", ".pth", ".ckpt", ".safetensors")),
)


def refuse_other_files(path: Path, start: bytes) -> None:
    """Refuse a file by its first bytes, its ending, or what a ZIP archive holds. Raises ``ResvitError``."""
    for other in _OTHERS:
        if start.startswith(other.starts) or path.suffix.lower() in other.endings:
            raise ResvitError(f"{path} is {other.what}.", other.fix)
    if start.startswith(b"PK") and path.suffix.lower() != ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()[:1000]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ResvitError(f"{path} is a ZIP archive that cannot be opened: {error}.", _UNPACK) from error
        if not any(name.endswith(".npy") for name in names):
            raise ResvitError(f"{path} is a ZIP archive, with {names[0] if names else 'nothing'} in it.", _UNPACK)


def refuse_databases(root: Path) -> None:
    """Refuse a folder that is an LMDB. Raises ``ResvitError``."""
    if leads_to_file(root / "data.mdb"):
        raise ResvitError(
            f"{root} is an LMDB.", f"{_FUNCTION} There is an example, examples/lmdb, whose keys may be yours."
        )
