"""What a fleet remembers: which release goes out, how far each device is, and the engines that were built.

One SQLite file in the fleet's folder. Each change of a device is one row, written in one transaction, so that a kill at
any moment leaves the state before or after it, and 10,000 devices cost ten times what 1,000 cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors, make_folder, open_lock
from resvit_engines.records import Record, record_from_bytes

DATABASE = "state.db"
_FORMAT = 1
_TEXT_MOST = 4000
_SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE devices (name TEXT PRIMARY KEY, place INTEGER NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE builds (key TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
"""


class Status(enum.Enum):
    """Where a device is on its way to the release."""

    WAITING = "waiting"
    AT_WORK = "at work"
    RUNS = "runs it"
    FAILED = "failed"
    BACK = "went back"
    BLOCKED = "blocked"
    UNREACHABLE = "unreachable"


class Phase(enum.Enum):
    """Where a release is."""

    GOING_OUT = "going out"
    OUT = "out"
    GOING_BACK = "going back"
    STOPPED = "stopped"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True)
class DeviceState:
    """One device. ``may_run`` tells that the release may be what runs there, as version ``digest`` of ``model``.

    ``before`` is the digest of what ran before; ``problem`` and ``fix`` say why it does not run the release;
    ``latency_ms`` was measured by the health check; ``facts`` is a line about the device; ``when`` is in UTC.
    ``owes_after`` tells that the version there was switched, or may have been, and the user's command after the switch
    has not ended well since.
    """

    name: str
    type: str
    status: Status = Status.WAITING
    wave: int | None = None
    may_run: bool = False
    model: str | None = None
    digest: str | None = None
    before: str | None = None
    latency_ms: float | None = None
    problem: str = ""
    fix: str = ""
    facts: str = ""
    when: str = ""
    owes_after: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "status": self.status.value}

    @classmethod
    def from_json(cls, record: Record) -> DeviceState:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            record.line("name"),
            record.name("type"),
            record.choice("status", Status),
            record.optional("wave", lambda key: record.whole(key, 1, 1000)),
            record.flag("may_run"),
            record.optional("model", record.name),
            record.optional("digest", record.sha256),
            record.optional("before", record.sha256),
            record.optional("latency_ms", lambda key: record.number(key, 0)),
            record.text("problem"),
            record.text("fix"),
            record.text("facts"),
            record.text("when"),
            record.optional("owes_after", record.flag) or False,  # states before it was kept
        )


@dataclass(frozen=True)
class ReleaseState:
    """The release that goes out: its digest ``id``, a ``label`` for people, and how far it is.

    ``pinned`` is the registry's reference held to its content, where it comes from one; ``soaked`` counts the waves
    that were checked once more.
    """

    id: str
    label: str
    phase: Phase
    wave: int
    started: str
    reason: str = ""
    pinned: str | None = None
    soaked: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "phase": self.phase.value}

    @classmethod
    def from_json(cls, record: Record) -> ReleaseState:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            record.sha256("id"),
            record.text("label"),
            record.choice("phase", Phase),
            record.whole("wave", 0, 1000),
            record.text("started"),
            record.text("reason"),
            record.optional("pinned", record.line),
            record.whole("soaked", 0, 1000),
        )


@dataclass(frozen=True)
class Built:
    """An engine that one device of a kind built: the bundle's file name, its digests, and the latency there in ms."""

    file: str
    sha256: str
    digest: str
    device: str
    latency_ms: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Record) -> Built:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(
            record.file_name("file"),
            record.sha256("sha256"),
            record.sha256("digest"),
            record.line("device"),
            record.optional("latency_ms", lambda key: record.number(key, 0)),
        )


