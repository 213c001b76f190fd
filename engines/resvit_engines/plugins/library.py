"""The plugin library for TensorRT without ahead-of-time plugins: compiled where it runs, by that TensorRT's headers.

NVIDIA's headers come with an installation and with nothing of ours, so the library cannot be shipped compiled. One
source of less than 500 lines is shipped instead, and takes some seconds to compile (``engines/plugin`` in the
repository, ``plugin_source`` in an installed package).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file, cache_folder, sha256_bytes

LIBRARY = "libresvit_plugins.so"
"""Its file name, in the cache and beside an engine that needs it."""
SOURCE = "resvit_plugins.cpp"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
SOURCE_FOLDER = "plugin_source"
"""Where an installed package has the source; a checkout has it beside the package."""
_PACKAGE = Path(__file__).parents[1]
_SOURCES = (_PACKAGE / SOURCE_FOLDER, _PACKAGE.parent / "plugin")
_VERSION = re.compile(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR)(?:_ENTERPRISE)? (\d+)")


@dataclass(frozen=True)
class Headers:
    """What the library is compiled against: folders of ``NvInfer.h`` and ``cuda.h``, and TensorRT's version "10.3"."""

    tensorrt: Path
    cuda: Path
    version: str


def find_headers(tensorrt: Path | None = None, cuda: Path | None = None) -> Headers:
    """The headers in the folders named, else where JetPack and NVIDIA's packages put them.

    Raises:
        ResvitError: MISSING with the package to install, INPUT where a folder that was named holds none.
    """
    arch = platform.machine()
    tensorrt_folder = _first(
        "NvInfer.h",
        tensorrt,
        [
            *_from_environment("TENSORRT_INCLUDE"),
            *(root / "include" for root in _from_environment("TENSORRT_ROOT")),
            Path(f"/usr/include/{arch}-linux-gnu"),
            Path("/usr/include"),
            Path("/usr/local/tensorrt/include"),
            Path("/usr/local/include"),
        ],
        "sudo apt-get install libnvinfer-headers-dev (on a Jetson: part of 'nvidia-jetpack'), or name their folder "
        "with --tensorrt-include.",
    )
    cuda_folder = _first(
        "cuda.h",
        cuda,
        [
            *(root / "include" for root in _from_environment("CUDA_HOME")),
            Path("/usr/local/cuda/include"),
            *sorted(Path("/usr/local").glob("cuda-*/include")),
            Path("/usr/include"),
        ],
        "sudo apt-get install cuda-cudart-dev-12-6 cuda-driver-dev-12-6 (on a Jetson: part of 'nvidia-jetpack'), or "
        "name their folder with --cuda-include.",
    )
    return Headers(tensorrt_folder, cuda_folder, _version_of(tensorrt_folder))


def library_from_source(out: Path, headers: Headers) -> Path:
    """Compile the library into the file ``out``, which appears whole or not at all; returns its path.

    Raises:
        ResvitError: MISSING without a compiler or the source, BUILD with the compiler's words.
    """
    compiler = _compiler()
    source = _source()
    includes = [word for folder in (headers.tensorrt, headers.cuda) for word in ("-isystem", str(folder))]
    with atomic_file(out) as partial:
        command = [*compiler, *_FLAGS, *includes, str(source), "-o", str(partial), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()[-400:]]
            raise ResvitError(
                f"The plugin library does not compile against TensorRT {headers.version} in {headers.tensorrt}: "
                f"{errors[0]}",
                "It needs the headers of TensorRT 10.3 or later and a compiler of C++17 (g++ 9 or later).",
                ExitCode.BUILD,
            )
    return out


def cached_library(headers: Headers | None = None) -> Path:
    """The library for the headers of this machine, compiled at the first call and kept below ``~/.cache/resvit``.

    Raises:
        ResvitError: as ``find_headers`` and ``library_from_source``.
    """
    headers = headers or find_headers()
    name = f"{sha256_bytes(_source().read_bytes())[:16]}-tensorrt-{headers.version}-{platform.machine()}"
    path = cache_folder("plugins") / name / LIBRARY
    return path if path.is_file() else library_from_source(path, headers)


def record_of(library: Path) -> dict[str, Any]:
    """Name and digest, as in an engine's record."""
    return {"name": LIBRARY, "sha256": sha256_bytes(library.read_bytes())}


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(words[0]):
            return words
    raise ResvitError(
        f"There is no C++ compiler to build the plugin library with{f' ({named[0]})' if named else ''}.",
        "sudo apt-get install g++",
        ExitCode.MISSING,
    )


def source_files() -> tuple[Path, ...]:
    """The library's source and what CMake needs, for those who build it in their own way.

    Raises:
        ResvitError: MISSING where this installation lacks them.
    """
    return tuple(sorted(file for file in _source().parent.iterdir() if file.is_file()))


def _source() -> Path:
    for folder in _SOURCES:
        if (folder / SOURCE).is_file():
            return folder / SOURCE
    raise ResvitError(
        f"The source of the plugin library, {SOURCE}, is not in this installation.",
        "Install resvit-export or the device wheel again.",
        ExitCode.MISSING,
    )


def _from_environment(name: str) -> list[Path]:
    return [Path(value)] if (value := os.environ.get(name)) else []


def _first(header: str, named: Path | None, folders: Iterable[Path], fix: str) -> Path:
    if named is not None:
        if (named / header).is_file():
            return named
        raise ResvitError(f"There is no {header} in {named}.", f"Name the folder that holds {header}.")
    for folder in folders:
        if (folder / header).is_file():
            return folder
    raise ResvitError(f"The header {header} was not found on this machine.", fix, ExitCode.MISSING)


def _version_of(folder: Path) -> str:
    header = folder / "NvInferVersion.h"
    text = header.read_text(errors="replace") if header.is_file() else ""
    found = dict(_VERSION.findall(text))
    if not {"MAJOR", "MINOR"} <= set(found):
        raise ResvitError(
            f"The headers in {folder} do not say which TensorRT they are of.",
            "Install TensorRT's headers again: sudo apt-get install --reinstall libnvinfer-headers-dev.",
            ExitCode.MISSING,
        )
    return f"{found['MAJOR']}.{found['MINOR']}"
