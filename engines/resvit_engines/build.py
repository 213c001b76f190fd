"""An ONNX graph becomes an engine, in a child process that may crash or be killed without harm."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file, sha256_file
from resvit_engines.gpu import local_sm
from resvit_engines.kernels import Kernel, kernel_from_json
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.targets import RTX_SMS, Builder, Kind, Target, version_of

_MODULES = {Builder.RTX: "tensorrt_rtx_bindings", Builder.TENSORRT: "tensorrt"}
_TITLES = {Builder.RTX: "TensorRT for RTX", Builder.TENSORRT: "TensorRT"}
_HEARTBEAT = 15.0  # seconds between the lines that say a long build is alive
_GRACE = 5.0  # seconds that an interrupted child gets before it is killed


@dataclass(frozen=True)
class BuildSettings:
    """How to build: the batch as (smallest, usual, largest), and how hard the builder tries (0 to 5).

    ``workspace_mib`` is the scratch memory in MiB that kernels may use; None takes the target's. ``sparse`` lets the
    builder take kernels for 2:4 sparse weights where it finds the pattern and they are faster.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    workspace_mib: int | None = None
    optimization_level: int = 3
    sparse: bool = False

    def __post_init__(self) -> None:
        smallest, usual, largest = self.batch
        if not 1 <= smallest <= usual <= largest:
            raise ResvitError(
                f"A batch of {smallest}, {usual}, {largest} makes no sense.",
                "Give the smallest, the usual and the largest batch, in this order, from 1 up.",
            )
        if not 0 <= self.optimization_level <= 5:
            raise ResvitError(
                f"There is no optimisation level {self.optimization_level}.", "Use 0 (fast build) to 5 (thorough)."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ResvitError(
                f"A workspace of {self.workspace_mib} MiB is too small.", "Give it at least some hundred MiB."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "batch": list(self.batch),
            "workspace_mib": self.workspace_mib,
            "optimization_level": self.optimization_level,
            **({"sparse": True} if self.sparse else {}),
        }


@dataclass(frozen=True)
class EngineReport:
    """What came out of a build, without reading the engine: its kernels are from the builder's log.

    ``seconds`` is wall-clock time, ``peak_mib`` the child's peak resident memory in MiB, ``bytes`` the size of the
    engine file. ``inputs`` and ``outputs`` hold name, shape (-1: dynamic) and dtype of each.
    """

    target: str
    builder: Builder
    builder_version: str
    sm: int
    bytes: int
    sha256: str
    seconds: float
    peak_mib: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in a run's ``engine.json``."""
        return {
            "target": self.target,
            "builder": _TITLES[self.builder],
            "builder_version": self.builder_version,
            "sm": self.sm,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 3),
            "peak_mib": self.peak_mib,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "kernels": [kernel.to_json() for kernel in self.kernels],
            "warnings": list(self.warnings),
        }


def builder_here(target: Target) -> Builder | None:
    """Which builder on this machine can build for ``target``; None where only another machine can.

    TensorRT itself comes first for Jetsons and datacenter GPUs, since it measures on the GPU, but needs that GPU.
    """
    tensorrt = target.kind is not Kind.RTX and _installed("tensorrt") and local_sm() == target.sm
    if tensorrt:
        return Builder.TENSORRT
    return Builder.RTX if target.kind is not Kind.JETSON and target.sm in RTX_SMS else None


def build_engine(
    onnx: Path,
    engine: Path,
    target: Target,
    settings: BuildSettings | None = None,
    reporter: Reporter = SILENT,
    log: Path | None = None,
) -> EngineReport:
    """Build ``engine`` from ``onnx``; the file appears whole or not at all. ``log`` keeps the builder's verbose log.

    Raises:
        ResvitError: IMPOSSIBLE where this machine cannot build for the target (see ``plan_for_device``), MISSING
            without the builder's package, BUILD where the builder fails, crashes or is killed for memory,
            INTERRUPTED on Ctrl-C, SYSTEM where the file cannot be written.
    """
    settings = settings or BuildSettings()
    builder = _require_builder(target)
    if not onnx.is_file():
        raise ResvitError(f"There is no file {onnx}.", "Give the path of an ONNX file.")
    if target.arch != platform.machine():
        reporter.warn(
            f"{target.title} has an {target.arch} processor and this machine is {platform.machine()}: NVIDIA does "
            "not promise that engines move between the two; if it does not load there, build it there."
        )
    reporter.say(f"Building for {target.title} (SM {target.sm / 10:.1f}) with {_TITLES[builder]}")
    with atomic_file(engine) as partial, tempfile.TemporaryDirectory(prefix="resvit-build-") as scratch:
        request = {
            "module": _MODULES[builder],
            "onnx": str(onnx.resolve()),
            "engine": str(partial.resolve()),
            "result": str(Path(scratch) / "result.json"),
            "log": str(log.resolve()) if log else None,
            "sm": target.sm if builder is Builder.RTX else None,
            "batch": list(settings.batch),
            "workspace_mib": settings.workspace_mib or target.workspace_mib,
            "optimization_level": settings.optimization_level,
            "sparse": settings.sparse,
            "parent": os.getpid(),
        }
        result = _run_worker(request, Path(scratch), reporter)
        report = EngineReport(
            target.name,
            builder,
            result["version"],
            target.sm,
            partial.stat().st_size,
            sha256_file(partial),
            result["seconds"],
            result["peak_mib"],
            tuple(result["inputs"]),
            tuple(result["outputs"]),
            tuple(kernel_from_json(kernel) for kernel in result["kernels"]),
            tuple(result["warnings"]),
        )
    if target.jetpack and version_of(report.builder_version)[:2] != version_of(target.tensorrt):
        reporter.warn(f"Built with TensorRT {report.builder_version}, but {target.software} was named as the target.")
    return report


