"""Variants timed in turns: groups where memory is short, who else used the machine, and the job that builds them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cuda_standin import FakeContext, FakeCuda, FakeEngine, FakeTensorRT
from engine_reports import engine_report
from resvit_engines.bench import variants as timing
from resvit_engines.bench.bench import BenchSettings
from resvit_engines.bench.beside import (
    Usage,
    busy_seconds,
    programs_from_smi,
    reasons_from_smi,
    usage_now,
    usage_remarks,
)
from resvit_engines.bench.variants import VariantTimes, drift_remarks, time_variants
from resvit_engines.builder import builder as building
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.cli.main import run as engine_run
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.keys.private import load_signing_key, make_key_pair
from resvit_engines.keys.public import PublicKey, load_trust
from resvit_engines.records import Record
from resvit_engines.remote import timing as job_module
from resvit_engines.remote.timing import TimingJob, TimingResult, run_timing, too_large
from resvit_engines.run import engine_runner
from resvit_engines.run.cuda import Cuda
from resvit_engines.run.onnx_on_cpu import open_onnx
from resvit_engines.targets.table import find_target

CPU = find_target("cpu")
SHORT = BenchSettings(seconds=0.05, warmup=0.0)


def network(path: Path, width: int) -> Path:
    """One linear layer [1, width] times ``width`` columns: the wider, the slower."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["y"], name="product")],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 64, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64, width])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {f"w{width}": network(folder / f"w{width}.onnx", width) for width in (512, 64, 32, 16)}


def openings(models: dict[str, Path]):
    return {name: lambda path=path: open_onnx(path) for name, path in models.items()}


def test_the_smaller_network_is_the_faster_one(models) -> None:
    times = time_variants(openings(models), SHORT, 8, on_gpu=False)
    assert times.names == tuple(models)
    assert times.ratio("w512", "w64").faster
    assert times.median_ms("w512") > times.median_ms("w16")
    assert times.profiles == {}
    assert VariantTimes.from_json(Record(json.loads(json.dumps(times.to_json())), "it")) == times


def test_what_memory_does_not_take_together_is_timed_in_groups(models) -> None:
    opened: list[str] = []

    @contextlib.contextmanager
    def limited(name: str):
        if len(opened) == 2:
            raise ResvitError("The GPU has no memory left.", "Close something.", ExitCode.SYSTEM)
        opened.append(name)
        try:
            yield open_onnx(models[name])
        finally:
            opened.remove(name)

    times = time_variants({name: lambda name=name: limited(name) for name in models}, SHORT, 8, on_gpu=False)
    assert [tuple(group) for group in times.groups] == [("w512", "w64"), ("w512", "w32"), ("w512", "w16")]
    assert times.ratio("w512", "w16").faster
    assert times.ratio("w64", "w16").value > 0  # each against the baseline beside it
    assert VariantTimes.from_json(Record(times.to_json(), "it")) == times


def test_two_that_do_not_fit_beside_each_other_are_a_sentence(models) -> None:
    def full():
        raise ResvitError("The GPU has no memory left.", "Close something.", ExitCode.SYSTEM)

    with pytest.raises(ResvitError, match="no memory left"):
        time_variants({"w512": openings(models)["w512"], "w64": full}, SHORT, 8, on_gpu=False)


def test_a_group_that_was_not_timed_together_is_held_against_its_own_baseline() -> None:
    slow = tuple(10.0 * drift for drift in (1.0, 1.1, 0.9, 1.05, 1.0, 0.95))
    times = VariantTimes(
        ({"base": slow, "a": tuple(ms / 2 for ms in slow)}, {"base": (30.0,) * 6, "b": (10.0,) * 6}),
    )
    # The machine was three times as slow while b was timed: a is twice, b three times as fast as the baseline.
    assert times.ratio("a", "b").value == pytest.approx(1.5)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": []},
        {"groups": [{"a": [1.0], "b": [1.0, 2.0]}]},
        {"groups": [{"a": [1.0]}, {"b": [1.0]}]},
        {"groups": [{"a": [-1.0], "b": [1.0]}]},
        {"groups": [{"a": ["fast"]}]},
        {"profiles": {"a": [{"name": "x", "averageMs": -1}]}},
        {"remarks": "none"},
    ],
)
def test_times_that_are_none_are_refused(change) -> None:
    good = VariantTimes(({"a": (1.0,), "b": (2.0,)},)).to_json()
    VariantTimes.from_json(Record(good, "it"))
    with pytest.raises(ResvitError) as caught:
        VariantTimes.from_json(Record({**good, **change}, "it"))
    assert caught.value.code is ExitCode.INPUT


