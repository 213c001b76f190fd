"""Timing: samples, percentiles, the paired ratio and its verdict, conditions, and the commands."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest

from resvit_engines.bench import clocks
from resvit_engines.bench.bench import BenchReport, BenchSettings, Stopwatch, bench_feeds, measure, percentiles
from resvit_engines.bench.clocks import NOT_REPORTED, Conditions, clock_warnings, conditions_now, smi_numbers
from resvit_engines.bench.compare import compare, paired_ratio, verdict
from resvit_engines.bench.text import comparison_lines, report_lines
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.run.onnx_on_cpu import open_onnx
from resvit_engines.trt.running import TensorSpec
from test_run import small_model

FAST = BenchSettings(iterations=60, warmup=0.0)


class Paced:
    """A runner on a pretended GPU: every batch takes ``gpu_ms`` on the GPU's clock, no time on ours."""

    label, why, runtime = "an engine", "", "tensorrt"
    batch = (1, 8)
    inputs = (TensorSpec("input", (-1, 3), np.dtype(np.float32)),)
    outputs = ()

    def __init__(self, gpu_ms: float, spread: float = 0.0, seed: int = 0, log: list | None = None) -> None:
        self.gpu_ms, self.spread = gpu_ms, spread
        self.random = np.random.default_rng(seed)
        self.log = log if log is not None else []
        self.open_lanes = 0
        self.device_mib = 12.5

    def lane(self, batch: int, *, cuda_graph: bool = False):
        return PacedLane(self)


class PacedLane:
    note = ""

    def __init__(self, runner: Paced) -> None:
        self.runner = runner
        self.under_way = False

    def __enter__(self):
        self.runner.open_lanes += 1
        return self

    def __exit__(self, *error):
        assert not self.under_way
        self.runner.open_lanes -= 1

    def load(self, feeds):
        assert not self.under_way, "a lane's buffers are in use until its work is over"
        self.feeds = feeds

    def submit(self):
        self.under_way = True

    def wait(self):
        assert self.under_way
        self.under_way = False
        self.runner.log.append(self.runner)
        return self.runner.gpu_ms * float(np.exp(self.runner.random.normal(0, self.runner.spread)))

    def results(self):
        return {}


def report(runtime: str = "tensorrt", gpu: bool = True) -> BenchReport:
    some = {"p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0}
    now = Conditions()
    return BenchReport("x", runtime, 1, 1, False, 10, some, some if gpu else None, 1000.0, None, 100, now, now)


@pytest.mark.parametrize("streams", [1, 3])
def test_every_stream_is_used_and_every_call_counted(streams) -> None:
    runner = Paced(2.0)
    with Stopwatch(runner, BenchSettings(streams=streams, warmup=0.0)) as watch:
        assert runner.open_lanes == streams
        samples = watch.take(10)
    assert len(samples.wall_ms) == len(samples.gpu_ms) == len(runner.log) == 10
    assert samples.typical_ms == 2.0
    assert runner.open_lanes == 0


def test_lanes_are_given_back_when_one_cannot_be_had(monkeypatch) -> None:
    runner = Paced(1.0)
    real = runner.lane

    def third_fails(batch, *, cuda_graph=False):
        if runner.open_lanes == 2:
            raise ResvitError("no memory", "less", ExitCode.SYSTEM)
        return real(batch)

    monkeypatch.setattr(runner, "lane", third_fails)
    with pytest.raises(ResvitError, match="no memory"), Stopwatch(runner, BenchSettings(streams=3)):
        pass
    assert runner.open_lanes == 0


def test_a_warm_up_comes_before_anything_is_measured() -> None:
    runner = Paced(1.0)
    found = measure(runner, BenchSettings(iterations=20, warmup=0.0, streams=2))
    assert found.iterations == 20
    assert len(runner.log) >= 24


def test_seconds_are_measured_for() -> None:
    class Slow(Paced):
        def lane(self, batch, *, cuda_graph=False):
            lane = super().lane(batch)
            wait = lane.wait
            lane.wait = lambda: time.sleep(0.002) or wait()
            return lane

    begin = time.perf_counter()
    found = measure(Slow(1.0), BenchSettings(seconds=0.3, warmup=0.1))
    assert time.perf_counter() - begin >= 0.4
    assert found.latency_ms["p50"] >= 2.0
    assert found.images_per_second <= 500


def test_percentiles_are_those_of_numpy() -> None:
    assert percentiles(list(range(101))) == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"streams": 0}, {"seconds": -1.0}, {"iterations": 0}, {"seconds": float("nan")}]
)
def test_settings_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ResvitError, match="makes no sense"):
        BenchSettings(**wrong)


