"""Engines of a fleet: one build for all that can share it, and nothing from a device but the engine."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_reports import engine_report
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import extract_bundle, read_manifest, signers, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import BuiltOnDevice
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.machine import Machine
from resvit_engines.targets.table import Builder, find_target
from resvit_export.fleet import commands
from resvit_export.fleet.builds import build_key
from resvit_export.fleet.plan import Fleet, fleet_from_document
from resvit_export.fleet.state import Phase, Status, opened_state
from resvit_export.fleet.transport import EngineThere
from test_install import refused
from test_signing import KEY, secret_file, signing_key

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from fleet_memory import MACHINE, MemoryDevice, MemorySession, MemoryTransport  # noqa: E402

DEVICE_KEY = signing_key(bytes([9] * 32), "machine cam")
Change = Callable[[Manifest, dict[str, bytes]], Manifest]


def as_it_is(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    del files
    return manifest


@dataclasses.dataclass
class Workshop:
    """Builds as a device does, but for ``change``; counts how often, and fails where it is told to."""

    change: Change = as_it_is
    built: list[str] = dataclasses.field(default_factory=list)
    error: ResvitError | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def build(self, session: MemorySession, bundle: Path, folder: Path) -> EngineThere:
        with self.lock:
            self.built.append(session.name)
        if self.error is not None:
            raise self.error
        original = extract_bundle(bundle, folder / "unpacked")
        assert original.target is not None
        files = {file.path: (folder / "unpacked" / file.path).read_bytes() for file in original.files}
        files["engine.plan"] = b"engine"
        machine = session.device.machine
        engine = engine_report(
            target="rtx-4090", builder=Builder.RTX, builder_version="1.7.1.116", sm=89, sha256=sha256_bytes(b"engine")
        )
        digest = sha256_bytes(canonical_json(original.to_json()))
        on = BuiltOnDevice.on(machine, sha256_file(bundle), digest, rehearsal=False)
        manifest = dataclasses.replace(original, engine=engine, plan=None, built=on, files=())
        path = folder / "built.resvit"
        write_bundle(path, self.change(manifest, files), files, DEVICE_KEY)
        path.with_suffix(".pub").write_text(DEVICE_KEY.public.to_text())
        return EngineThere(path, 3.0)


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    found = Workshop()
    monkeypatch.setattr(
        MemorySession, "build", lambda session, bundle, key, folder: found.build(session, bundle, folder)
    )
    return found


def fleet_of(folder: Path, count: int, machines: dict[int, Machine] | None = None) -> tuple[Fleet, MemoryTransport]:
    if not (folder / "release.key").exists():
        secret_file(folder / "release.key")
    manifest = Manifest(
        "net", target=find_target("rtx-4090"), precision="fp16", build=BuildSettings(), preprocess={"mean": [0.5]}
    )
    write_bundle(folder / "net.resvit", manifest, {"model.onnx": b"weights"}, KEY)
    names = [f"ssh://cam-{number}" for number in range(count)]
    fleet = fleet_from_document(
        {
            "name": "cameras",
            "release": {"bundles": ["net.resvit"], "key": "release.key"},
            "health": {"latency": 2.0},
            "types": {"camera": {"target": "rtx-4090", "devices": names}},
        },
        folder / "fleet.toml",
    )
    devices = {name: MemoryDevice(machine=(machines or {}).get(number, MACHINE)) for number, name in enumerate(names)}
    return fleet, MemoryTransport(devices)


def test_one_builds_for_all_and_the_release_key_signs(tmp_path: Path, workshop: Workshop) -> None:
    fleet, transport = fleet_of(tmp_path, 12)
    outcome, seen = commands.apply(fleet, transport)
    assert outcome.release.phase is Phase.OUT, seen.devices[0]
    assert workshop.built == ["ssh://cam-0"]
    (path,) = (fleet.state / "engines").glob("*.resvit")
    assert signers(path) == [KEY.public.keyid]
    assert read_manifest(path).engine is not None
    assert len({device.digest for device in seen.devices}) == 1
    with opened_state(fleet.state, alone=False) as state:
        assert state.latency_of(str(seen.devices[0].digest)) == (3.0, "ssh://cam-0")
    assert not list((fleet.state / "engines").glob(".build*"))


def test_another_driver_is_another_build(tmp_path: Path, workshop: Workshop) -> None:
    newer = dataclasses.replace(MACHINE, rtx="1.7.2.4")
    fleet, transport = fleet_of(tmp_path, 9, {4: newer, 7: newer})
    assert commands.apply(fleet, transport)[0].release.phase is Phase.OUT
    assert workshop.built[0] == "ssh://cam-0"
    assert len(workshop.built) == 2
    assert workshop.built[1] in ("ssh://cam-4", "ssh://cam-7")
    assert len(list((fleet.state / "engines").glob("*.resvit"))) == 2


def test_what_was_built_is_not_built_again(tmp_path: Path, workshop: Workshop) -> None:
    fleet, transport = fleet_of(tmp_path, 3)
    commands.apply(fleet, transport)
    transport.devices.update({f"ssh://cam-{number}": MemoryDevice() for number in range(3)})
    commands.apply(fleet, transport, again=True)
    assert workshop.built == ["ssh://cam-0"]
    # Unless it was changed where it lay.
    (path,) = (fleet.state / "engines").glob("*.resvit")
    path.write_bytes(path.read_bytes()[:-1])
    transport.devices.update({f"ssh://cam-{number}": MemoryDevice() for number in range(3)})
    commands.apply(fleet, transport, again=True)
    assert workshop.built == ["ssh://cam-0"] * 2
    assert {device.runs() for device in transport.devices.values()} == {1}


def other_preprocessing(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    del files
    return dataclasses.replace(manifest, preprocess={"mean": [0.0]})


def other_weights(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    files["model.onnx"] = b"other weights"
    return manifest


def other_release(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    del files
    return dataclasses.replace(manifest, release=9)


def no_engine(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    del files
    return dataclasses.replace(manifest, engine=None)


def other_bundle(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    del files
    assert manifest.built is not None
    return dataclasses.replace(manifest, built=dataclasses.replace(manifest.built, bundle="0" * 64))


def one_more_file(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    files["data/more.py"] = b"import os"
    return manifest


def of_its_own(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    del files
    return dataclasses.replace(manifest, other={"says": "more"})


@pytest.mark.parametrize(
    "change", [other_preprocessing, other_weights, other_release, no_engine, other_bundle, one_more_file, of_its_own]
)
def test_a_device_that_sends_more_than_an_engine_is_refused(tmp_path: Path, workshop: Workshop, change: Change) -> None:
    workshop.change = change
    fleet, transport = fleet_of(tmp_path, 3)
    outcome, seen = commands.apply(fleet, transport)
    assert outcome.code is ExitCode.PARTIAL
    assert seen.devices[0].status is Status.BLOCKED
    assert "than it was asked to build" in seen.devices[0].problem
    assert {device.runs() for device in transport.devices.values()} == {None}
    assert not list((fleet.state / "engines").iterdir())


def test_a_build_that_fails_stops_the_release(tmp_path: Path, workshop: Workshop) -> None:
    workshop.error = ResvitError("The builder failed.", "Try another.", ExitCode.BUILD)
    fleet, transport = fleet_of(tmp_path, 3)
    outcome, seen = commands.apply(fleet, transport)
    assert outcome.release.phase is Phase.STOPPED
    assert [device.status for device in seen.devices] == [Status.FAILED, Status.WAITING, Status.WAITING]


def test_a_device_without_room_to_build_is_told_before(tmp_path: Path, workshop: Workshop) -> None:
    fleet, transport = fleet_of(tmp_path, 1, {0: dataclasses.replace(MACHINE, free_disk_mib=32)})
    _, seen = commands.apply(fleet, transport)
    assert "Building needs 64 MiB" in seen.devices[0].problem
    assert workshop.built == []


def test_without_a_key_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESVIT_SIGNING_KEY", "RESVIT_SIGNING_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    fleet, transport = fleet_of(tmp_path, 1)
    fleet = dataclasses.replace(fleet, release=dataclasses.replace(fleet.release, key=None))
    assert "there is no key to sign with" in refused(commands.apply, fleet, transport, code=ExitCode.INPUT)


def test_what_makes_an_engine_another_one(tmp_path: Path) -> None:
    fleet, _ = fleet_of(tmp_path, 1)
    package = commands.release_of(fleet, tmp_path / "state", commands.SILENT).packages["camera"]
    key = build_key(package, MACHINE)
    same = {"free_disk_mib": 7, "host": "x", "memory_mib": 9, "python": "3.10.1", "power_mode": "N", "processor": "z"}
    other = {"sm": 90, "tensorrt": "10.3.0", "rtx": "1.8", "jetpack": "6.2", "arch": "aarch64"}
    for name, value in {**same, **other}.items():
        changed = build_key(package, dataclasses.replace(MACHINE, **{name: value}))
        assert (changed == key) == (name in same), name
