"""The folder of a job on a device: what is done is kept, who works in it holds a lock, and how it ended is written.

``state.json`` holds the phase and the process, ``progress.log`` the events of the run, ``result.json`` the result or
the error. A phase that is finished has its result in ``phases/NAME.json``, and in ``phases/NAME.left.json`` the digests
of that result, of every file that it left, and of the same of the phase before. It is not repeated as long as all of
that holds; where something was changed, added or lost, it and those after it are done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from resvit_engines.bundle.parts import BundledFile
from resvit_engines.errors import ExitCode, ResvitError, interrupts_as_themselves
from resvit_engines.files import (
    explain_os_errors,
    make_folder,
    open_lock,
    pretty_json,
    remove,
    sha256_bytes,
    sha256_file,
    write_atomic,
)
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record, record_from_file
from resvit_engines.remote.job_result import Written, document_of
from resvit_engines.remote.progress_events import EventLog

STATE, PROGRESS, RESULT, LOCK = "state.json", "progress.log", "result.json", ".lock"
_TRIES = 20


T = TypeVar("T", bound=Written)


class JobFolder:
    """A job in ``path``; use it inside :meth:`working`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reporter: Reporter = SILENT
        self._before = ""
        """Digest of what the phase before left; of the key, before the first."""

    @contextlib.contextmanager
    def working(self, shown: Reporter) -> Iterator[EventLog]:
        """Hold the folder, and write how the block ends to ``result.json``; yields the reporter of the job.

        Raises ``ResvitError`` where another process works in it.
        """
        with explain_os_errors(self.path):
            make_folder(self.path)
            lock = open_lock(self.path / LOCK, 0o600)
        try:
            self._hold(lock)
            (self.path / RESULT).unlink(missing_ok=True)
            events = self._reporter = EventLog(self.path / PROGRESS, shown)
            try:
                with interrupts_as_themselves():
                    yield events
            except ResvitError as error:
                self._fail(error)
                raise
            except KeyboardInterrupt:
                fix = "The same command continues it."
                self._fail(ResvitError("The job was interrupted.", fix, ExitCode.INTERRUPTED))
                raise
            except Exception as error:
                problem = f"Unexpected {type(error).__name__}: {error}"
                self._fail(ResvitError(problem, "This is a bug; report it.", ExitCode.BUG))
                raise
            finally:
                events.close()
        finally:
            os.close(lock)

    def _hold(self, lock: int) -> None:
        # Whoever asks whether the job lives takes the lock for a moment: try for a while.
        for _ in range(_TRIES):
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise ResvitError(f"Another process is building in {self.path}.", "Wait for it to end.", ExitCode.SYSTEM)

    def begin(self, key: str) -> None:
        """Forget finished phases that were done for another ``key``: another bundle, device or software."""
        known = self.path / "key"
        if not known.exists() or known.read_text() != key:
            for name in ("phases", "model", "built", "outputs", "variants"):
                remove(self.path / name)
            write_atomic(known, key.encode())
        self._before = sha256_bytes(key.encode())

    def phase(
        self, name: str, do: Callable[[], T], read: Callable[[Record], T], left: str | None = None
    ) -> tuple[T, Mapping[str, BundledFile]]:
        """The result of a phase: as ``read`` makes it of what was written when it finished, or by doing it now.

        Returns with it the files that it left in the folder ``left`` of the job, or as that file, by their paths there
        (a file by its own name), each with the digest that it had when the phase was done.

        Raises ``ResvitError`` UNTRUSTED where what it left is no plain file.
        """
        listing, done = (self.path / "phases" / f"{name}{ending}" for ending in (".left.json", ".json"))
        if os.path.lexists(done):
            try:
                return self._kept(done, listing, read, left)
            except ResvitError as error:
                self._reporter.warn(f"The phase {name} is done again. {error.problem}")
        result = self._done(name, do)
        files, written = self._left(left), pretty_json(result.to_json())
        document = pretty_json(
            {
                "before": self._before,
                "result": sha256_bytes(written),
                "files": [file.to_json() for file in files.values()],
            }
        )
        write_atomic(listing, document)
        write_atomic(done, written)  # the last: where it is, the phase is finished
        self._before = sha256_bytes(document)
        return result, files

    def repeated_phase(self, name: str, do: Callable[[], T]) -> T:
        """The result of a phase that is done whether it was done before or not, and that no other depends on."""
        result = self._done(name, do)
        write_atomic(self.path / "phases" / f"{name}.json", pretty_json(result.to_json()))
        return result

    def _done(self, name: str, do: Callable[[], T]) -> T:
        write_atomic(self.path / STATE, pretty_json({"phase": name, "pid": os.getpid()}))
        return do()

    def _kept(
        self, done: Path, listing: Path, read: Callable[[Record], T], left: str | None
    ) -> tuple[T, Mapping[str, BundledFile]]:
        """A finished phase, if all that it left is as it was."""
        for path in (listing, done):
            _require_plain(path)
        said = record_from_file(listing)
        if said.sha256("before") != self._before:
            raise _changed("What it was made from was made anew.")
        known = {file.path: file for file in map(BundledFile.from_json, said.records("files"))}
        there = self._left(left)
        if odd := sorted({file.path for file in set(known.values()) ^ set(there.values())}):
            raise _changed(f"{odd[0]} was changed, added or lost after it was done.")
        result = read(record_from_file(done))
        if sha256_file(done) != said.sha256("result"):
            raise _changed(f"{done.name} was changed after it was done.")
        self._before = sha256_file(listing)
        return result, there

    def _left(self, name: str | None) -> dict[str, BundledFile]:
        """All that lies in a folder of the job, or one file of it; links and pipes are no part of any job."""
        place = self.path / name if name else None
        if place is None or not os.path.lexists(place):
            return {}
        folder = place.is_dir() and not place.is_symlink()
        paths = [path for path in sorted(place.rglob("*")) if path.is_symlink() or not path.is_dir()]
        files = {}
        for path in paths if folder else [place]:
            named = path.relative_to(place).as_posix() if folder else path.name
            _require_plain(path)
            files[named] = BundledFile(named, path.stat().st_size, sha256_file(path))
        return files

    def finish(self, result: Written) -> None:
        """Write the result: the job is done."""
        write_atomic(self.path / RESULT, pretty_json(document_of(result)))

    def _fail(self, error: ResvitError) -> None:
        with contextlib.suppress(ResvitError, OSError):
            write_atomic(self.path / RESULT, pretty_json(document_of(error)))


def _require_plain(path: Path) -> None:
    if not os.path.lexists(path) or not stat.S_ISREG(path.lstat().st_mode):
        raise _changed(f"{path} is no plain file.")


def _changed(problem: str) -> ResvitError:
    return ResvitError(problem, "Let nothing else write into the folder of a job.", ExitCode.UNTRUSTED)