def test_times_of_a_variant_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ResvitError, match="not asked for"):
        VariantTimes(({"v0": (1.0,), "evil": (1.0,)},)).renamed({"v0": "plain"})


def test_work_of_other_programs_is_said() -> None:
    program = "import time; begin = time.monotonic()\nwhile time.monotonic() - begin < 60: pass"
    busy = subprocess.Popen([sys.executable, "-c", program])
    try:
        before = usage_now(on_gpu=False)
        # Until that program has really had a core for a while: nothing else may have been left to it.
        while (after := usage_now(on_gpu=False)).busy_s - before.busy_s < 0.5:
            time.sleep(0.05)
        assert any("Other programs used" in remark for remark in usage_remarks(before, after))
    finally:
        busy.kill()
        busy.wait()


def test_own_work_is_no_other_program() -> None:
    before = Usage(0.0, 100.0, 10.0, 2, throttled=3)
    assert usage_remarks(before, Usage(10.0, 120.0, 29.0, 2, throttled=3)) == ()
    (said,) = usage_remarks(before, Usage(10.0, 120.0, 20.0, 2, throttled=3))
    assert "1.0 of 2 cores" in said
    (hot,) = usage_remarks(before, Usage(10.0, 100.0, 10.0, 2, throttled=4))
    assert "too hot" in hot


def test_what_the_machine_says_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    ticks = os.sysconf("SC_CLK_TCK")
    text = f"cpu  {ticks} 0 {ticks} 999 999 0 0 {ticks} 0 0\ncpu0 1 0 0 0 0 0 0 0 0 0\ncpu1 1 0 0 0 0 0 0 0 0 0\n"
    (tmp_path / "proc/stat").write_text(text)
    for cpu in (0, 1):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text("2\n")
    found = usage_now(on_gpu=True, root=tmp_path, run=lambda command: {
        "--query-compute-apps=pid,process_name": "4711, /usr/bin/python3\n",
        "--query-gpu=clocks_throttle_reasons.active": "0x0000000000000044\n",
    }[command[2]])  # fmt: skip
    assert (found.busy_s, found.cores, found.throttled) == (3.0, 2, 4)
    assert found.others == ("python3 (4711)",)
    assert found.held_down == ("its power limit", "its temperature")
    remarks = usage_remarks(found, dataclasses.replace(found, at=found.at + 1))
    assert [remark.partition(":")[0] for remark in remarks] == [
        "Another program uses the GPU",
        "The GPU's clock was held down by its power limit and its temperature.",
    ]
    assert busy_seconds("nothing of the kind") == (0.0, 0)
    assert programs_from_smi("[N/A], [N/A]\nNo running processes found") == ()
    assert reasons_from_smi("[Not Supported]") == reasons_from_smi("0x0000000000000001") == ()


def test_a_machine_whose_speed_moved_is_said() -> None:
    assert drift_remarks([1.0] * 12) == ()
    assert "1.000 ms at first, 2.000 ms at the end" in drift_remarks([1.0] * 6 + [2.0] * 6)[0]


class ProfiledContext(FakeContext):
    """Reports two layers of one name and a third after every run, as TensorRT does."""

    profiler = None

    def execute_async_v3(self, stream) -> bool:
        done = super().execute_async_v3(stream)
        if self.profiler is not None:
            for name, ms in (("conv", 0.1), ("copy", 0.01), ("copy", 0.03)):
                self.profiler.report_layer_time(name, ms)
        return done


