"""A fleet: waves, failures, rollbacks, whatever interrupts them; scheduler and state that ship, devices in memory.

``test_fleet_ssh.py`` has the same over sshd.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sqlite3
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from engine_reports import engine_report
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.keys.key_list import KeyList, sign_list
from resvit_engines.keys.private import load_signing_key
from resvit_engines.registry.client import Client
from resvit_engines.registry.offer import Offer
from resvit_engines.remote.ssh import UnreachableError
from resvit_engines.targets.table import Builder
from resvit_export.fleet import commands
from resvit_export.fleet.addresses import expand
from resvit_export.fleet.plan import Fleet, Share, fleet_from_document, fleet_from_toml
from resvit_export.fleet.rollout import Outcome
from resvit_export.fleet.state import DATABASE, DeviceState, Phase, Status, opened_state
from resvit_export.fleet.transport import Running
from test_install import bundle
from test_signing import secret_file

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from fleet_memory import MACHINE, MemoryDevice, MemoryTransport  # noqa: E402


def engine(path: Path, release: int, content: bytes = b"") -> Path:
    """A bundle with an engine, as far as a fleet looks."""
    built = engine_report(target="rtx-4090", builder=Builder.RTX, builder_version="1.7.1.116", sm=89)
    return bundle(path, content or b"%d" % release, release=release, engine=built, precision="fp16")


@dataclasses.dataclass
class Yard:
    """A fleet's folder, its devices in memory, and what its file says."""

    folder: Path
    devices: Mapping[str, MemoryDevice]
    said: dict[str, object]
    transport: MemoryTransport

    def fleet(self, release: int, content: bytes = b"") -> Fleet:
        path = engine(self.folder / f"{release}.resvit", release, content)
        release_table = {"bundles": [str(path)], "key": str(self.folder / "release.key")}
        said = {"name": "cameras", "release": release_table, **self.said}
        return fleet_from_document(said, self.folder / "fleet.toml")

    def apply(self, release: int, content: bytes = b"", **options: bool) -> Outcome:
        return commands.apply(self.fleet(release, content), self.transport, **options)[0]

    def rollback(self, release: int) -> Outcome:
        return commands.rollback(self.fleet(release), self.transport)[0]

    def states(self, release: int = 1) -> dict[str, DeviceState]:
        return {state.name: state for state in commands.status(self.fleet(release)).devices}

    def releases(self) -> list[int | None]:
        return [device.runs() for device in self.devices.values()]


def yard(folder: Path, count: int = 10, **said: object) -> Yard:
    folder.mkdir(exist_ok=True)
    if not (folder / "release.key").exists():
        secret_file(folder / "release.key")
    names = [f"ssh://cam-{number:02d}" for number in range(count)]
    devices = {name: MemoryDevice() for name in names}
    types = {"camera": {"target": "rtx-4090", "devices": names}}
    return Yard(folder, devices, {"types": types, **said}, MemoryTransport(devices))


@pytest.fixture
def ten(tmp_path: Path) -> Yard:
    return yard(tmp_path / "yard")


def refused(function: Callable[..., object], *arguments: object, code: ExitCode, **named: object) -> str:
    with pytest.raises(ResvitError) as caught:
        function(*arguments, **named)
    assert caught.value.code is code, caught.value
    return str(caught.value)


# Waves


def test_a_release_goes_out_in_waves(ten: Yard) -> None:
    outcome = ten.apply(1)
    assert (outcome.code, outcome.release.phase) == (ExitCode.OK, Phase.OUT)
    assert ten.releases() == [1] * 10
    waves = [state.wave for state in ten.states().values()]
    assert waves == [1] + [3] * 9  # a tenth of ten is the one that has it
    assert ten.transport.most_at_once <= 8
    assert all(state.status is Status.RUNS and not state.problem for state in ten.states().values())


def test_the_same_again_asks_no_device(ten: Yard) -> None:
    ten.apply(1)
    steps = [len(device.steps) for device in ten.devices.values()]
    assert ten.apply(1).code is ExitCode.OK
    assert [len(device.steps) for device in ten.devices.values()] == steps
    assert ten.apply(2).code is ExitCode.OK
    assert ten.releases() == [2] * 10


def test_each_type_has_a_device_in_the_first_wave(tmp_path: Path) -> None:
    place = yard(tmp_path / "yard", 6)
    names = list(place.devices)
    kinds = {f"kind-{n}": {"target": "rtx-4090", "devices": names[2 * n : 2 * n + 2]} for n in range(3)}
    place.said["types"] = kinds
    place.apply(1)
    assert [state.wave for state in place.states().values()] == [1, 3] * 3


def test_no_more_at_once_than_the_file_says(tmp_path: Path) -> None:
    place = yard(tmp_path / "yard", 30, rollout={"parallel": 3, "waves": ["100%"]})
    assert place.apply(1).code is ExitCode.OK
    assert place.transport.most_at_once <= 3


def test_waves_that_do_not_reach_all_leave_the_rest(tmp_path: Path) -> None:
    place = yard(tmp_path / "yard", 10, rollout={"waves": [1, "30%"]})
    assert place.apply(1).code is ExitCode.OK
    assert place.releases() == [1] * 3 + [None] * 7
    place.said["rollout"] = {"waves": [1, "30%", "100%"]}
    assert place.apply(1).code is ExitCode.OK
    assert place.releases() == [1] * 10


# Failures


