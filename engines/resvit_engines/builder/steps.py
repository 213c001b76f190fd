"""How far a build is: steps go from the child to its parent through a socket, and become one number of per cent.

The child writes one JSON line per phase and step. A single byte the other way, or the parent's end, stops the build.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass


class StepsToParent:
    """The child's end: a ``trt_config.Watcher`` that writes to the parent and asks whether to stop."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """Tell that a phase begins."""
        self._send(["start", phase, parent, steps])

    def stepped(self, phase: str, step: int) -> bool:
        """Tell that a step is done; False where the parent wants the build to stop."""
        self._send(["step", phase, step])
        return not select.select([self._stream], [], [], 0)[0]

    def finished(self, phase: str) -> None:
        """Tell that a phase is over."""
        self._send(["finish", phase])

    def _send(self, event: list[object]) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone is seen by `stepped`
            self._stream.sendall(json.dumps(event).encode() + b"\n")


@dataclass
class _Phase:
    name: str
    steps: int
    parent: _Phase | None
    done: int = 0

    @property
    def share(self) -> float:
        """How much of the whole build one step of it is."""
        whole = self.parent.share if self.parent else 1.0
        return whole / max(self.steps, 1)


class Percent:
    """From phases within phases to the part of the build that is done, 0 to 100; it never falls.

    Every step counts the same within its phase, whatever time it takes: TensorRT does not say more.
    """

    def __init__(self) -> None:
        self.done = 0
        self.phase = ""
        self._open: dict[str, _Phase] = {}

    def read(self, line: bytes) -> None:
        """Take one line of ``StepsToParent``; a damaged one changes nothing."""
        with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
            kind, name, *rest = json.loads(line)
            if kind == "start":
                self._open[name] = _Phase(name, int(rest[1]), self._open.get(rest[0]))
                self.phase = name
            elif kind == "step":
                self._open[name].done = int(rest[0]) + 1
            elif kind == "finish":
                self._open.pop(name)
                self.phase = next(reversed(self._open), "")
            part = sum(min(phase.done, phase.steps) * phase.share for phase in self._open.values())
            # A builder that fell short of a phase's steps leaves a gap, and rounding must not end a build early.
            self.done = max(self.done, min(int(100 * part), 99))


class StepsFromChild:
    """The parent's end of the socket."""

    def __init__(self) -> None:
        self._here, self.child_end = socket.socketpair()
        self._here.setblocking(False)
        self._rest = b""
        self._ended = False

    def started(self) -> None:
        """Close the child's end here, once the child has its own."""
        self.child_end.close()

    def stop(self) -> None:
        """Ask the child to stop at its next step."""
        with contextlib.suppress(OSError):
            self._here.send(b"s")

    def lines(self, seconds: float) -> Iterator[bytes]:
        """What the child wrote, waiting up to so many seconds for it."""
        if self._ended:
            time.sleep(seconds)
            return
        select.select([self._here], [], [], seconds)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while chunk := self._here.recv(1 << 16):
                self._rest += chunk
            self._ended = True
        *whole, self._rest = self._rest.split(b"\n")
        yield from whole

    def close(self) -> None:
        """Let both ends go."""
        self.child_end.close()
        self._here.close()
