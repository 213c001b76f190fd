"""Whose device this is: one fleet at a time installs here, and another is told so.

The claim lies below the root of installations, by a name that no model has. It keeps fleets apart that do not know of
each other; it keeps nobody out who may write there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError
from resvit_engines.files import (
    OPEN_FILE,
    OPEN_FOLDER,
    explain_os_errors,
    held_lock,
    make_folder,
    pretty_json,
    write_atomic,
)
from resvit_engines.names import NAME_MOST
from resvit_engines.records import Record, record_from_file

_FILE, _LOCK = ".fleet.json", ".fleet.lock"
_HOLDER = "[0-9a-f]{32}"
_DEVICE_MOST = 400


@dataclass(frozen=True)
class Claim:
    """A fleet's name, the 32 hexadecimal digits that its state folder has, what it calls this device, since when."""

    fleet: str
    holder: str
    device: str
    since: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Record) -> Claim:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            record.line("fleet", most=NAME_MOST),
            record.line("holder", _HOLDER),
            record.line("device", most=_DEVICE_MOST),
            record.line("since", most=40),
        )


def claimed(root: Path) -> Claim | None:
    """Who has claimed the device whose installations are below ``root``; None for nobody.

    Raises:
        ResvitError: INPUT for a claim that does not read.
    """
    path = root / _FILE
    return Claim.from_json(record_from_file(path)) if os.path.lexists(path) else None


def claim(root: Path, fleet: str, holder: str, device: str, *, take_over: bool = False) -> Claim:
    """Claim the device for a fleet, as often as it likes; ``take_over`` takes it from another.

    Raises:
        ResvitError: INPUT where another fleet has it, or this one by another name of the device.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    wanted = Claim.from_json(Record({"fleet": fleet, "holder": holder, "device": device, "since": now}, "the claim"))
    with _held(root):
        if not take_over and (there := claimed(root)) is not None:
            if there.holder == holder and there.device == device:
                return there
            raise _taken(there, wanted)
        write_atomic(root / _FILE, pretty_json(wanted.to_json()), OPEN_FILE)
    return wanted


def release(root: Path) -> Claim | None:
    """Take the claim away, whoever has it; returns what it was, None where there was none that reads."""
    if not os.path.lexists(root / _FILE):
        return None
    with _held(root):
        try:
            there = claimed(root)
        except ResvitError:
            there = None
        with explain_os_errors(root / _FILE):
            (root / _FILE).unlink(missing_ok=True)
    return there


def _taken(there: Claim, wanted: Claim) -> ResvitError:
    if there.holder == wanted.holder:
        return ResvitError(
            f"{wanted.device} is the same device as {there.device} of this fleet.",
            "Leave one of both addresses out of the fleet's file.",
        )
    other = "another state of this fleet" if there.fleet == wanted.fleet else f"the fleet {there.fleet}"
    return ResvitError(
        f"{wanted.device} is claimed by {other} since {there.since}, which calls it {there.device}.",
        "Take it out of one of both. To take it from the other: resvit-export fleet apply --take-over, or on the "
        "device resvit-engine claim --release.",
    )


@contextmanager
def _held(root: Path) -> Iterator[None]:
    with explain_os_errors(root):
        make_folder(root, OPEN_FOLDER)
    with held_lock(root / _LOCK, 0o600):
        yield