def test_a_bad_release_is_stopped_in_wave_one_and_nobody_else_sees_it(ten: Yard) -> None:
    ten.apply(1)
    for device in ten.devices.values():
        device.command_code = 1
    ten.said["health"] = {"command": "systemctl is-active camera"}
    outcome = ten.apply(2)
    assert (outcome.code, outcome.release.phase, outcome.release.wave) == (ExitCode.STOPPED, Phase.STOPPED, 1)
    assert ten.releases() == [1] * 10
    first, *others = ten.devices.values()
    assert "rollback" in first.steps
    assert not any("rollback" in device.steps for device in others)
    assert "systemctl is-active camera" in str(ten.states()["ssh://cam-00"])
    # The same release does not come back by itself; the next one does.
    said = refused(ten.apply, 2, code=ExitCode.INPUT)
    assert "was stopped" in said
    assert "--again" in said
    for device in ten.devices.values():
        device.command_code = 0
    assert ten.apply(2, again=True).code is ExitCode.OK
    assert ten.releases() == [2] * 10


def test_a_failure_in_the_last_wave_takes_all_devices_back(ten: Yard) -> None:
    ten.apply(1)
    ten.said["health"] = {"command": "true"}
    ten.devices["ssh://cam-05"].command_code = 3
    outcome = ten.apply(2)
    assert outcome.release.phase is Phase.STOPPED
    assert "1 device failed by wave 3, and 0 may" in outcome.release.reason
    assert ten.releases() == [1] * 10
    assert outcome.may_run == 0
    assert Status.RUNS not in outcome.counts


def test_failures_that_are_allowed_stop_nothing(ten: Yard) -> None:
    ten.apply(1)
    ten.said["rollout"] = {"max_failures": "10%"}
    ten.said["health"] = {"command": "true"}
    ten.devices["ssh://cam-05"].command_code = 3
    outcome = ten.apply(2)
    assert (outcome.code, outcome.release.phase) == (ExitCode.PARTIAL, Phase.GOING_OUT)
    assert ten.releases() == [2] * 5 + [1] + [2] * 4
    assert ten.states(2)["ssh://cam-05"].status is Status.BACK


def test_a_first_device_that_fails_within_what_may_is_replaced(ten: Yard) -> None:
    ten.apply(1)
    ten.said.update(rollout={"max_failures": 1}, health={"command": "true"})
    ten.devices["ssh://cam-00"].command_code = 3
    assert ten.apply(2).code is ExitCode.PARTIAL
    assert ten.releases() == [1] + [2] * 9
    assert [ten.states(2)[f"ssh://cam-0{n}"].wave for n in (0, 1, 2)] == [1, 1, 3]
    # One more, and nobody after it is asked.
    ten.devices["ssh://cam-01"].command_code = 3
    outcome = ten.apply(3)
    assert (outcome.release.phase, outcome.release.wave) == (Phase.STOPPED, 1)
    assert ten.releases() == [1] + [2] * 9


def test_to_stop_without_going_back(ten: Yard) -> None:
    ten.apply(1)
    ten.said.update(rollout={"on_failure": "stop"}, health={"command": "true"})
    ten.devices["ssh://cam-00"].command_code = 3
    assert ten.apply(2).release.phase is Phase.STOPPED
    assert ten.releases() == [2] + [1] * 9
    assert ten.rollback(2).code is ExitCode.OK
    assert ten.releases() == [1] * 10


def test_wrong_golden_outputs_fail_and_need_no_way_back(ten: Yard) -> None:
    ten.apply(1)
    place = ten.fleet(2)
    digest = commands.release_of(place, place.state, commands.SILENT).packages["camera"].digest
    ten.devices["ssh://cam-00"].bad = frozenset({str(digest)})
    outcome = ten.apply(2)
    assert outcome.release.phase is Phase.STOPPED
    assert ten.states(2)["ssh://cam-00"].status is Status.FAILED
    assert "golden" in outcome.release.reason
    assert ten.releases() == [1] * 10
    assert not any("rollback" in device.steps for device in ten.devices.values())


@pytest.mark.parametrize(
    ("health", "says"),
    [({"latency": 1.5}, "1.5 times the 4.000 ms"), ({"latency_ms": 5.0}, "allows 5 ms")],
)
def test_a_device_that_is_too_slow_goes_back(ten: Yard, health: dict[str, object], says: str) -> None:
    ten.apply(1)
    ten.devices["ssh://cam-04"].latency_ms = 9.0
    ten.said["health"] = health
    outcome = ten.apply(2)
    assert outcome.release.phase is Phase.STOPPED
    assert says in outcome.release.reason
    assert "9.000 ms" in outcome.release.reason
    assert ten.releases() == [1] * 10


def test_a_device_that_answers_without_its_engine_goes_back(ten: Yard) -> None:
    ten.apply(1)
    ten.devices["ssh://cam-00"].why = "cuda-bindings is not installed"
    outcome = ten.apply(2)
    assert outcome.release.phase is Phase.STOPPED
    assert "not answered by the engine: cuda-bindings" in outcome.release.reason
    assert ten.releases() == [1] * 10


def test_a_first_release_that_fails_has_nothing_to_go_back_to(ten: Yard) -> None:
    ten.said["health"] = {"command": "true"}
    ten.devices["ssh://cam-00"].command_code = 1
    outcome = ten.apply(1)
    assert outcome.release.phase is Phase.STOPPED
    state = ten.states()["ssh://cam-00"]
    assert state.status is Status.FAILED
    assert "no earlier version" in state.problem


