"""A checkpoint in several files, as Hugging Face writes large ones: an index that says in which file each weight is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.outside import TEXT_MOST, json_from_outside, open_outside, read_to_end

ENDING = ".index.json"
"""How the names of such indexes end."""
_MOST_FILES = 1000
_FIX = "Give the index that was saved with the weights, model.safetensors.index.json, beside all of its files."


def shards_of(index: Path) -> dict[str, list[str]]:
    """Names of the weights by the name of the file, in the index's own folder, that holds them.

    Raises:
        ResvitError: for what is no such index, and for files in other folders.
    """
    with open_outside(index, f"the checkpoint's index {index}") as stream:
        document = json_from_outside(read_to_end(stream, TEXT_MOST), str(index), _FIX)
    named = document.get("weight_map") if isinstance(document, Mapping) else None
    if not isinstance(named, Mapping) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ResvitError(f"{index} does not say which weights are in which file (weight_map).", _FIX)
    files: dict[str, list[str]] = {}
    for weight, file in named.items():
        if Path(file).name != file or file in ("", "..") or "\\" in file or not file.isprintable():
            raise ResvitError(f"{index} names {file[:80]!r}, which is no file of its own folder.", _FIX)
        files.setdefault(file, []).append(weight)
    if len(files) > _MOST_FILES:
        raise ResvitError(f"{index} names {len(files):,} files; up to {_MOST_FILES:,} are read.", _FIX)
    return files


def shard_files(index: Path) -> dict[str, Path]:
    """The files that an index names and that are there, by name; none of what is no index: its reader says why."""
    if not index.name.endswith(ENDING):
        return {}
    try:
        files = {name: index.parent / name for name in sorted(shards_of(index))}
    except ResvitError:
        return {}
    return {name: file for name, file in files.items() if file.is_file()}


def read_shards(index: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """All weights that an index names, from files that ``read`` takes.

    Raises:
        ResvitError: as ``shards_of`` and ``read``, and for a file that does not hold what the index says.
    """
    weights: dict[str, Any] = {}
    for file, names in shards_of(index).items():
        held = read(index.parent / file)
        lacking = [name for name in names if not isinstance(held, Mapping) or name not in held]
        if lacking:
            raise ResvitError(
                f"{index.parent / file} does not hold {lacking[0]}, which {index.name} says it does.",
                "Copy the index and all of its files again: they are of one kind.",
            )
        weights |= {name: held[name] for name in names}
    return weights
