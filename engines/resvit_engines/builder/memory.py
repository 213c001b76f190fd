"""Memory of a build: how much there is, how much is needed, and whether the kernel's OOM killer ended one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.targets.table import Kind, Target

SMALLEST_WORKSPACE_MIB = 128
"""With less, convolutions have hardly a kernel left to choose from."""
_ROOT = Path("/")
# Estimates: CUDA's context, TensorRT's libraries and its generated kernels; and the weights as read, as parsed, as laid
# out for the kernels, and in the engine. TensorRT for RTX, which needs no CUDA to build, was measured at 200 MiB and
# 3.1 times the ONNX file (8 to 320 MiB of FP16 weights).
_BASE_MIB = 1024
_COPIES_OF_WEIGHTS = 4


@dataclass(frozen=True)
class Workspace:
    """The limit chosen for the scratch memory of kernels in MiB, and the sentences that explain it."""

    mib: int
    notes: tuple[str, ...] = ()


def shares_memory(target: Target) -> bool:
    """Whether the GPU's memory is the CPU's, so that a build competes with every other program."""
    return target.kind is Kind.JETSON or target.name == "dgx-spark"


def workspace_for(target: Target, asked_mib: int | None, onnx_bytes: int, available_mib: int | None) -> Workspace:
    """The target's workspace, or as much of it as fits into the memory that is free on a device that shares it.

    A limit that was asked for is kept; a note says where it does not fit.
    """
    wanted = asked_mib or target.workspace_mib
    if not shares_memory(target) or available_mib is None:
        return Workspace(wanted)
    weights = -(-onnx_bytes // (1 << 20))
    rest = _BASE_MIB + _COPIES_OF_WEIGHTS * weights
    if rest + wanted <= available_mib:
        return Workspace(wanted)
    found = f"{available_mib} MiB of memory are free, and the build needs about {rest} MiB and the workspace"
    if asked_mib is not None:
        return Workspace(asked_mib, (f"{found} of {asked_mib} MiB that was asked for: it may not fit.",))
    fits = max(available_mib - rest, SMALLEST_WORKSPACE_MIB)
    tight = "" if rest + fits <= available_mib else " Even so it may not fit: close other programs, or add swap."
    return Workspace(fits, (f"{found}: the workspace is limited to {fits} MiB instead of {wanted}.{tight}",))


def available_mib(root: Path = _ROOT) -> int | None:
    """Memory that programs can still get, in MiB: the machine's or the control group's; None where nothing says."""
    machine = _counters(root / "proc/meminfo").get("MemAvailable:")
    known = [] if machine is None else [machine >> 10]
    for folder in _groups(root):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                known.append(int((folder / limit).read_text()) - int((folder / used).read_text()) >> 20)
    return max(min(known), 0) if known else None


def oom_kills(root: Path = _ROOT) -> int | None:
    """How many processes the kernel has killed for memory so far, in our control group where it counts them.

    None where nothing says. Compare before and after a process was killed.
    """
    for folder in _groups(root):
        for file in ("memory.events", "memory.oom_control"):
            if (count := _counters(folder / file).get("oom_kill")) is not None:
                return count
    return _counters(root / "proc/vmstat").get("oom_kill")


def _groups(root: Path) -> list[Path]:
    """The memory control group of this process (cgroup v2 or v1) and those above it, innermost first."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
                group = base / path.lstrip("/")
                found += [group, *(parent for parent in group.parents if base in (parent, *parent.parents))]
    return found


def _counters(path: Path) -> Mapping[str, int]:
    """Of a file of names and numbers, the numbers by name."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(" ")
            value = rest.split()[:1]
            if value and value[0].isdigit():
                found[name] = int(value[0])
    return found