def test_a_device_that_fails_while_the_wave_is_watched_goes_back(ten: Yard) -> None:
    ten.apply(1)
    ten.said.update(rollout={"soak_seconds": 5, "waves": [1, "100%"]}, health={"command": "true"})
    waited = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        ten.devices["ssh://cam-00"].command_code = 1

    fleet = ten.fleet(2)
    with opened_state(fleet.state, alone=True) as state:
        release = commands.release_of(fleet, fleet.state, commands.SILENT)
        outcome = commands.Rollout(fleet, state, ten.transport, pause=pause).apply(release)
    assert waited == [5.0]
    assert (outcome.release.phase, outcome.release.wave) == (Phase.STOPPED, 1)
    assert ten.releases() == [1] * 10


def test_whoever_is_killed_while_a_wave_is_watched_watches_it_again(ten: Yard) -> None:
    ten.said.update(rollout={"soak_seconds": 5, "waves": [1, "100%"]}, health={"command": "true"})
    fleet, waited = ten.fleet(1), []

    def applied(pause: Callable[[float], object]) -> Outcome:
        with opened_state(fleet.state, alone=True) as state:
            release = commands.release_of(fleet, fleet.state, commands.SILENT)
            return commands.Rollout(fleet, state, ten.transport, pause=pause).apply(release)

    def die(seconds: float) -> None:
        raise KilledError(seconds)

    with pytest.raises(KilledError):
        applied(die)
    assert ten.releases() == [1] + [None] * 9
    assert applied(waited.append).code is ExitCode.OK
    assert waited == [5.0, 5.0]
    assert applied(waited.append).code is ExitCode.OK
    assert waited == [5.0, 5.0], "what was watched is not watched again"
    assert ten.devices["ssh://cam-00"].steps.count("health") == 2


def test_the_command_after_the_switch_runs_once_and_after_going_back(ten: Yard) -> None:
    ten.said.update(rollout={"after": "systemctl restart camera"}, health={"command": "true"})
    ten.apply(1)
    first = ten.devices["ssh://cam-00"]
    assert first.steps.count("command systemctl restart camera") == 1
    ten.rollback(1)
    assert first.steps.count("command systemctl restart camera") == 1  # it could not go back
    ten.apply(2)
    ten.rollback(2)
    assert first.steps.count("command systemctl restart camera") == 3


RESTART = "command systemctl restart camera"


def lost(_: str) -> None:
    raise UnreachableError("The connection was lost.", "Check it.", ExitCode.SYSTEM)


@pytest.mark.parametrize("killed", [False, True])
def test_a_connection_that_is_lost_at_the_command_after_the_switch_leaves_it_owed(ten: Yard, killed: bool) -> None:
    def gone(step: str) -> None:
        if step == RESTART:
            if killed:
                raise KilledError
            lost(step)

    def ends_early(command: Callable[[int], Outcome]) -> None:
        if killed:
            with pytest.raises(KilledError):
                command(2)
        else:
            assert command(2).code is ExitCode.PARTIAL

    ten.said["rollout"] = {"after": "systemctl restart camera"}
    ten.apply(1)
    device = ten.devices["ssh://cam-03"]
    runs = device.steps.count(RESTART)
    device.at = gone
    ends_early(ten.apply)
    assert (device.runs(), ten.states(2)["ssh://cam-03"].owes_after) == (2, True)
    device.at = len
    assert ten.apply(2).code is ExitCode.OK
    assert device.steps.count(RESTART) == runs + 2, "once in vain, and once"
    assert not any(state.owes_after for state in ten.states(2).values())
    # And on the way back.
    device.at = gone
    ends_early(ten.rollback)
    device.at = len
    assert ten.rollback(2).code is ExitCode.OK
    assert device.steps.count(RESTART) == runs + 4
    assert device.steps[-1] == RESTART
    assert ten.releases() == [1] * 10, "none went two back"
    assert not any(state.owes_after for state in ten.states(2).values())


def test_a_pull_that_is_lost_before_its_answer_leaves_the_command_owed(ten: Yard, tag: Tag) -> None:
    ten.said["rollout"] = {"after": "systemctl restart camera"}
    device = ten.devices["ssh://cam-00"]

    def gone(step: str) -> None:
        if step == "pull":
            device.history["net"] = [Running(tag.digest.partition(":")[2], 1, None)]  # done, and nobody heard
            lost(step)

    device.at = gone
    commands.apply(pulled(ten), ten.transport)
    device.at = len
    assert commands.apply(pulled(ten), ten.transport)[0].code is ExitCode.OK
    assert device.steps.count(RESTART) == 1
    # What runs there already is not switched.
    commands.apply(pulled(ten), ten.transport, again=True)
    assert device.steps.count(RESTART) == 1


def test_an_installation_that_fails_owes_nothing(ten: Yard) -> None:
    def full(step: str) -> None:
        if step == "install":
            raise ResvitError("The disk is full.", "Free some space.", ExitCode.SYSTEM)

    ten.said["rollout"] = {"after": "systemctl restart camera"}
    ten.apply(1)
    ten.devices["ssh://cam-02"].at = full
    ten.apply(2)
    assert not ten.states(2)["ssh://cam-02"].owes_after


