"""Builds with kernels of our own: the library on this machine, the builder's child, and the record of an engine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from resvit_engines.builder import builder as build
from resvit_engines.builder.builder import build_engine
from resvit_engines.builder.engine_report import EngineReport, LibraryRecord
from resvit_engines.builder.limits import require_buildable
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.cli.main import run
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.plugins import library
from resvit_engines.plugins.library import LIBRARY, cached_library, find_headers, library_from_source, source_files
from resvit_engines.run.engine_runner import _library_beside
from resvit_engines.targets.table import Builder, find_target
from tensorrt_standin import standin_environment
from test_plugin_registration import model, real_library  # noqa: F401  (a fixture)

pytestmark = pytest.mark.whole

OURS = ROOT / "tests/plugin_library/headers"
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def headers(tmp_path, monkeypatch) -> Path:
    """An installation of headers, and an empty cache."""
    folder = tmp_path / "include"
    shutil.copytree(OURS, folder)
    (folder / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 10 //!< x\n#define NV_TENSORRT_MINOR 3 //!< y\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TENSORRT_INCLUDE", str(folder))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_headers_are_found_where_they_are_named(headers, tmp_path) -> None:
    found = find_headers()
    assert (found.tensorrt, found.cuda, found.version) == (headers, headers, "10.3")
    newer = tmp_path / "newer"
    shutil.copytree(headers, newer)
    (newer / "NvInferVersion.h").write_text(
        "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 4\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"
    )
    assert find_headers(newer, headers).version == "11.4"
    (newer / "NvInferVersion.h").unlink()
    with pytest.raises(ResvitError, match="do not say which TensorRT"):
        find_headers(newer, headers)
    with pytest.raises(ResvitError, match=r"no NvInfer\.h in") as caught:
        find_headers(tmp_path, headers)
    assert caught.value.code is ExitCode.INPUT


def test_headers_that_are_missing_say_what_to_install(monkeypatch, headers) -> None:
    monkeypatch.delenv("TENSORRT_INCLUDE")
    if not any(Path(folder, "NvInfer.h").is_file() for folder in ("/usr/include", "/usr/local/include")):
        with pytest.raises(ResvitError, match=r"NvInfer\.h was not found") as caught:
            find_headers()
        assert caught.value.code is ExitCode.MISSING
        assert "libnvinfer-headers-dev" in caught.value.fix


@compiles
def test_the_library_is_compiled_once(headers) -> None:
    path = cached_library()
    assert path.name == LIBRARY
    assert "tensorrt-10.3" in path.parent.name
    first = path.stat().st_mtime_ns
    assert cached_library() == path
    assert path.stat().st_mtime_ns == first
    assert [file.name for file in path.parent.iterdir()] == [LIBRARY]


@compiles
def test_what_the_compiler_says_is_passed_on(headers, tmp_path) -> None:
    (headers / "NvInfer.h").write_text("#error these are no headers\n")
    with pytest.raises(ResvitError, match="these are no headers") as caught:
        library_from_source(tmp_path / "out" / LIBRARY, find_headers())
    assert caught.value.code is ExitCode.BUILD
    assert list((tmp_path / "out").iterdir()) == []


def test_a_machine_without_a_compiler_is_told(headers, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResvitError, match="no C") as caught:
        cached_library()
    assert (caught.value.code, caught.value.fix) == (ExitCode.MISSING, "sudo apt-get install g++")
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ResvitError, match="no-such-compiler"):
        cached_library()


def test_an_installation_without_the_source_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(library, "_SOURCES", (tmp_path,))
    with pytest.raises(ResvitError, match=r"resvit_plugins\.cpp, is not in this installation"):
        source_files()


@pytest.mark.slow
@compiles
def test_the_command_compiles_it(headers, tmp_path, capsys) -> None:
    out = tmp_path / "here" / "lib.so"
    assert run(["plugin", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"name": LIBRARY, "sha256": sha256_bytes(out.read_bytes()), "path": str(out), "tensorrt": "10.3"}
    assert run(["plugin"]) == 0
    assert "plugin library for TensorRT 10.3: " in capsys.readouterr().out
    assert run(["plugin", "--source"]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "CMakeLists.txt", "aarch64.cmake", "resvit_plugins.cpp",
    ]  # fmt: skip
    assert run(["plugin", "--tensorrt-include", str(tmp_path)]) == ExitCode.INPUT
    assert "NvInfer.h" in capsys.readouterr().err


@pytest.mark.slow
@compiles
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake")
def test_cmake_builds_it_too(headers, tmp_path) -> None:
    given = [f"-DTENSORRT_INCLUDE={headers}", f"-DCUDA_INCLUDE={headers}"]
    source, folder = ROOT / "engines/plugin", tmp_path / "build"
    subprocess.run(["cmake", "-S", source, "-B", folder, *given], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    assert (folder / LIBRARY).is_file()
    if shutil.which("aarch64-linux-gnu-g++"):
        cross = f"-DCMAKE_TOOLCHAIN_FILE={source / 'aarch64.cmake'}"
        subprocess.run(["cmake", "-S", source, "-B", tmp_path / "arm", cross, *given], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", tmp_path / "arm"], check=True, capture_output=True)
        assert (tmp_path / "arm" / LIBRARY).read_bytes()[18:20] == b"\xb7\x00"  # ELF's number for aarch64


def test_settings_say_how_plugins_come() -> None:
    assert "plugins" not in BuildSettings().to_json()
    assert BuildSettings(plugins="aot").to_json()["plugins"] == "aot"
    with pytest.raises(ResvitError, match="no way 'on' for plugins"):
        BuildSettings(plugins="on")
    require_buildable(find_target("jetson-orin"), BuildSettings(plugins="library"))
    with pytest.raises(ResvitError, match="takes no plugins") as caught:
        require_buildable(find_target("rtx-4090"), BuildSettings(plugins="aot"))
    assert caught.value.code is ExitCode.IMPOSSIBLE


def test_the_record_names_plugins_and_library() -> None:
    plain = EngineReport("t", Builder.TENSORRT, "10.3.0", 87, 1, "a", 1.0, 1, (), (), (), ())
    assert not any("plugin" in name for name in plain.to_json())
    record = {"name": LIBRARY, "sha256": "b"}
    with_library = EngineReport(
        "t", Builder.TENSORRT, "10.3.0", 87, 1, "a", 1.0, 1, (), (), (), (),
        plugins="library", plugin_layers=("x",), plugin_library=LibraryRecord(LIBRARY, "b"),
    )  # fmt: skip
    found = with_library.to_json()
    assert (found["plugins"], found["plugin_layers"], found["plugin_library"]) == ("library", ["x"], record)


def test_only_the_library_of_the_record_is_loaded(tmp_path) -> None:
    engine, path = tmp_path / "engine.plan", tmp_path / LIBRARY
    record = LibraryRecord(LIBRARY, sha256_bytes(b"code"))
    with pytest.raises(ResvitError, match="cannot be read") as caught:
        _library_beside(engine, record)
    assert caught.value.code is ExitCode.MISSING
    path.write_bytes(b"code")
    assert _library_beside(engine, record) == b"code"
    path.write_bytes(b"other")
    with pytest.raises(ResvitError, match="is not the plugin library") as caught:
        _library_beside(engine, record)
    assert caught.value.code is ExitCode.UNTRUSTED


@pytest.fixture
def gpu(monkeypatch, tmp_path_factory) -> None:
    """Pretend that TensorRT is installed, beside an Orin's GPU."""
    environment = standin_environment(tmp_path_factory.mktemp("standin"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(environment["PYTHONPATH"])
    monkeypatch.setattr(build, "local_sm", lambda: 87)


def failed_build(tmp_path: Path, file: Path, settings: BuildSettings) -> ResvitError:
    with pytest.raises(ResvitError) as caught:
        build_engine(file, tmp_path / "engine.plan", find_target("jetson-orin"), settings, log=tmp_path / "log")
    assert not (tmp_path / "engine.plan").exists()
    return caught.value


def test_a_build_registers_what_the_file_needs(tmp_path, gpu) -> None:
    """The stand-in's parser finds the plugin, and then has no use for one in Python."""
    error = failed_build(tmp_path, model(tmp_path / "m.onnx"), BuildSettings(plugins="aot"))
    assert error.code is ExitCode.BUILD
    assert "'blocks.0/attn' (ResvitAttentionBias)" in error.problem
    assert "IPluginCreatorV3One creator only" in error.problem
    assert "Found registered plugin: ResvitAttentionBias" in (tmp_path / "log").read_text()


def test_a_file_without_kernels_is_no_file_for_plugins(tmp_path, gpu) -> None:
    error = failed_build(tmp_path, model(tmp_path / "m.onnx", kernel=False), BuildSettings(plugins="aot"))
    assert error.code is ExitCode.INPUT
    assert "no node with a kernel" in error.problem


def test_without_plugins_the_bodies_are_built(tmp_path, gpu) -> None:
    target = find_target("jetson-orin")
    report = build_engine(model(tmp_path / "m.onnx"), tmp_path / "engine.plan", target)
    assert (report.plugins, report.plugin_layers) == ("off", ())
    assert not (tmp_path / LIBRARY).exists()


def test_a_library_that_is_missing_or_broken_ends_the_build(tmp_path, gpu) -> None:
    file, path = model(tmp_path / "m.onnx"), tmp_path / "lib.so"
    settings = BuildSettings(plugins="library", plugin_library=path)
    assert failed_build(tmp_path, file, settings).code is ExitCode.MISSING
    path.write_bytes(b"\x7fELF")
    error = failed_build(tmp_path, file, settings)
    assert error.code is ExitCode.BUILD
    assert "cannot load the plugin library" in error.problem


def test_a_build_loads_the_library_before_it_parses(tmp_path, gpu, real_library) -> None:  # noqa: F811
    """The stand-in ends its process where a network would take the layer; the parent says so and lives."""
    settings = BuildSettings(plugins="library", plugin_library=real_library)
    error = failed_build(tmp_path, model(tmp_path / "m.onnx", functions=False), settings)
    assert error.code is ExitCode.BUILD
    assert "crashed" in error.problem
