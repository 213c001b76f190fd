"""The one error type of this project and its exit codes."""

from __future__ import annotations

import enum


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
    INTERRUPTED = 130


class ResvitError(Exception):
    """Anything that a user can cause or mend: what happened, and what to do about it.

    ``problem`` is one sentence about what happened, with the names and numbers involved; ``fix`` is the next
    thing to try. Raise it where the cause is known; the command line prints both and exits with ``code``.
    """

    def __init__(self, problem: str, fix: str, code: ExitCode = ExitCode.INPUT) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.code = code

    def __str__(self) -> str:
        return f"{self.problem}\n  → {self.fix}"

    def __reduce__(self) -> tuple[type[ResvitError], tuple[str, str, ExitCode]]:
        return type(self), (self.problem, self.fix, self.code)


class OutOfMemoryError(ResvitError):
    """A build ended for want of memory; with a smaller workspace it may succeed."""
