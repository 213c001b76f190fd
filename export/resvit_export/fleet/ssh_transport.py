"""Devices of a fleet over SSH: the user's own OpenSSH, and ``resvit-engine`` on the other end."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from resvit_engines.bench.bench import BenchReport
from resvit_engines.bench.health import Health
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file, write_atomic
from resvit_engines.machine import Machine
from resvit_engines.progress import SILENT
from resvit_engines.records import Record, record_from_bytes, shown
from resvit_engines.remote.device import ROOT, Device, RemoteJob
from resvit_engines.remote.ssh import Connection, UnreachableError, address_from, quoted
from resvit_engines.remote.ssh_files import download, upload
from resvit_export.fleet.transport import EngineThere, Pull, Running

_ENGINE = f"{ROOT}/venv/bin/python -m resvit_engines"
_FOLDER = f"{ROOT}/fleet"
_SOON, _LONG = 300.0, 4 * 3600.0
"""Seconds for what looks, and for what fetches, unpacks and runs."""
_BUNDLE_MOST = 64 << 30
_CODES = {int(code): code for code in ExitCode if code not in (ExitCode.OK, ExitCode.BUG, ExitCode.USAGE)}


class SshTransport:
    """Opens SSH connections; ``wheels`` is a folder for devices without a network, as ``Device.prepare`` takes it."""

    def __init__(self, wheels: Path | None = None, patience: float | None = None) -> None:
        self._wheels = wheels
        self._patience = patience

    @contextlib.contextmanager
    def open(self, device: str) -> Iterator[SshSession]:
        """Connect; raises ``UnreachableError`` where nobody answers, ``ResvitError`` where ssh refuses."""
        with Connection(address_from(device), SILENT, self._patience) as connection:
            yield SshSession(connection, device, self._wheels)


@dataclass(frozen=True)
class SshSession:
    """A session as ``transport.Session`` has it."""

    connection: Connection
    device: str
    wheels: Path | None

    def facts(self) -> tuple[Machine, float]:
        """What the device is, and by how many seconds its clock is ahead."""
        machine = Device(self.connection).machine()
        before = time.time()
        said = self._run("date -u +%s").strip()
        if not re.fullmatch(r"-?[0-9]{1,15}", said):
            raise ResvitError(f"{self.device} tells no time: {shown(said)}", "Try it there by hand: date -u +%s")
        return machine, int(said) - (before + time.time()) / 2

    def prepare(self, machine: Machine, *, on_cpu: bool) -> None:
        """Install ``resvit-engine`` where it is missing or of another version."""
        Device(self.connection).prepare(machine, self.wheels, on_cpu=on_cpu)

    def claim(self, fleet: str, holder: str, *, take_over: bool) -> None:
        """Claim the device."""
        more = ["--take-over"] if take_over else []
        self._engine("claim", "--fleet", fleet, "--holder", holder, "--device", self.device, *more)

    def take_keys(self, path: Path, root: Path | None) -> None:
        """Copy the list of keys, and the root's public key where there is one, and have it taken."""
        remote = f"{_FOLDER}/{sha256_file(path)[:16]}.keys"
        upload(self.connection, path, remote)
        more = []
        if root is not None:
            upload(self.connection, root, f"{_FOLDER}/root.pub")
            more = ["--root", f"{_FOLDER}/root.pub"]
        self._engine("keys", remote, *more)

    def installed(self) -> Mapping[str, Running]:
        """What ``resvit-engine status`` lists; what does not read there is left out."""
        found = {}
        for state in self._engine("status").records("installed"):
            running, previous = (state.optional(key, state.record) for key in ("running", "previous"))
            if running is not None:
                before = previous.sha256("digest") if previous else None
                found[state.name("name")] = Running(running.sha256("digest"), running.whole("release"), before)
        return found

    def build(self, bundle: Path, key: str, folder: Path) -> EngineThere:
        """Run the same job as 'build --device' does, and fetch the bundle that it packed."""
        job, device = RemoteJob(bundle, key), Device(self.connection)
        result = device.run(job)
        path = folder / "built.resvit"
        download(self.connection, f"{job.folder}/{result.bundle.name}", path, SILENT, _BUNDLE_MOST)
        if sha256_file(path) != result.bundle.sha256:
            raise ResvitError(
                f"The engine that {self.device} built is not the one that it tells of.",
                "Look at it by hand: something else writes there.",
                ExitCode.UNTRUSTED,
            )
        write_atomic(path.with_suffix(".pub"), result.bundle.key.encode())
        p50 = result.bench.latency_ms.get("p50") if isinstance(result.bench, BenchReport) else None
        self._forget(job.folder)
        return EngineThere(path, p50)

    def install(self, bundle: Path) -> Running:
        """Copy the bundle and install it; neither it nor a part of it stays behind, unless the connection is lost."""
        remote = f"{_FOLDER}/{sha256_file(bundle)[:16]}.resvit"
        try:
            upload(self.connection, bundle, remote)
            done = self._engine("install", remote, seconds=_LONG)
        except UnreachableError:
            raise  # what has arrived is kept for the next time
        except ResvitError:
            self._forget(remote, f"{remote}.part")
            raise
        self._forget(remote)
        return _installed(done)

    def pull(self, wanted: Pull) -> Running:
        """Have the device pull what is for it."""
        options = ["--expect", wanted.name, "--target", wanted.target]
        if wanted.ca is not None:
            certificate = Path(wanted.ca)
            remote = f"{_FOLDER}/{sha256_file(certificate)[:16]}.pem"
            upload(self.connection, certificate, remote)
            options += ["--ca", remote]
        options += ["--plain-http"] if wanted.plain_http else []
        done = self._engine("pull", wanted.reference, "--install", *options, seconds=_LONG)
        told = done.optional("installed", done.record)
        if told is not None:
            return _installed(told)
        there = self.installed().get(wanted.name)
        if there is None:
            raise ResvitError(f"{self.device} says that {wanted.name} runs, and lists it not.", "Look at it by hand.")
        return there

    def health(self, name: str, *, golden: bool, seconds: float) -> Health:
        """Ask ``resvit-engine health``."""
        more = [] if golden else ["--no-golden"]
        return Health.from_json(self._engine("health", name, "--seconds", f"{seconds:g}", *more, seconds=_LONG))

    def command(self, text: str, seconds: float) -> tuple[int, str]:
        """Run a line of shell; 124 and what it printed where it takes longer than ``seconds``.

        It may run twice, where the connection is lost meanwhile.
        """
        script = (
            f"mkdir -p {_FOLDER}; rm -f {_FOLDER}/status; "
            f"{{ timeout -k 5 {seconds:.0f} sh -c {quoted(text)} 2>&1 < /dev/null; "
            f"echo $? > {_FOLDER}/status; }} | tail -c 4000; cat {_FOLDER}/status >&2"
        )
        answer = self.connection.patiently(lambda: self.connection.run(script, seconds=seconds + 30))
        code = answer.stderr.strip().rpartition("\n")[2]
        if not re.fullmatch("[0-9]{1,3}", code):
            raise ResvitError(f"{self.device} could not run a command: {shown(answer.stderr)}", f"Try it there: {text}")
        return int(code), answer.stdout

    def rollback(self, name: str, leave: str) -> Running:
        """Go back; what runs afterwards."""
        return _installed(self._engine("rollback", name, "--leave", leave, seconds=_LONG))

    def _run(self, script: str) -> str:
        return self.connection.patiently(lambda: self.connection.run(script)).stdout

    def _forget(self, *paths: str) -> None:
        with contextlib.suppress(UnreachableError):
            self.connection.run(f"rm -rf {quoted(*paths)}")

    def _engine(self, *arguments: str, seconds: float = _SOON) -> Record:
        """Run ``resvit-engine`` there and read the JSON that it prints; raises the error that it ended with."""
        script = f"{_ENGINE} {quoted(*arguments)} --json"
        answer = self.connection.patiently(lambda: self.connection.run(script, seconds=seconds))
        what = f"the answer of {self.device} to {arguments[0]}"
        if answer.code == 0:
            return record_from_bytes(answer.stdout.encode(), what)
        if not answer.stdout.strip():
            last = answer.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
            raise ResvitError(
                f"On {self.device} resvit-engine {arguments[0]} ended with {answer.code}: {shown(last[0])}",
                f"Try it there by hand: {self.connection.address.by_hand}",
                ExitCode.MISSING,
            )
        error = record_from_bytes(answer.stdout.encode(), what).record("error")
        code = _CODES.get(error.whole("exit_code", 1, 255), ExitCode.MISSING)
        raise ResvitError(f"On {self.device}: {error.text('problem')}", error.text("fix"), code)


def _installed(done: Record) -> Running:
    version = done.record("version")
    before = done.optional("before", done.record)
    return Running(version.sha256("digest"), version.whole("release"), before.sha256("digest") if before else None)
