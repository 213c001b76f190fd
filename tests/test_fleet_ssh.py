"""A fleet of loopback devices over sshd: what ``test_fleet.py`` says of the scheduler, with real installations."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from device_wheels import WHEELS
from fleet_devices import Devices, devices
from loopback_device import missing
from registry_standin import logged_in
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import read_manifest, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ExitCode
from resvit_engines.keys.private import SigningKey, load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey
from resvit_engines.remote.device import ROOT
from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE
from resvit_engines.targets.table import find_target
from resvit_engines.trt.io_tensor import IoTensor
from resvit_export.cli.main import run
from resvit_export.fleet.state import opened_state
from test_registry_docker import PROGRAM, Running, registry  # noqa: F401  (a fixture)
from test_remote_job import small_network

pytestmark = [pytest.mark.whole, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
NAME = "small-cpu-fp32"


def signing_key(folder: Path) -> SigningKey:
    if not (folder / "release.key").exists():
        make_key_pair(folder / "release.key", folder / "release.pub", lambda raw: PublicKey(raw, "release"))
    key = load_signing_key(str(folder / "release.key"))
    assert key is not None
    return key


def made(folder: Path, release: int, *, wrong: bool = False) -> Path:
    """A bundle of a release for processors, whose engine a device builds; ``wrong`` are its golden outputs."""
    folder.mkdir(exist_ok=True)
    small_network(folder / "model.onnx")
    images = np.random.default_rng(release).standard_normal((4, 1, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    answers = np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])
    np.save(folder / "golden_input.npy", images)
    np.save(folder / "golden_output.npy", -answers if wrong else answers)
    manifest = Manifest(
        NAME,
        release=release,
        target=find_target("cpu"),
        precision="fp32",
        build=BuildSettings(),
        input=IoTensor("input", (1, 1, 12, 12), "float32"),
        outputs=(IoTensor("logits", (1, 10), "float32"),),
        golden=GoldenFiles(),
    )
    files = {name: folder / name for name in ("model.onnx", "golden_input.npy", "golden_output.npy")}
    path = folder / f"release-{release}.resvit"
    write_bundle(path, manifest, files, signing_key(folder))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    with devices(tmp_path_factory.mktemp("yard") / "devices", 3) as found:
        yield found


@pytest.fixture
def three(prepared: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Devices]:
    monkeypatch.setenv("RESVIT_SSH_CONFIG", str(prepared.config))
    monkeypatch.setenv("RESVIT_SSH_PATIENCE", "5")
    monkeypatch.setenv(WHEELS_VARIABLE, str(WHEELS))
    signing_key(tmp_path)
    for device in prepared.all:
        (device.trust / "release.pub").write_bytes((tmp_path / "release.pub").read_bytes())
    yield prepared
    for device in prepared.all:
        device.vanish()
        device.start()
    prepared.forget()


def file_of(folder: Path, places: list[str], release: int, more: str = "", name: str = "fleet") -> str:
    made(folder, release)
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\n[release]\nbundles = ["release-{release}.resvit"]\nkey = "release.key"\n'
        f'[types.box]\ntarget = "cpu"\ndevices = {json.dumps(places)}\n{more}'
    )
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = run(["fleet", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def runs(device) -> int | None:
    place = device.home / "versions" / NAME / "current" / "manifest.json"
    return json.loads(place.read_text())["release"] if place.exists() else None


def test_one_device_builds_all_run_it_a_bad_release_stops_in_wave_one_and_rollback(
    three: Devices, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    health = '[health]\nlatency = 1000\nseconds = 0.2\ncommand = "test ! -e bad.flag"\n'
    file = file_of(tmp_path, three.addresses, 1, health)
    code, said = told(capsys, "apply", file)
    assert code == 0, said
    assert [runs(device) for device in three.all] == [1, 1, 1]
    assert len({device["digest"] for device in said["devices"]}) == 1
    assert all(device["latency_ms"] > 0 for device in said["devices"])
    with opened_state(tmp_path / "fleet.fleet", alone=False) as state:
        digest = said["devices"][0]["digest"]
        recorded = state.latency_of(digest)
    assert recorded is not None
    assert recorded[1] == three.addresses[0], "the first device built, and its figure is the one of all"
    (engine,) = (tmp_path / "fleet.fleet" / "engines").glob("*.resvit")
    manifest = read_manifest(engine)
    assert manifest.engine is not None
    assert manifest.built is not None
    for device in three.all:
        assert not list((device.home / ROOT / "fleet").glob("*.resvit*")), "the copy was left there"
    assert not list((three.all[1].home / ROOT).glob("jobs/*")), "it built what it was to take"

    # A release that computes what it should and breaks what runs beside it.
    (three.all[0].home / "bad.flag").touch()
    file = file_of(tmp_path, three.addresses, 2, health)
    code, said = told(capsys, "apply", file)
    assert code == ExitCode.STOPPED
    assert (said["release"]["phase"], said["release"]["wave"]) == ("stopped", 1)
    assert [runs(device) for device in three.all] == [1, 1, 1]
    assert [device["status"] for device in said["devices"]] == ["went back", "waiting", "waiting"]
    assert "test ! -e bad.flag" in said["devices"][0]["fix"]
    (three.all[0].home / "bad.flag").unlink()

    file = file_of(tmp_path, three.addresses, 3, health)
    assert told(capsys, "apply", file)[0] == 0
    assert [runs(device) for device in three.all] == [3, 3, 3]
    code, said = told(capsys, "rollback", file)
    assert (code, said["release"]["phase"]) == (0, "rolled back")
    assert [runs(device) for device in three.all] == [1, 1, 1]
    code, said = told(capsys, "rollback", file)
    assert code == ExitCode.INPUT
    assert "a rollback is not rolled back" in said["error"]["problem"]


def test_wrong_golden_outputs_stop_at_the_device_that_builds(
    three: Devices, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(tmp_path, three.addresses, 1)
    made(tmp_path, 1, wrong=True)
    code, said = told(capsys, "apply", file)
    assert code == ExitCode.STOPPED
    assert [runs(device) for device in three.all] == [None] * 3
    assert said["devices"][0]["status"] == "failed"
    assert "SQNR" in said["devices"][0]["problem"]


@pytest.mark.slow
def test_devices_that_are_gone_full_late_or_taken(
    three: Devices, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, full, late = three.all
    assert told(capsys, "apply", file_of(tmp_path, three.addresses, 1))[0] == 0
    file = file_of(tmp_path, three.addresses, 2, '[rollout]\nwaves = ["100%"]\n')
    # The disk: what is copied there next goes to one that is full.
    gone.vanish()
    real = late.root / "bin" / "date"
    real.write_text('#!/bin/sh\n[ "$*" = "-u +%s" ] && echo $(($(/bin/date +%s) - 31622400)) || exec /bin/date "$@"\n')
    real.chmod(0o755)
    shelf = full.home / ROOT / "fleet"
    shelf.mkdir(parents=True, exist_ok=True)
    (shelf / "x.sh").write_text("")
    blocked = full.root / "bin" / "cat"
    blocked.write_text('#!/bin/sh\n[ $# = 0 ] && exec /bin/cat > /dev/full || exec /bin/cat "$@"\n')
    blocked.chmod(0o755)
    try:
        code, said = told(capsys, "apply", file)
    finally:
        real.unlink()
        blocked.unlink()
        gone.start()
    assert code == ExitCode.PARTIAL
    problems = [device["problem"] for device in said["devices"]]
    assert [device["status"] for device in said["devices"]] == ["unreachable", "blocked", "blocked"], problems
    assert "is full" in problems[1]
    assert "366 days behind" in problems[2]
    assert [runs(device) for device in three.all] == [1, 1, 1]
    assert not list(shelf.glob("*.part"))

    # Another fleet, and then the first one goes on.
    other = file_of(tmp_path, three.addresses[:1], 3, name="other")
    code, said = told(capsys, "apply", other)
    assert code == ExitCode.PARTIAL
    assert "is claimed by the fleet fleet" in said["devices"][0]["problem"]
    code, said = told(capsys, "apply", file_of(tmp_path, three.addresses, 2, '[rollout]\nwaves = ["100%"]\n'))
    assert code == 0, said
    assert [runs(device) for device in three.all] == [2, 2, 2]
    code, said = told(capsys, "apply", other, "--take-over")
    assert code == 0, said
    assert runs(three.all[0]) == 3
    # Asked, the first fleet's device tells that it runs something else.
    code, said = told(capsys, "status", file, "--ask")
    assert [device["status"] for device in said["devices"]] == ["waiting", "runs it", "runs it"]


def test_a_device_that_vanishes_while_it_is_checked(
    three: Devices, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESVIT_SSH_PATIENCE", "0.5")
    device = three.all[1]
    slow = "test -e here.flag || { touch here.flag; sleep 60; }"
    file = file_of(tmp_path, [device.address], 1, f"[health]\ncommand = {json.dumps(slow)}\n")

    def vanish() -> None:
        while not (device.home / "here.flag").exists():
            time.sleep(0.02)
        device.vanish()

    away = threading.Thread(target=vanish)
    away.start()
    code, said = told(capsys, "apply", file)
    away.join()
    assert code == ExitCode.PARTIAL, said
    assert (said["devices"][0]["status"], said["devices"][0]["may_run"]) == ("unreachable", True)
    device.start()
    code, said = told(capsys, "apply", file)
    assert code == 0, said
    assert runs(device) == 1


@pytest.mark.skipif(PROGRAM is None, reason="docker-registry is not installed: sudo apt-get install docker-registry")
def test_devices_pull_and_take_the_keys_before(
    three: Devices, registry: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The engine that one device built is pushed, and all pull it; they trust it by a list of keys that comes first."""
    file = file_of(tmp_path, three.addresses[:1], 1)
    assert told(capsys, "apply", file)[0] == 0
    (built,) = (tmp_path / "fleet.fleet" / "engines").glob("*.resvit")
    monkeypatch.setenv("DOCKER_CONFIG", str(logged_in(tmp_path / "docker", f"127.0.0.1:{registry.port}")))
    registry.push("fleet/small:1", built)
    make_key_pair(tmp_path / "root.key", tmp_path / "root.pub", lambda raw: PublicKey(raw, "root"))
    made_list = ["keylist", str(tmp_path / "keys.json"), "--root", str(tmp_path / "root.key")]
    assert run([*made_list, "--key", str(tmp_path / "release.pub"), "--quiet"]) == 0
    for device in three.all:
        (device.trust / "release.pub").unlink()
        logged_in(device.home / ".docker", f"127.0.0.1:{registry.port}")
    pulled = tmp_path / "pulled.toml"
    pulled.write_text(
        f'name = "pulled"\n[release]\nregistry = "{registry.reference("fleet/small:1")}"\n'
        f'ca = "{registry.certificates.ca}"\nkeys = "keys.json"\nroot = "root.pub"\n'
        f'[types.box]\ntarget = "cpu"\ndevices = {json.dumps(three.addresses[1:])}\n'
    )
    try:
        capsys.readouterr()
        code, said = told(capsys, "apply", str(pulled))
        assert code == 0, said
        assert [runs(device) for device in three.all] == [1, 1, 1]
        assert "@sha256:" in said["release"]["pinned"]
        for device in three.all[1:]:
            assert (device.trust / "keys.json").read_bytes() == (tmp_path / "keys.json").read_bytes()
    finally:
        for device in three.all:
            (device.trust / "keys.json").unlink(missing_ok=True)


