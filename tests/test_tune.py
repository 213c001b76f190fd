"""Which regions keep Q/DQ: by measured times and the gate, with made-up machines and one real one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DEMO
from device_wheels import WHEELS
from loopback_device import LoopbackDevice, loopback_device, missing
from resvit_engines.bench.compare import Ratio, paired_ratio
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT
from resvit_engines.remote.device import ROOT
from resvit_engines.remote.ssh import CONFIG_VARIABLE, Connection, address_from
from resvit_engines.remote.wheelhouse import WHEELS_VARIABLE
from resvit_engines.targets.speed_verdict import SpeedKind
from resvit_engines.targets.table import Precision, find_target
from resvit_export.cli.main import run
from resvit_export.pipeline import Pipeline
from resvit_export.run_folder import RunFolder
from resvit_export.stage import File
from resvit_export.stages.decide.region_search import FLOAT, Start, Ways, search_regions
from resvit_export.stages.decide.tune import Candidate, TimeVariants, Tune, finished_tuning, place_here
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.quantize import quantize_model
from resvit_quantize.search.regions import Region, regions_of
from resvit_quantize.settings import QuantizeSettings, Rules

REGIONS = tuple(Region(name, (f"{name}.0", f"{name}.1"), 0.25) for name in ("conv", "qkv", "mlp"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before, in another test or by whoever works here, decides nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Machine:
    """A machine on which FP32 takes 10 ms, and each region in INT8 takes so many ms less (or more), with some noise."""

    def __init__(self, noise: float = 0.002, **saved: float) -> None:
        self.saved, self.noise, self.asked = saved, noise, []
        self.random = np.random.default_rng(0)
        self.ms: dict[str, np.ndarray] = {}

    def timed(self, variants: Mapping[str, frozenset[str]]) -> Machine:
        self.asked.append(dict(variants))
        for name, out in variants.items():
            true = 10.0 - sum(ms for region, ms in self.saved.items() if region not in out)
            self.ms[name] = true * (1 + self.noise * self.random.standard_normal(20))
        return self

    def ratio(self, slower: str, faster: str) -> Ratio:
        return paired_ratio(self.ms[slower], self.ms[faster])

    def median_ms(self, name: str) -> float:
        return float(np.median(self.ms[name]))


def searched(machine: Machine, accepts=lambda out: True, passes: int = 2, start: Start | None = None):
    damage = {"conv": 1.0, "qkv": 2.0, "mlp": 30.0}
    ways = Ways(machine.timed, accepts, lambda region: damage[region.name])
    return search_regions(REGIONS, ways, passes, lambda said: None, start)


def test_regions_that_gain_nothing_go_back_to_floats() -> None:
    found = searched(Machine(conv=3.0, qkv=-0.5, mlp=1.0))
    assert found.out == {"qkv"}
    assert {name: choice.kept for name, choice in found.choices.items()} == {"conv": True, "qkv": False, "mlp": True}
    assert "stay in conv, mlp" in found.sentences[-1]


def test_a_gain_below_two_per_cent_is_none() -> None:
    assert searched(Machine(conv=3.0, qkv=0.05, mlp=1.0)).out == {"qkv"}


def test_a_gain_that_chance_explains_is_none() -> None:
    kept = {"conv": 0, "qkv": 0, "mlp": 0}
    for seed in range(20):
        machine = Machine(noise=0.2, conv=3.0, qkv=0.0, mlp=0.0)
        machine.random = np.random.default_rng(seed)
        for name, choice in searched(machine, passes=1).choices.items():
            kept[name] += choice.kept
    assert kept["conv"] >= 18
    assert max(kept["qkv"], kept["mlp"]) <= 3, kept


def test_where_nothing_gains_the_engine_is_float_and_says_so() -> None:
    found = searched(Machine(conv=-1.0, qkv=-0.5, mlp=0.0))
    assert found.out == {"conv", "qkv", "mlp"}
    assert "gains 2% on FP32" in found.sentences[0]
    assert found.best is not None
    assert found.best[0].value < 1.02
    assert found.best[0].value == pytest.approx(found.best[2] / found.best[1], rel=0.01)
    assert "computes in FP32" in found.sentences[-1]


def test_what_the_gate_rejects_is_never_chosen() -> None:
    # The MLP hurts 30 times as much as the convolutions, for half of the gain: it goes first.
    found = searched(Machine(conv=2.0, qkv=1.0, mlp=1.0), accepts=lambda out: "mlp" in out)
    assert found.out == {"mlp"}
    assert "mlp goes back" in found.sentences[0]
    none = searched(Machine(conv=2.0, qkv=1.0, mlp=1.0), accepts=lambda out: False)
    assert none.out == {"conv", "qkv", "mlp"}


def test_the_plain_placement_wins_where_it_is_faster_as_a_whole() -> None:
    class Together(Machine):
        def timed(self, variants):
            super().timed(variants)
            for name, out in variants.items():
                self.ms[name] = np.full(20, 5.0 if not out else 10.0 if name == FLOAT else 4.99)
            return self

    found = searched(Together(), passes=1)
    # Each region alone seems to cost; all of them out is FP32, which is half as fast as the plain placement.
    assert found.out == frozenset()


def test_layers_that_are_alike_are_one_region(tmp_path: Path) -> None:
    from test_cpu_target import residual_and_linear

    residual_and_linear(tmp_path / "model.onnx")
    analysis = graph_from_onnx(tmp_path / "model.onnx").analysis
    names = {product.name for product in analysis.products}
    *convs, linear = regions_of(analysis, names)
    assert sum(len(region.nodes) for region in convs) == 4
    assert max(len(region.nodes) for region in convs) >= 2
    assert all("conv at 8x8" in region.name for region in convs)
    assert linear.name.endswith("linear 32x64 (1)")
    assert sum(region.share for region in (*convs, linear)) == pytest.approx(1.0)
    assert regions_of(analysis, set()) == ()


def test_what_is_known_of_a_region_is_where_the_search_starts() -> None:
    bad, good = Ratio(0.9, 0.88, 0.92), Ratio(1.3, 1.2, 1.4)
    known = {"qkv": bad, "conv": good, "mlp": good}
    machine = Machine(conv=3.0, qkv=-0.5, mlp=1.0)
    found = searched(machine, passes=1, start=Start(known, trusted=True))
    assert found.out == {"qkv"}
    assert len(machine.asked) == 1, "regions that are known were timed one by one"
    assert all(choice.known for choice in found.choices.values())
    # Not trusted, every region is timed again: what another network told was wrong here.
    machine = Machine(conv=-1.0, qkv=0.8, mlp=1.0)
    found = searched(machine, passes=2, start=Start(known))
    assert found.out == {"conv"}
    assert not any(choice.known for choice in found.choices.values())


@pytest.mark.parametrize(
    ("ratio", "asked"), [((1.3, 1.2, 1.4), 1), ((0.9, 0.88, 0.92), 1), ((1.3, 0.9, 1.7), 2), ((1.01, 0.96, 1.06), 2)]
)
def test_a_ratio_that_chance_may_explain_is_measured_again(ratio: tuple[float, float, float], asked: int) -> None:
    good = Ratio(1.3, 1.2, 1.4)
    machine = Machine(conv=3.0, qkv=0.8, mlp=1.0)
    found = searched(machine, passes=1, start=Start({"conv": good, "mlp": good, "qkv": Ratio(*ratio)}, trusted=True))
    assert len(machine.asked) == asked
    assert found.choices["qkv"].known == (asked == 1)
    assert found.choices["conv"].known


def test_an_engine_that_ended_in_floats_says_what_was_measured(tmp_path: Path) -> None:
    """The verdict on speed, from what the choice keeps."""
    (tmp_path / "model.onnx").write_bytes(b"plain")
    here = place_here(find_target("cpu"))
    assert here is not None
    plain, folder = File.of(tmp_path / "model.onnx"), RunFolder(tmp_path / "run", SILENT)
    best = {"value": 0.8, "low": 0.78, "high": 0.82, "ms": [2.5, 2.0]}
    remarks = ("Other programs used the cores.",)
    with folder.locked():
        made = folder.do(Tune(plain, "quick", here, (), {"a": "fp32"}, ("x", *remarks), None, None, best, remarks, {}))
    assert made.best == (Ratio(0.8, 0.78, 0.82), 2.5, 2.0)
    assert (made.speed, made.remarks) == (None, remarks)
    ends: Any = SimpleNamespace(
        run=SimpleNamespace(require_target=lambda: find_target("cpu"), precision=Precision.INT8),
        variant=SimpleNamespace(tuned=made),
        quantized=SimpleNamespace(eight_bit_products=()),
    )
    speed = Pipeline.speed.func(ends)
    assert speed.kind is SpeedKind.NOT_FASTER
    assert "so FP32 ships: the fastest in INT8 is 0.80x [0.78, 0.82] as fast" in speed.headline


def test_a_kill_leaves_nothing_outside_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resvit_export.stages.decide import tune

    (tmp_path / "model.onnx").write_bytes(b"plain")
    here, seen = place_here(find_target("cpu")), []
    assert here is not None

    def killed(model: Path, engine: Path, *more: object) -> None:
        engine.write_bytes(b"an engine")
        seen.append(engine)
        shutil.copytree(run_path, tmp_path / "left")  # as a kill would leave it
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "build_engine", killed)
    candidate = Candidate(File.of(tmp_path / "model.onnx"), BuildSettings())
    run_path = tmp_path / "run"
    folder = RunFolder(run_path, SILENT)
    with folder.locked(), pytest.raises(KeyboardInterrupt):
        folder.do(TimeVariants({"float": candidate}, find_target("cpu"), here, 6, 0.1))
    (engine,) = seen
    assert engine.is_relative_to(run_path)
    assert list((tmp_path / "left").rglob(engine.name))
    with RunFolder(tmp_path / "left", SILENT).locked():
        assert not list((tmp_path / "left").rglob(engine.name))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-3.0, 3.0), min_size=3, max_size=3),
    st.floats(-2.0, 2.0),
    st.sampled_from([0.0, 0.002, 0.02]),
    st.sets(st.sampled_from(["conv", "qkv", "mlp"])),
    st.dictionaries(st.sampled_from(["conv", "qkv", "mlp"]), st.floats(0.7, 1.5)),
    st.booleans(),
    st.integers(1, 3),
)
def test_what_is_chosen_is_faster_than_floats_and_accepted_or_it_is_floats(
    saved, together, noise, hurtful, known, trusted, passes
) -> None:
    """Whatever regions cost alone and together, whatever the gate says, and whatever other networks told."""
    names = ("conv", "qkv", "mlp")

    class Interacting(Machine):
        def true_ms(self, out) -> float:
            inside = [name for name in names if name not in out]
            return 10.0 - sum(self.saved[name] for name in inside) + together * (len(inside) == 2)

        def timed(self, variants):
            for name, out in variants.items():
                self.ms[name] = self.true_ms(out) * (1 + self.noise * self.random.standard_normal(20))
            return self

    def accepts(out) -> bool:
        return hurtful <= set(out)

    machine = Interacting(noise, **dict(zip(names, saved, strict=True)))
    start = Start({name: Ratio(value, value - 0.01, value + 0.01) for name, value in known.items()}, trusted)
    found = searched(machine, accepts, passes, start)
    if found.out == set(names):
        assert found.faster is None
        assert "computes in FP32" in found.sentences[-1]
    else:
        assert accepts(found.out)
        assert found.faster is not None
        assert found.faster.faster
        # Twice what 20 rounds of that noise leave open.
        assert machine.true_ms(found.out) < 10.0 * (1 + noise)


@pytest.mark.parametrize("rules", [Rules.TENSORRT, Rules.ONNXRUNTIME])
def test_the_variant_in_floats_is_the_network_that_fp16_and_fp32_would_be(tmp_path: Path, rules: Rules) -> None:
    """What everything is held against is no quantised network with its Q/DQ taken out, but the one without any."""
    from test_cpu_target import ranges_of, residual_and_linear

    path, image = tmp_path / "float.onnx", np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)
    residual_and_linear(path)
    ranges, floats = ranges_of(path, image), Precision.FP32 if rules is Rules.ONNXRUNTIME else Precision.FP16
    names = [product.name for product in graph_from_onnx(path).analysis.products]
    variant = QuantizeSettings(Precision.INT8, rules=rules, precisions=dict.fromkeys(names, floats))
    heard: list[str] = []

    class Heard(type(SILENT)):  # type: ignore[misc]
        def warn(self, text: str) -> None:
            heard.append(text)

    quantize_model(path, ranges, variant, tmp_path / "variant.onnx", Heard())
    assert not heard, "what was chosen is no warning"
    quantize_model(path, ranges, QuantizeSettings(floats, rules=rules), tmp_path / "floats.onnx")
    assert (tmp_path / "variant.onnx").read_bytes() == (tmp_path / "floats.onnx").read_bytes()
    assert b"QuantizeLinear" not in (tmp_path / "variant.onnx").read_bytes()


@pytest.mark.parametrize("effort", ["quick", "thorough"])
@pytest.mark.parametrize("target", ["jetson-orin", "l4", "rtx-4090"])
def test_tuning_is_refused_where_nothing_can_be_timed(workspace: Path, capsys, target: str, effort: str) -> None:
    code = run(["build", *DEMO.split(), "--run", "runs/tuned", "--tune", effort, "--target", target])
    assert code == ExitCode.IMPOSSIBLE
    told = capsys.readouterr().err
    assert "this machine is none" in told
    assert "--device ssh://" in told
    assert not list((workspace / "runs/tuned").glob("export-*"))


@pytest.mark.slow
@pytest.mark.whole
def test_a_real_machine_is_tuned_and_a_killed_run_goes_on(workspace: Path, finished_run, capsys) -> None:
    shutil.copytree(finished_run("cpu"), workspace / "runs/tuned")
    capsys.readouterr()
    how = ["build", *DEMO.split(), "--target", "cpu", "--run", "runs/tuned", "--tune", "quick"]
    assert run([*how, "--json"]) in (ExitCode.OK, ExitCode.UNDECIDED)
    told = json.loads(capsys.readouterr().out)["tuned"]
    folder = workspace / "runs/tuned"
    record = json.loads(next(folder.glob("tune-*/tune.json")).read_text())
    assert record["sentences"] == told
    timings = sorted(folder.glob("timings-*"))
    assert len(timings) >= 2
    # As a kill would leave it: the choice is missing, measurements are there and are not made again.
    shutil.rmtree(next(folder.glob("tune-*")))
    stamps = [path.stat().st_mtime_ns for path in timings]
    assert run([*how, "--json"]) in (ExitCode.OK, ExitCode.UNDECIDED)
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("timings-*"))] == stamps
    assert json.loads(next(folder.glob("tune-*/tune.json")).read_text()) == record


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target", "cpu", "--precision", "fp32"],
        ["--target", "jetson-orin", "--precision", "fp16"],
        ["--target", "jetson-orin", "--quantizer", "modelopt"],
    ],
)
def test_where_there_are_no_8_bits_of_ours_nothing_is_tuned(workspace: Path, capsys, arguments: list[str]) -> None:
    code = run(["build", *DEMO.split(), "--run", "runs/tuned", "--tune", "quick", *arguments])
    assert code == ExitCode.IMPOSSIBLE
    assert "--tune chooses which layers our own quantiser puts into 8 bits" in capsys.readouterr().err
    assert not list((workspace / "runs/tuned").glob("export-*"))


@pytest.fixture
def over_ssh(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackDevice]:
    """A device of its own on loopback, with trust and caches of their own on both sides."""
    (tmp_path / "config" / "keys").mkdir(parents=True)
    monkeypatch.setenv("RESVIT_TRUST", str(tmp_path / "config" / "keys"))
    monkeypatch.setenv(WHEELS_VARIABLE, str(WHEELS))
    with loopback_device(tmp_path / "device") as device:
        monkeypatch.setenv(CONFIG_VARIABLE, str(device.config))
        yield device


def tuned_there(device: LoopbackDevice, *more: str) -> list[str]:
    return ["build", *DEMO.split(), "--target", "cpu", "--run", "runs/there", "--device", device.address, *more]


needs_device = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.mark.slow
@pytest.mark.whole
@needs_device
def test_a_device_is_tuned_over_ssh_killed_on_both_sides_and_what_it_chose_is_installed_there(
    workspace: Path, finished_run, over_ssh: LoopbackDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device, folder = over_ssh, workspace / "runs/there"
    shutil.copytree(finished_run("cpu"), folder)
    how = tuned_there(device, "--tune", "quick", "--json")
    # The device's process dies while it builds variants: a sentence, and the same command goes on.
    jobs = device.home / ".local/share/resvit-device/jobs"

    def kill() -> None:
        while not list(jobs.glob("tune-*/phases/build-v1.json")):
            time.sleep(0.01)
        for pid in device.job_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert run(how) == ExitCode.BUILD
    killer.join()
    assert "ended without a result" in capsys.readouterr().err
    (job,) = jobs.glob("tune-*")
    kept = {file.name: file.stat().st_mtime_ns for file in (job / "phases").glob("build-*")}
    assert kept
    assert not list(folder.glob("timings-*"))

    # The cable is pulled while variants are timed, and put back: the host waits, the device goes on.
    def pull() -> None:
        while not (job / "progress.log").is_file() or "timing rounds" not in (job / "progress.log").read_text():
            time.sleep(0.005)
        again.update({file.name: file.stat().st_mtime_ns for file in (job / "phases").glob("build-*")})
        dropped.append(device.drop_connections())
        device.stop()
        device.start()

    dropped: list[int] = []
    again: dict[str, int] = {}
    puller = threading.Thread(target=pull)
    puller.start()
    code = run(how)
    puller.join()
    told = capsys.readouterr()
    assert code in (ExitCode.OK, ExitCode.UNDECIDED), told.err
    assert dropped[0] > 0
    assert {name: again[name] for name in kept} == kept, "a finished engine was built again"
    document = json.loads(told.out)
    record = json.loads(next(folder.glob("tune-*/tune.json")).read_text())
    assert record["sentences"] == document["tuned"]
    assert any(line.startswith("Timed on") for line in document["tuned"])
    times = [json.loads(path.read_text()) for path in folder.glob("timings-*/timings.json")]
    assert len(times) >= 2
    for one in times:
        (group,) = one["times"]["groups"]
        assert len(group) == len(one["names"])
        assert all(ms > 0 for rounds in group.values() for ms in rounds)
        assert {len(rounds) for rounds in group.values()} == {12}
    # Nothing but times is left of them on the device, and what ships was built, judged and timed there.
    assert not list(jobs.glob("tune-*/variants")) + list(jobs.glob("tune-*/bundles"))
    stage = next(folder.glob("device-*"))
    found = json.loads((stage / "device.json").read_text())
    assert found["verdict"]["verdict"] == "accepted"
    assert found["bench"]["latency_ms"]["p50"] > 0
    # Never slower than floats as it was measured, by all times that were taken.
    assert record["faster"] is None or record["faster"]["low"] > 1
    if record["faster"] is None:
        assert "computes in FP32" in " ".join(document["tuned"])
        assert not any(kernel["type"] == "QLinearConv" for kernel in found["engine"]["kernels"])
    # The same command asks the device what it is, and times nothing.
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.glob("timings-*"))]
    assert run(how) in (ExitCode.OK, ExitCode.UNDECIDED)
    assert json.loads(capsys.readouterr().out)["tuned"] == document["tuned"]
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("timings-*"))] == stamps
    # Who looks at the run sees that choice, without a device.
    device.stop()
    assert run(["report", "--run", "runs/there", "--json"]) == 0
    device.start()
    capsys.readouterr()
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("timings-*"))] == stamps
    # There it installs, runs and is timed by hand.
    with Connection(address_from(device.address)) as connection:
        engine, name = f"{ROOT}/venv/bin/resvit-engine", found["bundle"]["name"]
        assert connection.run(f"{engine} install {ROOT}/jobs/[0-9a-f]*/{name}").code == 0
        (version,) = json.loads(connection.run(f"{engine} status --json").stdout)["installed"]
        done = connection.run(f"{engine} bench {version['name']} --seconds 0.2 --json")
        assert json.loads(done.stdout)["latency_ms"]["p50"] > 0
    # The next network of this kind starts from what was measured: nothing is timed one by one again.
    (cache,) = (tmp_path / "cache/resvit/tuning").glob("*.json")
    known = json.loads(cache.read_text())
    assert len(known["patterns"]) == len(record["regions"])
    for row in known["patterns"]:
        row["network"] = row["floats"] = "0" * 64  # as if another had told it, and beyond chance
        row["faster"] = dict.fromkeys(("value", "low", "high"), row["faster"]["value"])
    cache.write_text(json.dumps(known))
    for path in [*folder.glob("tune-*"), *folder.glob("timings-*")]:
        shutil.rmtree(path)
    assert run(how) in (ExitCode.OK, ExitCode.UNDECIDED)
    second = json.loads(capsys.readouterr().out)["tuned"]
    assert sum("as another network of this device told" in line for line in second) == len(record["regions"])
    for path in folder.glob("timings-*/timings.json"):
        assert set(json.loads(path.read_text())["names"]) <= {"float", "plain", "tuned"}


@pytest.mark.whole
@needs_device
def test_a_device_without_space_for_the_engines_is_a_sentence(
    workspace: Path, finished_run, over_ssh: LoopbackDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run("cpu"), workspace / "runs/there")
    df = over_ssh.root / "bin/df"
    df.write_text("#!/bin/sh\necho Filesystem\necho /dev/x 9 9 2048 9% /\n")
    df.chmod(0o755)
    assert run(tuned_there(over_ssh, "--tune", "quick")) == ExitCode.SYSTEM
    told = capsys.readouterr().err
    assert "variants and their engines take" in told
    assert "2 MiB are free" in told
    assert not list((over_ssh.home / ".local/share/resvit-device").glob("jobs/*/bundles/*"))


@pytest.mark.slow
@pytest.mark.whole
@needs_device
def test_tuning_for_tensorrt_is_rehearsed_with_engines_that_are_really_built_and_decides_nothing(
    workspace: Path, finished_run, over_ssh: LoopbackDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT for RTX builds every variant; the processor, which says nothing of a GPU, runs their graphs."""
    folder = workspace / "runs/there"
    shutil.copytree(finished_run("jetson-orin"), folder)
    how = ["build", *DEMO.split(), "--target", "jetson-orin", "--run", "runs/there", "--device", over_ssh.address]
    how += ["--plugins", "off", "--rehearse", "--json"]
    assert run([*how, "--tune", "quick"]) in (ExitCode.OK, ExitCode.UNDECIDED, ExitCode.REJECTED)
    told = json.loads(capsys.readouterr().out)["tuned"]
    assert told[0].startswith("REHEARSAL")
    record = json.loads(next(folder.glob("tune-*/tune.json")).read_text())
    assert record["precisions"] == {}, "what a processor took decided where 8 bits stay on a GPU"
    assert record["faster"] is None
    assert not list(folder.glob("tune-*/measured-times.json"))
    names = {name for path in folder.glob("timings-*/timings.json") for name in json.loads(path.read_text())["names"]}
    assert len(names) > 3
    (device,) = folder.glob("device-*/device.json")
    assert json.loads(device.read_text())["rehearsal"] is True
    # Nor does it count for another network there.
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).glob("resvit/tuning/*.json"))


