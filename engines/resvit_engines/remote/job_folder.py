"""The folder of a job on a device: what is done is kept, who works in it holds a lock, and how it ended is written.

``state.json`` holds the phase and the process, ``progress.log`` the events of the run, ``result.json`` the result or
the error. A phase that is finished has its result in ``phases``; it is not repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors, pretty_json, write_atomic
from resvit_engines.progress import Reporter
from resvit_engines.records import Record, record_from_file
from resvit_engines.remote.job_result import JobResult, document_of
from resvit_engines.remote.progress_events import EventLog

STATE, PROGRESS, RESULT, LOCK = "state.json", "progress.log", "result.json", ".lock"
_TRIES = 20


class Written(Protocol):
    """The result of a phase, which can be written."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...


T = TypeVar("T", bound=Written)


class JobFolder:
    """A job in ``path``; use it inside :meth:`working`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def working(self, shown: Reporter) -> Iterator[EventLog]:
        """Hold the folder, and write how the block ends to ``result.json``; yields the reporter of the job.

        Raises ``ResvitError`` where another process works in it.
        """
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._hold(lock)
            (self.path / RESULT).unlink(missing_ok=True)
            events = EventLog(self.path / PROGRESS, shown)
            try:
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
            for name in ("phases", "model", "built", "outputs"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            write_atomic(known, key.encode())

    def phase(self, name: str, do: Callable[[], T], read: Callable[[Record], T]) -> T:
        """The result of a phase: as ``read`` makes it of what was written when it finished, or by doing it now."""
        done = self.path / "phases" / f"{name}.json"
        return read(record_from_file(done)) if done.exists() else self.repeated_phase(name, do)

    def repeated_phase(self, name: str, do: Callable[[], T]) -> T:
        """The result of a phase that is done whether it was done before or not."""
        write_atomic(self.path / STATE, pretty_json({"phase": name, "pid": os.getpid()}))
        result = do()
        write_atomic(self.path / "phases" / f"{name}.json", pretty_json(result.to_json()))
        return result

    def finish(self, result: JobResult) -> None:
        """Write the result: the job is done."""
        write_atomic(self.path / RESULT, pretty_json(document_of(result)))

    def _fail(self, error: ResvitError) -> None:
        with contextlib.suppress(ResvitError, OSError):
            write_atomic(self.path / RESULT, pretty_json(document_of(error)))
