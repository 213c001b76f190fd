"""Calling NVIDIA ModelOpt: without its prints, and with a sentence where it is not installed."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

from resvit_engines.errors import ExitCode, ResvitError


@contextlib.contextmanager
def quiet_modelopt(part: str, without: str) -> Iterator[None]:
    """Keep output and warnings off the terminal; raise ``ResvitError`` (MISSING) where an import in it fails.

    ``part`` is what of ModelOpt is needed; ``without`` says how to do without it.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise ResvitError(
            f"ModelOpt's {part} does not import: {error}.",
            f"pip install 'resvit-export[modelopt]', or {without}.",
            ExitCode.MISSING,
        ) from error
