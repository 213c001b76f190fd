"""Parts run one after the other within a budget of seconds, and a book of what is done that outlives every call.

Needs the standard library alone: the machine with the GPU may hold nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DONE, FAILED, IMPOSSIBLE, STOPPED = "done", "failed", "not possible here", "stopped"
BOOK = "gpu-day.json"
IMPOSSIBLE_KEY = "impossible"
"""A part that finds out only by itself that it cannot be done writes a result with this key and the reason."""
_TRIES = {FAILED: 2, STOPPED: 3}
"""So often a part is tried in all, by how it ended last; what it had built by then is there the next time."""
_RESULT_BYTES, _LOG_BYTES = 256 << 10, 16 << 10
"""The most that the book takes of one part's result and of its log's end: it stays below 16 MiB."""
_GRACE_S = 5.0
_CHECK_S = 0.05


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own.

    These words of ``command`` are filled in: ``{python}``, ``{folder}`` (of this part alone), ``{work}`` (kept between
    calls, shared), ``{result}``, and ``{program}`` (that one of ``programs`` which is there). What matches the glob
    pattern ``result`` in the folder afterwards is its result, JSON. ``seconds`` is what it is expected to take: it is
    started where so much is left. It is skipped, with a sentence, where one of ``modules`` cannot be imported, none of
    ``programs`` is there, or one of ``files`` (below the repository) is not.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    result: str = "result.json"


@dataclass(frozen=True)
class Place:
    """Where parts run: the repository, folders for the book and for large files, and the environment of processes.

    ``look`` says what state the GPU is in, as plain JSON values; ``missing`` which of a list of modules cannot be
    imported, ``found`` the first of a list of programs that is there.
    """

    root: Path
    results: Path
    work: Path
    environment: Mapping[str, str]
    look: Callable[[], Mapping[str, Any]]
    missing: Callable[[Sequence[str]], Sequence[str]]
    found: Callable[[Sequence[str]], str | None]


class BookError(Exception):
    """A file is no book of this script; the message is a sentence."""


class Book:
    """What is known of every part, in ``gpu-day.json``: written anew, and whole, after each.

    Raises :class:`BookError` for a file that this script did not write; where there is none, nothing is known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            content = {}
        except ValueError as error:
            raise BookError(f"{self.path} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise BookError(f"{self.path} is none of this script's")
        self.machine, self.parts = _table(content.get("machine", {})), _table(content.get("parts", {}))
        for facts in map(_table, self.parts.values()):
            numbers = [facts.get(key, 0) for key in ("tries", "seconds", "ended_after")]
            if not isinstance(facts.get("status"), str) or not all(isinstance(item, (int, float)) for item in numbers):
                raise BookError(f"{self.path} holds a part that this script did not write")

    def put(self, name: str, **facts: Any) -> None:
        """Note ``facts`` of a part, in place of what they were."""
        self.parts[name] = {**self.parts.get(name, {}), **facts}
        self.save()

    def save(self) -> None:
        """Write the book; it is never half-written."""
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n")
        partial.replace(self.path)

    def waits(self, part: Part) -> bool:
        """Whether it is still to be done: never tried, or ended on the way or failed, and not too often."""
        known = self.parts.get(part.name)
        return known is None or known.get("tries", 0) < _TRIES.get(known["status"], 0)

    def seconds(self, part: Part) -> float:
        """What it is expected to take: more than the time in which it was ended last."""
        return max(part.seconds, float(self.parts.get(part.name, {}).get("ended_after", 0.0)))


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BookError(f"a table was expected in {BOOK}, and there is {str(value)[:40]}")
    return value


def run_parts(parts: Sequence[Part], place: Place, book: Book, budget: float, say: Callable[[str], None]) -> list[str]:
    """Run what waits and fits into ``budget`` seconds; returns the names of what is left for the next call.

    What was never tried comes before what failed. The first part that is started gets all of the budget, also where
    less is left than it is expected to take, so that every call gets on.
    """
    end, started = time.monotonic() + budget, False
    waiting = sorted((part for part in parts if book.waits(part)), key=lambda part: part.name in book.parts)
    for part in waiting:
        if reason := why_not(part, place):
            book.put(part.name, status=IMPOSSIBLE, reason=reason)
            say(f"{part.name}: {IMPOSSIBLE}: {reason}")
            continue
        left = end - time.monotonic()
        if left <= 0 or (started and book.seconds(part) > left):
            continue
        started = True
        say(f"{part.name}: started, {left:.0f} s are left")
        run_part(part, place, book, left)
        facts = book.parts[part.name]
        why = f": {facts['reason']}" if facts["reason"] else ""
        say(f"{part.name}: {facts['status']} after {facts['seconds']:.0f} s{why}")
    return [part.name for part in waiting if book.waits(part)]


def why_not(part: Part, place: Place) -> str:
    """Why a part cannot be done on this machine; an empty text where nothing speaks against it."""
    if lacking := place.missing(part.modules):
        return f"Python has no module {', '.join(lacking)} (carry its wheel, and name the folder: --wheels)."
    if part.programs and place.found(part.programs) is None:
        return f"There is no program {' or '.join(part.programs)}."
    absent = [name for name in part.files if not (place.root / name).exists()]
    return f"There is no {', '.join(absent)} here: carry it along." if absent else ""


def run_part(part: Part, place: Place, book: Book, limit: float) -> None:
    """Run one part for at most ``limit`` seconds and note what came of it. The book tells of it while it runs."""
    folder = place.results / part.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(part.result):
        old.unlink()
    tries = int(book.parts.get(part.name, {}).get("tries", 0)) + 1
    # What a killed call leaves behind: the next one takes it up.
    before = dict(place.look())
    book.put(part.name, status=STOPPED, tries=tries, reason="the call ended while it ran", seconds=0.0, before=before)
    words = {"{python}": sys.executable, "{folder}": str(folder), "{work}": str(place.work),
             "{result}": str(folder / part.result), "{program}": place.found(part.programs) or ""}  # fmt: skip
    command = [words.get(word, word) for word in part.command]
    begin, log = time.monotonic(), place.results / f"{part.name}.log"
    with log.open("wb") as stream:
        code = _ended(command, place, stream, limit)
    taken = time.monotonic() - begin
    result, problem = _result(folder, part.result)
    if code is None:
        status, reason = STOPPED, f"ended after {taken:.0f} s, where the budget did"
    elif code != 0:
        status, reason = FAILED, f"exit code {code}: {_last_line(log)}"
    elif problem:
        status, reason = FAILED, problem
    elif isinstance(result, dict) and IMPOSSIBLE_KEY in result:
        status, reason = IMPOSSIBLE, str(result[IMPOSSIBLE_KEY])
    else:
        status, reason = DONE, ""
    facts = {"status": status, "reason": reason, "seconds": round(taken, 1), "after": dict(place.look())}
    facts |= {"result": result, "log": _tail(log), "ended_after": round(taken, 1) if code is None else 0.0}
    book.put(part.name, **facts)


def _ended(command: Sequence[str], place: Place, stream: Any, limit: float) -> int | None:
    """The exit code of a process and all that it started; None where it was ended at the limit.

    They are a process group, and no session of their own: where the caller is ended with its session, so are they.
    """
    try:
        process = subprocess.Popen(
            command, cwd=place.root, env=dict(place.environment), stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,  # noqa: PLW1509  one thread; `process_group` is of 3.11
        )  # fmt: skip
    except OSError as error:
        stream.write(f"{error}\n".encode())
        return 127
    end = time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(_CHECK_S)
        return process.poll()
    finally:  # also where this call is interrupted
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
            if sign is signal.SIGTERM and _group_is_gone(process.pid):
                return


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _result(folder: Path, pattern: str) -> tuple[Any, str]:
    """(what a part wrote, what is wrong with it)."""
    file = next(iter(sorted(folder.glob(pattern))), None)
    if file is None:
        return None, "it wrote no result"
    if file.stat().st_size > _RESULT_BYTES:
        return None, f"its result is larger than {_RESULT_BYTES >> 10} KiB; it lies in {file}"
    try:
        return json.loads(file.read_bytes()), ""
    except ValueError as error:
        return None, f"its result is no JSON: {error}"


def _tail(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _LOG_BYTES))
        return stream.read().decode(errors="replace")


def _last_line(log: Path) -> str:
    lines = [line for line in _tail(log).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: the part that runs is ended with its processes, and the book stays whole."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