def test_images_are_repeated_or_cut_to_the_batch() -> None:
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bench_feeds(Paced(1), 5, {"input": images})["input"].tolist() == [*images.tolist() * 2, images[0].tolist()]
    assert len(bench_feeds(Paced(1), 1, {"input": images})["input"]) == 1
    noise = bench_feeds(Paced(1), 4, None)["input"]
    assert noise.shape == (4, 3)
    assert np.isfinite(noise).all()


def test_a_faster_engine_is_found_faster_and_by_how_much() -> None:
    found = compare({"FP16": Paced(2.0, 0.05, 1), "INT8": Paced(1.5, 0.05, 2)}, FAST)
    assert found.baseline == "FP16"
    ratio = found.ratios["INT8"]
    assert ratio.low < 1.333 < ratio.high
    assert 1.25 < ratio.low < ratio.high < 1.42
    assert found.verdicts["INT8"] == f"faster than FP16 by {ratio.sentence}"


@pytest.mark.parametrize(("ms", "words"), [(2.2, "slower than FP16"), (2.0, "no faster than FP16 that could be shown")])
def test_what_is_not_faster_was_not_worth_it(ms, words) -> None:
    found = compare({"FP16": Paced(2.0, 0.05, 1), "INT8": Paced(ms, 0.05, 2)}, FAST)
    assert found.verdicts["INT8"].startswith("not worth it: ")
    assert words in found.verdicts["INT8"]


def test_runners_take_turns_and_each_begins_a_round_as_often() -> None:
    log: list[Paced] = []
    runners = {name: Paced(1.0, log=log) for name in "abc"}
    compare(runners, BenchSettings(iterations=60, warmup=0.0), rounds=12)
    names = [next(name for name, runner in runners.items() if runner is one) for one in log]
    in_turn = names[-12 * 3 * 6 :]  # 5 calls and one outside the clock, of each of three, in twelve rounds
    first = [in_turn[start] for start in range(0, len(in_turn), 18)]
    assert first == list("abc") * 4
    assert [in_turn.count(name) for name in "abc"] == [72, 72, 72]


def test_drift_that_meets_all_alike_does_not_count() -> None:
    drift = np.linspace(1.0, 3.0, 20)
    ratio = paired_ratio(2.0 * drift, 1.6 * drift)
    assert ratio.value == pytest.approx(1.25)
    assert ratio.low == pytest.approx(ratio.high)


@pytest.mark.whole
def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        one, other = (np.exp(random.normal(0.0, 0.1, 20)) for _ in range(2))
        ratio = paired_ratio(1.2 * one, other)
        held += ratio.low <= 1.2 <= ratio.high
    assert 0.88 <= held / 200 <= 1.0


def test_without_a_device_there_is_no_verdict() -> None:
    ratio = paired_ratio([2.0] * 6, [1.0] * 6)
    assert verdict(ratio, "FP16", report(), report()).startswith("faster")
    engine = report("onnxruntime", gpu=False)
    assert verdict(ratio, "FP32", engine, engine).startswith("faster"), (
        "a processor's own engines are what was asked for"
    )
    on_cpu = dataclasses.replace(engine, label="ONNX Runtime on the CPU, not the engine")
    said = verdict(ratio, "FP16", on_cpu, on_cpu)
    assert said.startswith("no verdict")
    assert said.endswith("which says nothing of the device")
    assert "another runtime" in verdict(ratio, "FP16", report(), on_cpu)


