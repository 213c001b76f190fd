"""What can be told about an engine file without deserialising it: reading an engine runs code from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.files import sha256_file

_RTX_MAGIC = b"vtrt"
_FAMILY = b"trt"
_VERSION_AT = 24  # major, minor, patch, build, one byte each (NVIDIA/TensorRT issue 3073)


def describe_engine_file(path: Path) -> dict[str, Any]:
    """Size, digest, and what the first bytes and the sidecar say. Nothing of the file is executed.

    ``format`` is ``tensorrt-rtx``, ``tensorrt`` or ``unknown``; ``version`` is the builder's, from the header, or
    None; ``sidecar`` is the name of the JSON record beside it (``engine.json`` for ``engine.plan``) or None;
    ``sidecar_matches`` tells whether the record holds this file's digest (None where it holds none).

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
    record = _record(sidecar)
    recorded = record.get("sha256") if record else None
    return {
        "magic": head[:4].hex(),
        "format": ("tensorrt-rtx" if head[:4] == _RTX_MAGIC else "tensorrt") if known else "unknown",
        "version": ".".join(map(str, head[_VERSION_AT:])) if known and len(head) == _VERSION_AT + 4 else None,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "sidecar": sidecar.name if record is not None else None,
        "sidecar_matches": recorded == digest if recorded else None,
        "target": record.get("target") if record else None,
    }


def _record(sidecar: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(sidecar.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
