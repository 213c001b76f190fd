"""Progress that crosses a connection: written as lines of JSON where the work is, and shown again where the user is."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter
from resvit_engines.records import Record, record_from_bytes

T = TypeVar("T")
_INTERVAL = 0.5  # seconds between the lines of one bar
_TOTAL_MOST = 2_000_000
_BARS_MOST = 8
"""How many bars may be open in each other."""


class EventLog:
    """A reporter that writes every event to a file and passes it on to another reporter."""

    def __init__(self, path: Path, shown: Reporter) -> None:
        self._shown = shown
        self._stream = path.open("w", encoding="utf-8")

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1, before: int = 0) -> Iterator[T]:
        """Pass ``items`` through, writing how many went."""
        self._write({"begin": what, "total": total, "weight": weight, **({"before": before} if before else {})})
        pending, last = 0, time.monotonic()
        try:
            for item in self._shown.track(items, what, total, weight, before):
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
    """Show the events of ``lines``, which may come as they are written; a line that is none is left out.

    No bar goes further than its total, and no more than ``_BARS_MOST`` are open in each other, whatever the lines say.
    """
    events = _events(lines)
    for event in events:
        _show(event, events, reporter, 0)


@dataclass(frozen=True)
class _Event:
    """One line: ``count`` is the total of a bar that begins at ``before``, or how many steps it went."""

    kind: str
    text: str = ""
    count: int = 0
    weight: int = 1
    before: int = 0

    @classmethod
    def from_json(cls, record: Record) -> _Event:
        """``ResvitError`` for what :class:`EventLog` does not write."""
        kind = next((kind for kind in ("begin", "step", "end", "say", "warn") if kind in record.names), "")
        if kind in ("step", "end"):
            return cls(kind, count=record.whole(kind, most=_TOTAL_MOST))
        text = record.text(kind)
        if kind != "begin":
            return cls(kind, text)
        total, weight = record.whole("total", most=_TOTAL_MOST), record.whole("weight", 1, _TOTAL_MOST)
        before = record.whole("before", most=total) if "before" in record.names else 0
        return cls(kind, text, total, weight, before)


def _show(event: _Event, events: Iterator[_Event], reporter: Reporter, bars: int) -> None:
    if event.kind == "begin" and bars < _BARS_MOST:
        steps = _steps(events, reporter, -(-(event.count - event.before) // event.weight), bars + 1)
        for _ in reporter.track(steps, event.text, event.count, event.weight, event.before):
            pass
    elif event.kind == "say":
        reporter.say(event.text)
    elif event.kind == "warn":
        reporter.warn(event.text)


def _steps(events: Iterator[_Event], reporter: Reporter, left: int, bars: int) -> Iterator[int]:
    """The steps of one bar, ``left`` at most, until it ends or the events do."""
    for event in events:
        if event.kind in ("step", "end"):
            steps = min(left, event.count)
            left -= steps
            yield from range(steps)
            if event.kind == "end":
                return
        else:
            _show(event, events, reporter, bars)


def _events(lines: Iterator[str]) -> Iterator[_Event]:
    for line in lines:
        with contextlib.suppress(ResvitError):
            yield _Event.from_json(record_from_bytes(line.encode(), "progress"))
