"""Where the files of a data set lie: in a folder that ``save_to_disk`` wrote, among parquet files, or in the caches.

Layouts are those of https://github.com/huggingface/datasets and of the hub's cache. Nothing is downloaded, and a
loading script is never run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_calibrate.readers.folders import name_inside
from resvit_calibrate.readers.hugging_face.reference import FORM, Wanted
from resvit_calibrate.readers.paired import shortened
from resvit_engines.errors import ResvitError
from resvit_engines.outside import json_from_outside, leads_to_file, leads_to_folder, read_outside

ENDINGS = (".arrow", ".parquet")
_SHARD = re.compile(r"(?P<name>.+)-[0-9]{5}-of-[0-9]{5}(-[0-9a-f]+)?")
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WHOLE = "all"
"""The part of a data set that is not divided."""
_MOST_FILES, _DEEPEST = 100_000, 4
_LOOKED_AT = 2000
_SAVE = "Write it with `dataset.save_to_disk(FOLDER)`, and name that folder."


@dataclass(frozen=True)
class Found:
    """The files of each part, in order; ``counts`` are the rows that its own description says each part has.

    ``roots`` are the folders that pictures, which rows name by their paths, may lie in.
    """

    name: str
    parts: dict[str, tuple[Path, ...]]
    roots: tuple[Path, ...]
    counts: dict[str, int]
    notes: tuple[str, ...] = ()


def is_saved(root: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return leads_to_file(root / "dataset_dict.json") or (
        leads_to_file(root / "dataset_info.json") and leads_to_file(root / "state.json")
    )


def has_files(root: Path) -> bool:
    """Whether parquet or arrow files lie in a folder, or not far below: told by its first entries, level by level."""
    seen, level = 0, [root]
    for _ in range(_DEEPEST):
        below: list[Path] = []
        for folder in level:
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in itertools.islice(entries, _LOOKED_AT - seen):
                    seen += 1
                    if entry.name.endswith(ENDINGS):
                        return True
                    if entry.is_dir():
                        below.append(folder / entry.name)
        level = below
    return False


def found_at(wanted: Wanted) -> Found:
    """The files of a data set by its path, else by its name in the caches.

    Raises ``ResvitError`` where there is none, where there are several, and where only a loading script is.
    """
    path = Path(wanted.where).expanduser()
    if leads_to_file(path):
        return _of_file(path)
    if leads_to_folder(path):
        return _of_folder(path, wanted)
    return _in_cache(wanted)


def caches() -> tuple[Path, Path]:
    """The folders in which the ``datasets`` library and the hub's client keep what they once loaded."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME") or base / "huggingface").expanduser()
    sets = os.environ.get("HF_DATASETS_CACHE") or home / "datasets"
    hub = os.environ.get("HF_HUB_CACHE") or home / "hub"
    return Path(sets).expanduser(), Path(hub).expanduser()


def _of_file(path: Path) -> Found:
    if path.suffix.lower() not in ENDINGS:
        raise ResvitError(f"{path} is neither a parquet nor an arrow file.", FORM)
    return Found(path.name, {WHOLE: (path,)}, (path.parent,), {})


def _of_folder(root: Path, wanted: Wanted) -> Found:
    described = root / "dataset_dict.json"
    if leads_to_file(described):
        document = _described(described)
        splits = document.get("splits")
        if not isinstance(splits, list) or not splits:
            raise ResvitError(f"{described} names no splits.", _SAVE)
        names = [name_inside(name, f"A split of {described}", _SAVE) for name in splits]
        return Found(root.name, {name: _saved(root / name) for name in names}, (root,), {})
    if is_saved(root):
        return Found(root.name, {WHOLE: _saved(root)}, (root,), {})
    each = [folder for folder in _folders_in(root) if next(folder.glob("*.arrow"), None) is not None]
    if any(is_saved(folder) for folder in each):
        return Found(root.name, {folder.name: _saved(folder) for folder in each}, (root,), {})
    if built := _built_below(root):
        return _of_cache(root, built, wanted)
    files = list(_files_below(root, ".parquet"))
    if files:
        return _of_parquet(root, files, wanted)
    scripts = sorted(file.name for file in root.glob("*.py"))
    if scripts:
        raise ResvitError(
            f"{root} holds a loading script ({shortened(scripts)}) and no data: a script is never run.", _SAVE
        )
    raise ResvitError(
        f"{root} is no data set of Hugging Face's: it has neither dataset_dict.json, nor dataset_info.json, nor "
        "parquet files.",
        f"{_SAVE} Folders of pictures are named without `hf-dataset:`.",
    )


def _saved(folder: Path) -> tuple[Path, ...]:
    """The arrow files that ``state.json`` names, in its order."""
    state = folder / "state.json"
    if not leads_to_file(state):
        raise ResvitError(f"{folder} has no state.json: the data set is not whole.", _SAVE)
    listed = _described(state).get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise ResvitError(f"{state} names no files.", _SAVE)
    names = [name_inside(item.get("filename"), f"A file of {state}", _SAVE) for item in listed]
    missing = [name for name in names if not leads_to_file(folder / name)]
    if missing:
        raise ResvitError(f"{folder} lacks {shortened(missing)}, which its state.json names.", _SAVE)
    return tuple(folder / name for name in names)


def _of_parquet(root: Path, files: list[Path], wanted: Wanted) -> Found:
    """Parquet files by part; folders that are no parts are configurations."""
    configs: dict[str, list[Path]] = {}
    for file in files:
        above = file.relative_to(root).parts[:-1]
        own = next((name for name in above if name != "data" and _PARTS.get(name.lower()) is None), "")
        configs.setdefault(own, []).append(file)
    chosen = _config(configs, str(root), wanted)
    parts: dict[str, list[Path]] = {}
    for file in configs[chosen]:
        parts.setdefault(_part_of(file.relative_to(root)), []).append(file)
    return Found(root.name, {name: tuple(sorted(part)) for name, part in parts.items()}, (root,), {})


