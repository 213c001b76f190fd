"""Look over the machine: what is installed, what is missing, and what to do about it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resvit_engines.errors import ResvitError, first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "warn", "fail"]
_PACKAGE = "resvit-export"
_NEEDED, _OPTIONAL = "host", "modelopt"
_INSTALL = f"pip install '{_PACKAGE}[{_NEEDED}]'"
_DISK_MIB, _MEMORY_MIB = 2048, 4096
_TIMEOUT = 10.0
_IMPORT_SECONDS = 120.0
# torchvision 0.N is built for torch 2.(N - 15)
_TORCHVISION_OFFSET = 15


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``fix`` is empty where nothing needs doing."""

    name: str
    state: State
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def examine() -> list[Check]:
    """Look at everything, in the order in which it would stop a run. Never raises; nothing heavy needs to be there.

    ``fail`` means that some stage cannot run here, ``warn`` that something optional or advisable is missing.
    """
    checks = [_python()]
    for look in (_packages, _torch_pair, _runtime, _rtx, _tensorrt, _gpu, _disk, _memory, _cores, _fashion_mnist):
        checks += _guarded(look)
    return checks


def _guarded(look: Callable[[], Iterator[Check]]) -> list[Check]:
    found: list[Check] = []
    try:
        found.extend(look())
    except Exception as error:  # noqa: BLE001  (a broken package may raise anything; the other checks still count)
        name = look.__name__.strip("_").replace("_", " ")
        found.append(Check(name, "fail", f"{type(error).__name__}: {first_line(error)}", f"Reinstall: {_INSTALL}"))
    return found


def _python() -> Check:
    version = platform.python_version()
    try:
        from packaging.specifiers import SpecifierSet

        wanted = importlib.metadata.metadata(_PACKAGE)["Requires-Python"] or ""
        if not SpecifierSet(wanted).contains(version, prereleases=True):
            return Check("Python", "fail", version, f"Use a Python that is {wanted}.")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        pass
    return Check("Python", "ok", f"{version} on {platform.machine()}")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(_PACKAGE, "fail", "not installed", f"{_INSTALL}, or pip install -e . in its repository")
        return
    for requirement in map(Requirement, declared):
        if _applies(requirement, ""):
            yield _package(requirement, f"pip install {_PACKAGE}", needed=True)
        elif _applies(requirement, _NEEDED):
            yield _package(requirement, _INSTALL, needed=True)
    optional = [entry for entry in map(Requirement, declared) if _applies(entry, _OPTIONAL)]
    yield _modelopt([entry for entry in optional if not _applies(entry, "")])


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": extra}))


def _package(requirement: Requirement, install: str, *, needed: bool) -> Check:
    wanted = str(requirement.specifier)
    missing: State = "fail" if needed else "warn"
    version = _version(requirement.name)
    if version is None:
        return Check(requirement.name, missing, "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(
            requirement.name, missing, f"{version}, needs {wanted}", f"pip install '{requirement.name}{wanted}'"
        )
    return Check(requirement.name, "ok", version)


def _modelopt(requirements: list[Requirement]) -> Check:
    """All that the other quantiser needs, as one line: it is optional."""
    install = f"For --quantizer modelopt: pip install '{_PACKAGE}[{_OPTIONAL}]'"
    checks = [_package(requirement, install, needed=False) for requirement in requirements]
    lacking = [f"{check.name} {check.found}" for check in checks if check.state != "ok"]
    version = _version("nvidia-modelopt")
    if version is None:
        return Check("ModelOpt (optional)", "warn", "not installed", install)
    if lacking:
        return Check("ModelOpt (optional)", "warn", f"{version}, but {', '.join(lacking)}", install)
    return Check("ModelOpt (optional)", "ok", version)


def _torch_pair() -> Iterator[Check]:
    torch, vision = _version("torch"), _version("torchvision")
    if torch is None or vision is None:
        return  # reported with the packages
    ours, theirs = _numbers(torch), _numbers(vision)
    if ours[0] == 2 and theirs[0] == 0 and theirs[1] != ours[1] + _TORCHVISION_OFFSET:
        fix = f"pip install 'torchvision==0.{ours[1] + _TORCHVISION_OFFSET}.*'"
        yield Check("torch and torchvision", "fail", f"{torch} and {vision} do not belong together", fix)
    elif problem := _import_problem("torchvision"):
        fix = f"pip install --force-reinstall --no-deps 'torchvision=={vision.partition('+')[0]}'"
        where = f"from the index that torch {torch} came from"
        found = f"{torch} and {vision}: {problem}; this tool works around it, code of your own does not"
        yield Check("torch and torchvision", "warn", found, f"{fix}, {where}")
    else:
        yield Check("torch and torchvision", "ok", f"{torch} and {vision} import together")


