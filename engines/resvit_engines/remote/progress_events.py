"""Progress that crosses a connection: written as lines of JSON where the work is, and shown again where the user is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from resvit_engines.progress import Reporter

T = TypeVar("T")
_INTERVAL = 0.5  # seconds between the lines of one bar


class EventLog:
    """A reporter that writes every event to a file and passes it on to another reporter."""

    def __init__(self, path: Path, shown: Reporter) -> None:
        self._shown = shown
        self._stream = path.open("w", encoding="utf-8")

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1) -> Iterator[T]:
        """Pass ``items`` through, writing how many went."""
        self._write({"begin": what, "total": total, "weight": weight})
        pending, last = 0, time.monotonic()
        try:
            for item in self._shown.track(items, what, total, weight):
                yield item
                pending += 1
                if time.monotonic() - last >= _INTERVAL:
                    self._write({"step": pending})
                    pending, last = 0, time.monotonic()
        finally:
            self._write({"end": pending})

    def say(self, text: str) -> None:
        """Write and pass on ``text``."""
        self._write({"say": text})
        self._shown.say(text)

    def warn(self, text: str) -> None:
        """Write and pass on ``text``."""
        self._write({"warn": text})
        self._shown.warn(text)

    def close(self) -> None:
        """Close the file; the reporter is of no use afterwards."""
        self._stream.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


def replay(lines: Iterator[str], reporter: Reporter) -> None:
    """Show the events of ``lines``, which may come as they are written; a line that is none is left out."""
    events = _events(lines)
    for event in events:
        _show(event, events, reporter)


def _show(event: dict[str, Any], events: Iterator[dict[str, Any]], reporter: Reporter) -> None:
    if "begin" in event:
        steps = _steps(events, reporter)
        for _ in reporter.track(steps, str(event["begin"]), int(event["total"]), int(event["weight"])):
            pass
    elif "say" in event:
        reporter.say(str(event["say"]))
    elif "warn" in event:
        reporter.warn(str(event["warn"]))


def _steps(events: Iterator[dict[str, Any]], reporter: Reporter) -> Iterator[int]:
    """The steps of one bar, until it ends or the events do."""
    for event in events:
        if "end" in event:
            yield from range(int(event["end"]))
            return
        if "step" in event:
            yield from range(int(event["step"]))
        else:
            _show(event, events, reporter)


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
