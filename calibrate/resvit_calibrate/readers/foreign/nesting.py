"""A folder above the data: it holds one folder, in which the data are."""

from __future__ import annotations

from pathlib import Path

from resvit_calibrate.readers.folders import class_names, files_below, is_image
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError

_DEEPEST = 8


def refuse_nested(root: Path) -> None:
    """Refuse a folder whose pictures all lie in one folder that has folders itself: that would be the only class.

    Raises:
        ResvitError: with the folder to name.
    """
    held = root
    for _ in range(_DEEPEST):
        only = _only_folder(held)
        if only is None:
            break
        held = only
    if held != root and (inner := _with_pictures(held)):
        raise ResvitError(
            f"{root} holds only `{held.relative_to(root)}`, with the folders {shortened(list(inner))}.",
            f"Name that folder: {held}; or say `folder:{root}` if all of it is one class.",
        )


def _only_folder(folder: Path) -> Path | None:
    """The one folder that has pictures in it, where it has folders with pictures and nothing lies beside it."""
    if next((name for name in folder.iterdir() if is_image(name.name) and name.is_file()), None) is not None:
        return None
    names = _with_pictures(folder)
    return folder / names[0] if len(names) == 1 and _with_pictures(folder / names[0]) else None


def _with_pictures(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in class_names(folder) if next(files_below(folder, name, is_image), None) is not None)