def now() -> str:
    """This moment, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class FleetState:
    """The state in one folder. Its methods may be called by several threads; ``devices`` are in the file's order."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._connection = connection
        self._lock = threading.Lock()
        self._devices: dict[str, DeviceState] = {}

    @property
    def holder(self) -> str:
        """The 32 hexadecimal digits by which devices know this state."""
        return Record({"holder": self._fact("holder")}, self._where).line("holder", "[0-9a-f]{32}")

    @property
    def devices(self) -> tuple[DeviceState, ...]:
        """Every device, in the order of the fleet's file."""
        with self._lock:
            return tuple(self._devices.values())

    def device(self, name: str) -> DeviceState:
        """One device."""
        with self._lock:
            return self._devices[name]

    @property
    def release(self) -> ReleaseState | None:
        """The release that goes out, or went out last."""
        text = self._fact("release")
        return None if text is None else ReleaseState.from_json(record_from_bytes(text.encode(), self._where))

    @release.setter
    def release(self, release: ReleaseState) -> None:
        self._write("INSERT OR REPLACE INTO facts VALUES ('release', ?)", [(_text(release.to_json()),)])

    def set_devices(self, listed: Sequence[tuple[str, str]]) -> list[str]:
        """Take over which devices there are, as (name, type); returns those that are in the fleet no more.

        What is known of the others stays; one that has another type begins anew.
        """
        with self._lock:
            known = self._devices
            self._devices = {
                name: known[name] if name in known and known[name].type == kind else DeviceState(name, kind)
                for name, kind in listed
            }
            gone = [name for name in known if name not in self._devices]
            self._transaction(
                ("DELETE FROM devices", None),
                ("INSERT INTO devices VALUES (?, ?, ?)", self._rows()),
            )
        return gone

    def begin(self, release: ReleaseState) -> None:
        """Another release, or the same once more: every device waits for it; what runs where, the devices tell."""
        with self._lock:
            self._devices = {
                name: DeviceState(
                    name,
                    device.type,
                    facts=device.facts,
                    latency_ms=device.latency_ms,
                    owes_after=device.owes_after,
                )
                for name, device in self._devices.items()
            }
            self._transaction(
                ("DELETE FROM devices", None),
                ("INSERT INTO devices VALUES (?, ?, ?)", self._rows()),
                ("INSERT OR REPLACE INTO facts VALUES ('release', ?)", [(_text(release.to_json()),)]),
            )

    def change(self, name: str, **changes: Any) -> DeviceState:
        """Write what became of one device; returns it."""
        with self._lock:
            old = self._devices[name]
            new = dataclasses.replace(old, when=now(), **changes)
            self._transaction(("UPDATE devices SET record = ? WHERE name = ?", [(_text(new.to_json()), name)]))
            self._devices[name] = new
        return new

    def built(self, key: str) -> Built | None:
        """The engine with this key, if one was built."""
        with self._lock, _explained(self.folder):
            row = self._connection.execute("SELECT record FROM builds WHERE key = ?", (key,)).fetchone()
        return None if row is None else Built.from_json(record_from_bytes(str(row[0]).encode(), self._where))

    def keep_built(self, key: str, built: Built) -> None:
        """Remember an engine."""
        self._write("INSERT OR REPLACE INTO builds VALUES (?, ?)", [(key, _text(built.to_json()))])

    def latency_of(self, digest: str) -> tuple[float, str] | None:
        """The latency in ms that was recorded for a version, and on which device."""
        text = self._fact(f"latency:{digest}")
        if text is None:
            return None
        record = record_from_bytes(text.encode(), self._where)
        return record.number("ms", 0), record.line("device")

    def record_latency(self, digest: str, device: str, latency_ms: float) -> tuple[float, str]:
        """Record the latency of a version, unless there is one; returns the one that holds."""
        text = _text({"ms": latency_ms, "device": device})
        self._write("INSERT OR IGNORE INTO facts VALUES (?, ?)", [(f"latency:{digest}", text)])
        return self.latency_of(digest) or (latency_ms, device)

    @property
    def _where(self) -> str:
        return str(self.folder / DATABASE)

    def _rows(self) -> list[tuple[str, int, str]]:
        return [(name, place, _text(device.to_json())) for place, (name, device) in enumerate(self._devices.items())]

    def _fact(self, key: str) -> str | None:
        with self._lock, _explained(self.folder):
            row = self._connection.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        with self._lock:
            self._transaction((statement, rows))

    def _transaction(self, *work: tuple[str, Sequence[tuple[Any, ...]] | None]) -> None:
        with _explained(self.folder), self._connection:
            for statement, rows in work:
                if rows is None:
                    self._connection.execute(statement)
                else:
                    self._connection.executemany(statement, rows)

    def _load(self, alone: bool) -> None:
        with _explained(self.folder):
            rows = self._connection.execute("SELECT record FROM devices ORDER BY place").fetchall()
        for (text,) in rows:
            device = DeviceState.from_json(record_from_bytes(str(text).encode(), self._where))
            if alone and device.status is Status.AT_WORK:  # whoever worked on it was killed
                device = dataclasses.replace(device, status=Status.WAITING)
            self._devices[device.name] = device


@contextlib.contextmanager
def opened_state(folder: Path, *, alone: bool) -> Iterator[FleetState]:
    """The state in ``folder``, made where it is missing; ``alone`` keeps others out while it is changed.

    Raises:
        ResvitError: INPUT where it is damaged, of a newer version, or not there and only looked at; SYSTEM where
            another command works on this fleet, or the disk is full.
    """
    path = folder / DATABASE
    if not alone and not os.path.lexists(path):
        raise ResvitError(
            f"Nothing has been applied to this fleet yet: there is no {path}.", "Run: resvit-export fleet apply FILE"
        )
    with contextlib.ExitStack() as owned:
        if alone:
            owned.enter_context(_alone(folder))
        with _explained(folder):
            connection = sqlite3.connect(path, timeout=30, isolation_level="IMMEDIATE", check_same_thread=False)
            owned.callback(connection.close)
            # What the last seconds before a power cut changed may be lost, which the devices then tell again.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA trusted_schema = OFF")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and alone:
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_FORMAT}; COMMIT;")
                with connection:
                    connection.execute("INSERT INTO facts VALUES ('holder', ?)", (secrets.token_hex(16),))
                version = _FORMAT
        if version != _FORMAT:
            raise ResvitError(
                f"{path} is of format {version}, and this version reads format {_FORMAT}.",
                "Use the version that wrote it, or name another folder as the fleet's state.",
            )
        state = FleetState(folder, connection)
        state._load(alone)
        yield state


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with explain_os_errors(folder):
        make_folder(folder)
        lock = open_lock(folder / ".lock", 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ResvitError(
            f"Another command works on the fleet in {folder}.", "Wait until it ends, or end it.", ExitCode.SYSTEM
        ) from error
    finally:
        os.close(lock)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into a problem and a fix."""
    try:
        yield
    except sqlite3.Error as error:
        said = str(error)
        if "full" in said:
            raise ResvitError(
                f"The disk is full: {folder / DATABASE} could not be written. Nothing was damaged.",
                "Free some space and run the same command again.",
                ExitCode.SYSTEM,
            ) from error
        if "unable to open" in said or "readonly" in said or "locked" in said or "disk I/O" in said:
            raise ResvitError(
                f"{folder / DATABASE} cannot be used: {said}.", "Check its folder and permissions.", ExitCode.SYSTEM
            ) from error
        raise ResvitError(
            f"{folder / DATABASE} is not a fleet's state: {said}.",
            "Restore it, or move it away: the devices tell what they run, and apply --take-over claims them anew.",
        ) from error


def _text(document: dict[str, Any]) -> str:
    short = {key: value[:_TEXT_MOST] if isinstance(value, str) else value for key, value in document.items()}
    return json.dumps(short, allow_nan=False)
