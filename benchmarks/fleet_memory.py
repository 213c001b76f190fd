"""Devices of a fleet in memory: what stands at the other end of the scheduler, state and health checks in simulations.

Everything of a fleet but the transport is the product's own. A device here keeps its versions as a real one does: a
history, the current version, a claim, a disk and a clock; an installation without room fails, a rollback goes one back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from resvit_engines.bench.health import Health
from resvit_engines.bundle.reader import opened_bundle
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.machine import Machine
from resvit_engines.remote.ssh import UnreachableError
from resvit_engines.run.golden import GoldenReport
from resvit_export.fleet.transport import EngineThere, Pull, Running

MACHINE = Machine(
    sm=89, gpu="NVIDIA L4", tensorrt=None, jetpack=None, arch="x86_64", memory_mib=16_000, free_disk_mib=20_000,
    python="3.12.3", rtx="1.7.1.116",
)  # fmt: skip


@dataclass
class MemoryDevice:
    """One device. ``away`` is unreachable; ``bad`` are digests whose golden outputs are wrong there; ``why`` is why the
    engine itself does not run.

    ``at`` is called with the name of each step before it is done, and may raise.
    """

    machine: Machine = MACHINE
    ahead: float = 0.0
    away: bool = False
    bad: frozenset[str] = frozenset()
    latency_ms: float = 4.0
    why: str = ""
    command_code: int = 0
    holder: str | None = None
    history: dict[str, list[Running]] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    at: Callable[[str], object] = len

    def runs(self, name: str = "net") -> int | None:
        """The release that runs."""
        return self.history[name][-1].release if self.history.get(name) else None


class MemoryTransport:
    """Devices by address; counts how many are worked on at once."""

    def __init__(self, devices: Mapping[str, MemoryDevice]) -> None:
        self.devices = dict(devices)
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, device: str) -> Iterator[MemorySession]:
        """Connect."""
        there = self.devices[device]
        if there.away:
            raise UnreachableError(f"{device} does not answer.", "Check that it is on.", ExitCode.SYSTEM)
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield MemorySession(device, there)
        finally:
            with self._lock:
                self._at_once -= 1


@dataclass(frozen=True)
class MemorySession:
    """A session as ``transport.Session`` has it."""

    name: str
    device: MemoryDevice

    def facts(self) -> tuple[Machine, float]:
        """What it is."""
        self._step("facts")
        return self.device.machine, self.device.ahead

    def prepare(self, machine: Machine, *, on_cpu: bool) -> None:
        """Nothing is needed."""
        del machine, on_cpu
        self._step("prepare")

    def claim(self, fleet: str, holder: str, *, take_over: bool) -> None:
        """One fleet at a time."""
        self._step("claim")
        if self.device.holder not in (None, holder) and not take_over:
            raise ResvitError(f"{self.name} is claimed by another fleet, not {fleet}.", "Take it out of one of both.")
        self.device.holder = holder

    def take_keys(self, path: Path, root: Path | None) -> None:
        """Taken."""
        del root
        self._step(f"keys {path.name}")

    def installed(self) -> Mapping[str, Running]:
        """What runs."""
        self._step("installed")
        return {
            name: replace(history[-1], previous=history[-2].digest if len(history) > 1 else None)
            for name, history in self.device.history.items()
            if history
        }

    def build(self, bundle: Path, key: str, folder: Path) -> EngineThere:
        """No device here has a compiler."""
        del bundle, key, folder
        raise ResvitError(f"{self.name} cannot build.", "Give a bundle with an engine.", ExitCode.BUILD)

    def install(self, bundle: Path) -> Running:
        """Switch, after the golden outputs were right."""
        self._step("install")
        with opened_bundle(bundle) as opened:
            manifest, digest = opened.manifest(), sha256_bytes(opened.head)
        return self._switch(str(manifest.name), Running(digest, manifest.release, None))

    def pull(self, wanted: Pull) -> Running:
        """The same, by what the reference is held to."""
        self._step("pull")
        return self._switch(wanted.name, Running(wanted.reference.rpartition("sha256:")[2], 1, None))

    def health(self, name: str, *, golden: bool, seconds: float) -> Health:
        """The golden outputs and the latency."""
        self._step("health")
        runs = self.device.history[name][-1]
        report = GoldenReport(4, 0.0, None, 1.0, 20.0, "in memory", self.device.why) if golden else None
        return Health(name, runs.digest, runs.release, report, self.device.latency_ms if seconds else None)

    def command(self, text: str, seconds: float) -> tuple[int, str]:
        """As the device was told to answer."""
        del seconds
        self._step(f"command {text}")
        return self.device.command_code, "as it was told"

    def rollback(self, name: str, leave: str) -> Running:
        """One back, from that version alone."""
        self._step("rollback")
        history = self.device.history.get(name, [])
        if not history:
            raise ResvitError(f"{name} is not installed.", "Check the name.")
        if history[-1].digest == leave:
            if len(history) < 2:
                raise ResvitError(f"{name} has no earlier version to return to.", "See resvit-engine status.")
            history.pop()
        return history[-1]

    def _switch(self, name: str, new: Running) -> Running:
        if new.digest in self.device.bad:
            raise ResvitError(f"On {self.name}: the golden outputs differ.", "Build again.", ExitCode.MISMATCH)
        history = self.device.history.setdefault(name, [])
        before = history[-1].digest if history else None
        if before != new.digest:
            history.append(new)
        return replace(new, previous=before)

    def _step(self, step: str) -> None:
        self.device.steps.append(step)
        self.device.at(step)