@pytest.mark.whole
def test_one_measurement_is_a_stage_and_a_choice_is_found_again_where_it_was_made(tmp_path: Path) -> None:
    from test_cpu_target import quantised, residual_and_linear

    residual_and_linear(tmp_path / "float.onnx")
    image = np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)
    models = {"float": tmp_path / "float.onnx", "plain": quantised(tmp_path, image)}
    cpu, folder = find_target("cpu"), RunFolder(tmp_path / "run", SILENT)
    here = place_here(cpu)
    assert here is not None
    assert here.facts["onnxruntime"]
    candidates = {name: Candidate(File.of(path), BuildSettings()) for name, path in models.items()}
    stage = TimeVariants(candidates, cpu, here, 6, 0.1)
    with folder.locked():
        timings = folder.do(stage)
        assert timings.times.names == ("float", "plain")
        assert timings.median_ms("plain") > 0
        assert timings.layers_of("plain") is None
        assert RunFolder(tmp_path / "run", SILENT).do(stage).reused
        other = dataclasses.replace(here, facts={**here.facts, "onnxruntime": "9.9"})
        assert not folder.has(dataclasses.replace(stage, place=other))
        ratio = timings.ratio("float", "plain").to_json()
        made = Tune(candidates["plain"].model, "quick", here, (), {}, ("said",), ratio, (1.0, 2.0), None, (), {})
        folder.do(made)
        for effort, place, found in (
            *(("quick", here, True), ("quick", None, True), ("quick", other, False)),
            *(("thorough", here, False), ("quick", dataclasses.replace(here, address="ssh://there"), True)),
        ):
            choice = finished_tuning(folder, candidates["plain"].model, effort, place)
            assert (choice is not None) == found, (effort, place)
        assert finished_tuning(folder, candidates["float"].model, "quick", here) is None
    choice = finished_tuning(folder, candidates["plain"].model, "quick", None)
    assert choice is not None
    assert choice.lines == ("said",)
    assert choice.measured_times is None
    assert choice.speed is not None
    assert choice.speed[1:] == (1.0, 2.0)
    # What was changed since is done again, not believed.
    (choice.folder / "tune.json").write_text("{}")
    assert finished_tuning(folder, candidates["plain"].model, "quick", None) is None
    with pytest.raises(ResvitError):
        _ = choice.lines
