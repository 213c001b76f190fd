"""What this machine is: GPU, TensorRT, JetPack, memory, disk, power mode. Read from files, without importing TensorRT.

Imports the standard library and modules that do no more, and reads on Python 3.8 too, so that a device can be asked
before anything is installed on it, and one that is too old can say so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.gpu import local_sm
from resvit_engines.records import Record

# Jetson Linux (L4T) release to JetPack, from NVIDIA's JetPack archive: the first row that is of the same minor release
# and not newer.
_JETPACK_OF_L4T = (
    ((39, 2, 1), "7.2.1"),
    ((39, 2, 0), "7.2"),
    ((38, 4, 0), "7.1"),
    ((38, 2, 0), "7.0"),
    ((36, 5, 0), "6.2.2"),
    ((36, 4, 4), "6.2.1"),
    ((36, 4, 2), "6.2"),
    ((36, 4, 0), "6.1"),
    ((36, 3, 0), "6.0"),
    ((36, 2, 0), "6.0"),
    *(((35, minor, 0), "5.1") for minor in range(1, 7)),
)
_TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_ARCH, _VERSION = "[A-Za-z0-9_]{1,32}", "[0-9][A-Za-z0-9.+~-]{0,63}"
_ONNXRUNTIME_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_EIGHT_BITS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
"""Flags of processors with instructions that add up products of bytes."""
_ADDS_FOUR_PRODUCTS = ("avx512_vnni", "avx_vnni")
"""Flags of x86 processors that add four products of bytes in 32 bits; others add two in 16 bits, which saturate."""
_RTX_DISTRIBUTIONS = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx")
# The Debian packages that hold the library, one per major version, and the Python bindings.
_TENSORRT_PACKAGES = ("python3-libnvinfer", "libnvinfer11", "libnvinfer10", "libnvinfer8")


@dataclass(frozen=True)
class Machine:
    """A device as it is now. Memory and disk are in MiB; what could not be found out is None.

    ``memory_mib`` is all of it (shared with the GPU on a Jetson), ``memory_available_mib`` what is free for new
    programs. ``oom_kills`` counts the processes that the kernel has killed for memory since the machine started.
    """

    sm: int | None
    gpu: str | None
    tensorrt: str | None
    jetpack: str | None
    arch: str
    memory_mib: int
    free_disk_mib: int
    python: str
    power_mode: str | None = None
    clocks: str | None = None
    rtx: str | None = None
    l4t: str | None = None
    memory_available_mib: int = 0
    oom_kills: int | None = None
    libc: str | None = None
    host: str = ""
    onnxruntime: str | None = None
    processor: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Record) -> Machine:
        """What :meth:`to_json` wrote, or an older or newer version on the device.

        Raises:
            ResvitError: INPUT, naming the key, where it is malformed.
        """

        def version(key: str) -> str:
            return record.line(key, _VERSION)

        return cls(
            sm=record.optional("sm", lambda key: record.whole(key, 10, 999)),
            gpu=record.optional("gpu", record.line),
            tensorrt=record.optional("tensorrt", version),
            jetpack=record.optional("jetpack", version),
            arch=record.line("arch", _ARCH),
            memory_mib=record.whole("memory_mib"),
            free_disk_mib=record.whole("free_disk_mib"),
            python=version("python"),
            power_mode=record.optional("power_mode", record.line),
            clocks=record.optional("clocks", record.line),
            rtx=record.optional("rtx", version),
            l4t=record.optional("l4t", version),
            memory_available_mib=record.optional("memory_available_mib", record.whole) or 0,
            oom_kills=record.optional("oom_kills", record.whole),
            libc=record.optional("libc", version),
            host=record.optional("host", record.line) or "",
            onnxruntime=record.optional("onnxruntime", version),
            processor=record.optional("processor", record.line),
        )


def this_machine(
    root: Path = Path("/"), run: Callable[[Sequence[str]], str] | None = None, disk: Path | None = None
) -> Machine:
    """Read this machine. ``root`` is where its file system begins, ``disk`` a folder on the disk that is asked about.

    ``run`` runs a program and returns what it printed, an empty text where there is none or it fails; no program but
    ``nvpmodel`` and ``nvidia-smi`` is run.
    """
    run = run or printed
    here = root == Path("/")
    l4t = l4t_from_release(_text(root / "etc/nv_tegra_release"))
    packages = versions_from_dpkg(_text(root / "var/lib/dpkg/status"))
    memory, available = memory_from_meminfo(_text(root / "proc/meminfo"))
    free = shutil.disk_usage(disk or (Path.home() if here else root)).free >> 20
    libc = platform.libc_ver()[1] if here else ""
    return Machine(
        sm=local_sm() if here else None,
        gpu=_gpu_name(root),
        tensorrt=tensorrt_here(root),
        jetpack=_jetpack(packages, l4t),
        arch=platform.machine(),
        memory_mib=memory,
        free_disk_mib=free,
        python=platform.python_version(),
        power_mode=power_mode_from_nvpmodel(run(("nvpmodel", "-q"))),
        clocks=_clocks(root, run),
        rtx=_distribution(_RTX_DISTRIBUTIONS) if here else None,
        l4t=l4t,
        memory_available_mib=available,
        oom_kills=oom_kills_from_vmstat(_text(root / "proc/vmstat")),
        libc=libc or None,
        host=platform.node(),
        onnxruntime=_distribution(_ONNXRUNTIME_DISTRIBUTIONS) if here else None,
        processor=processor_from_cpuinfo(_text(root / "proc/cpuinfo")),
    )


def tensorrt_here(root: Path = Path("/")) -> str | None:
    """The version of the TensorRT that is installed for this Python, or else by the system's packages."""
    distribution = _distribution(_TENSORRT_DISTRIBUTIONS) if root == Path("/") else None
    return distribution or _first(versions_from_dpkg(_text(root / "var/lib/dpkg/status")), _TENSORRT_PACKAGES)


