"""Files that others named, before they are opened."""

from __future__ import annotations

import stat
from pathlib import Path

from resvit_engines.errors import ResvitError
from resvit_engines.outside import kind_of_file


def require_file(path: Path, what: str, option: str) -> None:
    """Refuse what cannot be read as a file from its beginning to its end, before anything waits for it.

    Raises:
        ResvitError: where nothing is there, or a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ResvitError(f"The {what} {path} does not exist.", f"Check the path given to {option}.") from error
    except OSError as error:
        raise ResvitError(
            f"The {what} {path} cannot be read: {error.strerror}.", f"Check the path given to {option}."
        ) from error
    if stat.S_ISDIR(mode):
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        raise ResvitError(
            f"The {what} {path} is a folder.",
            f"Give the file in it: {', '.join(inside[:5])}." if inside else "Give a file.",
        )
    if not stat.S_ISREG(mode):
        raise ResvitError(
            f"The {what} {path} is {kind_of_file(mode)}, not a file.", "Write the content to a file, and give that."
        )
