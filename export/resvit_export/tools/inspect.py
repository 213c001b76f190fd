"""Say what a file is: which kind, how large, what is inside; for people as tables, for programs as JSON."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file
from resvit_export.report.layout import wording
from resvit_export.tools import describe
from resvit_export.tools.describe_onnx import describe_onnx

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

ROWS = 30
"""Rows of a table shown to people; ``--json`` has them all."""
_ENGINE_SUFFIXES = (".plan", ".engine", ".trt")
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_KINDS = (
    "a checkpoint (.pt, .pth, .safetensors), an exported program (.pt2), ONNX, an engine (.plan) or a bundle (.resvit)"
)


def describe_file(path: Path, trust: Path | None = None) -> dict[str, Any]:
    """Describe ``path`` by its content: plain JSON values, with ``kind``, ``file``, ``bytes`` and ``sha256`` in front.

    ``trust`` is a public key's file, or a folder of them, by which a bundle's signature is verified; None stands for
    the keys that are trusted on this machine.

    Raises ``ResvitError`` for a file that is missing, empty, truncated, damaged or of no known kind.
    """
    if path.is_dir():
        raise ResvitError(f"{path} is a folder.", f"Give a file: {_KINDS}.")
    if not path.is_file():
        raise ResvitError(f"{path} does not exist.", "Check the path.")
    if path.stat().st_size == 0:
        raise ResvitError(f"{path} is empty (0 bytes).", "Copy it again or write it anew.")
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
        reader = _reader_for(path, head)
        details = describe.describe_bundle(path, trust) if reader is describe.describe_bundle else reader(path)
        digest = details.pop("sha256", None) or sha256_file(path)
    except PermissionError as error:
        raise ResvitError(
            f"{path} cannot be read: permission denied.", "Change its permissions.", ExitCode.SYSTEM
        ) from error
    front = {"kind": details.pop("kind"), "file": str(path), "bytes": path.stat().st_size, "sha256": digest}
    return {**front, **{key: value for key, value in details.items() if key not in front}}


def render(description: Mapping[str, Any], brief: bool = False) -> list[RenderableType]:
    """Turn a description into rich tables: the facts, then each list as its own; ``brief`` leaves the lists out."""
    from rich.table import Table

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    tables: list[RenderableType] = [facts]
    for key, value in description.items():
        title = key.replace("_", " ")
        if _is_table(value):
            if brief:
                facts.add_row(title, _cell("count", len(value)))
            else:
                tables.append(_table(title, value))
        elif key == "operators" and isinstance(value, Mapping):
            rows = [{"operator": name, "nodes": count} for name, count in value.items()]
            if not brief:
                tables.append(_table(title, rows))
        elif value not in (None, [], {}, ""):
            facts.add_row(title, _cell(key, value))
    return tables


def _reader_for(path: Path, head: bytes) -> Callable[[Path], dict[str, Any]]:
    suffix = path.suffix.lower()
    if head.startswith(b"PK\x03\x04"):
        return _reader_for_zip(path)
    if head[1:4] == b"trt" or suffix in _ENGINE_SUFFIXES:
        return describe.describe_engine
    if suffix == ".safetensors" or head[8:9] == b"{":
        return describe.describe_safetensors
    if suffix == ".resvit":
        return describe.describe_bundle
    if suffix == ".pt2":
        raise describe.damaged(path, "an exported program", "it is not an archive")
    if suffix in _CHECKPOINT_SUFFIXES:
        return describe.describe_checkpoint
    if suffix == ".onnx" or head[:1] == b"\x08":  # field 1 of a ModelProto, ir_version, as a varint
        return describe_onnx
    raise ResvitError(f"{path} is no kind of file that is known here.", f"Give {_KINDS}.")


def _reader_for_zip(path: Path) -> Callable[[Path], dict[str, Any]]:
    if path.suffix.lower() == ".resvit":
        return describe.describe_bundle
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise describe.damaged(path, "an archive", error) from error
    inner = [name.partition("/")[2] for name in names]
    if names[:1] == ["manifest.json"]:
        return describe.describe_bundle
    if "archive_format" in inner or path.suffix.lower() == ".pt2":
        return describe.describe_program
    if "data.pkl" in inner:
        return describe.describe_checkpoint
    raise ResvitError(f"{path} is an archive of no kind that is known here.", f"Give {_KINDS}.")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    left = f"; {len(rows) - ROWS:,} more with --json" if len(rows) > ROWS else ""
    table = Table(title=Text(f"{title}{left}", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(Text(column.replace("_", " ")), justify="right" if numeric else "left", overflow="fold")
    for row in rows[:ROWS]:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    return table


def _cell(key: str, value: Any) -> RenderableType:
    """File content is shown as it is: no console markup is read from it, and no control characters pass."""
    from rich.text import Text

    if key.endswith("bytes") and isinstance(value, int):
        text = f"{value:,} ({wording.size(value)})"
    elif key == "shape" and isinstance(value, list):
        text = wording.shape(value) if value else "scalar"
    elif isinstance(value, int) and not isinstance(value, bool) and not key.endswith("version"):
        text = f"{value:,}"
    else:
        text = wording.plain(value)
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))
