"""Files that others named, before they are opened."""

from __future__ import annotations

import stat
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.outside import FILE_MOST, TEXT_MOST, kind_of_file
from resvit_export.loading.weights.shards import ENDING

_MOST = {".onnx": 2 << 30, ".py": TEXT_MOST}
"""Bytes by ending; protobuf ends below 2 GiB."""


def require_file(path: Path, what: str, option: str) -> None:
    """Refuse what cannot be read as a file from its beginning to its end, before anything waits for it.

    Raises:
        ResvitError: where nothing is there, a folder, a pipe or a device, or more than a file of its ending may hold.
    """
    try:
        status = path.stat()
        mode, most = status.st_mode, _MOST.get(path.suffix, FILE_MOST)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ResvitError(f"The {what} {path} does not exist.", f"Check the path given to {option}.") from error
    except OSError as error:
        raise ResvitError(
            f"The {what} {path} cannot be read: {error.strerror}.", f"Check the path given to {option}."
        ) from error
    if stat.S_ISDIR(mode):
        kinds = (".safetensors", ".pt", ".pth", ".bin")
        inside = sorted(file.name for file in path.iterdir() if file.name.endswith(ENDING))
        inside = inside or sorted(file.name for file in path.iterdir() if file.suffix in kinds)
        raise ResvitError(
            f"The {what} {path} is a folder.",
            f"Give the file in it: {', '.join(inside[:5])}." if inside else "Give a file.",
        )
    if stat.S_ISREG(mode) and status.st_size > most:
        held = f"{most >> 30} GiB" if most >= 1 << 30 else f"{most >> 20} MiB"
        fix = "Save it with its weights beside it (save_as_external_data)." if path.suffix == ".onnx" else "Check it."
        raise ResvitError(f"The {what} {path} has {status.st_size:,} bytes: such a file holds at most {held}.", fix)
    if not stat.S_ISREG(mode):
        raise ResvitError(
            f"The {what} {path} is {kind_of_file(mode)}, not a file.", "Write the content to a file, and give that."
        )
