"""The way of ``docs/last_mile.md``, by its commands: registry, three devices, two programs, a bad release, a sweep."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, copy_stages, demo_folder
from device_wheels import WHEELS
from fleet_devices import Devices, devices
from loopback_device import LoopbackDevice, missing
from registry_standin import logged_in
from resvit_calibrate.readers.fashion_mnist import read_split
from resvit_engines.bundle.bundle import read_manifest
from resvit_engines.errors import ExitCode
from resvit_engines.files import sha256_file
from resvit_engines.program.answers import Classification
from resvit_engines.registry.choice import Wishes
from resvit_engines.registry.client import Client
from resvit_engines.registry.pull import Place, pull
from resvit_engines.registry.reference import reference_from_text
from resvit_engines.remote.device import ROOT as ON_DEVICE
from resvit_engines.remote.ssh import CONFIG_VARIABLE
from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE
from resvit_export.cli.main import run
from runtime_driver import Harness, written
from test_registry import ORIN
from test_registry_docker import PROGRAM, Running, registry  # noqa: F401  (a fixture)
from test_runtime_library import engine_bundle, harness, python_engine  # noqa: F401  (fixtures)
from test_signing import TRUST

pytestmark = pytest.mark.slow
BLOCKS = re.findall(r"```(sh|toml|python)\n(.*?)```", (ROOT / "docs/last_mile.md").read_text(), re.DOTALL)
NAME = "embed-nano-cpu-int8"
REGISTRY = pytest.mark.skipif(
    PROGRAM is None, reason="docker-registry is not installed: sudo apt-get install docker-registry"
)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def did(commands: str, told: Callable[[str], str] = str) -> list[int]:
    """The exit codes of the page's commands, each as ``told`` has it."""
    return [run(shlex.split(told(line))[1:]) for line in commands.splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    if (why := missing()) is not None:
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WHEELS_VARIABLE, str(WHEELS))
        with devices(tmp_path_factory.mktemp("yard") / "devices", 3) as found:
            yield found


def there(device: LoopbackDevice, command: str) -> str:
    """What a command says on a device."""
    line = ["ssh", "-F", os.environ[CONFIG_VARIABLE], "-p", str(device.port), "127.0.0.1", command]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built_on(device: LoopbackDevice) -> None:
    """A device builds the engine of the bundle that was made last, which comes back into the current folder."""
    made = max(Path("runs/net").glob("bundle-*/*.resvit"), key=lambda path: path.stat().st_mtime)
    place = device.home / "build"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(made, place)
    there(device, f"cd build && {device.home / ON_DEVICE}/venv/bin/resvit-engine build {made.name}")
    shutil.copy(place / f"{NAME}-engine" / f"{NAME}-engine.resvit", ".")


def running(device: LoopbackDevice) -> int | None:
    """The release that a device runs."""
    place = device.home / "versions" / NAME / "current" / "manifest.json"
    return json.loads(place.read_text())["release"] if place.exists() else None


@dataclass(frozen=True)
class Delivered:
    """The page's network on three devices, and what its program said there about the frames: the same on all."""

    folder: Path
    all: list[LoopbackDevice]
    frames: np.ndarray
    said: str
    probabilities: np.ndarray
    as_here: Callable[[str], str]
    """What the page says, with the registry and the devices of this test."""


