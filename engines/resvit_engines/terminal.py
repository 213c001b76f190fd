"""Text on its way to a terminal: what files, devices and libraries call things must not command it.

``clean_streams`` puts ``errors.printable``, and replacement of what the terminal's encoding lacks, before standard
output and error, so that nothing that is printed goes around it; ``CleanConsole`` does it for rich, which writes
colours of its own.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from resvit_engines.errors import printable


class NobodyReadsError(Exception):
    """Whoever read what is printed has gone; no ``OSError``, since click would end the process with 1 for that."""


class CleanStream(io.TextIOBase):
    """A text stream before ``raw`` that writes nothing but printable text, in whatever encoding ``raw`` has."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    # Without an attribute ``buffer``, nobody writes bytes around it.
    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream behind."""
        return self.raw.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What cannot be written is replaced."""
        return "replace"

    def write(self, text: str | bytes) -> int:
        """Write ``text``, cleaned; bytes, as click writes a shell's completions, are UTF-8."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        try:
            self.raw.write(encodable(printable(text), self.encoding))
        except BrokenPipeError as error:
            raise NobodyReadsError from error
        return len(text)

    def flush(self) -> None:
        """Flush the stream behind."""
        try:
            self.raw.flush()
        except BrokenPipeError as error:
            raise NobodyReadsError from error

    def isatty(self) -> bool:
        """Whether a terminal is behind; libraries ask at exit too, when the stream behind may be closed."""
        return not self.raw.closed and self.raw.isatty()

    def fileno(self) -> int:
        """The file descriptor behind."""
        return self.raw.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True


def encodable(text: str, encoding: str) -> str:
    """``text`` as ``encoding`` has it: arrows in ASCII, and ``?`` for whatever else it lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("→", "->").replace("…", "...")
        return text.encode(encoding, "replace").decode(encoding, "replace")
    except LookupError:
        return text.encode("ascii", "replace").decode()
    return text


@contextlib.contextmanager
def clean_streams() -> Iterator[None]:
    """Within the block, standard output and error take printable text alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, CleanStream) else CleanStream(stream) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class CleanConsole(Console):
    """A rich console whose text is printable; its colours and movements are rich's own."""

    @property
    def file(self) -> IO[str]:
        """The stream behind a clean one, since rich's own codes are no text."""
        stream = super().file
        return cast("IO[str]", _Encodable(stream.raw if isinstance(stream, CleanStream) else stream))

    @file.setter
    def file(self, stream: IO[str]) -> None:
        Console.file.fset(self, stream)  # type: ignore[attr-defined]

    def on_broken_pipe(self) -> None:
        """Nobody reads any more: for the command line to end quietly, where rich would exit with 1."""
        raise NobodyReadsError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with every piece of text cleaned."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class _Encodable:
    """A stream that replaces what its encoding lacks, and is the one behind in all else."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(encodable(text, getattr(self._stream, "encoding", None) or "utf-8"))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
