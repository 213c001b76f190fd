"""A bundle built, checked and timed on a loopback device over SSH, and everything that can go wrong on the way.

TensorRT for RTX stands where TensorRT would, and ONNX Runtime where the GPU would: a rehearsal, called one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from device_wheels import WHEELS
from loopback_device import LoopbackDevice, loopback_device, missing
from resvit_engines.builder.device_plan import DevicePlan, plan_for_device
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import extract_bundle, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_file
from resvit_engines.keys.private import SigningKey, load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey
from resvit_engines.progress import Silent
from resvit_engines.records import Record
from resvit_engines.remote.device import ROOT, Device, RemoteJob
from resvit_engines.remote.job_result import JobResult
from resvit_engines.remote.ssh import CONFIG_VARIABLE, Connection, UnreachableError, address_from
from resvit_engines.remote.ssh_files import upload
from resvit_engines.targets.table import Builder, Target, find_target
from resvit_engines.trt.io_tensor import IoTensor

pytestmark = [pytest.mark.whole, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


class Heard(Silent):
    """Keeps what was said; ``when`` does something the first time that a line begins with its key."""

    def __init__(self, **when: Callable[[], object]) -> None:
        self.lines: list[str] = []
        self.when = when

    def say(self, text: str) -> None:
        self.lines.append(text)
        for start in [start for start in self.when if text.startswith(start)]:
            self.when.pop(start)()

    def warn(self, text: str) -> None:
        self.say(text)


@dataclass(frozen=True)
class Bundle:
    path: Path
    key: SigningKey
    images: Path


def signing_key(folder: Path, name: str) -> SigningKey:
    make_key_pair(folder / f"{name}.key", folder / f"{name}.pub", lambda raw: PublicKey(raw, name))
    key = load_signing_key(str(folder / f"{name}.key"))
    assert key is not None
    return key


def small_network(path: Path) -> None:
    """A convolution and a classifier: [1, 1, 12, 12] to [1, 10]."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.standard_normal((8, 1, 3, 3)).astype(np.float32),
        "v": random.standard_normal((8 * 100, 10)).astype(np.float32) / 20,
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Flatten", ["b"], ["c"]),
            helper.make_node("MatMul", ["c", "v"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    small_network(folder / "model.onnx")
    images = np.random.default_rng(1).standard_normal((11, 1, 12, 12)).astype(np.float32)
    np.save(folder / "images-0000-aa.npy", images)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    answers = np.concatenate([session.run(None, {"input": image[None]})[0] for image in images[:4]])
    np.save(folder / "golden_input.npy", images[:4])
    np.save(folder / "golden_output.npy", answers)
    manifest = Manifest(
        "small-jetson-orin-fp16",
        target=find_target("jetson-orin"),
        precision="fp16",
        build=BuildSettings(optimization_level=0),
        input=IoTensor("input", (1, 1, 12, 12), "float32"),
        outputs=(IoTensor("logits", (1, 10), "float32"),),
        golden=GoldenFiles(),
    )
    key = signing_key(folder, "release")
    files = {name: folder / name for name in ("model.onnx", "golden_input.npy", "golden_output.npy")}
    write_bundle(folder / "small.resvit", manifest, files, key)
    return Bundle(folder / "small.resvit", key, folder / "images-0000-aa.npy")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackDevice]:
    """A device on which everything is installed, without a network."""
    with loopback_device(tmp_path_factory.mktemp("device") / "root") as device:
        before = os.environ.get(CONFIG_VARIABLE)
        os.environ[CONFIG_VARIABLE] = str(device.config)
        try:
            with Connection(address_from(device.address)) as connection:
                there = Device(connection)
                facts = there.machine()
                assert there.prepare(facts, WHEELS)
                assert not there.prepare(facts, WHEELS), "it was installed twice"
            yield device
        finally:
            os.environ.pop(CONFIG_VARIABLE) if before is None else os.environ.update({CONFIG_VARIABLE: before})


@pytest.fixture
def device(prepared: LoopbackDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackDevice]:
    """The prepared device, on and without jobs."""
    monkeypatch.setenv(CONFIG_VARIABLE, str(prepared.config))
    yield prepared
    prepared.vanish()
    prepared.forget_jobs()
    prepared.start()


def run(device: LoopbackDevice, job: RemoteJob, reporter: Silent | None = None, patience: float = 60.0) -> JobResult:
    reporter = reporter or Silent()
    with Connection(address_from(device.address), reporter, patience) as connection:
        return Device(connection, reporter).run(job)


def job_of(bundle: Bundle, path: Path | None = None, key: SigningKey | None = None) -> RemoteJob:
    return RemoteJob(path or bundle.path, (key or bundle.key).public.to_text(), (lambda: bundle.images,), True)


def test_the_device_builds_checks_answers_and_times(device: LoopbackDevice, bundle: Bundle, tmp_path: Path) -> None:
    heard, job = Heard(), job_of(bundle)
    result = run(device, job, heard)
    assert result.rehearsal is True
    assert any(line.startswith("REHEARSAL") for line in heard.lines)
    assert result.engine.builder is Builder.RTX
    assert result.engine.sm == 86
    assert result.golden.images == 4
    assert "CPU" in result.golden.label
    assert result.bench.latency_ms["p50"] > 0
    with Connection(address_from(device.address)) as connection:
        Device(connection).fetch(job, tmp_path)
        assert connection.run(f"{ROOT}/venv/bin/python -c 'import torch'").code == 1
        assert connection.run(f"ls {job.folder}/images-*").code != 0, "the images were left there"
    assert sha256_file(tmp_path / "engine.plan") == result.engine.sha256
    assert json.loads((tmp_path / "engine.json").read_text())["rehearsal"] is True
    assert (tmp_path / "build.log").stat().st_size > 1000
    answers = np.load(tmp_path / "outputs" / bundle.images.name)
    assert answers.shape == (11, 10)
    with zipfile.ZipFile(bundle.path) as archive, archive.open("golden_output.npy") as stream:
        np.testing.assert_allclose(answers[:4], np.load(stream), atol=1e-4)


@pytest.mark.slow
def test_the_built_bundle_is_signed_by_the_device_and_says_where_it_is_from(
    device: LoopbackDevice, bundle: Bundle
) -> None:
    result, job = run(device, job_of(bundle)), job_of(bundle)
    built = device.home / job.folder / result.bundle.name
    with zipfile.ZipFile(built) as archive:
        manifest, signature = (json.loads(archive.read(name)) for name in ("manifest.json", "signature.json"))
        assert "engine.plan" in archive.namelist()
    assert manifest["built_from"]["bundle"] == sha256_file(bundle.path)
    assert manifest["rehearsal"] is True
    assert signature["signatures"][0]["keyid"] == result.bundle.keyid != bundle.key.public.keyid
    secret = device.home / ".config/resvit/own.key"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert (device.trust / "own.pub").read_text() == result.bundle.key


@pytest.mark.slow
def test_by_hand_without_ssh_or_host(device: LoopbackDevice, bundle: Bundle) -> None:
    (device.home / "by hand").mkdir(exist_ok=True)
    (device.home / "by hand" / "small.resvit").write_bytes(bundle.path.read_bytes())
    (device.home / "by hand" / "release.pub").write_text(bundle.key.public.to_text())
    command = f"cd 'by hand' && ../{ROOT}/venv/bin/resvit-engine build small.resvit --rehearse"
    with Connection(address_from(device.address)) as connection:
        refused = connection.run(command)
        assert refused.code == ExitCode.UNTRUSTED
        assert not (device.home / "by hand/small-engine/model").exists()
        done = connection.run(f"{command} --trust release.pub --json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["rehearsal"] is True
    assert (device.home / "by hand/small-engine/built/engine.plan").exists()


def test_a_machine_that_is_not_the_target_refuses_without_rehearsal(device: LoopbackDevice, bundle: Bundle) -> None:
    job = RemoteJob(bundle.path, bundle.key.public.to_text())
    with pytest.raises(ResvitError, match=r"On ssh://127") as caught:
        run(device, job)
    assert caught.value.code == ExitCode.IMPOSSIBLE
    assert not (device.home / job.folder / "model").exists()


def test_a_tampered_bundle_is_refused_there(device: LoopbackDevice, bundle: Bundle, tmp_path: Path) -> None:
    data = bytearray(bundle.path.read_bytes())
    place = data.index(b'"precision": "fp16"') + len('"precision": "')
    data[place : place + 4] = b"int8"
    tampered = tmp_path / "tampered.resvit"
    tampered.write_bytes(data)
    job = job_of(bundle, tampered)
    with pytest.raises(ResvitError) as caught:
        run(device, job)
    # The manifest's own checksum is off too, whichever is looked at first.
    assert caught.value.code in (ExitCode.UNTRUSTED, ExitCode.INPUT)
    assert not (device.home / job.folder / "model").exists()


def test_a_bundle_signed_by_somebody_else_is_refused_there(
    device: LoopbackDevice, bundle: Bundle, tmp_path: Path
) -> None:
    job = job_of(bundle, key=signing_key(tmp_path, "stranger"))
    with pytest.raises(ResvitError, match="not trusted") as caught:
        run(device, job)
    assert caught.value.code == ExitCode.UNTRUSTED
    assert not (device.home / job.folder / "model").exists()


@pytest.mark.slow
def test_a_connection_cut_during_the_build_is_taken_up_again(device: LoopbackDevice, bundle: Bundle) -> None:
    def back() -> None:
        device.start()
        device.thaw_jobs()

    away = threading.Timer(1.0, back)

    def cut() -> None:
        assert device.drop_connections() > 0
        device.stop()
        away.start()

    heard = Heard(Building=cut)
    with device.frozen_at("Building"):
        result = run(device, job_of(bundle), heard)
    away.join()
    assert result.engine.bytes > 0
    assert any("was lost" in line for line in heard.lines)
    assert sum(line.startswith("Building") for line in heard.lines) == 1, "it was built or told twice"


@pytest.mark.slow
def test_a_host_that_went_away_follows_the_job_that_runs(device: LoopbackDevice, bundle: Bundle) -> None:
    class GoneError(Exception):
        pass

    def leave() -> None:
        raise GoneError

    with device.frozen_at("Building"), pytest.raises(GoneError):
        run(device, job_of(bundle), Heard(Building=leave))
    heard = Heard(**{"The job is running": device.thaw_jobs})
    assert run(device, job_of(bundle), heard).engine.bytes > 0
    assert any("following it" in line for line in heard.lines)


@pytest.mark.slow
def test_a_device_that_disappears_during_the_build_goes_on_when_it_is_back(
    device: LoopbackDevice, bundle: Bundle
) -> None:
    job = job_of(bundle)
    with device.frozen_at("Building"), pytest.raises(UnreachableError, match="did not come back") as caught:
        run(device, job, Heard(Building=device.vanish), patience=0.3)
    assert "run the same command" in caught.value.fix
    folder = device.home / job.folder
    assert not (folder / "built").exists(), "half an engine was taken for one"
    extracted = (folder / "phases/extract.json").stat().st_mtime_ns
    device.start()
    assert run(device, job).engine.bytes > 0
    assert (folder / "phases/extract.json").stat().st_mtime_ns == extracted, "a finished phase was repeated"


@pytest.mark.slow
def test_a_job_that_was_killed_gives_a_sentence_and_can_go_on(device: LoopbackDevice, bundle: Bundle) -> None:
    job = job_of(bundle)

    def kill() -> None:
        for pid in device.job_processes():
            os.kill(pid, signal.SIGKILL)

    with device.frozen_at("Building"), pytest.raises(ResvitError, match="ended without a result") as caught:
        run(device, job, Heard(Building=kill))
    assert caught.value.code == ExitCode.BUILD
    assert run(device, job).engine.bytes > 0


def test_ctrl_c_here_stops_the_job_there(device: LoopbackDevice, bundle: Bundle) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with device.frozen_at("Building"), pytest.raises(KeyboardInterrupt):
        run(device, job_of(bundle), Heard(Building=interrupt))
    device.thaw_jobs()
    device.wait_for_jobs()
    result = json.loads((device.home / job_of(bundle).folder / "result.json").read_text())
    assert result["error"]["exit_code"] == ExitCode.INTERRUPTED


@pytest.mark.slow
def test_the_device_installs_runs_refuses_and_rolls_back(
    device: LoopbackDevice, bundle: Bundle, tmp_path: Path
) -> None:
    """What the device built goes into use there; one whose golden outputs differ does not."""
    result, job = run(device, job_of(bundle)), job_of(bundle)
    built = f"{job.folder}/{result.bundle.name}"
    upload_of = {name: tmp_path / f"{name}.resvit" for name in ("second", "wrong")}
    manifest = extract_bundle(bundle.path, tmp_path / "model")
    files: dict[str, Path | bytes] = {
        name: tmp_path / "model" / name for name in ("model.onnx", "golden_input.npy", "golden_output.npy")
    }
    write_bundle(upload_of["second"], dataclasses.replace(manifest, release=2), files, bundle.key)
    np.save(tmp_path / "other.npy", -np.load(tmp_path / "model/golden_output.npy"))
    write_bundle(
        upload_of["wrong"],
        dataclasses.replace(manifest, release=3),
        {**files, "golden_output.npy": tmp_path / "other.npy"},
        bundle.key,
    )
    (device.trust / "release.pub").write_text(bundle.key.public.to_text())
    engine, name = f"{ROOT}/venv/bin/resvit-engine", manifest.name
    with Connection(address_from(device.address)) as connection:
        for what, file in upload_of.items():
            upload(connection, file, f"{what}.resvit")
        upload(connection, bundle.images, "images.npy")

        def does(command: str) -> tuple[int, dict]:
            answer = connection.run(f"{engine} {command} --json")
            return answer.code, json.loads(answer.stdout)

        def release() -> int:
            return does("status")[1]["installed"][0]["running"]["release"]

        assert does(f"install {built}")[0] == ExitCode.IMPOSSIBLE, "a rehearsal was installed as the real thing"
        assert does(f"install --rehearse {built}")[0] == 0
        assert does(f"run {name} --input images.npy --output first.npy")[0] == 0
        assert np.load(device.home / "first.npy").shape == (11, 10)
        assert does("install --rehearse second.resvit")[0] == 0
        code, told = does("install --rehearse wrong.resvit")
        assert code == ExitCode.MISMATCH, told
        assert release() == 2, "the refused one runs"
        assert does(f"rollback {name}")[0] == 0
        assert release() == 1


def test_what_a_manifest_says_of_the_build() -> None:
    for name in ("jetson-orin", "l4", "dgx-spark"):
        target = find_target(name)
        assert Target.from_json(Record(json.loads(json.dumps(target.to_json())), "a manifest")) == target
    with pytest.raises(ResvitError, match="kind of a manifest is 'toaster'"):
        Target.from_json(Record({**find_target("l4").to_json(), "kind": "toaster"}, "a manifest"))
    settings = BuildSettings(batch=(1, 8, 32), workspace_mib=512, sparse=True)
    assert BuildSettings.from_json(Record(settings.to_json(), "a manifest")) == settings
    assert Manifest(build=settings).build_settings == settings
    plan = plan_for_device(find_target("jetson-orin"), settings, (3, 8, 8), dynamic_batch=True)
    assert Manifest(plan=plan).build_settings == settings
    assert DevicePlan.from_json(Record(plan.to_json(), "plan.json")) == plan
    with pytest.raises(ResvitError, match="how the engine is built"):
        _ = Manifest().build_settings