def _require_builder(target: Target) -> Builder:
    builder = builder_here(target)
    if builder is None:
        raise ResvitError(
            f"An engine for {target.title} cannot be built on this machine.",
            "Build it where that GPU is, with the commands of the plan.",
            ExitCode.IMPOSSIBLE,
        )
    if not _installed(_MODULES[builder]):
        raise ResvitError(
            "TensorRT for RTX, which builds engines without a GPU, is not installed.",
            "pip install 'resvit-export[host]' (or tensorrt-rtx-cu13-bindings and tensorrt-rtx-cu13-libs).",
            ExitCode.MISSING,
        )
    return builder


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _worker_command(request: Path) -> list[str]:
    return [sys.executable, "-m", "resvit_engines.rtx_worker", str(request)]


def _run_worker(request: dict[str, Any], scratch: Path, reporter: Reporter) -> dict[str, Any]:
    """Run the child to its end and return its result; every way to fail becomes a ResvitError."""
    request_file, output = scratch / "request.json", scratch / "output.txt"
    request_file.write_text(json.dumps(request))
    with output.open("wb") as stream, _ended(_start(request_file, scratch, stream.fileno())) as child:
        peak = _wait(child, reporter)
    result_file = Path(request["result"])
    if child.returncode != 0 or not result_file.is_file():
        raise _death(child.returncode, peak, output.read_text(errors="replace"))
    result: dict[str, Any] = json.loads(result_file.read_text())
    if "problem" in result:
        raise ResvitError(result["problem"], result["fix"], ExitCode(result["code"]))
    return result


def _start(request_file: Path, scratch: Path, output: int) -> subprocess.Popen[bytes]:
    # The working folder is the empty-but-for-our-files scratch folder: `python -m` puts it on the import path, and a
    # user's own tensorrt.py or json.py must not be found there. Its own session keeps a terminal's Ctrl-C with us.
    return subprocess.Popen(
        _worker_command(request_file),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"} if sys.version_info >= (3, 11) else None,
    )


@contextlib.contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Make sure that ``child`` has ended when the block does, however it does."""
    try:
        yield child
    except KeyboardInterrupt:
        raise ResvitError(
            "The build was interrupted; no engine was written.",
            "Run the same command again; finished stages are kept.",
            ExitCode.INTERRUPTED,
        ) from None
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait(child: subprocess.Popen[bytes], reporter: Reporter) -> int:
    """Wait for the child, saying now and then that it lives; returns the most memory seen, in MiB."""
    start = said = time.monotonic()
    peak = 0
    while True:
        try:
            child.wait(0.2)
        except subprocess.TimeoutExpired:
            peak = max(peak, _resident_mib(child.pid))
            if time.monotonic() - said >= _HEARTBEAT:
                said = time.monotonic()
                reporter.say(f"still building: {said - start:.0f} s, {peak} MiB")
            continue
        return peak


def _resident_mib(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return 0


def _death(code: int, peak_mib: int, output: str) -> ResvitError:
    last = [line.strip() for line in output.splitlines() if line.strip()][-3:]
    said = f" Its last words: {' | '.join(last)}" if last else ""
    if code == -signal.SIGKILL:
        return ResvitError(
            f"The builder was killed (signal 9) after using {peak_mib} MiB: most likely this machine ran out of "
            "memory. No engine was written.",
            "Close other programs, add swap, or build on a machine with more memory; a smaller batch or workspace "
            "also helps.",
            ExitCode.SYSTEM,
        )
    if code < 0:
        with contextlib.suppress(ValueError):
            return ResvitError(
                f"The builder crashed ({signal.Signals(-code).name}); no engine was written.{said}",
                "Try a lower optimisation level; if it crashes again, report it with the ONNX file.",
                ExitCode.BUILD,
            )
    return ResvitError(
        f"The builder ended without a result (exit status {code}); no engine was written.{said}",
        "Run again; if it fails again, report it with these words and the ONNX file.",
        ExitCode.BUILD,
    )