@pytest.mark.slow
def test_fifty_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(WHEELS_VARIABLE, str(WHEELS))
    monkeypatch.setenv("RESVIT_SSH_PATIENCE", "20")
    more = '[rollout]\nparallel = 4\nmax_failures = 2\n[health]\ncommand = "test ! -e bad.flag"\n'
    with devices(tmp_path / "devices", 50) as fifty:
        signing_key(tmp_path)
        for device in fifty.all:
            (device.trust / "release.pub").write_bytes((tmp_path / "release.pub").read_bytes())
        for device in fifty.all[20:23]:
            device.vanish()
        code, said = told(capsys, "apply", file_of(tmp_path, fifty.addresses, 1, more))
        assert code == ExitCode.PARTIAL
        assert [runs(device) for device in fifty.all] == [1] * 20 + [None] * 3 + [1] * 27, said["counts"]
        assert [sum(d["wave"] == wave for d in said["devices"]) for wave in (1, 2, 3)] == [1, 4, 45]
        for device in fifty.all[20:23]:
            device.start()
        code, said = told(capsys, "apply", file_of(tmp_path, fifty.addresses, 1, more))
        assert code == 0
        assert [runs(device) for device in fifty.all] == [1] * 50
        for device in fifty.all[:3]:
            (device.home / "bad.flag").touch()
        code, said = told(capsys, "apply", file_of(tmp_path, fifty.addresses, 2, more))
        assert (code, said["release"]["wave"]) == (ExitCode.STOPPED, 1)
        assert [runs(device) for device in fifty.all] == [1] * 50
        assert sum(device["status"] == "waiting" for device in said["devices"]) == 47
        assert (tmp_path / "fleet.fleet" / "fleet.html").stat().st_size > 10_000