def profiled_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: type[FakeContext]):
    api = FakeCuda()
    engine = FakeEngine(api)
    engine.create_execution_context = lambda: context(engine)  # type: ignore[method-assign]
    fakes = FakeTensorRT(engine)
    fakes.IProfiler = type("IProfiler", (), {})  # type: ignore[attr-defined]
    monkeypatch.setattr(engine_runner, "load_cuda", lambda: Cuda(api))
    monkeypatch.setattr(engine_runner, "load_tensorrt", lambda module: fakes)
    content = b"engine of a test"
    (tmp_path / "engine.plan").write_bytes(content)
    report = engine_report()
    return engine_runner.open_engine(tmp_path / "engine.plan", sha256_bytes(content), report, tmp_path / "m.onnx"), api


def test_an_engine_tells_the_time_of_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, api = profiled_runner(tmp_path, monkeypatch, ProfiledContext)
    with runner:
        found = runner.layer_times({"input": np.zeros((2, 3, 2, 2), np.float32)}, 3)
    assert [name for name, _ in found] == ["conv", "copy", "copy"]
    assert [us for _, us in found] == pytest.approx([100.0, 10.0, 30.0])
    assert not api.left()


def test_a_profile_that_leaves_layers_out_of_a_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(ProfiledContext):
        count = 0

        def execute_async_v3(self, stream) -> bool:
            done = FakeContext.execute_async_v3(self, stream)
            if self.profiler is not None:
                Odd.count += 1
                for name in ("a", "b") if Odd.count % 2 else ("b", "a"):
                    self.profiler.report_layer_time(name, 0.1)
            return done

    runner, _ = profiled_runner(tmp_path, monkeypatch, Odd)
    with runner:
        assert runner.layer_times({"input": np.zeros((1, 3, 2, 2), np.float32)}, 4) == ()


def test_variants_on_a_gpu_are_timed_with_their_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opening():
        return profiled_runner(tmp_path, monkeypatch, ProfiledContext)[0]

    monkeypatch.setattr(timing, "usage_now", lambda on_gpu: Usage(0.0, 0.0, 0.0, 0, held_down=("its power limit",)))
    times = time_variants({"fp16": opening, "int8": opening}, SHORT, 6, on_gpu=True)
    assert times.median_ms("fp16") == pytest.approx(0.25)  # the stand-in's clock
    assert set(times.profiles) == {"fp16", "int8"}
    assert "held down by its power limit" in times.remarks[0]
    assert VariantTimes.from_json(Record(json.loads(json.dumps(times.to_json())), "it")).profiles == times.profiles


# The job on the device.


@pytest.fixture
def bundles(models, tmp_path: Path) -> tuple[list[Path], Path]:
    make_key_pair(tmp_path / "a.key", tmp_path / "a.pub", lambda raw: PublicKey(raw, "a"))
    key, found = load_signing_key(str(tmp_path / "a.key")), []
    for name in ("w512", "w64"):
        found.append(tmp_path / f"{name}.resvit")
        manifest = Manifest(name, target=CPU, build=BuildSettings())
        write_bundle(found[-1], manifest, {"model.onnx": models[name]}, key)
    return found, tmp_path / "a.pub"


def job_of(paths: list[Path], tmp_path: Path) -> TimingJob:
    return TimingJob(tuple(paths), tmp_path / "job", 6, 0.05)