@pytest.fixture(scope="module")
def delivered(
    tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path, finished_run: Callable[..., Path],
    prepared: Devices, registry: Running,  # noqa: F811
) -> Iterator[Delivered]:  # fmt: skip
    """Built, pushed; pulled, verified and installed by three devices, each of which answers about the same frames."""
    folder = tmp_path_factory.mktemp("mile") / "work"
    demo_folder(folder)
    copy_stages(finished_run("cpu"), folder / "runs/net")
    build, push, apply, *_ = blocks("sh")
    (program,) = blocks("python")
    assert len(program.splitlines()) <= 15
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RESVIT_FASHION_MNIST", str(fashion_folder))
        patch.setenv("RESVIT_SSH_PATIENCE", "20")
        patch.setenv(WHEELS_VARIABLE, str(WHEELS))
        patch.setenv("DOCKER_CONFIG", str(logged_in(folder / "docker", f"127.0.0.1:{registry.port}")))

        def as_here(text: str) -> str:
            text = text.replace("oci://registry.example/", registry.reference(""))
            text = text.replace('["ssh://gate-[1..3].example"]', json.dumps(prepared.addresses))
            text = text.replace("[types", f'ca = "{registry.certificates.ca}"\n\n[types')
            return f"{text} --ca {registry.certificates.ca}" if text.startswith("resvit-export push") else text

        assert did(build) == [0, 0]
        for device in prepared.all:
            shutil.copy("release.pub", device.trust / "release.pub")
            logged_in(device.home / ".docker", f"127.0.0.1:{registry.port}")
        built_on(prepared.all[0])
        assert did(push, as_here) == [0, 0]
        Path("fleet.toml").write_text(as_here(blocks("toml")[0]))
        assert did(apply) == [0, 0]
        assert [running(device) for device in prepared.all] == [1, 1, 1]

        frames = np.repeat(read_split("test")[0][:5, ..., None], 3, 3)
        frames[3] = 255 - frames[3]
        said, found = set(), set()
        for device in prepared.all:
            np.save(device.home / "frames.npy", frames)
            (device.home / "look.py").write_text(program)
            said.add(there(device, f"{ON_DEVICE}/venv/bin/python look.py {NAME} frames.npy found.npy"))
            found.add((device.home / "found.npy").read_bytes())
        assert len(said) == len(found) == 1
        yield Delivered(folder, prepared.all, frames, said.pop(), np.load(device.home / "found.npy"), as_here)


@REGISTRY
def test_what_the_devices_installed_is_answered_by_c_as_by_python(
    delivered: Delivered,
    harness: Harness,  # noqa: F811
    tmp_path: Path,
) -> None:
    """TensorRT is what C++ runs: here the device's own engine computes between what C++ prepared and what it reads."""
    for device in delivered.all:
        folder, key = (device.home / f"versions/{NAME}/current").resolve(), device.trust / "release.pub"
        manifest = json.loads((folder / "manifest.json").read_text())
        (answer,) = harness([f"check {folder} {key}"])
        assert answer.startswith(f"ok {NAME} {manifest['release']} "), answer
        (tmp_path / "how.json").write_text(json.dumps(manifest["preprocess"]))
        lines, sizes = [], []
        for number, frame in enumerate(delivered.frames):
            (tmp_path / f"{number}.rgb").write_bytes(frame.tobytes())
            height, width, channels = frame.shape
            sizes.append(f"{height} {width}")
            picture = f"{tmp_path / f'{number}.rgb'} {height} {width} {channels} 0 rgb"
            lines.append(f"prepare {tmp_path / 'how.json'} {tmp_path / f'{number}.f32'} {picture}")
        shapes = [tuple(map(int, answer.split()[1:])) for answer in harness(lines)]
        images = [np.fromfile(tmp_path / f"{n}.f32", np.float32).reshape(shape) for n, shape in enumerate(shapes)]
        np.save(device.home / "prepared.npy", np.stack(images))
        there(device, f"{ON_DEVICE}/venv/bin/resvit-engine run {NAME} --input prepared.npy --output logits.npy")
        names = manifest["class_names"]
        places = f"{folder / 'manifest.json'} {tmp_path / 'how.json'} {tmp_path / 'answers'}"
        frames = f"{len(sizes)} {' '.join(sizes)}"
        assert harness([f"read {places} -1 {frames} logits {device.home / 'logits.npy'}"]) == [f"ok {len(sizes)}"]
        best = [re.findall(r"\((\d+), '([^']*)'\)", line) for line in delivered.said.splitlines()]
        assert (tmp_path / "answers").read_bytes() == b"".join(
            b"classification %d\n" % len(names) + one.tobytes() + "".join(f"{n} {name}\n" for n, name in top).encode()
            for one, top in zip(delivered.probabilities, best, strict=True)
        )