def test_a_command_after_the_switch_that_fails_takes_the_device_back(ten: Yard) -> None:
    ten.apply(1)
    ten.said["rollout"] = {"after": "systemctl restart camera"}
    device = ten.devices["ssh://cam-00"]
    device.command_code = 1
    outcome = ten.apply(2)
    assert (outcome.code, outcome.release.phase) == (ExitCode.STOPPED, Phase.STOPPED)
    state = ten.states(2)["ssh://cam-00"]
    assert (state.status, state.owes_after, device.steps.count(RESTART)) == (Status.BACK, True, 2)
    assert "after the switch ended with 1" in state.problem
    assert "did not end well there" in state.problem
    assert ten.releases() == [1] * 10
    device.command_code = 0
    assert ten.rollback(2).code is ExitCode.OK
    assert (device.steps.count(RESTART), device.runs()) == (3, 1)
    assert ten.apply(2, again=True).code is ExitCode.OK


def test_a_command_after_the_switch_that_fails_is_run_again_where_devices_stay(ten: Yard) -> None:
    ten.said["rollout"] = {"after": "systemctl restart camera", "on_failure": "stop"}
    device = ten.devices["ssh://cam-00"]
    device.command_code = 1
    assert ten.apply(1).release.phase is Phase.STOPPED
    assert (device.runs(), ten.states()["ssh://cam-00"].owes_after) == (1, True)
    device.command_code = 0
    assert ten.apply(1, again=True).code is ExitCode.OK
    assert (device.steps.count(RESTART), device.steps.count("install")) == (2, 1)


def test_why_a_device_went_back_is_said_once(ten: Yard) -> None:
    ten.apply(1)
    ten.said["health"] = {"command": "true"}
    ten.devices["ssh://cam-00"].command_code = 3
    ten.apply(2)
    assert ten.states(2)["ssh://cam-00"].problem.count("ended with 3") == 1


# Devices that are in the way


def test_devices_that_vanish_are_replaced_and_asked_again(ten: Yard) -> None:
    for name in ("ssh://cam-00", "ssh://cam-07"):
        ten.devices[name].away = True
    outcome = ten.apply(1)
    assert outcome.code is ExitCode.PARTIAL
    states = ten.states()
    assert states["ssh://cam-00"].status is Status.UNREACHABLE
    assert states["ssh://cam-01"].wave == 1, "another device takes the place of one that is gone"
    assert ten.releases() == [None, 1, 1, 1, 1, 1, 1, None, 1, 1]
    for device in ten.devices.values():
        device.away = False
    asked = [len(device.steps) for device in ten.devices.values()]
    assert ten.apply(1).code is ExitCode.OK
    assert ten.releases() == [1] * 10
    assert [len(device.steps) > before for device, before in zip(ten.devices.values(), asked, strict=True)] == [
        name in ("ssh://cam-00", "ssh://cam-07") for name in ten.devices
    ]


def test_a_device_that_vanishes_while_it_installs_is_taken_up_again(ten: Yard) -> None:
    def gone(step: str) -> None:
        if step == "health":
            raise UnreachableError("The connection was lost.", "Check it.", ExitCode.SYSTEM)

    ten.apply(1)
    there = ten.devices["ssh://cam-03"]
    there.at = gone
    assert ten.apply(2).code is ExitCode.PARTIAL
    assert ten.states(2)["ssh://cam-03"].may_run
    there.at = len
    assert ten.apply(2).code is ExitCode.OK
    assert there.runs() == 2
    assert len(there.history["net"]) == 2, "it was not installed twice"


def test_a_type_without_any_device_that_answers_waits(tmp_path: Path) -> None:
    place = yard(tmp_path / "yard", 60)
    for device in place.devices.values():
        device.away = True
    outcome = place.apply(1)
    assert (outcome.code, outcome.release.phase) == (ExitCode.PARTIAL, Phase.GOING_OUT)
    assert outcome.counts[Status.UNREACHABLE] == 22, "as many again as the wave wants, and 20 more"
    assert outcome.counts[Status.WAITING] == 38


BLOCKS: dict[str, tuple[Callable[[MemoryDevice], object], str]] = {
    "a clock that is wrong by a year": (lambda device: vars(device).update(ahead=-366 * 86400.0), "366 days behind"),
    "a clock that is ahead": (lambda device: vars(device).update(ahead=400 * 86400.0), "400 days ahead"),
    "half the disk": (
        lambda device: vars(device).update(machine=dataclasses.replace(MACHINE, free_disk_mib=60)),
        "60 MiB are free",
    ),
    "another GPU": (
        lambda device: vars(device).update(machine=dataclasses.replace(MACHINE, sm=87, gpu="Orin")), "is 8.9"
    ),
    "another fleet": (lambda device: vars(device).update(holder="f" * 32), "claimed by another fleet"),
}  # fmt: skip


@pytest.mark.parametrize("what", BLOCKS)
def test_what_is_in_the_way_is_a_sentence_and_the_device_stays_as_it_was(ten: Yard, what: str) -> None:
    spoil, says = BLOCKS[what]
    spoil(ten.devices["ssh://cam-03"])
    outcome = ten.apply(1)
    assert outcome.code is ExitCode.PARTIAL
    state = ten.states()["ssh://cam-03"]
    assert state.status is Status.BLOCKED
    assert says in state.problem
    assert state.fix
    assert not state.may_run
    assert ten.releases() == [1, 1, 1, None] + [1] * 6
    ten.devices["ssh://cam-03"].__dict__.update(MemoryDevice().__dict__)
    assert ten.apply(1).code is ExitCode.OK


def test_a_first_device_that_is_blocked_holds_its_type(ten: Yard) -> None:
    ten.devices["ssh://cam-00"].ahead = 1e8
    assert ten.apply(1).code is ExitCode.PARTIAL
    assert ten.releases() == [None] * 10, "nothing was proven on any device"


