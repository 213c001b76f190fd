"""A release goes out in waves, is stopped by failures and goes back; whatever interrupts it, the same call goes on."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_export.fleet.builds import Builds
from resvit_export.fleet.plan import DeviceType, Fleet
from resvit_export.fleet.release import Release
from resvit_export.fleet.state import DeviceState, FleetState, Phase, ReleaseState, Status, now
from resvit_export.fleet.transport import Transport
from resvit_export.fleet.visit import Visitor

_NAMED = 5
_REPLACED_MOST = 20
"""Devices of a type that one wave replaces, and as many as it wants besides."""
_SETTLED = frozenset({Status.RUNS, Status.FAILED, Status.BACK, Status.BLOCKED})
_COUNTED = frozenset({Status.RUNS, Status.BLOCKED})
"""What fills a place in a wave: a blocked device does, so that what is in its way is looked at first."""


@dataclass(frozen=True)
class Outcome:
    """How a fleet stands after a command: the release, how many devices have each status, and how many may run it.

    ``owing`` are those that went back, and where the command after the switch has not ended well since.
    """

    release: ReleaseState
    counts: dict[Status, int]
    may_run: int
    owing: int = 0

    @property
    def code(self) -> ExitCode:
        """OK where all is as it was asked for, STOPPED where failures stopped it, PARTIAL where devices are missing."""
        if self.release.phase in (Phase.STOPPED, Phase.GOING_BACK):
            return ExitCode.STOPPED
        if self.release.phase is Phase.ROLLED_BACK:
            return ExitCode.PARTIAL if self.may_run or self.owing else ExitCode.OK
        return ExitCode.OK if self.release.phase is Phase.OUT else ExitCode.PARTIAL

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "release": self.release.to_json(),
            "devices": {status.value: self.counts.get(status, 0) for status in Status},
        }


@dataclass
class _Queue:
    """One type in one wave: how many devices it wants, how many places are filled, and which may be asked."""

    goal: int
    settled: int
    ahead: deque[str]
    asked: int = 0

    def next(self) -> list[str]:
        """The devices that are missing, as far as there are any."""
        most = 2 * self.goal + _REPLACED_MOST - self.asked
        names = [self.ahead.popleft() for _ in range(min(len(self.ahead), self.goal - self.settled, most))]
        self.asked += len(names)
        return names


@dataclass
class Rollout:
    """One command's work on a fleet. ``pause`` waits for so many seconds."""

    fleet: Fleet
    state: FleetState
    transport: Transport
    reporter: Reporter = SILENT
    pause: Callable[[float], None] = time.sleep
    _stop: threading.Event = field(default_factory=threading.Event)
    _asked: set[str] = field(default_factory=set)
    _failed: dict[str, str] = field(default_factory=dict)

    def apply(self, release: Release, *, again: bool = False, take_over: bool = False) -> Outcome:
        """Bring the release to every device that its waves reach; what was done before is not done again.

        Failures beyond what the fleet allows stop it, and take it back from all that run it.

        Raises:
            ResvitError: INPUT for a release that was stopped or rolled back, unless ``again``.
        """
        gone = self.state.set_devices([(device, kind.name) for kind in self.fleet.types for device in kind.devices])
        if gone:
            self.reporter.say(f"In the fleet's file no more, and left as they are: {_some(gone)}.")
        self._begin(release, again)
        visitor = Visitor(
            self.fleet, release, self.state, self.transport,
            Builds(self.state, release.key, self.reporter) if release.key else None, take_over,
        )  # fmt: skip
        self._failed = {
            device.name: device.problem
            for device in self.state.devices
            if device.status in (Status.FAILED, Status.BACK)
        }
        for number in range(1, len(self.fleet.rollout.waves) + 1):
            if self._phase is not Phase.GOING_OUT:
                break
            self._wave(number, visitor)
        if self._phase is Phase.GOING_OUT and all(map(self._is_reached, self.fleet.types)):
            self._now(phase=Phase.OUT)
        if self._phase is Phase.GOING_BACK:
            self._go_back(visitor, Phase.STOPPED)
        return self.outcome()

    def rollback(self) -> Outcome:
        """Take the release back from every device that may run it.

        Raises:
            ResvitError: INPUT where that was done already: there is no way back from a way back.
        """
        there = self.state.release
        assert there is not None
        if there.phase in (Phase.ROLLED_BACK, Phase.STOPPED) and not self._to_take_back():
            raise ResvitError(
                f"{there.label} has been taken back from every device already: a rollback is not rolled back.",
                "Apply the release that is wanted: resvit-export fleet apply FILE, with --again for this one.",
            )
        self._now(phase=Phase.GOING_BACK, reason=there.reason or "it was asked for")
        self._go_back(Visitor(self.fleet, None, self.state, self.transport, None), Phase.ROLLED_BACK)
        return self.outcome()

    def outcome(self) -> Outcome:
        """How the fleet stands."""
        release = self.state.release
        assert release is not None
        devices = self.state.devices
        counts = Counter(device.status for device in devices)
        owing = sum(device.owes_after and not device.may_run for device in devices)
        return Outcome(release, dict(counts), sum(device.may_run for device in devices), owing)

    @property
    def _phase(self) -> Phase:
        release = self.state.release
        assert release is not None
        return release.phase

    def _now(self, **changes: Any) -> None:
        release = self.state.release
        assert release is not None
        self.state.release = dataclasses.replace(release, **changes)

    def _begin(self, release: Release, again: bool) -> None:
        there = self.state.release
        if there is not None and there.id == release.id and not again:
            if there.phase in (Phase.STOPPED, Phase.ROLLED_BACK):
                raise ResvitError(
                    f"{there.label} was {there.phase.value}: {there.reason}",
                    "Apply another release. To try this one once more: resvit-export fleet apply --again.",
                )
            if there.phase is not Phase.GOING_BACK:
                self._now(phase=Phase.GOING_OUT, label=release.label)
            return
        self.state.begin(ReleaseState(release.id, release.label, Phase.GOING_OUT, 0, now(), pinned=release.pinned))

    def _wave(self, number: int, visitor: Visitor) -> None:
        """Work until each type has as many devices as the wave wants; unreachable and failed ones are replaced."""
        self._now(wave=number)
        queues = {kind.name: self._queue(kind, number) for kind in self.fleet.types}
        came: list[str] = []
        share = self.fleet.rollout.waves[number - 1]
        what = f"wave {number} of {len(self.fleet.rollout.waves)} ({share} of each type)"
        while batch := [name for queue in queues.values() for name in queue.next()]:
            work = self.each(batch, lambda name: visitor.bring(name, number))
            for device in self.reporter.track(work, what, len(batch)):
                queues[device.type].settled += device.status in _COUNTED
                came += [device.name] if device.status is Status.RUNS else []
                self._judge(device)
            if self._stop.is_set():
                return
        if self.fleet.rollout.soak_seconds:
            self._soak(number, came, visitor)

    def _soak(self, number: int, came: Sequence[str], visitor: Visitor) -> None:
        """Leave the devices that came in this wave alone for a while, and check them once more."""
        release = self.state.release
        assert release is not None
        if release.soaked < number:  # whoever was killed meanwhile knows only the wave
            here = (number, Status.RUNS)
            came = [device.name for device in self.state.devices if (device.wave, device.status) == here]
        if came:
            self.reporter.say(f"Waiting {self.fleet.rollout.soak_seconds:g} s before the wave is checked once more")
            self.pause(self.fleet.rollout.soak_seconds)
            for device in self.each(came, visitor.check):
                self._judge(device)
        if not self._stop.is_set():
            self._now(soaked=max(number, release.soaked))

    def _queue(self, kind: DeviceType, number: int) -> _Queue:
        """What a wave asks of a type: nothing where no device of it ran the release after the wave before."""
        goal = max(wave.of(len(kind.devices)) for wave in self.fleet.rollout.waves[:number])
        devices = [self.state.device(name) for name in kind.devices]
        if number > 1 and not any(device.status is Status.RUNS for device in devices):
            return _Queue(0, 0, deque())
        ahead = deque(device.name for device in devices if self._to_ask(device))
        counted = sum(device.status in _COUNTED and not self._to_ask(device) for device in devices)
        return _Queue(goal, counted, ahead)

    def _to_ask(self, device: DeviceState) -> bool:
        """Whether a device is asked in this wave; one that could not take the release, once by each command."""
        if device.status is Status.BLOCKED:
            return device.name not in self._asked
        return device.status not in _SETTLED

    def each(self, names: Sequence[str], work: Callable[[str], DeviceState]) -> Iterator[DeviceState]:
        """Do ``work`` for each device, so many at once; no other is begun once the rollout is stopped."""
        waiting = iter(names)
        running: set[Future[DeviceState]] = set()
        pool = ThreadPoolExecutor(self.fleet.rollout.parallel, "fleet")
        try:
            while True:
                room = 0 if self._stop.is_set() else self.fleet.rollout.parallel - len(running)
                for name in itertools.islice(waiting, room):
                    self._asked.add(name)
                    running.add(pool.submit(work, name))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    yield one.result()
        finally:
            # Whoever is interrupted does not wait for builds: what a device does, it does to its end by itself.
            pool.shutdown(wait=not running, cancel_futures=True)

    def _judge(self, device: DeviceState) -> None:
        """Say what went wrong with a device, and stop the rollout where more failed than may."""
        if device.status is Status.RUNS:
            return
        self._tell(device)
        if device.status not in (Status.FAILED, Status.BACK):
            return
        self._failed.setdefault(device.name, device.problem)
        allowed = self.fleet.rollout.max_failures.at_most(self.fleet.devices)
        if len(self._failed) <= allowed or self._stop.is_set():
            return
        release = self.state.release
        assert release is not None
        counted = "1 device" if len(self._failed) == 1 else f"{len(self._failed)} devices"
        first = next(iter(self._failed.values()))
        reason = f"{counted} failed by wave {release.wave}, and {allowed} may. The first: {first}"
        self._stop.set()
        self._now(phase=Phase.GOING_BACK if self.fleet.rollout.roll_back else Phase.STOPPED, reason=reason)
        self.reporter.warn(f"The release is stopped: {reason}")

    def _go_back(self, visitor: Visitor, end: Phase) -> None:
        self._stop.clear()
        names = self._to_take_back()
        for device in self.reporter.track(self.each(names, visitor.take_back), "go back", len(names)):
            if device.may_run or device.owes_after:
                self._tell(device)
        self._now(phase=end)

    def _to_take_back(self) -> list[str]:
        """The devices that may run the release, and those that went back and owe the command after the switch.

        Of the latter not those that this command asked already: what failed there a moment ago is not tried again.
        """
        return [
            device.name
            for device in self.state.devices
            if device.may_run or (device.owes_after and device.name not in self._asked)
        ]

    def _is_reached(self, kind: DeviceType) -> bool:
        """Whether as many devices of a type run the release as the last wave wants."""
        goal = max(wave.of(len(kind.devices)) for wave in self.fleet.rollout.waves)
        return sum(self.state.device(name).status is Status.RUNS for name in kind.devices) >= goal

    def _tell(self, device: DeviceState) -> None:
        self.reporter.warn(f"{device.name} {device.status.value}: {device.problem}".rstrip(": "))


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
