"""YOLO's ``data.yaml``: where pictures lie, and what classes are called (https://docs.ultralytics.com/datasets)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_calibrate.readers.folders import plain_path
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.outside import leads_to_file, leads_to_folder, open_outside, read_outside, text_from_outside

_CLASSES_MOST = 32768
_HEAD_BYTES = 1 << 16
_MARKS = tuple(re.compile(rb"^%s\s*:" % key, re.MULTILINE) for key in (b"train", b"val(?:id)?", b"(?:names|nc)"))


@dataclass(frozen=True)
class YoloData:
    """What ``data.yaml`` says: pictures to train with and to validate with, classes, and numbers of a key point."""

    path: Path
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    names: tuple[str, ...]
    key_point_values: int
    classes: int
    """How many there are: those named, or ``nc`` alone; 0 where nothing says."""


def data_from_yaml(path: Path) -> YoloData:
    """What the file says. Raises ``ResvitError`` for what is no such file, and pictures that are not there."""
    document = _yaml(path)
    if not isinstance(document, Mapping):
        raise ResvitError(f"{path} holds no names with values.", how_it_is_written(path))
    base = path.parent
    said = document.get("path")
    if isinstance(said, str) and said.strip():
        # Where it is relative, Ultralytics takes it from its own folder of data sets; most often it is this one.
        base = next((place for place in (path.parent / said, Path(said)) if leads_to_folder(place)), path.parent)
    train = _places(path, base, document.get("train"), "train")
    validation = _places(path, base, document.get("val", document.get("valid")), "val")
    shape = document.get("kpt_shape")
    points = math.prod(shape) if isinstance(shape, list) and all(isinstance(size, int) for size in shape) else 0
    names, count = _names_of(path, document), document.get("nc")
    told = count if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= _CLASSES_MOST else 0
    return YoloData(path, train, validation, names, points, len(names) or told)


def describes_data(path: Path) -> bool:
    """Whether a YAML file has `train` and `val` and classes, as Ultralytics' have, by its first lines alone."""
    try:
        with open_outside(path) as stream:
            head = stream.read(_HEAD_BYTES)
    except (ResvitError, OSError):
        return False
    return all(mark.search(head) for mark in _MARKS)


def _places(path: Path, base: Path, said: Any, which: str) -> tuple[Path, ...]:
    """Folders and lists that are there, also where ``images/train`` is ``train/images`` instead.

    Roboflow's ``../train/images`` is looked for in the file's own folder too.
    """
    if said is None:
        return ()
    entries = said if isinstance(said, list) else [said]
    found = []
    for entry in entries:
        if not isinstance(entry, str) or not entry.strip() or "\0" in entry:
            raise ResvitError(f"{path}: `{which}` is {entry!r}.", how_it_is_written(path))
        text = entry.strip().replace("\\", "/")
        inner = re.sub(r"^(\.\./|\./)+", "", text)
        swapped = "/".join(reversed(inner.split("/"))) if inner.count("/") == 1 else inner
        places = [folder / form for form in (text, inner, swapped) for folder in (base, path.parent)]
        there = next((place for place in places if leads_to_folder(place) or leads_to_file(place)), None)
        if there is None:
            what = f"{path}: the `{which}` pictures {entry!r} are not there ({places[0]})."
            raise ResvitError(what, how_it_is_written(path))
        found.append(plain_path(there))
    return tuple(found)


def _names_of(path: Path, document: Mapping[Any, Any]) -> tuple[str, ...]:
    names, count = document.get("names"), document.get("nc")
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise ResvitError(f"{path}: `names` does not number its classes from 0.", how_it_is_written(path))
        names = [names[number] for number in range(len(names))]
    if names is None:
        return ()
    fits = isinstance(names, list) and 0 < len(names) <= _CLASSES_MOST
    if not fits or not all(isinstance(name, (str, int, float)) for name in names):
        raise ResvitError(f"{path}: `names` is no list of names.", how_it_is_written(path))
    if isinstance(count, int) and count != len(names):
        raise ResvitError(f"{path}: `nc` is {count}, and there are {len(names)} `names`.", how_it_is_written(path))
    return tuple(str(name) for name in names)


def names_from_yaml(path: Path) -> tuple[str, ...]:
    """The names of classes alone, wherever the pictures are; raises as ``data_from_yaml``."""
    document = _yaml(path)
    return _names_of(path, document) if isinstance(document, Mapping) else ()


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ResvitError(
            f"{path} is YAML, and PyYAML is not installed.", "Install it: pip install pyyaml", ExitCode.MISSING
        ) from error
    text = text_from_outside(read_outside(path), str(path), how_it_is_written(path))
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ResvitError(f"{path} refers to parts of itself (`*name`).", "Write them out.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ResvitError(
            f"{path} is no YAML: {' '.join(str(error).split())[:200]}.", how_it_is_written(path)
        ) from error


def how_it_is_written(path: Path) -> str:
    """What a ``data.yaml`` looks like, for messages."""
    name = path.name if path.suffix else "data.yaml"
    return f"{name} has `train: images/train`, `val: images/val` (folders, or lists of files) and `names: [cat, dog]`."