def test_another_fleet_takes_over_when_it_is_told_to(ten: Yard, tmp_path: Path) -> None:
    ten.apply(1)
    other = yard(tmp_path / "other")
    other.transport = MemoryTransport(ten.devices)
    assert other.apply(2).counts[Status.BLOCKED] == 1
    assert ten.releases() == [1] * 10
    other.apply(2, take_over=True)
    assert ten.releases() == [2] * 10


def test_a_disk_that_fills_leaves_the_version_before(ten: Yard) -> None:
    def full(step: str) -> None:
        if step == "install":
            raise ResvitError("The disk of ssh://cam-02 is full.", "Free some space.", ExitCode.SYSTEM)

    ten.apply(1)
    ten.devices["ssh://cam-02"].at = full
    assert ten.apply(2).code is ExitCode.PARTIAL
    assert ten.states(2)["ssh://cam-02"].status is Status.BLOCKED
    assert not ten.states(2)["ssh://cam-02"].may_run
    assert ten.releases() == [2, 2, 1] + [2] * 7


def test_a_type_that_nobody_built_for(ten: Yard) -> None:
    types = dict(ten.said["types"])  # type: ignore[call-overload]
    ten.said["types"] = {**types, "robot": {"target": "jetson-thor", "devices": ["ssh://robot"]}}
    said = refused(ten.apply, 1, code=ExitCode.IMPOSSIBLE)
    assert "Nobody built for the devices of type robot" in said
    assert "--target jetson-thor, and" in said
    types["robot"] = {"target": "rtx-4090", "precision": "int8", "devices": ["ssh://robot"]}
    ten.said["types"] = types
    assert "--target rtx-4090 --precision int8, and" in refused(ten.apply, 1, code=ExitCode.IMPOSSIBLE)
    assert ten.releases() == [None] * 10


# Out of a registry


@dataclasses.dataclass
class Tag:
    """What a registry says of a tag."""

    digest: str
    offers: list[Offer]


@pytest.fixture
def tag(ten: Yard, monkeypatch: pytest.MonkeyPatch) -> Tag:
    offer = Offer("net", "1", "rtx-4090", "x86_64", "89", "rtx", "1.7", "", "fp16", "accepted", "engine")
    found = Tag("sha256:" + "1" * 64, [offer])

    def offered_in(client: Client, where: str) -> tuple[None, str, list[tuple[Offer, str]]]:
        del where
        digest = client.reference.digest or found.digest
        return None, digest, [(offer, digest) for offer in found.offers]

    monkeypatch.setattr("resvit_engines.registry.choice.offered_in", offered_in)
    return found


def pulled(place: Yard) -> Fleet:
    said = {"name": "cameras", "release": {"registry": "oci://registry.example/net:stable"}, **place.said}
    return fleet_from_document(said, place.folder / "fleet.toml")


def test_a_tag_that_moves_meanwhile_changes_nothing(ten: Yard, tag: Tag) -> None:
    ten.devices["ssh://cam-04"].away = True
    outcome, seen = commands.apply(pulled(ten), ten.transport)
    assert outcome.code is ExitCode.PARTIAL
    tag.digest = "sha256:" + "2" * 64
    ten.devices["ssh://cam-04"].away = False
    outcome, seen = commands.apply(pulled(ten), ten.transport)
    assert outcome.code is ExitCode.OK
    assert {device.digest for device in seen.devices} == {"1" * 64}
    # It went out: what the tag leads to now is the next release.
    outcome, seen = commands.apply(pulled(ten), ten.transport)
    assert {device.digest for device in seen.devices} == {"2" * 64}
    assert outcome.release.pinned == "oci://registry.example/net:stable@sha256:" + "2" * 64
    assert commands.rollback(pulled(ten), ten.transport)[0].code is ExitCode.OK
    assert {device.history["net"][-1].digest for device in ten.devices.values()} == {"1" * 64}


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"holds": "model"}, ExitCode.INPUT, "holds no engine"),
        ({"target": "l4"}, ExitCode.IMPOSSIBLE, "Nobody built"),
        ({"release": "x"}, ExitCode.INPUT, "says release 'x'"),
    ],
)
def test_what_a_registry_may_not_hold(ten: Yard, tag: Tag, changes: dict[str, str], code: ExitCode, says: str) -> None:
    tag.offers = [dataclasses.replace(tag.offers[0], **changes)]
    assert says in refused(commands.apply, pulled(ten), ten.transport, code=code)
    assert ten.releases() == [None] * 10


def test_two_bundles_for_one_type(ten: Yard, tag: Tag) -> None:
    tag.offers.append(dataclasses.replace(tag.offers[0], name="net-8", precision="int8"))
    said = refused(commands.apply, pulled(ten), ten.transport, code=ExitCode.INPUT)
    assert "types.camera.precision" in said


# What is copied to devices


def private_key(folder: Path) -> Path:
    return secret_file(folder / "root.key")


def certificate(folder: Path, *, with_key: bool) -> Path:
    key, day = Ed25519PrivateKey.generate(), datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(day).not_valid_after(day + datetime.timedelta(30)).sign(key, None)
    )  # fmt: skip
    (folder / "ca.pem").write_bytes(
        made.public_bytes(Encoding.PEM) + (private_key(folder).read_bytes() if with_key else b"")
    )
    return folder / "ca.pem"


def key_list(folder: Path, days: int = 30) -> Path:
    root = load_signing_key(str(private_key(folder)))
    assert root is not None
    day = datetime.datetime.now(datetime.timezone.utc).date()
    dates = (day - datetime.timedelta(40), day - datetime.timedelta(40 - days) if days < 30 else day)
    (folder / "keys.json").write_bytes(sign_list(KeyList(1, *dates, (root.public,), 1, ()), root).to_bytes())
    return folder / "keys.json"


