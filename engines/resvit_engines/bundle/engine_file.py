"""What can be told about an engine file without deserialising it: reading an engine runs code from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.records import record_from_file

_RTX_MAGIC = b"vtrt"
_FAMILY = b"trt"
_VERSION_AT = 24  # major, minor, patch, build, one byte each (NVIDIA/TensorRT issue 3073)


@dataclass(frozen=True)
class EngineFile:
    """Size, digest, and what the first bytes and the sidecar say.

    ``format`` is ``tensorrt-rtx``, ``tensorrt`` or ``unknown``; ``version`` is the builder's, from the header, or
    None; ``sidecar`` is the name of the JSON record beside it (``engine.json`` for ``engine.plan``) or None;
    ``sidecar_matches`` tells whether the record holds this file's digest, and ``target`` is the record's.
    """

    magic: str
    format: str
    version: str | None
    bytes: int
    sha256: str
    sidecar: str | None
    sidecar_matches: bool | None
    target: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def describe_engine_file(path: Path) -> EngineFile:
    """Describe an engine; nothing of the file is executed.

    Raises:
        ResvitError: INPUT where the file is absent or empty.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise ResvitError(f"{path} is not an engine file: it is absent or empty.", "Give the path of an engine.plan.")
    with path.open("rb") as stream:
        head = stream.read(_VERSION_AT + 4)
    known = head[1:4] == _FAMILY
    digest = sha256_file(path)
    sidecar = path.with_suffix(".json")
    report = _report(sidecar)
    return EngineFile(
        magic=head[:4].hex(),
        format=("tensorrt-rtx" if head[:4] == _RTX_MAGIC else "tensorrt") if known else "unknown",
        version=".".join(map(str, head[_VERSION_AT:])) if known and len(head) == _VERSION_AT + 4 else None,
        bytes=path.stat().st_size,
        sha256=digest,
        sidecar=sidecar.name if report else None,
        sidecar_matches=report.sha256 == digest if report else None,
        target=report.target if report else None,
    )


def _report(sidecar: Path) -> EngineReport | None:
    """The record beside an engine; None where that file is none of ours."""
    try:
        return EngineReport.from_json(record_from_file(sidecar))
    except ResvitError:
        return None
