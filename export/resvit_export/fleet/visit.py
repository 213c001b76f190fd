"""One device on its way to a release: asked, claimed, given it, checked; and back, where the check fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.machine import Machine
from resvit_engines.remote.ssh import UnreachableError
from resvit_export.fleet.builds import Builds, require_disk
from resvit_export.fleet.plan import Fleet, HealthChecks
from resvit_export.fleet.release import Package, Release
from resvit_export.fleet.state import DeviceState, FleetState, Status
from resvit_export.fleet.transport import Running, Session, Transport

CLOCK_MOST = 24 * 3600.0
"""Seconds by which a device's clock may be wrong: keys expire by days."""
_TRIED = frozenset({ExitCode.BUILD, ExitCode.MISMATCH})
"""How a device's answer ends where the release was tried there and is bad. Anything else is about the device."""
_WORDS_MOST = 300


class UnwellError(ResvitError):
    """The release runs, and a health check says that it should not."""


@dataclass
class Visitor:
    """Everything that the devices of one rollout share; its methods are called by several threads.

    Without a ``release`` it only takes back.
    """

    fleet: Fleet
    release: Release | None
    state: FleetState
    transport: Transport
    builds: Builds | None
    take_over: bool = False
    holder: str = field(default="")

    def __post_init__(self) -> None:
        self.holder = self.state.holder

    def bring(self, name: str, wave: int) -> DeviceState:
        """Bring one device to the release; what became of it is written down and returned. Never raises ResvitError."""
        self.state.change(name, status=Status.AT_WORK, wave=wave, problem="", fix="")
        package = self._package(name)
        try:
            with self.transport.open(name) as session:
                return self._bring(name, package, session)
        except UnreachableError as error:
            return self._ended(name, Status.UNREACHABLE, error)
        except ResvitError as error:
            bad = error.code in _TRIED
            return self._ended(name, Status.FAILED if bad else Status.BLOCKED, error)

    def check(self, name: str) -> DeviceState:
        """Ask a device that runs the release whether it is still well; one that is not goes back."""
        package = self._package(name)
        try:
            with self.transport.open(name) as session:
                return self._checked(name, package, session)
        except UnreachableError:
            return self.state.device(name)  # it was well, and comes again
        except ResvitError as error:
            return self._ended(name, Status.FAILED if error.code in _TRIED else Status.BLOCKED, error)

    def take_back(self, name: str) -> DeviceState:
        """Return one device to what ran before the release. Never raises ResvitError."""
        device = self.state.device(name)
        if device.may_run and (device.model is None or device.digest is None):
            device = self.state.change(name, may_run=False)
        if not device.may_run and not device.owes_after:
            return device
        try:
            with self.transport.open(name) as session:
                return self._back(device, session)
        except UnreachableError as error:
            return self.state.change(name, status=Status.UNREACHABLE, problem=error.problem, fix=error.fix)
        except ResvitError as error:
            return self.state.change(name, status=Status.FAILED, problem=error.problem, fix=error.fix)

    def _package(self, name: str) -> Package:
        assert self.release is not None, "nothing is brought without a release"
        return self.release.packages[self.state.device(name).type]

    def _bring(self, name: str, package: Package, session: Session) -> DeviceState:
        machine, ahead = session.facts()
        self.state.change(name, facts=_described(machine))
        _require_clock(name, ahead)
        if package.manifest is not None and package.manifest.target is not None:
            from resvit_export.stages.device import require_target_there

            require_target_there(package.manifest.target, machine, name)
        session.prepare(machine, on_cpu=package.on_cpu)
        session.claim(self.fleet.name, self.holder, take_over=self.take_over)
        if self.release is not None and self.release.keys is not None:
            session.take_keys(self.release.keys, self.release.root)
        there = session.installed().get(package.name)
        self._give(name, package, machine, there, session)
        return self._checked(name, package, session)

    def _give(self, name: str, package: Package, machine: Machine, there: Running | None, session: Session) -> None:
        """Have the device run the package, where it does not already."""
        before = there.digest if there else None
        if package.pull is not None:
            owed = self.state.change(name, model=package.name, before=before).owes_after
            with self._switching(name):
                done = session.pull(package.pull)
            self.state.change(name, may_run=True, digest=done.digest, before=_before(done, before))
            if done.digest == before:
                self.state.change(name, owes_after=owed)  # nothing was switched
            return
        path, digest = package.path, package.digest
        if package.built_there:
            if self.builds is None:
                raise ResvitError(
                    "There is no key to sign what a device builds.", "Say release.key in the fleet's file."
                )
            engine = self.builds.engine_for(package, machine, name, session)
            path, digest = engine.path, engine.digest
            if engine.latency_ms is not None:
                self.state.record_latency(digest, engine.device, engine.latency_ms)
        assert path is not None
        if there is not None and there.digest == digest:
            self.state.change(name, may_run=True, model=package.name, digest=digest, before=there.previous)
            return
        require_disk(name, machine, 2 * path.stat().st_size, "Installing")
        # Written down before: whoever is killed now knows afterwards what may run there.
        self.state.change(name, may_run=True, model=package.name, digest=digest, before=before)
        try:
            with self._switching(name):
                session.install(path)
        except UnreachableError:
            raise
        except ResvitError:
            self.state.change(name, may_run=False)  # an installation that fails changes nothing
            raise

    @contextlib.contextmanager
    def _switching(self, name: str) -> Iterator[None]:
        """Hold a device to owe the command after the switch from before the switch on, whatever interrupts it."""
        owed = self.state.device(name).owes_after
        self.state.change(name, owes_after=self.fleet.rollout.after is not None)
        try:
            yield
        except UnreachableError:
            raise
        except ResvitError:
            self.state.change(name, owes_after=owed)  # what fails switches nothing
            raise

    def _settle(self, name: str, session: Session) -> None:
        """Run the command after the switch on a device that owes it; what fails leaves it owed."""
        if not self.state.device(name).owes_after:
            return
        if self.fleet.rollout.after is not None:
            self._run(name, self.fleet.rollout.after, self.fleet.rollout.after_seconds, "after the switch", session)
        self.state.change(name, owes_after=False)

    def _checked(self, name: str, package: Package, session: Session) -> DeviceState:
        """Run what is owed after the switch and check the device; where it is not well, take it back and say why."""
        try:
            self._settle(name, session)
            latency = self._require_well(name, package, session)
        except UnreachableError:
            raise
        except ResvitError as error:
            if error.code not in _TRIED or not self.fleet.rollout.roll_back:
                raise
            self.state.change(name, status=Status.FAILED, problem=error.problem, fix=error.fix)
            back = self._back(self.state.device(name), session)
            more = "" if back.problem == error.problem else f" {back.problem}"
            return self.state.change(name, status=back.status, problem=error.problem + more, fix=error.fix)
        return self.state.change(name, status=Status.RUNS, latency_ms=latency, problem="", fix="")

    def _require_well(self, name: str, package: Package, session: Session) -> float | None:
        checks = self.fleet.health
        latency = None
        if checks.golden or checks.timed_seconds:
            found = session.health(package.name, golden=checks.golden, seconds=checks.timed_seconds)
            wanted = self.state.device(name).digest
            if wanted is not None and found.digest != wanted:
                raise UnwellError(
                    f"{name} runs {found.digest[:12]} and not {wanted[:12]}, which was installed.",
                    "Something else installs there: find out what.",
                    ExitCode.MISMATCH,
                )
            if found.golden is not None and found.golden.why:
                raise UnwellError(
                    f"On {name} the golden images were not answered by the engine: {found.golden.why}.",
                    "Install there what it names, and apply again with --again.",
                    ExitCode.MISMATCH,
                )
            latency = found.latency_ms
            if latency is not None:
                self._require_fast(name, found.digest, latency, checks)
        if checks.command is not None:
            self._run(name, checks.command, checks.command_seconds, "that says whether it is well", session)
        return latency

    def _require_fast(self, name: str, digest: str, latency: float, checks: HealthChecks) -> None:
        recorded, where = self.state.latency_of(digest) or self.state.record_latency(digest, name, latency)
        too_slow = None
        if checks.latency_ms is not None and latency > checks.latency_ms:
            too_slow = f"health.latency_ms allows {checks.latency_ms:g} ms"
        elif checks.latency is not None and latency > checks.latency * recorded:
            too_slow = f"health.latency allows {checks.latency:g} times the {recorded:.3f} ms that {where} takes"
        if too_slow:
            raise UnwellError(
                f"On {name} it takes {latency:.3f} ms, and {too_slow}.",
                "Compare power mode and clocks of both; where the figure is right, allow more.",
                ExitCode.MISMATCH,
            )

    def _run(self, name: str, command: str, seconds: float, what: str, session: Session) -> None:
        code, said = session.command(command, seconds)
        if code != 0:
            words = " | ".join(line.strip() for line in said.strip().splitlines()[-3:])[:_WORDS_MOST]
            raise UnwellError(
                f"On {name} the command {what} ended with {code}: {words or 'it printed nothing'}",
                f"Try it there by hand: {command}",
                ExitCode.MISMATCH,
            )

    def _back(self, device: DeviceState, session: Session) -> DeviceState:
        """Return to the version before, where the release runs, and run what is owed after the switch."""
        told: dict[str, Any] = {"status": Status.BACK, "may_run": False, "before": None}
        if device.may_run:
            assert device.model is not None
            assert device.digest is not None
            there = session.installed().get(device.model)
            if there is not None and there.digest == device.digest:
                try:
                    with self._switching(device.name):
                        there = session.rollback(device.model, device.digest)
                except UnreachableError:
                    raise
                except ResvitError as error:
                    said = f"It could not go back: {error.problem}"
                    return self.state.change(device.name, status=Status.FAILED, problem=said, fix=error.fix)
            told["digest"] = there.digest if there else None
        # Written down before the command: it is not taken back once more, whatever becomes of that.
        self.state.change(device.name, **told)
        try:
            self._settle(device.name, session)
        except ResvitError as error:
            said = f"It went back, and the command after the switch did not end well there. {error.problem}"
            return self.state.change(device.name, problem=said, fix=error.fix)
        if device.may_run and device.status is not Status.UNREACHABLE:
            return self.state.device(device.name)  # why it goes back stays
        return self.state.change(device.name, problem="", fix="")

    def _ended(self, name: str, status: Status, error: ResvitError) -> DeviceState:
        return self.state.change(name, status=status, problem=error.problem, fix=error.fix)


def _before(done: Running, before: str | None) -> str | None:
    return before if before != done.digest else done.previous


def _require_clock(name: str, ahead: float) -> None:
    if abs(ahead) <= CLOCK_MOST:
        return
    days = abs(ahead) / 86_400
    raise ResvitError(
        f"The clock of {name} is {days:,.0f} days {'ahead of' if ahead > 0 else 'behind'} this machine's, so it could "
        "not tell which keys have expired.",
        "Set it there (sudo timedatectl set-ntp true), and apply again.",
        ExitCode.SYSTEM,
    )


def _described(machine: Machine) -> str:
    parts = (
        machine.gpu or machine.processor or machine.arch,
        f"JetPack {machine.jetpack}" if machine.jetpack else "",
        f"TensorRT {machine.tensorrt}" if machine.tensorrt else "",
        f"{machine.free_disk_mib:,} MiB of disk free",
    )
    return ", ".join(part for part in parts if part)[:400]
