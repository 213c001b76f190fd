"""What the example scripts say and end with, where the commands of ``resvit_export.cli`` have their own way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from resvit_engines.errors import ExitCode, ResvitError, printable
from resvit_engines.terminal import clean_streams


@contextlib.contextmanager
def spoken_errors(goes_on: str) -> Iterator[None]:
    """Within the block, errors become sentences with the exit codes of ``resvit-export``.

    ``goes_on`` says what the same command does after Ctrl-C.
    """
    try:
        with clean_streams():
            yield
    except ResvitError as error:
        click.echo(printable(f"error: {error}"), err=True)
        raise SystemExit(int(error.code)) from None
    except OSError as error:
        click.echo(printable(f"error: {error}\n  → Choose an --out in a folder that can be written."), err=True)
        raise SystemExit(int(ExitCode.SYSTEM)) from None
    except KeyboardInterrupt:
        click.echo(f"Interrupted; the same command {goes_on}.", err=True)
        raise SystemExit(int(ExitCode.INTERRUPTED)) from None
