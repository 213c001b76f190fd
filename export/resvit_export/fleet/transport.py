"""What can be done to a device of a fleet, whatever leads there: each step can be done again when it is interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resvit_engines.bench.health import Health
from resvit_engines.machine import Machine


@dataclass(frozen=True)
class Running:
    """What runs under a name: the digest of its manifest, its release, and the digest of what came before."""

    digest: str
    release: int
    previous: str | None


@dataclass(frozen=True)
class EngineThere:
    """An engine that a device built: a bundle on this machine, signed by that device, and the latency there in ms."""

    bundle: Path
    latency_ms: float | None


@dataclass(frozen=True)
class Pull:
    """What a device is to pull: a reference that is held to its content, and what is wanted of it."""

    reference: str
    name: str
    target: str
    precision: str | None
    ca: str | None
    plain_http: bool


class Session(Protocol):
    """An open way to one device. Every method raises ``UnreachableError`` where the device is gone."""

    def facts(self) -> tuple[Machine, float]:
        """What the device is, and by how many seconds its clock is ahead of this machine's."""
        ...

    def prepare(self, machine: Machine, *, on_cpu: bool) -> None:
        """Install what the device needs for everything below."""
        ...

    def claim(self, fleet: str, holder: str, *, take_over: bool) -> None:
        """Claim it for a fleet; raises ``ResvitError`` where another has it."""
        ...

    def take_keys(self, path: Path, root: Path | None) -> None:
        """Hand over a signed list of keys, with the root's public key for a device's first.

        Raises UNTRUSTED where the device does not take it.
        """
        ...

    def installed(self) -> Mapping[str, Running]:
        """What runs there, by name."""
        ...

    def build(self, bundle: Path, key: str, folder: Path) -> EngineThere:
        """Build the engine of a bundle that ``key`` (the text of its file) signed; it comes into ``folder``."""
        ...

    def install(self, bundle: Path) -> Running:
        """Install a bundle and switch to it, after its golden outputs were right."""
        ...

    def pull(self, wanted: Pull) -> Running:
        """Have the device pull and install what fits it."""
        ...

    def health(self, name: str, *, golden: bool, seconds: float) -> Health:
        """Check what runs under a name, and time it for ``seconds`` above 0."""
        ...

    def command(self, text: str, seconds: float) -> tuple[int, str]:
        """Run the user's own line of shell; returns its exit status and the last that it printed."""
        ...

    def rollback(self, name: str, leave: str) -> Running:
        """Go back from the version with the digest ``leave``; where another runs, nothing is done."""
        ...


class Transport(Protocol):
    """Opens ways to devices."""

    def open(self, device: str) -> AbstractContextManager[Session]:
        """Connect to the device at this address; raises ``UnreachableError`` where it does not answer."""
        ...
