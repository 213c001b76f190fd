"""The one error type of this project and its exit codes; and text that commands no terminal, as its words are.

Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Iterator

_MARKS = "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
_CONTROL = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_MARKS}]")
_CONTROL_OR_BREAK = re.compile(f"[\x00-\x1f\x7f-\x9f{_MARKS}]")
_SHORT = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}


def printable(text: str) -> str:
    """``text`` with its line ends and tabs, and every other control character as an escape such as ``\\x1b``.

    These are C0 (ESC among them), C1, DEL, the marks that turn the direction of text (CVE-2021-42574), line separators
    and lone surrogates.
    """
    return _CONTROL.sub(_escape, text)


def one_line(text: str) -> str:
    """``text`` on one line: line ends and tabs are escapes too."""
    return _CONTROL_OR_BREAK.sub(_escape, text)


def first_line(error: object) -> str:
    """The first line of a foreign error's message, 300 characters at most."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file's name that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return _SHORT.get(match[0]) or (f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}")


class ExitCode(enum.IntEnum):
    """What the process returns. 2 is click's own code for a misspelt command line."""

    OK = 0
    BUG = 1
    """Unexpected failure: worth a bug report."""
    USAGE = 2
    INPUT = 3
    """The model, checkpoint, data or recipe given cannot be used."""
    REJECTED = 4
    """Validation: the accuracy drop is above the limit."""
    UNDECIDED = 5
    """Validation: too few images (or a baseline at chance level) to tell."""
    IMPOSSIBLE = 6
    """The target cannot do what was asked for."""
    MISSING = 7
    """A program, package or runtime that is needed is absent or broken."""
    BUILD = 8
    """The engine builder failed."""
    SYSTEM = 9
    """Disk full, no permission, read-only folder, out of memory."""
    UNTRUSTED = 10
    """A signature is missing, does not hold, or is by a key that is not trusted."""
    MISMATCH = 11
    """An engine computes something else than what was validated."""
    NOT_FASTER = 12
    """Accurate, but known to be no faster than FP16 on the target."""
    STOPPED = 13
    """A release was stopped on its way to a fleet, since devices failed."""
    PARTIAL = 14
    """Some devices of a fleet are not where they were to be: unreachable, or something there is in the way."""
    INTERRUPTED = 130


class ResvitError(Exception):
    """Anything that a user can cause or mend: what happened, and what to do about it.

    ``problem`` is one sentence about what happened, with the names and numbers involved; ``fix`` is the next
    thing to try; both are ``printable``. Raise it where the cause is known; the command line prints both and exits with
    ``code``.
    """

    def __init__(self, problem: str, fix: str, code: ExitCode = ExitCode.INPUT) -> None:
        # Names that others chose stand in both.
        self.problem = printable(problem)
        self.fix = printable(fix)
        super().__init__(self.problem)
        self.code = code

    def __str__(self) -> str:
        return f"{self.problem}\n  → {self.fix}"

    def __reduce__(self) -> tuple[type[ResvitError], tuple[str, str, ExitCode]]:
        return type(self), (self.problem, self.fix, self.code)


_NO_MEMORY = (
    *("allocate", "bad_alloc", "alloc failed", "out of memory", "not enough memory"),
    "Failed to serialize proto",  # weights above what a message holds lie beside it, so that memory alone is left
)
"""What libraries say."""


class OutOfMemoryError(ResvitError):
    """A build ended for want of memory, with a smaller workspace it may succeed; or a model did not fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's, of torch, ONNX Runtime or protobuf, or one behind it, says that memory ran out."""
    cause: BaseException | None = error
    while cause is not None:
        says = not isinstance(cause, ResvitError) and any(word in str(cause) for word in _NO_MEMORY)
        if says or isinstance(cause, (MemoryError, OutOfMemoryError)):
            return True
        cause = cause.__cause__
    return False


@contextlib.contextmanager
def interrupts_as_themselves() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` for an error that a library made of one.

    A module in C++ that is interrupted while it is imported reports ``ImportError: initialization failed``, and what
    catches that reports a package that is missing.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, ResvitError) and error.code is ExitCode.INTERRUPTED
        if not told and any(isinstance(item, KeyboardInterrupt) for item in chain_of(error)):
            raise KeyboardInterrupt from error
        raise


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error, and one after the other those that it was raised from, or while they were handled."""
    item: BaseException | None = error
    while item is not None:
        yield item
        item = item.__cause__ or item.__context__