SHARED: dict[str, tuple[Callable[[Path], dict[str, str]], ExitCode, str]] = {
    "a private key as the root": (
        lambda f: {"keys": str(key_list(f)), "root": str(f / "root.key")}, ExitCode.UNTRUSTED, "holds a private key"
    ),
    "no root": (lambda f: {"keys": str(key_list(f)), "root": "absent.pub"}, ExitCode.INPUT, "release.root names"),
    "a name too long": (lambda f: {"keys": "k" * 1000}, ExitCode.INPUT, "release.keys names"),
    "no list": (lambda f: {"keys": "absent.json"}, ExitCode.INPUT, "release.keys names"),
    "a key as the list": (lambda f: {"keys": str(private_key(f))}, ExitCode.INPUT, "no signed list of keys"),
    "a list that has ended": (lambda f: {"keys": str(key_list(f, 3))}, ExitCode.UNTRUSTED, "expired on"),
}  # fmt: skip


@pytest.mark.parametrize("what", SHARED)
def test_what_devices_must_not_get_is_refused_before_any_is_asked(ten: Yard, what: str) -> None:
    make, code, says = SHARED[what]
    fleet = ten.fleet(1)
    release = {"bundles": list(fleet.release.bundles), "key": fleet.release.key, **make(ten.folder)}
    fleet = fleet_from_document({"name": "cameras", "release": release, **ten.said}, ten.folder / "fleet.toml")
    assert says in refused(commands.apply, fleet, ten.transport, code=code)
    assert not any(device.steps for device in ten.devices.values())


@pytest.mark.parametrize(("with_key", "code"), [(True, ExitCode.UNTRUSTED), (None, ExitCode.INPUT), (False, None)])
def test_the_certificate_that_devices_get_is_one(
    ten: Yard, tag: Tag, with_key: bool | None, code: ExitCode | None
) -> None:
    path = ten.folder / "release.pub" if with_key is None else certificate(ten.folder, with_key=with_key)
    path.touch()
    said = {"registry": "oci://registry.example/net:stable", "ca": str(path)}
    fleet = fleet_from_document({"name": "cameras", "release": said, **ten.said}, ten.folder / "fleet.toml")
    if code is None:
        with contextlib.suppress(ResvitError):
            commands.apply(fleet, ten.transport)
        assert ten.releases() == [1] * 10
        return
    assert "ca" in refused(commands.apply, fleet, ten.transport, code=code)
    assert not any(device.steps for device in ten.devices.values())


# Rollback


def test_rollback_and_no_rollback_of_a_rollback(ten: Yard) -> None:
    ten.apply(1)
    ten.apply(2)
    outcome = ten.rollback(2)
    assert (outcome.code, outcome.release.phase) == (ExitCode.OK, Phase.ROLLED_BACK)
    assert ten.releases() == [1] * 10
    said = refused(ten.rollback, 2, code=ExitCode.INPUT)
    assert "a rollback is not rolled back" in said
    assert ten.releases() == [1] * 10
    assert "was rolled back" in refused(ten.apply, 2, code=ExitCode.INPUT)
    assert ten.apply(3).code is ExitCode.OK


def test_rollback_goes_on_with_those_that_were_away(ten: Yard) -> None:
    ten.apply(1)
    ten.apply(2)
    ten.devices["ssh://cam-04"].away = True
    assert ten.rollback(2).code is ExitCode.PARTIAL
    ten.devices["ssh://cam-04"].away = False
    steps = [device.steps.count("rollback") for device in ten.devices.values()]
    assert ten.rollback(2).code is ExitCode.OK
    assert ten.releases() == [1] * 10
    assert [device.steps.count("rollback") for device in ten.devices.values()] == [
        count + (name == "ssh://cam-04") for name, count in zip(ten.devices, steps, strict=True)
    ]


def test_a_rollback_that_was_done_before_the_answer_was_lost_is_not_done_twice(ten: Yard) -> None:
    for release in (1, 2, 3):
        ten.apply(release)
    device = ten.devices["ssh://cam-00"]
    device.history["net"].pop()  # it went back, and nobody heard
    assert ten.rollback(3).code is ExitCode.OK
    assert ten.releases() == [2] * 10


def test_nothing_to_roll_back(ten: Yard) -> None:
    assert "Nothing has been applied" in refused(ten.rollback, 1, code=ExitCode.INPUT)
    assert not ten.fleet(1).state.exists()


# Interrupted, damaged, at once


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("step", ["facts", "claim", "installed", "install", "health"])
@pytest.mark.parametrize("device", [0, 6])
def test_whatever_is_killed_goes_on_by_the_same_command(ten: Yard, step: str, device: int) -> None:
    ten.apply(1)

    def die(now: str) -> None:
        if now == step:
            raise KilledError

    there = ten.devices[f"ssh://cam-{device:02d}"]
    there.at = die
    with pytest.raises(KilledError):
        ten.apply(2)
    there.at = len
    assert ten.apply(2).code is ExitCode.OK
    assert ten.releases() == [2] * 10
    assert all(len(device.history["net"]) == 2 for device in ten.devices.values())
    ten.rollback(2)
    assert ten.releases() == [1] * 10


