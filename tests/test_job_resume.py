"""A job on a device that is taken up again signs what was checked: every file is held against what was recorded."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engine_reports import engine_report
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import verify_bundle, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import BundledFile, GoldenFiles
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_directory, sha256_bytes, sha256_file
from resvit_engines.keys.private import load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey, TrustStore, load_trust
from resvit_engines.progress import Silent
from resvit_engines.records import Record
from resvit_engines.remote.job import Job, _packed, run_job
from resvit_engines.remote.job_folder import JobFolder
from resvit_engines.targets.table import find_target
from resvit_engines.trt.io_tensor import IoTensor


@dataclass(frozen=True)
class Said:
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text}

    @classmethod
    def from_json(cls, record: Record) -> Said:
        return cls(record.text("text"))


def three_phases(folder: Path) -> list[str]:
    """Run a job of three phases, each with a file; returns the names of those that were done, and not kept."""
    job, did = JobFolder(folder), []

    def do(name: str) -> Said:
        did.append(name)
        with atomic_directory(folder / name) as partial:
            (partial / "file").write_text(name)
            (partial / "other").write_text("x")
        return Said(f"{name} is done")

    with job.working(Silent()):
        job.begin("k" * 64)
        for name in "abc":
            said, left = job.phase(name, lambda name=name: do(name), Said.from_json, name)
            assert said == Said(f"{name} is done")
            assert left["file"] == BundledFile("file", 1, sha256_bytes(name.encode()))
            assert sorted(left) == ["file", "other"]
    return did


def changed(path: Path) -> None:
    path.write_text("z" * path.stat().st_size)


def added(path: Path) -> None:
    (path.parent / "evil.so").write_text("evil")


def lost(path: Path) -> None:
    path.unlink()


def linked(path: Path) -> None:
    path.rename(path.with_name(".kept"))
    (path.parent.parent / "outside").write_bytes(path.with_name(".kept").read_bytes())
    path.with_name(".kept").unlink()
    path.symlink_to(path.parent.parent / "outside")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def exchanged(path: Path) -> None:
    other = "c.left.json" if path.suffix else "other" if path.name == "file" else "file"
    path.write_bytes(path.with_name(other).read_bytes())


ATTACKS = [changed, lost, linked, pipe, exchanged]


@pytest.mark.whole
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([*ATTACKS, added]),
    st.sampled_from(["a/file", "b/file", "c/file", "a/other"]),
)
def test_whatever_is_done_to_a_file_its_phase_and_those_after_it_are_done_again(
    tmp_path_factory: pytest.TempPathFactory, attack: Callable[[Path], None], name: str
) -> None:
    folder = tmp_path_factory.mktemp("job")
    assert three_phases(folder) == ["a", "b", "c"]
    assert three_phases(folder) == []
    attack(folder / name)
    again = three_phases(folder)
    assert again[:1] == [name[0]]
    assert three_phases(folder) == []


@pytest.mark.parametrize("record", ["a.json", "b.left.json", "c.json"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_done_to_a_record_its_phase_is_done_again(
    tmp_path: Path, attack: Callable[[Path], None], record: str
) -> None:
    three_phases(tmp_path)
    attack(tmp_path / "phases" / record)
    assert record[0] in three_phases(tmp_path)
    assert three_phases(tmp_path) == []


def test_a_phase_that_was_made_anew_takes_those_after_it_along(tmp_path: Path) -> None:
    """The second is whole, and was made from another first."""
    three_phases(tmp_path)
    listing = json.loads((tmp_path / "phases/a.left.json").read_text())
    (tmp_path / "a/file").write_text("A")
    for file in listing["files"]:
        file["sha256"] = sha256_file(tmp_path / "a" / file["path"])
    (tmp_path / "phases/a.left.json").write_text(json.dumps(listing))
    job, did = JobFolder(tmp_path), []
    with job.working(Silent()):
        job.begin("k" * 64)
        for name in "abc":
            job.phase(name, lambda name=name: did.append(name) or Said(name), Said.from_json, name)
    assert did == ["b", "c"]


def test_what_nobody_knows_is_not_packed(tmp_path: Path) -> None:
    engine, signed = engine_report(), Manifest("net", files=(BundledFile("model.onnx", 1, "1" * 64),))
    left = {name: BundledFile(name, 1, "2" * 64) for name in ("engine.plan", "engine.json", "build.log", "model.onnx")}
    packed = _packed(tmp_path, signed, engine, left)
    # What came in the bundle must be what was signed, whatever lies there now.
    assert packed["model.onnx"].sha256 == "1" * 64
    assert packed["engine.plan"].sha256 == engine.sha256
    assert packed["build.log"].sha256 == "2" * 64
    for name in ("evil.so", "sub/model.onnx", "model.onnx.bak"):
        with pytest.raises(ResvitError, match="nor the build knows it") as caught:
            _packed(tmp_path, signed, engine, {**left, name: BundledFile(name, 1, "2" * 64)})
        assert caught.value.code is ExitCode.UNTRUSTED


def small_bundle(folder: Path) -> tuple[Path, TrustStore]:
    """A signed bundle of a tiny network with a verdict beside it, and who trusts it."""
    weights = np.random.default_rng(0).standard_normal((16, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["logits"])],
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "model.onnx"
    )
    images = np.random.default_rng(1).standard_normal((4, 1, 4, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    np.save(folder / "golden_input.npy", images)
    np.save(folder / "golden_output.npy", np.concatenate([session.run(None, {"input": i[None]})[0] for i in images]))
    (folder / "verdict.json").write_text('{"verdict": "undecided"}\n')
    make_key_pair(folder / "a.key", folder / "a.pub", lambda raw: PublicKey(raw, "a"))
    manifest = Manifest(
        "small-orin",
        target=find_target("jetson-orin"),
        precision="fp16",
        build=BuildSettings(optimization_level=0),
        input=IoTensor("input", (1, 1, 4, 4), "float32"),
        outputs=(IoTensor("logits", (1, 10), "float32"),),
        golden=GoldenFiles(),
    )
    names = ("model.onnx", "golden_input.npy", "golden_output.npy", "verdict.json")
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    write_bundle(folder / "small.resvit", manifest, files, load_signing_key(str(folder / "a.key")))
    return folder / "small.resvit", load_trust(folder / "a.pub")


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="no TensorRT for RTX to rehearse with")
def test_a_rehearsal_that_is_taken_up_again_signs_what_it_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "etc/keys"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "etc/keys").mkdir(parents=True)
    bundle, trust = small_bundle(tmp_path)
    job = Job(bundle, tmp_path / "job", rehearse=True)
    np.save(tmp_path / "images-0.npy", np.zeros((2, 1, 4, 4), np.float32))
    (tmp_path / "job").mkdir()
    (tmp_path / "images-0.npy").rename(tmp_path / "job/images-0.npy")
    first = run_job(job, trust)
    packed = job.folder / first.bundle.name
    honest = verify_bundle(packed)
    before = packed.read_bytes()
    again = dataclasses.replace(run_job(job, trust), machine=first.machine)
    assert again.to_json() == first.to_json()
    assert packed.read_bytes() == before

    def attacked(attack: Callable[[], object]) -> None:
        for name in ("phases/pack.json", first.bundle.name):
            (job.folder / name).unlink()
        attack()
        again = run_job(job, trust)
        manifest = verify_bundle(packed)
        assert manifest.digest_of("engine.plan") == again.engine.sha256
        assert manifest.digest_of("verdict.json") == honest.digest_of("verdict.json")
        assert [file.path for file in manifest.files] == [file.path for file in honest.files]
        with zipfile.ZipFile(packed) as archive:
            assert b"accepted" not in archive.read("verdict.json")

    built = job.folder / "built"

    def damage_engine() -> None:
        data = bytearray((built / "engine.plan").read_bytes())
        data[len(data) // 2] ^= 0xFF
        (built / "engine.plan").write_bytes(data)

    attacked(damage_engine)
    attacked(lambda: (built / "verdict.json").write_text('{"verdict": "accepted"}\n'))
    attacked(lambda: (built / "evil.so").write_text("evil"))
    attacked(lambda: (job.folder / "model/evil.so").write_text("evil"))
    answers = (job.folder / "outputs/images-0.npy").read_bytes()
    (job.folder / "outputs/images-0.npy").write_bytes(answers[:-4] + b"\0\0\x80?")
    assert run_job(job, trust).outputs.images == 2
    assert (job.folder / "outputs/images-0.npy").read_bytes() == answers
    np.save(job.folder / "images-0.npy", np.ones((2, 1, 4, 4), np.float32))  # of the same name and size
    assert run_job(job, trust).outputs.images == 2
    assert (job.folder / "outputs/images-0.npy").read_bytes() != answers


def test_what_changes_while_the_job_runs_is_not_signed(tmp_path: Path) -> None:
    """Between the build and the packing, all within one run."""
    from resvit_engines.bundle.source import RecordedFile

    (tmp_path / "verdict.json").write_text("undecided")
    source = RecordedFile(tmp_path / "verdict.json", sha256_file(tmp_path / "verdict.json"))
    (tmp_path / "verdict.json").write_text("accepted!")
    with pytest.raises(ResvitError, match="not what was checked"):
        write_bundle(tmp_path / "b.resvit", Manifest("net"), {"verdict.json": source})
    assert not (tmp_path / "b.resvit").exists()
