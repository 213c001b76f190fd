"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from resvit_calibrate.gate.comparison import DECIBELS, SHARE

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """Write a number with a real minus sign, or a dash where there is none."""
    if value is None:
        return NOTHING
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0.0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """Write a number of unknown magnitude with ``digits`` significant digits."""
    if value is None:
        return NOTHING
    text = f"{value:.{digits}g}"
    if 1e3 <= abs(value) < 1e6:
        text = f"{float(text):,.0f}"
    return text.replace("-", MINUS)


def percent(share: float | None, digits: int = 2) -> str:
    """Write a share 0..1 in per cent."""
    return NOTHING if share is None else f"{number(share * 100, digits)}%"


def small_percent(share: float) -> str:
    """Write a share that is mostly tiny: 12%, 0.031%, or < 0.001%."""
    if share <= 0:
        return "0%"
    if share < 1e-5:
        return "< 0.001%"
    return f"{share * 100:.0f}%" if share >= 0.0995 else f"{share * 100:#.2g}%"


def size(count: float | None) -> str:
    """Write bytes as KiB or MiB."""
    if count is None:
        return NOTHING
    return f"{count / 1024:,.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):,.1f} MiB"


def operations(count: float | None) -> str:
    """Write multiply-accumulates with K, M or G."""
    if count is None:
        return NOTHING
    for unit, power in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:,.0f}"


def plural(count: int, noun: str) -> str:
    """Write "1 node", "2 nodes"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shape(dims: Iterable[Any] | None) -> str:
    """Write a shape as 1 x 3 x 224 x 224."""
    return NOTHING if dims is None else f" {TIMES} ".join(str(dim) for dim in dims)


def plain(value: Any) -> str:
    """Write any JSON value on one line."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value, 6)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def drop_name(unit: str) -> str:
    """Name what ``drop`` writes: what was lost, or what an SQNR has above the least one."""
    return "Above the least" if unit == DECIBELS else "Drop"


def drop(value: float | None, unit: str) -> str:
    """Write a drop with its unit: percentage points, points of another metric, or dB above the least SQNR."""
    if value is None:
        return NOTHING
    if unit == DECIBELS:
        return f"{number(-value, 1, signed=True)} dB"
    return f"{number(value)} {'pp' if unit == SHARE else unit}"


def decibels(noise_to_signal: float | None) -> str:
    """Write a noise-to-signal power ratio as SQNR in dB."""
    if noise_to_signal is None:
        return NOTHING
    return number(-10.0 * math.log10(noise_to_signal), 1) if noise_to_signal > 0 else "∞"