@REGISTRY
def test_the_next_release_stops_at_the_first_device_that_it_breaks_and_goes_back(
    delivered: Delivered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It computes what it should, and breaks what runs beside it on one device."""
    monkeypatch.chdir(delivered.folder)
    again, push = blocks("sh")[3:5]
    assert did(again) == [0]
    built_on(delivered.all[0])
    assert did(push, delivered.as_here) == [0, 0]
    fleet = delivered.as_here(blocks("toml")[0])
    Path("fleet.toml").write_text(fleet.replace("net:1", "net:2"))
    (delivered.all[0].home / "down").touch()
    capsys.readouterr()
    assert run(["fleet", "apply", "fleet.toml", "--json"]) == ExitCode.STOPPED
    told = json.loads(capsys.readouterr().out)
    assert (told["release"]["phase"], told["release"]["wave"]) == ("stopped", 1)
    assert [one["status"] for one in told["devices"]] == ["went back", "waiting", "waiting"]
    assert [running(device) for device in delivered.all] == [1, 1, 1]
    (delivered.all[0].home / "down").unlink()
    assert run(["fleet", "apply", "fleet.toml", "--again", "--quiet"]) == 0
    assert [running(device) for device in delivered.all] == [2, 2, 2]


@REGISTRY
def test_what_three_devices_pulled_is_run_by_the_program_in_c_as_by_python(
    prepared: Devices, registry: Running, harness: Harness, python_engine: Any,  # noqa: F811
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the stand-in for TensorRT's library behind both, which computes the same from a plan."""
    monkeypatch.setenv("DOCKER_CONFIG", str(logged_in(tmp_path / "docker", f"127.0.0.1:{registry.port}")))
    made = engine_bundle(harness, tmp_path, "classification", precision="int8")
    manifest = read_manifest(made.bundle)
    registry.push("last/engine:1", made.bundle)
    frame = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
    with python_engine(made) as model:
        (answer,) = model([frame])
    assert isinstance(answer, Classification)
    for device in prepared.all:
        place = Place(device.home / "versions", lambda folder, manifest: None)
        with Client(reference_from_text(registry.reference("last/engine:1")), ca=registry.certificates.ca) as client:
            pull(client, TRUST, ORIN, Wishes(), place=place)
        (device.home / "frame.ppm").write_bytes(b"P6\n14 9\n255\n" + frame.tobytes())
        shutil.copy(made.key, device.home / "release.pub")
        said = there(device, f"{harness.folder}/runtime/resvit-frames {manifest.name} release.pub frame.ppm")
        first, _, *best = said.splitlines()
        assert "the very outputs" in first
        assert best == [f"  {one.name} {one.probability:.6g}" for one in answer.top(3)]
        folder = (device.home / "versions" / manifest.name / "current").resolve()
        words = f"{device.home / 'frame.rgb'} 9 14 3 0 rgb"
        (device.home / "frame.rgb").write_bytes(frame.tobytes())
        (ran,) = harness([f"run {folder} {made.key} {tmp_path / 'answers'} 1 1 1 1 {words}"])
        assert ran.startswith("ok "), ran
        assert (tmp_path / "answers").read_bytes() == written([answer])


def test_two_networks_for_three_targets_in_two_precisions_over_ray_give_the_page(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    for name in ("embed-nano.pt", "mobile-nano.pt"):
        shutil.copy(ROOT / "tests/assets" / name, workspace / name)
    _, plan = blocks("toml")
    Path("sweep.toml").write_text(plan)
    assert did(blocks("sh")[-1]) == [0]
    said = json.loads(Path("runs/sweep/sweep.json").read_text())
    rows = [(task["name"], target["target"]) for task in said["tasks"] for target in task["targets"]]
    assert len(rows) == len(set(rows)) == 12
    assert len(said["entries"]) == 12
    page = Path("runs/sweep/comparison.html").read_text()
    for name in ("embed-int8", "embed-fp16", "mobile-int8", "mobile-fp16"):
        assert name in page
    made = {sha256_file(path) for path in Path("runs/sweep").glob("*/bundle-*/*.resvit")}
    told = {target["bundle"] for task in said["tasks"] for target in task["targets"] if target["bundle"]}
    assert told
    assert told <= made
