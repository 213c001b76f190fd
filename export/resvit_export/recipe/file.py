"""The recipe as a TOML file, and the paths in it."""

from __future__ import annotations

import difflib
import enum
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.outside import expanded, leads_to_folder, read_outside, text_from_outside
from resvit_export.recipe.recipe import SETTINGS, Recipe
from resvit_export.recipe.setting import Place, Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_RECIPE_MOST = 1 << 20
_TABLES = (
    *("model", "data", "preprocess", "task", "prune", "quantize"),
    *("recover", "search", "validate", "target", "targets", "bundle"),
)
"""The order in which they are written."""
_NETWORKS = ("resvit:", "timm:", "hf:", "object:")


def recipe_from_toml(path: Path) -> Recipe:
    """Read a recipe file. Relative paths in it are relative to the folder that it lies in.

    Raises ``ResvitError`` for a missing or malformed file, an unknown key or a value that its setting refuses.
    """
    return recipe_from_document(document_from_toml(path, "recipe", "Check the path given to --recipe."), path)


def document_from_toml(path: Path, what: str, if_absent: str) -> dict[str, Any]:
    """The content of a TOML file, ``what`` it should be; ``if_absent`` is what to do where there is none.

    Raises ``ResvitError`` for a missing or malformed file.
    """
    if not os.path.lexists(path):
        raise ResvitError(f"There is no {what} at {path}.", if_absent)
    name = f"The {what} {path}"
    text = text_from_outside(read_outside(path, _RECIPE_MOST, name), name, "Give a UTF-8 TOML file.")
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and so are dates that do not exist
        raise ResvitError(f"{name} is not valid TOML: {error}.", "Mend that line.") from error
    return document


def recipe_from_document(document: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe of a document's tables; ``path`` is the file that they are from. Raises as ``recipe_from_toml``."""
    return Recipe(**_settings_from_document(document, path))


def recipe_to_toml(recipe: Recipe) -> str:
    """Write the complete recipe: every setting that has a value."""
    import tomli_w

    document: dict[str, Any] = {}
    for item in sorted(SETTINGS.values(), key=lambda item: _TABLES.index(item.table)):
        value = getattr(recipe, item.name)
        if value is None or (item.name in ("targets", "own_targets") and not value):
            continue
        *tables, key = item.toml.split(".")
        table = document
        for name in tables:
            table = table.setdefault(name, {})
        alone = item.many and item.also is not None and len(value) == 1
        table[key] = value[0] if alone else _plain(value)
    return tomli_w.dumps(document)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _settings_from_document(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    by_key = {item.toml: item for item in SETTINGS.values()}
    flat: dict[str, Any] = {}
    for table, content in document.items():
        if table in by_key or not isinstance(content, dict):
            flat[table] = content
        else:
            flat.update({f"{table}.{key}": value for key, value in content.items()})
    settings = {}
    for key, value in flat.items():
        if key not in by_key:
            near = difflib.get_close_matches(key, by_key, n=3, cutoff=0.4)
            raise ResvitError(
                f"The recipe {path} has a setting that does not exist: {key}.",
                f"Did you mean {', '.join(near)}?" if near else f"It can have: {', '.join(sorted(by_key))}.",
            )
        item = by_key[key]
        settings[item.name] = absolute(item, item.checked(value, f"In the recipe {path}, {key}"), path.parent)
    return settings


def absolute(item: Setting, value: Any, folder: Path) -> Any:
    """The value with its path made absolute, where the setting is one; an empty text stays."""
    if item.place is None or not value:
        return value
    return {Place.FILE: absolute_file, Place.REFERENCE: absolute_reference}[item.place](value, folder)


def absolute_file(text: str, folder: Path) -> str:
    """Make the path of a file absolute; ``agent`` and ``agent:COMMENT``, which name a key, stay."""
    if re.fullmatch(r"agent(:.*)?", text):
        return text
    return str((folder / expanded(text)).resolve())


def absolute_reference(text: str, folder: Path) -> str:
    """Make the path part of a model or data reference absolute; names such as ``timm:NAME`` stay.

    A reference is a path when it names something that exists below ``folder`` or ends like a file; in
    ``file.py:factory`` only the file is a path.
    """
    head, colon, tail = text.rpartition(":")
    if head == "hf" and leads_to_folder(named := folder / expanded(tail)):
        return f"hf:{named.resolve()}"
    if colon and head.endswith(".py"):
        return f"{(folder / expanded(head)).resolve()}:{tail}"
    if colon and not text.startswith(_NETWORKS):
        from resvit_calibrate.data.naming import absolute_source

        if (named_data := absolute_source(text, folder)) is not None:
            return named_data
    path = folder / expanded(text)
    looks_like_path = text.startswith(("/", "./", "../", "~")) or "/" in text
    if path.exists() or (looks_like_path and ":" not in text) or text.endswith((".pt", ".pth", ".npz", ".onnx")):
        return str(path.resolve())
    return text
