"""The devices that a fleet's file lists: addresses, and ranges of them such as ``ssh://cam@cam-[001..120].local``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from resvit_engines.errors import ResvitError
from resvit_engines.remote.ssh import address_from

DEVICES_MOST = 100_000
"""Devices of the largest fleet."""
TEXT_MOST = 400
"""Characters of the longest address."""
_RANGE = re.compile(r"\[([0-9]{1,9})\.\.([0-9]{1,9})\]")
_FIX = "Write a range as ssh://user@camera-[001..120], and longer fleets as several."


def expand(text: str, most: int = DEVICES_MOST) -> Iterator[str]:
    """Every address that ``text`` stands for, in order: itself, or one for each number of its range.

    Numbers have as many digits as the first one is written with.

    Raises:
        ResvitError: INPUT for a range that runs backwards, a second one, more than ``most``, and what is no address.
    """
    if len(text) > TEXT_MOST:
        raise ResvitError(f"An address of {len(text)} characters is none: {text[:40]}…", _FIX)
    found = _RANGE.findall(text)
    if not found:
        yield str(address_from(text))
        return
    if len(found) > 1:
        raise ResvitError(f"'{text}' has {len(found)} ranges.", "Give each address one range; list several addresses.")
    first, last = found[0]
    if int(last) < int(first):
        raise ResvitError(f"The range of '{text}' runs backwards.", _FIX)
    if int(last) - int(first) >= most:
        raise ResvitError(
            f"'{text}' stands for {int(last) - int(first) + 1:,} devices, and a fleet has {most:,} at most.", _FIX
        )
    before, behind = _RANGE.split(text)[0], _RANGE.split(text)[-1]
    for number in range(int(first), int(last) + 1):
        yield str(address_from(f"{before}{number:0{len(first)}d}{behind}"))