@pytest.mark.whole
def test_a_job_builds_times_and_goes_on_where_it_was_killed(bundles, tmp_path: Path, monkeypatch) -> None:
    (paths, trust), built = bundles, []
    real = building.build_engine

    def counted(onnx, engine, *rest):
        if len(built) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        built.append(engine.parent.name)
        return real(onnx, engine, *rest)

    monkeypatch.setattr(job_module, "build_engine", counted)
    with pytest.raises(KeyboardInterrupt):
        run_timing(job_of(paths, tmp_path), load_trust(trust))
    assert json.loads((tmp_path / "job/result.json").read_text())["error"]["exit_code"] == ExitCode.INTERRUPTED
    result = run_timing(job_of(paths, tmp_path), load_trust(trust))
    assert len(built) == 2, "a finished engine was built again"
    assert result.times.ratio("w512", "w64").faster
    again = run_timing(job_of(paths, tmp_path), load_trust(trust))
    assert again.times == result.times
    assert len(built) == 2
    document = json.loads((tmp_path / "job/result.json").read_text())["result"]
    assert TimingResult.from_json(Record(document, "it")).times == result.times
    # What another has changed is built again, and other rounds are another job.
    plan = tmp_path / "job/variants/w64/engine.plan"
    plan.write_bytes(plan.read_bytes() + b"\0")
    run_timing(job_of(paths, tmp_path), load_trust(trust))
    assert len(built) == 3


def test_a_bundle_of_a_stranger_is_not_even_unpacked(bundles, tmp_path: Path) -> None:
    paths, _ = bundles
    make_key_pair(tmp_path / "b.key", tmp_path / "b.pub", lambda raw: PublicKey(raw, "b"))
    with pytest.raises(ResvitError) as caught:
        run_timing(job_of(paths, tmp_path), load_trust(tmp_path / "b.pub"))
    assert caught.value.code is ExitCode.UNTRUSTED
    assert not (tmp_path / "job/variants").exists()


def test_no_space_for_another_engine_keeps_those_that_are_finished(bundles, tmp_path: Path, monkeypatch) -> None:
    (paths, trust), built, full = bundles, [], [True]
    real = building.build_engine

    def filling(onnx, engine, *rest):
        if built and full[0]:
            raise ResvitError(f"The disk is full: {engine} could not be written.", "Free some.", ExitCode.SYSTEM)
        built.append(engine)
        return real(onnx, engine, *rest)

    monkeypatch.setattr(job_module, "build_engine", filling)
    with pytest.raises(ResvitError, match="disk is full") as caught:
        run_timing(job_of(paths, tmp_path), load_trust(trust))
    assert caught.value.code is ExitCode.SYSTEM
    assert (tmp_path / "job/variants/w512/engine.plan").is_file()
    assert not (tmp_path / "job/variants/w64").exists()
    full[0] = False
    run_timing(job_of(paths, tmp_path), load_trust(trust))
    assert len(built) == 2


def test_what_would_not_fit_is_said_before_it_is_copied() -> None:
    assert too_large([100 << 20] * 3, 2000, "it") is None
    error = too_large([100 << 20] * 10, 2000, "ssh://orin")
    assert error is not None
    assert error.code is ExitCode.SYSTEM
    assert "10 variants and their engines take 2,356 MiB on ssh://orin" in error.problem


@pytest.mark.parametrize("names", [["one"], ["same", "same"]])
def test_one_bundle_alone_gives_no_times(tmp_path: Path, names, capsys) -> None:
    paths = [tmp_path / str(place) / f"{name}.resvit" for place, name in enumerate(names)]
    assert engine_run(["time", *map(str, paths), "--job", str(tmp_path / "job")]) == ExitCode.INPUT
    assert "Two bundles or more of different names" in capsys.readouterr().err


@pytest.mark.whole
def test_times_by_hand(bundles, tmp_path: Path, capsys) -> None:
    paths, trust = bundles
    how = ["time", *map(str, paths), "--trust", str(trust), "--rounds", "6", "--seconds", "0.05"]
    assert engine_run(how) == 0
    told = capsys.readouterr().out
    assert "baseline" in told
    assert "w64" in told
    assert engine_run([*how, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["variants"]["w64"]["faster"]["low"] > 1
    assert document["folder"] == str(tmp_path / "w512-times")
    assert engine_run([*how, "--rehearse"]) == ExitCode.IMPOSSIBLE
    assert "nothing to rehearse" in capsys.readouterr().err
