"""Who else used the machine while something was timed, and whether its clocks were held down meanwhile.

Read from ``/proc`` and ``/sys``, and from ``nvidia-smi`` where there is a GPU. Nothing is changed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.machine import printed

_NOTABLE_CORES, _NOTABLE_SHARE = 0.25, 0.05
"""Work of others is told from so many cores on, and from such a share of all."""
_HELD_DOWN = {
    0x4: "its power limit",
    0x8: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature",
    0x80: "its power supply",
}
"""Bits of NVML's clocks event reasons (``nvmlClocksEventReasons``) that make a GPU slower than it could be."""
_THROTTLED = "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"
_REASONS = ("nvidia-smi", "--id=0", "--query-gpu=clocks_throttle_reasons.active", "--format=csv,noheader")
_APPS = ("nvidia-smi", "--id=0", "--query-compute-apps=pid,process_name", "--format=csv,noheader")


@dataclass(frozen=True)
class Usage:
    """A moment: processor seconds of the whole machine and of this process so far, and what the GPU says.

    ``others`` are the programs on the GPU, to be asked for before this process uses it. ``throttled`` counts how often
    the processor was held down for heat; None where nothing tells. ``held_down`` says why the GPU is.
    """

    at: float
    busy_s: float
    own_s: float
    cores: int
    throttled: int | None = None
    others: tuple[str, ...] = ()
    held_down: tuple[str, ...] = ()


def usage_now(*, on_gpu: bool, root: Path = Path("/"), run: Callable[[Sequence[str]], str] = printed) -> Usage:
    """Read the moment. ``root`` is where the file system begins; ``run`` runs a program and returns what it prints."""
    busy, cores = busy_seconds(_text(root / "proc/stat"))
    own = os.times()
    counts = [text for file in root.glob(_THROTTLED) if (text := _text(file).strip()).isdigit()]
    return Usage(
        time.monotonic(),
        busy,
        own.user + own.system + own.children_user + own.children_system,
        cores,
        sum(map(int, counts)) if counts else None,
        programs_from_smi(run(_APPS)) if on_gpu else (),
        reasons_from_smi(run(_REASONS)) if on_gpu else (),
    )


def usage_remarks(before: Usage, after: Usage) -> tuple[str, ...]:
    """What speaks against trusting times that were taken between the two moments."""
    found = []
    seconds = after.at - before.at
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    cores = others / seconds if seconds > 0 else 0.0
    if after.cores and cores > max(_NOTABLE_CORES, _NOTABLE_SHARE * after.cores):
        found.append(f"Other programs used {cores:.1f} of {after.cores} cores while it was timed.")
    if before.others:
        found.append(f"Another program uses the GPU: {', '.join(before.others[:3])}.")
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        found.append("The processor was too hot, and was held down while it was timed.")
    if after.held_down:
        found.append(f"The GPU's clock was held down by {' and '.join(after.held_down)}.")
    return tuple(found)


def busy_seconds(stat: str) -> tuple[float, int]:
    """Seconds of work of all cores since the machine started, and their number, from ``/proc/stat``; zeros without."""
    line = re.search(r"^cpu +(\d+(?: \d+){7,9})$", stat, re.MULTILINE)
    if line is None:
        return 0.0, 0
    user, nice, system, _, _, irq, softirq, steal = map(int, line[1].split()[:8])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), len(re.findall(r"^cpu\d+ ", stat, re.MULTILINE))


def programs_from_smi(text: str) -> tuple[str, ...]:
    """The programs on the GPU, from ``nvidia-smi --query-compute-apps=pid,process_name``."""
    rows = re.findall(r"^(\d+), (\S.{0,200})$", text, re.MULTILINE)
    return tuple(f"{Path(name).name} ({pid})" for pid, name in rows)


def reasons_from_smi(text: str) -> tuple[str, ...]:
    """Why the GPU's clock is held down, from ``nvidia-smi --query-gpu=clocks_throttle_reasons.active``."""
    mask = re.match(r"0x([0-9a-fA-F]{1,16})", text.strip())
    bits = int(mask[1], 16) if mask else 0
    return tuple(dict.fromkeys(why for bit, why in _HELD_DOWN.items() if bits & bit))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