def _part_of(file: Path) -> str:
    """The part that a file is of, by its own name, else by its folder's."""
    shard = _SHARD.fullmatch(file.stem)
    name = shard["name"] if shard else file.stem
    for text in (name, *reversed(file.parts[:-1])):
        words = re.split(r"[^A-Za-z]+", text.lower())
        known = next((_PARTS[word] for word in words if word in _PARTS), None)
        if known is not None:
            return known
    return name if shard else WHOLE


def _in_cache(wanted: Wanted) -> Found:
    sets, hub = caches()
    names = {_plain(folder.name): folder for folder in _folders_in(sets)}
    folder = names.get(_plain(wanted.where.replace("/", "___")))
    if folder is not None and (built := _built_below(folder)):
        return _of_cache(folder, built, wanted)
    snapshot = _snapshot(hub / f"datasets--{wanted.where.replace('/', '--')}")
    if snapshot is not None:
        found = _of_folder(snapshot, wanted)
        return Found(wanted.where, found.parts, (*found.roots, hub), found.counts, found.notes)
    held = sorted(folder.name.replace("___", "/") for folder in names.values())
    there = f"it has {shortened(held)}" if held else "it is empty or not there"
    raise ResvitError(
        f"There is no folder {wanted.where}, and no data set of that name in the cache {sets} ({there}); nothing is "
        "downloaded.",
        f"Load it once where there is a network, `datasets.load_dataset({wanted.where!r})`, and copy the cache or name "
        "the folder that `save_to_disk` writes.",
    )


def _of_cache(root: Path, built: list[Path], wanted: Wanted) -> Found:
    """One of the data sets that ``load_dataset`` built: of the configuration that is meant, the newest."""
    configs: dict[str, list[Path]] = {}
    for folder in built:
        above = folder.relative_to(root).parts
        # NAME/CONFIG/VERSION/DIGEST, of which the user may have named any folder.
        configs.setdefault(above[-3] if len(above) >= 3 else "", []).append(folder)
    chosen = configs[_config(configs, wanted.where, wanted)]
    newest = max(chosen, key=lambda folder: folder.stat().st_mtime)
    parts: dict[str, list[Path]] = {}
    for file in sorted(newest.glob("*.arrow")):
        if file.name.startswith(("cache-", "tmp")):
            continue  # what `map` and `filter` left there
        shard = _SHARD.fullmatch(file.stem)
        name = shard["name"] if shard else file.stem
        parts.setdefault(name.rpartition("-")[2] or WHOLE, []).append(file)
    if not parts:
        raise ResvitError(f"{newest} holds no arrow files.", "Load the data set again, or name another folder.")
    splits = _described(newest / "dataset_info.json").get("splits")
    counts = {
        name: said["num_examples"]
        for name, said in (splits.items() if isinstance(splits, dict) else ())
        if isinstance(said, dict) and isinstance(said.get("num_examples"), int)
    }
    notes = (f"of {len(chosen)} versions of {wanted.where} the newest is read: {newest}",) if len(chosen) > 1 else ()
    sets, hub = caches()
    return Found(wanted.where, {name: tuple(part) for name, part in parts.items()}, (newest, sets, hub), counts, notes)


def _config(configs: dict[str, list[Path]], where: str, wanted: Wanted) -> str:
    if wanted.config is not None:
        if wanted.config in configs:
            return wanted.config
        raise ResvitError(
            f"{where} has no configuration {wanted.config!r}.",
            f"It has: {shortened(sorted(filter(None, configs)))}." if any(configs) else "Leave `config=` out.",
        )
    if len(configs) > 1:
        names = sorted(filter(None, configs))
        raise ResvitError(
            f"{where} has several configurations: {shortened(names)}.",
            f"Say which: `{wanted.saying(config=names[0])}`.",
        )
    return next(iter(configs))


def _built_below(root: Path) -> list[Path]:
    """Folders that ``load_dataset`` finished: ``dataset_info.json`` beside arrow files."""
    found = []
    for file in _files_below(root, "dataset_info.json"):
        whole = not file.parent.name.endswith(".incomplete") and not is_saved(file.parent)
        if whole and next(file.parent.glob("*.arrow"), None) is not None:
            found.append(file.parent)
    return found


def _files_below(root: Path, ending: str) -> Iterator[Path]:
    """Files of visible names not deeper than the layouts have them, sorted by their paths."""
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if depth < _DEEPEST else []
        found += [Path(folder, name) for name in files if name.endswith(ending) and not name.startswith(".")]
        if len(found) > _MOST_FILES:
            raise ResvitError(f"{root} holds more than {_MOST_FILES} such files.", "Name one data set of them.")
    yield from sorted(found)


def _snapshot(folder: Path) -> Path | None:
    """What the hub's client last fetched of a data set."""
    snapshots = _folders_in(folder / "snapshots")
    if not snapshots:
        return None
    main = folder / "refs" / "main"
    named = read_outside(main, 1 << 10).decode("ascii", "replace").strip() if leads_to_file(main) else ""
    return next((one for one in snapshots if one.name == named), snapshots[-1])


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _plain(name: str) -> str:
    """Names of folders differ from the hub's in case, and in what stands between words."""
    return re.sub(r"[-_.]", "", name.replace("___", "/")).lower()


def _described(path: Path) -> dict[str, Any]:
    document = json_from_outside(read_outside(path), str(path), _SAVE)
    if not isinstance(document, dict):
        raise ResvitError(f"{path} holds no object.", _SAVE)
    return document
