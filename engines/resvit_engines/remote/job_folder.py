"""The folder of a job on a device: what is done is kept, who works in it holds a lock, and how it ended is written.

``state.json`` holds the phase and the process, ``progress.log`` the events of the run, ``result.json`` the result or
the error. A phase that is finished has its result in ``phases``; it is not repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import explain_os_errors, pretty_json, write_atomic
from resvit_engines.progress import Reporter
from resvit_engines.remote.progress_events import EventLog

STATE, PROGRESS, RESULT, LOCK = "state.json", "progress.log", "result.json", ".lock"
_TRIES = 20


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
                self._fail(error.problem, error.fix, error.code)
                raise
            except KeyboardInterrupt:
                self._fail("The job was interrupted.", "The same command continues it.", ExitCode.INTERRUPTED)
                raise
            except Exception as error:
                self._fail(f"Unexpected {type(error).__name__}: {error}", "This is a bug; report it.", ExitCode.BUG)
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

    def phase(self, name: str, work: Callable[[], dict[str, Any]], *, always: bool = False) -> dict[str, Any]:
        """The result of a phase: as it was written when it finished, or by doing it now."""
        done = self.path / "phases" / f"{name}.json"
        if not always and done.exists():
            known: dict[str, Any] = json.loads(done.read_bytes())
            return known
        write_atomic(self.path / STATE, pretty_json({"phase": name, "pid": os.getpid()}))
        result = work()
        write_atomic(done, pretty_json(result))
        return result

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result: the job is done."""
        write_atomic(self.path / RESULT, pretty_json({"result": dict(result)}))

    def _fail(self, problem: str, fix: str, code: ExitCode) -> None:
        document = {"error": {"problem": problem, "fix": fix, "exit_code": int(code)}}
        with contextlib.suppress(ResvitError, OSError):
            write_atomic(self.path / RESULT, pretty_json(document))
