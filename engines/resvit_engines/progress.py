"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resvit_engines.errors import one_line
from resvit_engines.terminal import CleanConsole, CleanStream

T = TypeVar("T")


class Reporter(Protocol):
    """Where long work says how far it is: on standard error, since standard output is for results."""

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1) -> Iterator[T]:
        """Pass ``items`` through, counting each as ``weight`` of ``total`` units (images, for batches)."""
        ...

    def say(self, text: str) -> None:
        """One line of information."""
        ...

    def warn(self, text: str) -> None:
        """One line that the user should not miss; shown even in quiet mode."""
        ...


class Silent:
    """Says nothing: the default of library calls."""

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1) -> Iterator[T]:
        """Pass ``items`` through."""
        del what, total, weight
        yield from items

    def say(self, text: str) -> None:
        """Drop ``text``."""

    def warn(self, text: str) -> None:
        """Drop ``text``."""


class Quiet(Silent):
    """Says nothing but warnings."""

    def warn(self, text: str) -> None:
        """Print ``text`` to standard error."""
        _write_line(f"warning: {text}")


class Lines(Quiet):
    """Plain lines, for logs: one at the start, one every ten seconds, one at the end."""

    interval = 10.0

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1) -> Iterator[T]:
        """Pass ``items`` through, printing a line every ``interval`` seconds."""
        start = last = time.monotonic()
        done = 0
        for item in items:
            yield item
            done = min(done + weight, total)
            now = time.monotonic()
            if now - last >= self.interval and done < total:
                last = now
                rate = done / (now - start)
                self.say(f"{what}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left")
        self.say(f"{what}: {done}/{total} in {time.monotonic() - start:.1f} s")

    def say(self, text: str) -> None:
        """Print ``text`` to standard error."""
        _write_line(text)


class Terminal:
    """A live bar per task on standard error."""

    def __init__(self) -> None:
        self.console = CleanConsole(stderr=True)

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1) -> Iterator[T]:
        """Pass ``items`` through under a bar with count, rate and time left."""
        start = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f}/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(escape(one_line(what)), total=total, rate=0.0)
            done = 0
            for item in items:
                yield item
                done = min(done + weight, total)
                bar.update(task, completed=done, rate=done / max(time.monotonic() - start, 1e-9))
        self.say(f"{what}: {done}/{total} in {time.monotonic() - start:.1f} s")

    def say(self, text: str) -> None:
        """Print ``text`` to standard error."""
        self.console.print(one_line(text), style="dim", highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Print ``text`` to standard error, in yellow."""
        self.console.print(f"warning: {one_line(text)}", style="yellow", highlight=False, markup=False)


SILENT: Reporter = Silent()


def _write_line(text: str) -> None:
    CleanStream(sys.stderr).write(f"{one_line(text)}\n")
    sys.stderr.flush()


def reporter(quiet: bool) -> Reporter:
    """Choose by where standard error goes: a terminal gets bars, a log gets lines."""
    if quiet:
        return Quiet()
    return Terminal() if sys.stderr.isatty() else Lines()
