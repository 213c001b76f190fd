"""Where installed versions lie, and what is remembered of them.

::

    ROOT/NAME/versions/3f2a90c1d4e5/   the unpacked bundle, named by the digest of its manifest
    ROOT/NAME/current -> versions/3f2a90c1d4e5
    ROOT/NAME/state.json               what was installed, in order
    ROOT/NAME/.lock

The link ``current`` alone decides what runs. ``state.json`` is written before the link is switched; if power is lost
between the two, its last entry is one that never ran, and the entry that ``current`` names tells so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import (
    OPEN_FILE,
    OPEN_FOLDER,
    explain_os_errors,
    make_folder,
    open_lock,
    pretty_json,
    write_atomic,
)
from resvit_engines.names import is_name, require_name
from resvit_engines.outside import leads_to_folder
from resvit_engines.records import Record, record_from_file

ROOT_VARIABLE = "RESVIT_ROOT"
KEEP = 3
"""Versions that are kept, with the current one."""
_HISTORY = 50
_VERSION = re.compile(r"[0-9a-f]{12}(\.\d{1,4})?")
_STATE = "state.json"


@dataclass(frozen=True)
class Version:
    """One installed version: its folder's name, release, the key that signed it and when it was installed (UTC).

    ``rehearsal`` tells that it was installed on a machine that stands in for the device.
    """

    version: str
    release: int
    digest: str
    key: str
    keyid: str
    installed: str
    rehearsal: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Record) -> Version:
        """What :meth:`to_json` wrote."""
        version = record.text("version")
        if not _VERSION.fullmatch(version):
            raise record.refusal("version", "the name of a version")
        return cls(
            version,
            record.whole("release"),
            record.sha256("digest"),
            record.text("key"),
            record.text("keyid"),
            record.text("installed"),
            record.optional("rehearsal", record.flag) or False,
        )


@dataclass(frozen=True)
class State:
    """What is installed under one name. ``history`` holds what is still there, in order, up to the current version."""

    name: str
    current: str | None
    history: tuple[Version, ...]
    highest_release: int
    """Of all that were ever installed; -1 for none."""
    problem: str = ""
    """Why the rest could not be read, if so."""

    @property
    def running(self) -> Version | None:
        """The version that ``current`` links to, if the state knows it."""
        return self.history[-1] if self.history and self.history[-1].version == self.current else None

    @property
    def previous(self) -> Version | None:
        """What a rollback returns to: the version before the current one."""
        return next((v for v in reversed(self.history[:-1]) if v.version != self.current), None)


def default_root() -> Path:
    """Where versions are installed unless told otherwise."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/resvit")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "resvit"


def model_folder(root: Path, name: object) -> Path:
    """The folder of one model; a name that could lead elsewhere is refused with INPUT."""
    return root / require_name(name, "The name to install under,")


def installed_names(root: Path) -> list[str]:
    """The names under which something is installed."""
    if not leads_to_folder(root):
        return []
    return sorted(path.name for path in root.iterdir() if is_name(path.name) and (path / "versions").is_dir())


def read_state(folder: Path) -> State:
    """Read what is installed in a model's folder.

    Raises:
        ResvitError: INPUT where ``state.json`` or ``current`` is not what an installation left.
    """
    path, current = folder / _STATE, current_version(folder)
    if not path.exists():
        return State(folder.name, current, (), -1)
    try:
        record = record_from_file(path)
        history = tuple(map(Version.from_json, record.records("history")))
        highest = max([record.whole("highest_release"), *(entry.release for entry in history)])
        if record.text("name") != folder.name:
            raise record.refusal("name", folder.name)
    except ResvitError as error:
        fix = f"Look at {folder}; to begin anew, move it away and install again."
        raise ResvitError(error.problem, fix) from error
    while history and history[-1].version != current:
        history = history[:-1]
    history = tuple(entry for entry in history if (folder / "versions" / entry.version).is_dir())
    return State(folder.name, current, history, highest)


def write_state(folder: Path, state: State) -> None:
    """Write ``state.json`` durably: it holds when power is lost right after."""
    document = {
        "format": 1,
        "name": state.name,
        "highest_release": state.highest_release,
        "history": [entry.to_json() for entry in state.history[-_HISTORY:]],
    }
    write_atomic(folder / _STATE, pretty_json(document), OPEN_FILE)
    sync_folder(folder)


def current_version(folder: Path) -> str | None:
    """The name of the folder that ``current`` links to; None where there is no link."""
    try:
        linked = (folder / "current").readlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _strange_link(folder) from error
    if linked.parent != Path("versions") or not _VERSION.fullmatch(linked.name):
        raise _strange_link(folder)
    return linked.name


def switch_current(folder: Path, version: str) -> None:
    """Point ``current`` at a version in one step that holds when power is lost: before it the old one, then the new."""
    link = folder / f".current.{os.getpid()}.tmp"
    with explain_os_errors(folder / "current"):
        link.unlink(missing_ok=True)
        link.symlink_to(Path("versions") / version)
        link.replace(folder / "current")
        sync_folder(folder)


def sync_tree(folder: Path) -> None:
    """Have every file and folder below ``folder``, and it itself, written to the disk."""
    for at, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(at) / name)
        sync_folder(Path(at))


def sync_folder(folder: Path) -> None:
    """Have a folder's own entries written to the disk."""
    _sync(folder)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a model's folder alone; ``waiting`` is called once if another installation has to be waited for."""
    with explain_os_errors(folder):
        make_folder(folder, OPEN_FOLDER)
        for place in (folder, folder / "versions"):
            if place.is_dir() and place.stat().st_uid == os.geteuid():
                place.chmod(OPEN_FOLDER)  # an older version left it to the umask
        sync_folder(folder.parent)
        sync_folder(folder.parent.parent)
        # Who can open it could hold it for ever.
        handle = open_lock(folder / ".lock", 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch_version(folder: Path) -> Iterator[Path]:
    """A new folder among the versions for one that is not whole yet; what is left of it afterwards is removed."""
    versions = folder / "versions"
    with explain_os_errors(versions):
        make_folder(versions, OPEN_FOLDER)
        scratch = Path(tempfile.mkdtemp(prefix=".new.", suffix=".tmp", dir=versions))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what installations that were killed left behind; call it with the lock held."""
    for left in (*folder.glob("versions/.*.tmp"), *folder.glob(".*.tmp")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def prune(folder: Path, state: State) -> list[str]:
    """Remove all versions but the last ``KEEP``, counting the current one; returns the names of those removed."""
    newest_first = dict.fromkeys(entry.version for entry in reversed(state.history))
    keep = {state.current, *list(newest_first)[:KEEP]}
    removed = []
    for path in sorted((folder / "versions").iterdir()):
        if path.name not in keep and _VERSION.fullmatch(path.name):
            # Under its own name a version is whole; one that is being removed has no such name any more.
            doomed = path.with_name(f".{path.name}.tmp")
            with contextlib.suppress(OSError):  # the installation is done; the next one tries again
                path.rename(doomed)
                removed.append(path.name)
                shutil.rmtree(doomed, ignore_errors=True)
    return removed


def _strange_link(folder: Path) -> ResvitError:
    return ResvitError(
        f"{folder / 'current'} is not a link to one of its versions.",
        "Something else changed it: remove it, and install again.",
        ExitCode.SYSTEM,
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