def test_a_kill_while_devices_go_back_goes_on_going_back(ten: Yard) -> None:
    ten.apply(1)
    ten.said["health"] = {"command": "true"}
    ten.devices["ssh://cam-09"].command_code = 1

    def die(now: str) -> None:
        if now == "rollback":
            raise KilledError

    ten.devices["ssh://cam-02"].at = die
    with pytest.raises(KilledError):
        ten.apply(2)
    ten.devices["ssh://cam-02"].at = len
    outcome = ten.apply(2)
    assert (outcome.code, outcome.release.phase) == (ExitCode.STOPPED, Phase.STOPPED)
    assert ten.releases() == [1] * 10


def test_one_command_at_a_time(ten: Yard) -> None:
    ten.apply(1)
    with opened_state(ten.fleet(1).state, alone=True):
        assert "Another command" in refused(ten.apply, 1, code=ExitCode.SYSTEM)
        assert len(ten.states()) == 10, "looking needs no lock"


@pytest.mark.parametrize("damage", ["noise", "row", "format", "short", "folder"])
def test_a_damaged_state_is_a_sentence(ten: Yard, damage: str) -> None:
    ten.apply(1)
    path = ten.fleet(1).state / DATABASE
    if damage == "noise":
        path.write_bytes(b"noise" * 2000)
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(
                "UPDATE devices SET record = '{\"name\": 7}'" if damage == "row" else "PRAGMA user_version = 9"
            )
        connection.close()
    with pytest.raises(ResvitError) as caught:
        ten.apply(1)
    assert caught.value.code in (ExitCode.INPUT, ExitCode.SYSTEM)


def test_devices_that_leave_the_file_are_forgotten_and_new_ones_wait(ten: Yard) -> None:
    ten.apply(1)
    names = list(ten.devices)
    ten.said["types"] = {"camera": {"target": "rtx-4090", "devices": [*names[:8], "ssh://new"]}}
    ten.transport.devices["ssh://new"] = MemoryDevice()
    assert ten.apply(1).code is ExitCode.OK
    assert list(ten.states()) == [*names[:8], "ssh://new"]
    assert ten.transport.devices["ssh://new"].runs() == 1


def test_asking_finds_what_changed_behind_the_fleets_back(ten: Yard) -> None:
    ten.apply(1)
    ten.apply(2)
    ten.devices["ssh://cam-01"].history["net"].pop()
    ten.devices["ssh://cam-02"].away = True
    seen = {state.name: state for state in commands.status(ten.fleet(2), ten.transport).devices}
    assert seen["ssh://cam-01"].status is Status.WAITING
    assert "runs" in seen["ssh://cam-01"].problem
    assert (seen["ssh://cam-02"].status, bool(seen["ssh://cam-02"].problem)) == (Status.RUNS, True)
    ten.devices["ssh://cam-02"].away = False
    assert commands.status(ten.fleet(2), ten.transport).devices[2].problem == ""
    assert ten.apply(2).code is ExitCode.OK
    assert ten.releases() == [2] * 10


def test_looking_meanwhile_shows_who_is_worked_on(ten: Yard) -> None:
    seen: list[Status] = []
    ten.devices["ssh://cam-00"].at = lambda step: seen.append(ten.states()["ssh://cam-00"].status)
    ten.apply(1)
    assert set(seen) == {Status.AT_WORK}


@pytest.mark.whole
def test_the_simulation_of_the_benchmark() -> None:
    from fleet import simulated

    row = simulated(120)
    assert set(row) == {"devices", "seconds", "peak_mib", "state_bytes", "page_bytes"}
    assert row["state_bytes"] < 120 * 1000 + 50_000


# The page and the command line


def test_the_page_shows_each_device_and_escapes_what_they_say(ten: Yard) -> None:
    machine = dataclasses.replace(MACHINE, gpu="<script>alert(1)</script>")
    ten.devices["ssh://cam-01"].machine = machine
    ten.devices["ssh://cam-02"].away = True
    ten.apply(1)
    page = (ten.fleet(1).state / commands.PAGE).read_text()
    assert page.count("<tr><td") == 10
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "unreachable" in page


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from resvit_export.cli.main import run

    secret_file(tmp_path / "release.key")
    engine(tmp_path / "1.resvit", 1)
    file = tmp_path / "fleet.toml"
    file.write_text(
        'name = "cameras"\n[release]\nbundles = ["1.resvit"]\nkey = "release.key"\n'
        '[types.camera]\ntarget = "rtx-4090"\ndevices = ["ssh://nobody@127.0.0.1:1"]\n'
    )
    assert run(["fleet", "status", str(file)]) == ExitCode.INPUT
    assert "fleet apply" in capsys.readouterr().err
    assert run(["fleet", "apply", str(file), "--json"]) == ExitCode.PARTIAL
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["unreachable"] == 1
    assert told["devices"][0]["fix"]
    assert Path(told["page"]).is_file()
    assert run(["fleet", "status", str(file)]) == 0
    assert "refuses connections" in capsys.readouterr().out
    for name in ("apply", "status", "rollback"):
        assert run(["fleet", name, "--help"]) == 0
        assert "Examples:" in capsys.readouterr().out
    assert run(["fleet", "aply", str(file)]) == ExitCode.USAGE


# The file


