"""The builder's child process, seen from its parent: start it, show how far it is, and explain how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resvit_engines.builder.memory import oom_kills
from resvit_engines.builder.steps import Percent, StepsFromChild
from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError
from resvit_engines.progress import Reporter

_HEARTBEAT = 15.0  # seconds between the lines that say a long build is alive
_GRACE = 5.0  # seconds that an interrupted child gets to stop by itself, and again before it is killed
_POLL = 0.2
_AGAIN = "Run the same command again; finished stages are kept."
_FIX_MEMORY = (
    "Close other programs, add swap, or build on a machine with more memory; a smaller batch or workspace also helps."
)


def run_child(request: dict[str, Any], scratch: Path, reporter: Reporter, what: str) -> dict[str, Any]:
    """Run the child on ``request`` to its end and return its result. ``what`` names the work: ``building``.

    Raises:
        OutOfMemoryError: where the kernel killed the child for memory, or the builder said that there was too little.
        ResvitError: for every other way to fail; INTERRUPTED on Ctrl-C.
    """
    request_file, output = scratch / "request.json", scratch / "output.txt"
    result_file = scratch / "result.json"
    result_file.unlink(missing_ok=True)
    steps, kills = StepsFromChild(), oom_kills()
    whole = {**request, "result": str(result_file), "steps": steps.child_end.fileno(), "parent": os.getpid()}
    request_file.write_text(json.dumps(whole))
    with contextlib.closing(steps), output.open("wb") as stream:
        child = _start(request_file, scratch, stream.fileno(), steps)
        with _ended(child, steps):
            watch = _Watch(child, steps, reporter, what)
            for _ in reporter.track(watch.percents(), f"{what} (percent)", 100):
                pass
    if not result_file.is_file():
        raise _death(child.returncode, watch.peak_mib, output.read_text(errors="replace"), kills)
    result: dict[str, Any] = json.loads(result_file.read_text())
    if "problem" in result:
        kind = OutOfMemoryError if result["memory"] else ResvitError
        raise kind(result["problem"], result["fix"], ExitCode(result["code"]))
    if child.returncode != 0:
        # The result is written once the engine is whole; only the listing of its layers comes after it.
        result["notes"].append(f"The engine is whole, but listing its layers ended the builder ({child.returncode}).")
    return result


def _worker_command(request: Path) -> list[str]:
    return [sys.executable, "-m", "resvit_engines.builder.worker", str(request)]


def _start(request_file: Path, scratch: Path, output: int, steps: StepsFromChild) -> subprocess.Popen[bytes]:
    # The working folder is the empty-but-for-our-files scratch folder: `python -m` puts it on the import path, and a
    # user's own tensorrt.py or json.py must not be found there. Its own session keeps a terminal's Ctrl-C with us.
    child = subprocess.Popen(
        _worker_command(request_file),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(steps.child_end.fileno(),),
        env={**os.environ, "PYTHONSAFEPATH": "1"} if sys.version_info >= (3, 11) else None,
    )
    steps.started()
    return child


@contextlib.contextmanager
def _ended(child: subprocess.Popen[bytes], steps: StepsFromChild) -> Iterator[None]:
    """Make sure that ``child`` has ended when the block does, however it does: asked first, killed last."""
    try:
        yield
    except KeyboardInterrupt:
        steps.stop()
        _wait(child, steps)
        raise ResvitError("The build was interrupted; no engine was written.", _AGAIN, ExitCode.INTERRUPTED) from None
    finally:
        if child.poll() is None:
            child.terminate()
            _wait(child, steps)
        if child.poll() is None:
            child.kill()
            child.wait()


def _wait(child: subprocess.Popen[bytes], steps: StepsFromChild) -> None:
    """Give the child its grace, and read what it writes so that it does not wait for us."""
    end = time.monotonic() + _GRACE
    while child.poll() is None and time.monotonic() < end:
        for _ in steps.lines(_POLL / 4):
            pass


class _Watch:
    """Follows a child: its progress, its memory, and whether it still lives."""

    def __init__(self, child: subprocess.Popen[bytes], steps: StepsFromChild, reporter: Reporter, what: str) -> None:
        self._child, self._steps, self._reporter, self._what = child, steps, reporter, what
        self.peak_mib = 0

    def percents(self) -> Iterator[int]:
        """Every per cent from 1 to 100 as it is reached, all of them where the child ends well."""
        percent, shown = Percent(), 0
        start = said = time.monotonic()
        while self._child.poll() is None:
            for line in self._steps.lines(_POLL):
                percent.read(line)
            self.peak_mib = max(self.peak_mib, _resident_mib(self._child.pid))
            while shown < percent.done:
                shown, said = shown + 1, time.monotonic()
                yield shown
            if time.monotonic() - said >= _HEARTBEAT:
                said = time.monotonic()
                phase = f", {percent.phase}" if percent.phase else ""
                self._reporter.say(f"still {self._what}: {said - start:.0f} s, {self.peak_mib} MiB{phase}")
        if self._child.returncode == 0:
            yield from range(shown + 1, 101)


def _resident_mib(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return 0


def _death(code: int, peak_mib: int, output: str, kills_before: int | None) -> ResvitError:
    last = [line.strip() for line in output.splitlines() if line.strip()][-3:]
    said = f" Its last words: {' | '.join(last)}" if last else ""
    if code == -signal.SIGKILL:
        return _killed(peak_mib, kills_before, oom_kills())
    if any("bad_alloc" in line or line.startswith("MemoryError") for line in last):
        problem = f"The builder found no more memory after using {peak_mib} MiB; no engine was written.{said}"
        return OutOfMemoryError(problem, _FIX_MEMORY, ExitCode.SYSTEM)
    if code < 0:
        with contextlib.suppress(ValueError):
            return ResvitError(
                f"The builder crashed ({signal.Signals(-code).name}); no engine was written.{said}",
                "Try a lower optimisation level; if it crashes again, report it with the ONNX file.",
                ExitCode.BUILD,
            )
    return ResvitError(
        f"The builder ended without a result (exit status {code}); no engine was written.{said}",
        "Run again; if it fails again, report it with these words and the ONNX file.",
        ExitCode.BUILD,
    )


def _killed(peak_mib: int, before: int | None, after: int | None) -> ResvitError:
    used = f"after using {peak_mib} MiB"
    if before is None or after is None:
        return OutOfMemoryError(
            f"The builder was killed (signal 9) {used}: most likely this machine ran out of memory. No engine was "
            "written.",
            _FIX_MEMORY,
            ExitCode.SYSTEM,
        )
    if after > before:
        return OutOfMemoryError(
            f"The kernel's OOM killer ended the builder {used}: there was no memory left. No engine was written.",
            _FIX_MEMORY,
            ExitCode.SYSTEM,
        )
    return ResvitError(
        f"The builder was killed (signal 9) {used}, and not by the kernel's OOM killer. No engine was written.",
        "Look for whoever did: a person, a job's limits, or a memory watcher such as systemd-oomd.",
        ExitCode.SYSTEM,
    )