@functools.cache
def _import_problem(package: str) -> str:
    """Why ``import package`` fails, in a process of its own: its binary may not fit. Empty where it does not."""
    command = [sys.executable, "-c", f"import {package}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    if done.returncode == 0:
        return ""
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
    return f"'import {package}' fails: {last.strip()}"


def _runtime() -> Iterator[Check]:
    name = "ONNX Runtime self-test"
    if _version("onnxruntime") is None or _version("onnx") is None:
        yield Check(name, "fail", "not run: onnx or onnxruntime is missing", _INSTALL)
        return
    from resvit_calibrate.runtime.selftest import runtime_note, self_test

    try:
        health = self_test()
        if health.exact:
            yield Check(name, "ok", "INT8 and FP8 Q/DQ round as ONNX says, from FP16 and from FP32")
        elif health.exact_with_casts:
            yield Check(
                name, "warn", runtime_note(), "Nothing to do; ONNX Runtime 1.32 (Python 3.11) needs no workaround."
            )
        else:
            wrong = f"{health.version} computes {', '.join(health.wrong_with_casts)} wrongly"
            yield Check(name, "fail", wrong, f"Scores would mean nothing. {_INSTALL}")
    except ResvitError as error:
        yield Check(name, "fail", error.problem, error.fix)


def _rtx() -> Iterator[Check]:
    name = "TensorRT for RTX library"
    version = _version("tensorrt-rtx-cu13-libs")
    if version is None:
        yield Check(name, "fail", "not installed", f"Engines for RTX cards cannot be built here. {_INSTALL}")
        return
    files = importlib.metadata.files("tensorrt-rtx-cu13-libs") or []
    libraries = [file for file in files if file.name.startswith("libtensorrt_rtx.so")]
    present = [file for file in libraries if Path(str(file.locate())).is_file()]
    if present:
        yield Check(name, "ok", f"{version} ({present[0].name})")
    else:
        again = f"pip install --force-reinstall tensorrt-rtx-cu13-libs=={version}"
        yield Check(name, "fail", f"{version}, but its library is not there", again)


def _tensorrt() -> Iterator[Check]:
    name = "TensorRT (optional)"
    version = next((v for v in map(_version, ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")) if v), None)
    trtexec = shutil.which("trtexec", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/src/tensorrt/bin"]))
    if version or trtexec:
        yield Check(name, "ok", ", ".join(filter(None, (version, trtexec))))
    else:
        fix = "Only needed on the machine with the datacenter GPU; Jetson has it from JetPack."
        yield Check(name, "warn", "not installed", fix)


def _gpu() -> Iterator[Check]:
    name = "NVIDIA GPU"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        release = Path("/etc/nv_tegra_release")
        if release.is_file():
            yield Check(name, "ok", f"Jetson, {release.read_text(errors='replace').splitlines()[0][:80]}")
        else:
            yield Check(
                name, "warn", "none found", "Not needed to export, quantise, validate or build; only to run engines."
            )
        return
    query = [tool, "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        yield Check(name, "warn", f"nvidia-smi does not answer: {first_line(error)}", "Check the NVIDIA driver.")
        return
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not lines:
        text = (answer.stderr or answer.stdout).strip() or f"exit status {answer.returncode}"
        yield Check(name, "warn", f"nvidia-smi fails: {text.splitlines()[0][:120]}", "Check the NVIDIA driver.")
        return
    for line in lines:
        parts = [part.strip() for part in line.split(",")]
        label = f"{parts[0]}, driver {parts[1]}, SM {parts[2]}, {parts[3]}" if len(parts) == 4 else line
        yield Check(name, "ok", label)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free >> 20
    state: State = "ok" if free >= _DISK_MIB else "warn"
    yield Check(
        "Disk", state, f"{free:,} MiB free here", "" if state == "ok" else "A run may need 2 GiB; free some space."
    )


def _memory() -> Iterator[Check]:
    available = _available_mib()
    if available is None:
        yield Check("Memory", "warn", "unknown on this system", "")
        return
    state: State = "ok" if available >= _MEMORY_MIB else "warn"
    fix = "" if state == "ok" else "Building an engine may need 4 GiB; close other programs."
    yield Check("Memory", state, f"{available:,} MiB available", fix)


def _cores() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("CPU cores", "ok", str(usable))


def _fashion_mnist() -> Iterator[Check]:
    from resvit_calibrate.readers.fashion_mnist import SPLITS, find_files

    try:
        folders = {str(find_files(split)[0].parent) for split in SPLITS}
        yield Check("Fashion-MNIST (optional)", "ok", ", ".join(sorted(folders)))
    except ResvitError as error:
        yield Check("Fashion-MNIST (optional)", "warn", "not found", error.fix)


def _available_mib() -> int | None:
    """MiB that can still be used, counting the limit of a container (cgroup v2)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return min(free, (int(limit) - int(used)) >> 20)
    except (OSError, ValueError):
        return free


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    from packaging.version import Version

    parsed = Version(version)
    return parsed.major, parsed.minor
