"""TensorRT's own Python bindings where TensorRT is not: for tests, and for nothing else.

The binding wheels (about 1 MiB each; ``make tensorrt-names`` fetches them) hold no TensorRT. They import over stub
libraries, which shows every name that a version has. The newest also works over the library of TensorRT for RTX, whose
interface is the same: parsing and building are then real, by another builder than on a device.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

WHEELS = Path(__file__).parent.parent / "data" / "tensorrt-bindings"
BINDINGS = {"10.3": "10.3.0", "10.13": "10.13.3.9", "10.16": "10.16.1.11", "11.4": "11.4.0.106"}
NEWEST = "11.4"
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
_STUBS = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
"""
_PLUGINS = "int initLibNvInferPlugins(void *logger, const char *space) { (void)logger; (void)space; return 1; }"
_LIST = """
import importlib, inspect, json, sys
found = set()
def walk(owner, prefix, depth):
    for name in dir(owner):
        found.add(prefix + name)
        value = getattr(owner, name, None)
        if depth and inspect.isclass(value):
            walk(value, prefix + name + ".", depth - 1)
walk(importlib.import_module(sys.argv[1]), "", 2)
try:
    walk(importlib.import_module(sys.argv[1] + ".plugin"), "plugin.", 1)
except ImportError:
    pass
print()
json.dump(sorted(found), sys.stdout)
"""


def bindings(version: str, into: Path) -> Path:
    """Unpack the wheel of ``version`` ("10.3") below ``into``; returns the folder to import from."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(WHEELS.glob(f"tensorrt_cu*_bindings-{BINDINGS[version]}-{tag}-*{platform.machine()}.whl"))
    if not found:
        pytest.skip(f"no bindings of TensorRT {version} in {WHEELS}: make tensorrt-names")
    folder = into / version
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(folder)
    # NVIDIA's package `tensorrt` is this and a check of the licence's extras.
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    if (folder / "tensorrt_bindings" / "plugin").is_dir():
        (folder / "tensorrt" / "plugin").mkdir()
        (folder / "tensorrt" / "plugin" / "__init__.py").write_text("from tensorrt_bindings.plugin import *\n")
    return folder


def library(path: Path, source: str) -> Path:
    """Compile a shared library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source, text=True, check=True)
    return path


@functools.cache
def names_of(version: str, into: Path) -> frozenset[str]:
    """Every name of the bindings of ``version``, as ``Class.member``: they are really imported."""
    return _names("tensorrt", stub_environment(version, into))


@functools.cache
def names_of_rtx() -> frozenset[str]:
    """Every name of TensorRT for RTX."""
    return _names("tensorrt_rtx_bindings", {})


def _names(module: str, extra: dict[str, str]) -> frozenset[str]:
    done = subprocess.run(
        [sys.executable, "-c", _LIST, module], env={**os.environ, **extra}, capture_output=True, text=True, check=True
    )
    # Lines before the last are TensorRT's: it warns that plugins in Python are experimental.
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


def stub_environment(version: str, into: Path) -> dict[str, str]:
    """Environment variables with which a child's ``import tensorrt`` finds ``version`` over stub libraries."""
    folder = bindings(version, into)
    for name in LIBRARIES:
        library(folder / "lib" / f"lib{name}.so.{version.split('.', maxsplit=1)[0]}", _STUBS + _PLUGINS)
    return {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / "lib")}


def standin_environment(into: Path) -> dict[str, str]:
    """Environment variables with which a child's ``import tensorrt`` finds 11.4 over TensorRT for RTX."""
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        pytest.skip("TensorRT for RTX is not installed")
    folder, real = bindings(NEWEST, into), Path(spec.origin).parent
    lib = library(folder / "lib" / "libnvinfer_plugin.so.11", _PLUGINS).parent
    (lib / "libnvinfer.so.11").symlink_to(real / "libtensorrt_rtx.so.1")
    (lib / "libnvonnxparser.so.11").symlink_to(real / "libtensorrt_onnxparser_rtx.so.1")
    return {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(lib)}