def l4t_from_release(text: str) -> str | None:
    """``36.4.3`` from the first line of ``/etc/nv_tegra_release``: ``# R36 (release), REVISION: 4.3, …``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def jetpack_from_l4t(l4t: str) -> str | None:
    """The JetPack that a Jetson Linux release belongs to, or None for one that is not in the table."""
    release = tuple(int(part) for part in re.findall(r"\d+", l4t))
    return next((jetpack for row, jetpack in _JETPACK_OF_L4T if row[:2] == release[:2] and row <= release), None)


def versions_from_dpkg(text: str) -> dict[str, str]:
    """Installed packages and versions from dpkg's status file; half-removed ones are left out."""
    found = {}
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed") and {"Package", "Version"} <= set(fields):
            found[fields["Package"]] = fields["Version"]
    return found


def memory_from_meminfo(text: str) -> tuple[int, int]:
    """All and available memory in MiB, from ``/proc/meminfo``."""
    fields = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE))
    return int(fields.get("MemTotal", 0)) >> 10, int(fields.get("MemAvailable", 0)) >> 10


def power_mode_from_nvpmodel(text: str) -> str | None:
    """``MAXN`` from what ``nvpmodel -q`` prints: ``NV Power Mode: MAXN`` and its number on the next line."""
    found = re.search(r"NV Power Mode: *(\S.*)", text)
    return found[1].strip() if found else None


def clocks_from_devfreq(smallest: int, current: int, largest: int) -> str:
    """The GPU clock in words, from devfreq's Hz: locked where the governor has no choice left."""
    if smallest == largest:
        return f"locked at {largest // 1_000_000} MHz"
    return f"not locked: {smallest // 1_000_000} to {largest // 1_000_000} MHz, now {current // 1_000_000}"


def processor_from_cpuinfo(text: str) -> str | None:
    """The processor's name, where it has one, and its instructions for 8 bits, from ``/proc/cpuinfo``."""
    fields = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", text, re.MULTILINE))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    eight_bits = ", ".join(flag for flag in _EIGHT_BITS if flag in flags)
    name = fields.get("model name", "").strip()[:100]
    found = f"{name} ({eight_bits})" if name and eight_bits else name or eight_bits
    return found or None


def bytes_saturate(cpuinfo: str | None = None) -> bool:
    """Whether sums of two products of bytes may saturate on this processor, or it cannot be told.

    ``cpuinfo`` is the text of ``/proc/cpuinfo``, read where it is not given.
    """
    found = re.search(r"^flags\s*: (.*)$", _text(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo, re.MULTILINE)
    return found is None or not any(flag in found[1].split() for flag in _ADDS_FOUR_PRODUCTS)


def oom_kills_from_vmstat(text: str) -> int | None:
    """How often the kernel's out-of-memory killer has struck, from ``/proc/vmstat``."""
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _jetpack(packages: Mapping[str, str], l4t: str | None) -> str | None:
    package = re.match(r"\d+(\.\d+)+", packages.get("nvidia-jetpack", ""))
    if package:
        return package[0]
    return jetpack_from_l4t(l4t) if l4t else None


def _first(packages: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The upstream part of the first version found: ``10.3.0.30`` of ``10.3.0.30-1+cuda12.5``."""
    return next((packages[name].split("-")[0] for name in names if name in packages), None)


def _distribution(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu_name(root: Path) -> str | None:
    """The Jetson's model, else the name that the driver gives the first GPU."""
    model = _text(root / "proc/device-tree/model").strip("\x00\n ")
    if model:
        return model
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s+(\S.*)$", _text(file), re.MULTILINE)
        if found:
            return found[1].strip()
    return None


def _clocks(root: Path, run: Callable[[Sequence[str]], str]) -> str | None:
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if re.search(r"gpu|gv11b|ga10b|gb10b", folder.name):
            numbers = [_text(folder / name).strip() for name in ("min_freq", "cur_freq", "max_freq")]
            if all(number.isdigit() for number in numbers):
                return clocks_from_devfreq(*(int(number) for number in numbers))
    said = run(("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"))
    found = re.match(r"(\d+), (\d+)", said)
    return f"{found[1]} MHz now, {found[2]} MHz at most" if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def printed(command: Sequence[str]) -> str:
    """What a program prints; an empty text where there is none, it fails, or it takes 20 seconds."""
    # nvpmodel lies in /usr/sbin, which a session that is no login often lacks.
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    program = shutil.which(command[0], path=path)
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main() -> None:
    """Print this machine as JSON: what a host asks a device that has nothing installed yet."""
    sys.stdout.write(json.dumps(this_machine().to_json()) + "\n")


if __name__ == "__main__":
    main()
