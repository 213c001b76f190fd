"""The one error of all that reads an archive."""

from __future__ import annotations


class NotAllowedError(Exception):
    """What in the archive is not allowed, as the end of a sentence; the archive's own words stand in it quoted."""


def quoted(value: object) -> str:
    """What the archive says, shortened and with control characters escaped."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
