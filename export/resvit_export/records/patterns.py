"""What was measured of regions by pattern, on a kind of device with its software: where the next network starts.

One file for each kind of device below ``$XDG_CACHE_HOME/resvit/tuning``; removing it loses nothing but time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.bench.compare import Ratio
from resvit_engines.errors import ResvitError
from resvit_engines.files import (
    cache_folder,
    canonical_json,
    explain_os_errors,
    held_lock,
    make_folder,
    pretty_json,
    sha256_bytes,
    write_atomic,
)
from resvit_engines.progress import Reporter
from resvit_engines.records import record_from_file
from resvit_export.records.place import Place

_MOST = 4000
"""Patterns in one file; those that were not measured for longest go first."""


@dataclass(frozen=True)
class KnownPattern:
    """How many times as fast a region was in 8 bits, and who told it.

    ``network`` is the digest of the quantised network, ``floats`` that of the one in floats that it was made from, by
    which it is the same after another calibration; empty where that was not written.
    """

    faster: Ratio
    network: str
    floats: str = ""


def patterns_file(place: Place) -> Path:
    """The file of a kind of device: its hardware, and the versions of what builds and runs engines there."""
    name = "".join(c if c.isalnum() else "-" for c in str(place.kind.get("gpu") or place.kind.get("processor") or ""))
    kind = sha256_bytes(canonical_json(place.kind))[:12]
    return cache_folder("tuning") / f"{name[:40].strip('-') or 'device'}-{kind}.json"


def known_patterns(place: Place, without: str, reporter: Reporter) -> dict[str, KnownPattern]:
    """What other quantised networks than ``without`` told of patterns.

    A file that cannot be read is said, and holds nothing.
    """
    file = patterns_file(place)
    if not os.path.lexists(file):
        return {}
    try:
        found = _read(file)
    except ResvitError as error:
        reporter.warn(f"What was measured before is not used: {error.problem} Remove {file}.")
        return {}
    return {pattern: known for pattern, known in found.items() if known.network != without}


def keep_patterns(
    place: Place, network: str, measured: Mapping[str, Ratio], reporter: Reporter, floats: str = ""
) -> None:
    """Add what was measured of a quantised ``network`` made from ``floats``, both digests.

    Where the file cannot be written that is said, and the tuning stands.
    """
    file = patterns_file(place)
    try:
        with _locked(file):
            before: dict[str, KnownPattern] = {}
            if os.path.lexists(file):
                with contextlib.suppress(ResvitError):
                    before = _read(file)
            for pattern, ratio in measured.items():
                before.pop(pattern, None)
                before[pattern] = KnownPattern(ratio, network, floats)
            newest = dict(list(before.items())[-_MOST:])
            write_atomic(file, pretty_json(_document(place, newest)))
    except ResvitError as error:
        reporter.warn(f"What was measured is not kept for other networks: {error.problem}")


def _document(place: Place, patterns: Mapping[str, KnownPattern]) -> dict[str, Any]:
    rows = [
        {"pattern": pattern, "faster": known.faster.to_json(), "network": known.network, "floats": known.floats}
        for pattern, known in patterns.items()
    ]
    return {"device": place.kind, "patterns": rows}


def _read(file: Path) -> dict[str, KnownPattern]:
    rows = record_from_file(file).records("patterns")
    return {
        row.text("pattern"): KnownPattern(
            Ratio.from_json(row.record("faster")), row.sha256("network"), row.optional("floats", row.text) or ""
        )
        for row in rows
    }


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with explain_os_errors(file):
        make_folder(file.parent)
    with held_lock(file.with_suffix(".lock"), 0o600):
        yield
