"""What the kernel tells of this process."""

from __future__ import annotations

import contextlib
from pathlib import Path


def peak_memory_mib() -> int:
    """Peak resident memory of this process since the last reset, in MiB (0 where the kernel does not tell).

    VmHWM, since ru_maxrss counts the parent's before exec too.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    return 0
