"""The engine's runner, on stand-ins for CUDA and TensorRT; on a GPU, the real ones beside ONNX Runtime."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from cuda_standin import Error, FakeCuda, FakeEngine, FakeTensorRT
from engine_reports import engine_report
from resvit_engines.bench.bench import BenchSettings, measure
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.run import engine_runner
from resvit_engines.run import runner as run
from resvit_engines.run.cuda import CALLS, VALUES, Cuda, load_cuda

CONTENT = b"engine of a test"


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 2, 2)).astype(np.float32)


def expected(batch: np.ndarray) -> np.ndarray:
    sums = batch.reshape(len(batch), -1).sum(1)
    return np.stack([sums, -sums], 1)


@pytest.fixture
def api() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def opened(api, tmp_path, monkeypatch):
    """Opens a runner of a stand-in engine."""

    def opener(record=None, content: bytes = CONTENT, sha256: str | None = None, **engine):
        fakes = FakeTensorRT(FakeEngine(api, **engine))
        monkeypatch.setattr(engine_runner, "load_cuda", lambda: Cuda(api))
        monkeypatch.setattr(engine_runner, "load_tensorrt", lambda module: fakes)
        path = tmp_path / "engine.plan"
        path.write_bytes(content)
        digest = sha256 or sha256_bytes(content)
        runner = engine_runner.open_engine(path, digest, record or engine_report(), tmp_path / "model.onnx")
        return runner, fakes

    return opener


@pytest.mark.parametrize("count", [1, 3, 4, 5, 11])
def test_any_number_of_images_runs_in_batches_that_the_engine_takes(opened, api, count) -> None:
    runner, fakes = opened(profile=(2, 4))
    batch = images(count)
    with runner:
        np.testing.assert_allclose(runner({"input": batch})["logits"], expected(batch), rtol=1e-5)
        assert fakes.engine.runs == -(-count // 4)
    assert not api.left()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_fixed_batch_is_filled_up(opened, count) -> None:
    runner, _ = opened(batch=3)
    with runner:
        assert runner.batch == (3, 3)
        np.testing.assert_allclose(runner({"input": images(count)})["logits"], expected(images(count)), rtol=1e-5)


def test_half_precision_goes_in_as_such(opened) -> None:
    runner, _ = opened(dtype="HALF")
    with runner:
        found = runner({"input": images(2)})["logits"]
    assert runner.inputs[0].dtype == np.float16
    np.testing.assert_allclose(found, expected(images(2)), atol=0.02)


def test_batches_of_changing_size_share_one_lane_until_it_is_too_small(opened, api) -> None:
    runner, _ = opened()
    with runner:
        for count in (2, 1, 2, 4, 3):
            np.testing.assert_allclose(runner({"input": images(count)})["logits"], expected(images(count)), rtol=1e-5)
        assert api.calls["cudaMalloc"] == 4  # input and output, for 2 images and then for 4
        assert api.left() == {"device": 2, "pinned": 2, "event": 2, "stream": 1}
    assert not api.left()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": images(1)}, "needs the input 'input'"),
        ({"input": images(1), "more": images(1)}, "has no input 'more'"),
        ({"input": images(1)[0]}, "[3, 2, 2]"),
        ({"input": np.zeros((1, 3, 4, 4), np.float32)}, "input float32[B, 3, 2, 2]"),
        ({"input": np.zeros((1, 3, 2, 2), np.uint8)}, "not prepared"),
        ({"input": np.zeros((1, 3, 2, 2), np.complex64)}, "complex64"),
        ({"input": images(0)}, "at least one image"),
    ],
)
def test_wrong_input_is_refused_with_names(opened, arrays, says) -> None:
    runner, fakes = opened()
    with runner, pytest.raises(ResvitError) as caught:
        runner(arrays)
    assert caught.value.code is ExitCode.INPUT
    assert says in str(caught.value)
    assert fakes.engine.runs == 0


@pytest.mark.parametrize("batch", [1, 5])
def test_a_lane_outside_the_profile_is_refused(opened, batch) -> None:
    runner, _ = opened(profile=(2, 4))
    with pytest.raises(ResvitError, match="batches of 2 to 4"), runner.lane(batch):
        pass


@pytest.mark.parametrize(
    ("call", "number", "code", "exit_code"),
    [
        ("cudaMalloc", 1, Error.cudaErrorMemoryAllocation, ExitCode.SYSTEM),
        ("cudaMalloc", 2, Error.cudaErrorMemoryAllocation, ExitCode.SYSTEM),
        ("cudaHostAlloc", 2, Error.cudaErrorMemoryAllocation, ExitCode.SYSTEM),
        ("cudaStreamCreateWithFlags", 1, Error.cudaErrorMemoryAllocation, ExitCode.SYSTEM),
        ("cudaEventCreate", 2, Error.cudaErrorMemoryAllocation, ExitCode.SYSTEM),
        ("cudaMemcpyAsync", 1, Error.cudaErrorIllegalAddress, ExitCode.SYSTEM),
        ("cudaMemcpyAsync", 2, Error.cudaErrorIllegalAddress, ExitCode.SYSTEM),
        ("cudaStreamSynchronize", 1, Error.cudaErrorIllegalAddress, ExitCode.SYSTEM),
        ("cudaEventRecord", 1, Error.cudaErrorNoDevice, ExitCode.MISSING),
    ],
)
def test_an_error_of_cuda_is_told_by_name_and_leaves_nothing_taken(opened, api, call, number, code, exit_code) -> None:
    runner, _ = opened()
    api.fail[call] = (number, code)
    with runner, pytest.raises(ResvitError) as caught:
        runner({"input": images(2)})
    assert caught.value.code is exit_code
    assert f"{call} failed with {code.name}: said of {code.name}" in caught.value.problem
    assert not api.left()


def test_memory_that_ran_out_once_can_be_asked_for_again(opened, api) -> None:
    runner, _ = opened()
    api.fail["cudaMalloc"] = (2, Error.cudaErrorMemoryAllocation)
    with runner:
        with pytest.raises(ResvitError):
            runner({"input": images(4)})
        np.testing.assert_allclose(runner({"input": images(1)})["logits"], expected(images(1)), rtol=1e-5)


def test_without_a_driver_nothing_is_deserialised(opened, api) -> None:
    api.fail["cudaMemGetInfo"] = (1, Error.cudaErrorInsufficientDriver)
    with pytest.raises(ResvitError) as caught:
        opened()
    assert caught.value.code is ExitCode.MISSING
    assert "cudaErrorInsufficientDriver" in str(caught.value)


def test_an_engine_that_tensorrt_refuses_is_told_in_its_words(opened) -> None:
    with pytest.raises(ResvitError) as caught:
        opened(content=b"another version")
    assert caught.value.code is ExitCode.BUILD
    assert "version tag does not match" in str(caught.value)


def test_an_engine_of_another_digest_is_not_deserialised(opened, api) -> None:
    fakes = []
    with pytest.raises(ResvitError) as caught:
        fakes.append(opened(sha256=sha256_bytes(b"signed")))
    assert caught.value.code is ExitCode.UNTRUSTED
    assert not api.calls


@pytest.mark.parametrize(
    ("trouble", "says", "code"),
    [
        ("refuses", "could not run the engine", ExitCode.SYSTEM),
        ("no_context", "execution context", ExitCode.SYSTEM),
        ("unknown_output", "depends on what is in the images", ExitCode.IMPOSSIBLE),
    ],
)
def test_what_tensorrt_refuses_later_is_a_sentence_too(opened, api, trouble, says, code) -> None:
    runner, fakes = opened()
    setattr(fakes.engine, trouble, True)
    with runner, pytest.raises(ResvitError) as caught:
        runner({"input": images(1)})
    assert caught.value.code is code
    assert says in str(caught.value)
    assert not api.left()


def test_a_type_that_numpy_lacks_is_refused(opened) -> None:
    with pytest.raises(ResvitError, match="BF16"):
        opened(dtype="BF16")


def through(lane, batch: np.ndarray) -> np.ndarray:
    lane.load({"input": batch})
    lane.submit()
    lane.wait()
    return lane.results()["logits"]


def test_a_cuda_graph_is_recorded_once_for_a_shape(opened, api) -> None:
    runner, fakes = opened()
    with runner, runner.lane(4, cuda_graph=True) as lane:
        for seed in range(3):
            np.testing.assert_allclose(through(lane, images(4, seed)), expected(images(4, seed)), rtol=1e-5)
        assert api.calls["cudaGraphLaunch"] == 3
        assert api.calls["cudaGraphInstantiate"] == 1
        assert fakes.engine.runs == 4  # one before the recording, none in it
        np.testing.assert_allclose(through(lane, images(2)), expected(images(2)), rtol=1e-5)
        assert api.calls["cudaGraphInstantiate"] == 2
        assert api.left()["executable"] == 1
        assert api.left()["graph"] == 0
        assert lane.note == ""
    assert not api.left()


@pytest.mark.parametrize("how", ["tensorrt", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_where_recording_fails_it_runs_without_and_says_so(opened, api, how) -> None:
    runner, fakes = opened()
    fakes.engine.no_capture = how == "tensorrt"
    api.fail[how] = (1, Error.cudaErrorStreamCaptureUnsupported)
    with runner, runner.lane(2, cuda_graph=True) as lane:
        for seed in range(2):
            np.testing.assert_allclose(through(lane, images(2, seed)), expected(images(2, seed)), rtol=1e-5)
        assert "There is no CUDA graph" in lane.note
        assert api.calls["cudaGraphLaunch"] == 0
        assert not api.recorded
    assert not api.left()


def test_a_closed_runner_says_so(opened) -> None:
    runner, _ = opened()
    runner.close()
    with pytest.raises(ResvitError, match="closed"):
        runner({"input": images(1)})


def test_streams_are_timed_by_the_gpu_clock(opened, api) -> None:
    runner, fakes = opened()
    settings = BenchSettings(batch=4, iterations=30, warmup=0.0, streams=3)
    with runner:
        report = measure(runner, settings)
    assert (report.streams, report.iterations, report.cuda_graph) == (3, 30, True)
    assert report.gpu_ms == {"p50": 0.25, "p90": 0.25, "p95": 0.25, "p99": 0.25}
    assert fakes.engine.runs >= 36
    assert report.device_mib is not None
    assert not api.left()


def test_a_graph_that_cannot_be_is_in_the_report(opened) -> None:
    runner, fakes = opened()
    fakes.engine.no_capture = True
    with runner:
        report = measure(runner, BenchSettings(iterations=10, warmup=0.0))
    assert not report.cuda_graph
    assert any("no CUDA graph" in remark for remark in report.warnings)


def test_every_name_of_cuda_exists() -> None:
    api = importlib.import_module("cuda.bindings.runtime")
    for name in (*CALLS, *VALUES):
        value = api
        for part in name.split("."):
            value = getattr(value, part)


def test_the_real_runtime_answers_with_a_code_that_becomes_a_sentence() -> None:
    """Without a GPU the driver is missing; with one, no device can give 2^62 bytes. Both are errors of CUDA."""
    with pytest.raises(ResvitError) as caught, load_cuda().device_memory(1 << 62):
        pass
    assert "cudaMalloc failed with cudaError" in caught.value.problem


def test_the_stand_in_has_what_the_code_calls() -> None:
    assert set(CALLS) <= set(dir(FakeCuda))


@pytest.mark.gpu
@pytest.mark.skipif(run.local_sm() is None, reason="there is no NVIDIA GPU here")
@pytest.mark.parametrize("batch", [(1, 1, 1), (1, 4, 8)])
def test_a_real_engine_computes_what_onnx_runtime_computes(tmp_path, batch) -> None:
    from resvit_engines.builder.builder import build_engine
    from resvit_engines.builder.settings import BuildSettings
    from resvit_engines.files import sha256_file
    from resvit_engines.run.onnx_on_cpu import open_onnx
    from resvit_engines.targets.choice import with_builder
    from resvit_engines.targets.table import RTX_SMS, TARGETS, Builder
    from test_run import small_model

    sm = run.local_sm()
    target = next((target for target in TARGETS if target.sm == sm and sm in RTX_SMS), None)
    if target is None:
        pytest.skip(f"TensorRT for RTX has no code generator for SM {sm}")
    model = small_model(tmp_path / "model.onnx", batch=None if batch[0] != batch[2] else batch[0])
    engine = tmp_path / "engine.plan"
    record = build_engine(model, engine, with_builder(target, Builder.RTX), BuildSettings(batch=batch))
    pictures = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    with open_onnx(model) as cpu:
        reference = cpu({"input": pictures})["logits"]
    with engine_runner.open_engine(engine, sha256_file(engine), record, model) as runner:
        np.testing.assert_allclose(runner({"input": pictures})["logits"], reference, rtol=2e-2, atol=2e-2)
        for graph in (False, True):
            report = measure(
                runner, BenchSettings(batch=batch[2], iterations=50, warmup=0.1, cuda_graph=graph, streams=2)
            )
            assert report.gpu_ms is not None
            assert report.gpu_ms["p50"] > 0