def test_too_little_is_no_comparison() -> None:
    with pytest.raises(ResvitError, match="no comparison"):
        compare({"FP16": Paced(1.0)}, FAST)
    with pytest.raises(ResvitError, match="no comparison"):
        compare({"FP16": Paced(1.0), "INT8": Paced(1.0)}, FAST, rounds=5)


def test_onnx_runtime_is_timed_by_wall_clock_and_says_what_it_is(tmp_path) -> None:
    with open_onnx(small_model(tmp_path / "model.onnx")) as runner:
        found = measure(runner, BenchSettings(batch=3, iterations=20, warmup=0.0, streams=4))
    assert found.gpu_ms is None
    assert found.device_mib is None
    assert found.streams == 1
    assert found.latency_ms["p50"] <= found.latency_ms["p99"]
    assert found.images_per_second > 0
    assert found.before == Conditions()
    assert any("no streams on a processor" in remark for remark in found.warnings)
    json.dumps(found.to_json(), allow_nan=False)
    assert any(isinstance(line, str) and "not the engine" in line for line in report_lines(found))


def test_a_fixed_batch_is_told_where_another_is_asked_for(tmp_path) -> None:
    with open_onnx(small_model(tmp_path / "model.onnx", batch=4)) as runner, pytest.raises(ResvitError) as caught:
        measure(runner, BenchSettings(batch=2))
    assert "a batch of 4, not 2" in str(caught.value)


def test_the_table_has_gpu_columns_only_for_a_gpu() -> None:
    found = compare({"FP16": Paced(2.0), "INT8": Paced(1.0)}, FAST)
    table, *rest = comparison_lines(found)
    assert [column.header for column in table.columns][-2:] == ["GPU p50 ms", "GPU MiB"]
    assert rest[-1].startswith("INT8: faster than FP16 by 2.00x")
    assert comparison_lines(found, brief=True) == [rest[-1]]
    plain = report_lines(report("onnxruntime", gpu=False))[0]
    assert [column.header for column in plain.columns][-1] == "images/s"


SMI = "1410, 1980, 700.00, 700.00, 41\n"


def test_nvidia_smi_is_read_and_what_it_does_not_say_is_left_out() -> None:
    assert smi_numbers(SMI)["power.limit"] == 700.0
    assert smi_numbers("[N/A], 1980, [Not Supported], , 41\n") == {"clocks.max.sm": 1980.0, "temperature.gpu": 41.0}
    assert smi_numbers("") == {}


def test_conditions_come_from_the_machine(monkeypatch) -> None:
    facts = clocks.this_machine()
    fields = {**facts.to_json(), "power_mode": "MAXN", "clocks": "not locked: 306 to 1300 MHz, now 306"}
    monkeypatch.setattr(clocks, "this_machine", lambda: type(facts)(**fields))
    monkeypatch.setattr(clocks, "_smi", lambda: SMI)
    found = conditions_now(on_gpu=True)
    assert (found.power_mode, found.sm_mhz, found.max_sm_mhz, found.gpu_c) == ("MAXN", 1410.0, 1980.0, 41.0)
    assert found.locked is False
    assert "jetson_clocks" in clock_warnings(found, found)[0]
    assert conditions_now(on_gpu=False).power_mode == NOT_REPORTED


def test_a_clock_that_moved_is_told() -> None:
    before, after = (Conditions(clocks="locked at 1300 MHz", sm_mhz=mhz) for mhz in (1980.0, 1410.0))
    assert "1980 to 1410 MHz" in clock_warnings(before, after)[0]
    assert clock_warnings(before, before) == ()
    assert before.locked is True
    assert Conditions().locked is None


def test_nvidia_smi_that_fails_is_not_reported(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks._smi() == ""
    program.write_text(f"#!/bin/sh\nprintf '%s' '{SMI.strip()}'\n")
    program.chmod(0o755)
    assert smi_numbers(clocks._smi())["clocks.sm"] == 1410.0
    program.write_text("#!/bin/sh\necho failed; exit 9\n")
    assert clocks._smi() == ""


def test_the_bootstrap_is_the_same_every_time() -> None:
    one, other = np.random.default_rng(0).uniform(1, 2, (2, 20))
    assert paired_ratio(one, other) == paired_ratio(one, other)
