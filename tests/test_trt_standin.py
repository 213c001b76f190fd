"""The path through TensorRT, run for real: its own 11.4 bindings over the library of TensorRT for RTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from tensorrt_standin import standin_environment

pytest.importorskip("onnx")
from resvit_engines.builder import builder as build
from resvit_engines.builder.builder import build_engine, builds_here
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.targets.table import Builder, find_target
from resvit_engines.trt import api as trt_api
from resvit_engines.trt import config as trt_config
from resvit_engines.trt.io_tensor import IoTensor
from test_build import small_model

CACHE = "jetson-orin-sm87-tensorrt-11.4.0.106.timing"


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return standin_environment(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def gpu(monkeypatch, environment):
    """Pretend that TensorRT is installed, beside a GPU of the given compute capability."""

    def use(sm: int) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.syspath_prepend(environment["PYTHONPATH"])
        monkeypatch.setattr(build, "local_sm", lambda: sm)

    return use


@pytest.mark.whole
def test_it_builds_and_says_what_it_found(tmp_path, model, gpu) -> None:
    gpu(87)
    target, notes = find_target("jetson-orin"), Notes()
    assert builds_here(target)
    report = build_engine(model, tmp_path / "engine.plan", target, None, notes, tmp_path / "log")
    assert (report.builder, report.builder_version, report.sm) == (Builder.TENSORRT, "11.4.0.106", 87)
    convs = [k for k in report.kernels if any(layer.endswith("_sum/Conv") for layer in k.layers)]
    assert [kernel.inputs for kernel in convs] == [("Int8",), ("Int8",)]
    assert report.inputs == (IoTensor("input", (1, 32, 8, 8), "float32"),)
    assert (tmp_path / "engine.plan").stat().st_size == report.bytes > 10_000
    assert any("Built with TensorRT 11.4.0.106, but JetPack 6.2" in note for note in notes.said)
    # There is no driver, so the engine cannot be read: that is no failed build.
    assert any("layers are not listed" in note for note in notes.said)
    assert report.to_json()["layers"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.plan", "log"]


@pytest.mark.whole
def test_a_range_of_batches_becomes_a_profile(tmp_path, model, gpu) -> None:
    gpu(87)
    report = build_engine(model, tmp_path / "e.plan", find_target("jetson-orin"), BuildSettings(batch=(1, 4, 8)))
    assert report.inputs[0].shape == (-1, 32, 8, 8)


@pytest.mark.whole
def test_the_timing_cache_is_kept_and_read_again(tmp_path, model, gpu) -> None:
    gpu(87)
    target, folder = find_target("jetson-orin"), tmp_path / "cache"
    settings = BuildSettings(timing_cache=folder)

    def refusals() -> list[str]:
        notes = Notes()
        report = build_engine(model, tmp_path / "engine.plan", target, settings, notes)
        assert report.timing_cache == CACHE
        assert sorted(path.name for path in folder.iterdir()) == [CACHE, f"{CACHE}.lock"]
        return [note for note in notes.said if "timing cache" in note]

    assert refusals() == []
    first = (folder / CACHE).read_bytes()
    assert json.loads(first.partition(b"\n")[0])["version"] == "11.4.0.106"
    assert refusals() == []
    assert (folder / CACHE).read_bytes() == first

    (folder / CACHE).write_bytes(first[:-1] + b"?")
    assert "damaged" in refusals()[0]
    assert (folder / CACHE).read_bytes() == first

    (folder / CACHE).write_bytes(first.replace(b"jetson-orin", b"jetson-thor"))
    assert "another device" in refusals()[0]
    assert (folder / CACHE).read_bytes() == first


@pytest.mark.whole
def test_a_cache_folder_that_cannot_be_written_costs_no_engine(tmp_path, model, gpu) -> None:
    gpu(87)
    (tmp_path / "file").write_text("")
    notes, settings = Notes(), BuildSettings(timing_cache=tmp_path / "file" / "cache")
    assert build_engine(model, tmp_path / "e.plan", find_target("jetson-orin"), settings, notes).bytes > 0
    assert any("timing cache" in note for note in notes.said)


@pytest.mark.whole
def test_several_gpus_are_asked_of_tensorrt(tmp_path, model, gpu) -> None:
    gpu(89)
    settings = BuildSettings(hardware_compatible=True)
    report = build_engine(model, tmp_path / "engine.plan", find_target("l4"), settings)
    assert report.builder is Builder.TENSORRT
    assert report.to_json()["hardware_compatible"] is True


@pytest.mark.whole
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # Another library than TensorRT's: it goes as far as these flags let it without a GPU and a lean runtime.
        (BuildSettings(version_compatible=True), "libnvinfer_lean"),
        (BuildSettings(strip_weights=True), "CUDA_SUCCESS"),
    ],
)
def test_what_needs_more_than_the_stand_in_reaches_it(tmp_path, model, gpu, settings, words) -> None:
    gpu(89)
    with pytest.raises(ResvitError, match=words) as caught:
        build_engine(model, tmp_path / "engine.plan", find_target("l4"), settings)
    assert caught.value.code is ExitCode.BUILD
    assert list(tmp_path.iterdir()) == []


def test_the_settings_arrive_in_tensorrts_configuration(environment) -> None:
    script = """
import json, tensorrt as trt
from resvit_engines.trt import api as trt_api
log = trt_api.Log()
builder = trt_api.builder_from(trt, trt_api.logger_into(trt, log), log)
flags = dict(sparse=True, hardware_compatible=True, version_compatible=True, strip_weights=True)
found = []
for extra in ({}, flags):
    config = trt_api.configure(trt, builder, workspace_mib=96, optimization_level=2, **extra)
    names = "SPARSE_WEIGHTS VERSION_COMPATIBLE STRIP_PLAN REFIT_IDENTICAL".split()
    found.append([config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE), config.builder_optimization_level,
        config.profiling_verbosity.name,
        *(config.get_flag(getattr(trt.BuilderFlag, name)) for name in names)])
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    plain, full = json.loads(done.stdout)
    assert plain == [96 << 20, 2, "DETAILED", False, False, False, False]
    assert full == [96 << 20, 2, "DETAILED", True, True, True, True]


def test_hardware_compatibility_is_asked_of_tensorrt_alone() -> None:
    """The stand-in's library ignores the level, so the call itself is looked at."""
    trt = MagicMock()
    for sms, level in (((), trt.HardwareCompatibilityLevel.AMPERE_PLUS), ((89, 120), None)):
        config = MagicMock(hardware_compatibility_level=None)
        builder = MagicMock(create_builder_config=lambda config=config: config)
        trt_api.configure(trt, builder, workspace_mib=1, optimization_level=3, sms=sms, hardware_compatible=True)
        assert config.hardware_compatibility_level is level
        assert config.set_compute_capability.call_count == len(sms)


@pytest.mark.parametrize(("content", "accepts", "fits"), [(b"", True, True), (b"x", True, True), (b"x", False, False)])
def test_a_cache_that_tensorrt_rejects_is_replaced_by_an_empty_one(content, accepts, fits) -> None:
    taken = []

    def set_timing_cache(cache: bytes, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False, "caches of other devices would be mixed in"
        taken.append(cache)
        return accepts or cache == b""

    config = MagicMock(create_timing_cache=lambda content: content, set_timing_cache=set_timing_cache)
    assert trt_config.use_timing_cache(config, content) is fits
    assert taken == ([content] if fits else [content, b""])
