"""The environment that the templates of the report are rendered in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.errors import ExitCode, ResvitError, printable

if TYPE_CHECKING:
    from jinja2 import Environment


def environment() -> Environment:
    """The templates of this package. Raises ``ResvitError`` if Jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise ResvitError(
            "The report needs Jinja2, which is not installed.",
            "pip install 'resvit-export[host]'",
            ExitCode.MISSING,
        ) from error
    from markupsafe import Markup

    def shown(value: object) -> object:
        """Names come from files: what is no character to see stands there as an escape, as on a terminal."""
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