def test_ranges_of_devices() -> None:
    assert list(expand("ssh://cam@cam-[08..11].local")) == [
        f"ssh://cam@cam-{n}.local" for n in ("08", "09", "10", "11")
    ]
    assert list(expand("ssh://[fe80::1]:22")) == ["ssh://[fe80::1]:22"]
    assert list(expand("ssh://a-[7..7]")) == ["ssh://a-7"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ssh://a-[9..1]", "backwards"),
        ("ssh://a-[1..2]-[1..2]", "2 ranges"),
        ("ssh://a-[0..999999999]", "at most"),
        ("ssh://user:secret@host", "password"),
        ("cam-1", "begins with ssh://"),
        ("ssh://-oProxyCommand=x", "host"),
        ("ssh://" + "a" * 500, "characters"),
        ("ssh://a-[1..x]", "not an address"),
    ],
)
def test_addresses_that_are_none(text: str, says: str) -> None:
    assert says in refused(lambda: list(expand(text)), code=ExitCode.INPUT)


def test_shares() -> None:
    assert [Share(None, 10).of(n) for n in (1, 10, 11, 10_000)] == [1, 1, 2, 1000]
    assert [Share(None, 10).at_most(n) for n in (1, 10, 19)] == [0, 1, 1]
    assert Share(5).of(3) == 3


WHOLE = {
    "name": "cameras",
    "state": "there",
    "release": {"bundles": ["net.resvit"], "key": "agent:release"},
    "rollout": {"waves": [1, "10%"], "parallel": 4, "max_failures": 2, "on_failure": "stop", "soak_seconds": 60,
                "after": "restart", "after_seconds": 5},
    "health": {"golden": False, "latency": 1.2, "latency_ms": 9, "seconds": 2, "command": "true", "command_seconds": 9},
    "types": {"camera": {"target": "rtx-4090", "precision": "int8", "devices": ["ssh://a"]}},
}  # fmt: skip


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    fleet = fleet_from_document(WHOLE, tmp_path / "fleet.toml")
    assert (fleet.state, fleet.release.bundles) == (tmp_path / "there", (str(tmp_path / "net.resvit"),))
    assert fleet.release.key == "agent:release"
    assert (fleet.rollout.parallel, fleet.rollout.roll_back, fleet.rollout.soak_seconds) == (4, False, 60.0)
    assert (fleet.health.golden, fleet.health.timed_seconds, fleet.health.command_seconds) == (False, 2.0, 9.0)


CHANGES = [
    (("name",), "../x", "a name"),
    (("nmae",), "x", "Did you mean name?"),
    (("types",), {}, "a table for each type"),
    (("types",), 7, "a table"),
    (("types", "camera", "target"), 7, "a name"),
    (("types", "camera", "precision"), "int4", "int8, fp8"),
    (("types", "camera", "devices"), [], "a list of 1 to"),
    (("types", "camera", "devices"), "ssh://a", "a list of"),
    (("types", "camera", "devices"), ["ssh://a", "ssh://a"], "twice as camera"),
    (("types", "camera", "devices"), ["ssh://b/../c"], "types.camera.devices"),
    (("types", "robot"), {"target": "l4", "devices": ["ssh://a"]}, "as camera and as robot"),
    (("types", "a/b"), {"target": "l4", "devices": ["ssh://z"]}, "letters, digits"),
    (("release", "registry"), "oci://h/n:t", "both"),
    (("release", "bundles"), None, "neither"),
    (("release", "ca"), "ca.pem", "names none"),
    (("release", "keys"), "", "a line of text"),
    (("rollout", "waves"), [], "1 to 20 waves"),
    (("rollout", "waves"), ["10%", 1], "that grow"),
    (("rollout", "waves"), [0], "from 1"),
    (("rollout", "waves"), ["0%", 1], "that grow"),
    (("rollout", "waves"), ["101%"], "share"),
    (("rollout", "waves"), [-1], "share"),
    (("rollout", "waves"), [True], "share"),
    (("rollout", "parallel"), 0, "from 1 to 64"),
    (("rollout", "parallel"), 65, "from 1 to 64"),
    (("rollout", "max_failures"), "x", "share"),
    (("rollout", "on_failure"), "panic", "'roll back' or 'stop'"),
    (("rollout", "soak_seconds"), 1e9, "from 0 to 86400"),
    (("rollout", "after"), "a\nb", "a line of text"),
    (("health", "golden"), "no", "true or false"),
    (("health", "latency"), 0, "from 0.01"),
    (("health", "latency_ms"), float("nan"), "a number"),
    (("health", "command"), " ", "a line of text"),
    (("health", "comand"), "x", "Did you mean health.command?"),
]


@pytest.mark.parametrize(("at", "value", "says"), CHANGES, ids=[f"{'.'.join(a)}={v!r:.20}" for a, v, _ in CHANGES])
def test_what_a_file_may_not_say(tmp_path: Path, at: tuple[str, ...], value: object, says: str) -> None:
    document = json.loads(json.dumps(WHOLE))
    place = document
    for key in at[:-1]:
        place = place[key]
    if value is None:
        del place[at[-1]]
    else:
        place[at[-1]] = value
    said = refused(fleet_from_document, document, tmp_path / "fleet.toml", code=ExitCode.INPUT)
    assert says in said, said


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"name = ", "not valid TOML"), (b"\xff\xfe", "UTF-16"), (b"\xff", "not UTF-8"), (b"a = 1979-13-01", "not valid"),
     (b"a = " + b"[" * 5000, "not valid")],
)  # fmt: skip
def test_files_that_do_not_read(tmp_path: Path, data: bytes, says: str) -> None:
    file = tmp_path / "fleet.toml"
    assert "no fleet" in refused(fleet_from_toml, file, code=ExitCode.INPUT)
    file.write_bytes(data)
    assert says in refused(fleet_from_toml, file, code=ExitCode.INPUT)
