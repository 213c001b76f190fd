"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log, or nothing."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from rich.control import Control
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import ControlType

from resvit_engines.errors import one_line
from resvit_engines.terminal import CleanConsole, CleanStream

T = TypeVar("T")
_PATIENCE = 10.0
"""Seconds for which nobody needs to be told what is done just now."""


class Reporter(Protocol):
    """Where long work says how far it is: on standard error, since standard output is for results."""

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1, before: int = 0) -> Iterator[T]:
        """Pass ``items`` through, counting each as ``weight`` of ``total`` units (images, for batches).

        ``before`` units were done in an earlier process, and are no part of the rate.
        """
        ...

    def say(self, text: str) -> None:
        """One line of information."""
        ...

    def warn(self, text: str) -> None:
        """One line that the user should not miss; shown even in quiet mode."""
        ...


@runtime_checkable
class Talkative(Protocol):
    """A reporter that people follow: it names what is at work, and in ``verbose`` mode says more than results."""

    verbose: bool

    def working(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Say that ``what`` is at work, as long as the block lasts."""
        ...


def working(reporter: Reporter, what: str) -> contextlib.AbstractContextManager[None]:
    """Within the block ``reporter`` names what is at work, where people follow it."""
    return reporter.working(what) if isinstance(reporter, Talkative) else contextlib.nullcontext()


def detail(reporter: Reporter, text: str) -> None:
    """One line for those who asked for everything."""
    if isinstance(reporter, Talkative) and reporter.verbose:
        reporter.say(text)


class Silent:
    """Says nothing: the default of library calls."""

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1, before: int = 0) -> Iterator[T]:
        """Pass ``items`` through."""
        del what, total, weight, before
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
    """Plain lines, for logs: of work that takes long one every ten seconds, and one at its end."""

    interval = _PATIENCE

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Name ``what`` where it lasts longer than ``interval`` seconds."""
        timer = threading.Timer(self.interval, self.say, (f"{what} …",))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1, before: int = 0) -> Iterator[T]:
        """Pass ``items`` through, printing a line every ``interval`` seconds."""
        start = last = time.monotonic()
        done = min(before, total)
        for item in items:
            yield item
            done = min(done + weight, total)
            now = time.monotonic()
            if now - last >= self.interval and done < total:
                last = now
                rate = (done - before) / (now - start)
                self.say(f"{what}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left")
        _say_at_the_end(self, what, done, total, time.monotonic() - start, self.verbose or last > start)

    def say(self, text: str) -> None:
        """Print ``text`` to standard error."""
        _write_line(text)


class Terminal:
    """A live bar per task on standard error."""

    def __init__(self, verbose: bool = False) -> None:
        self.console = CleanConsole(stderr=True)
        self.verbose = verbose

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Name ``what`` in a line that the next one replaces."""
        self.console.print(one_line(f"{what} …"), end="", style="dim", highlight=False, markup=False)
        self.console.control(Control(ControlType.CARRIAGE_RETURN))
        try:
            yield
        finally:
            self.console.control(Control((ControlType.ERASE_IN_LINE, 2)))

    def track(self, items: Iterable[T], what: str, total: int, weight: int = 1, before: int = 0) -> Iterator[T]:
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
            done = min(before, total)
            task = bar.add_task(escape(one_line(what)), total=total, completed=done, rate=0.0)
            for item in items:
                yield item
                done = min(done + weight, total)
                bar.update(task, completed=done, rate=(done - before) / max(time.monotonic() - start, 1e-9))
        _say_at_the_end(self, what, done, total, time.monotonic() - start, self.verbose)

    def say(self, text: str) -> None:
        """Print ``text`` to standard error."""
        self.console.print(one_line(text), style="dim", highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Print ``text`` to standard error, in yellow."""
        self.console.print(f"warning: {one_line(text)}", style="yellow", highlight=False, markup=False)


def _say_at_the_end(reporter: Reporter, what: str, done: int, total: int, seconds: float, told: bool) -> None:
    if told:
        reporter.say(f"{what}: {done}/{total} in {seconds:.1f} s")


SILENT: Reporter = Silent()


def _write_line(text: str) -> None:
    CleanStream(sys.stderr).write(f"{one_line(text)}\n")
    sys.stderr.flush()


def reporter(quiet: bool, verbose: bool = False) -> Reporter:
    """Choose by where standard error goes: a terminal gets bars, a log gets lines."""
    if quiet:
        return Quiet()
    return Terminal(verbose) if sys.stderr.isatty() else Lines(verbose)
