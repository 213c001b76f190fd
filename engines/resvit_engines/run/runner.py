"""An unpacked bundle as a function from arrays to arrays: by its engine, or by ONNX Runtime where there is none.

numpy in, numpy out; no torch. ``open_runner`` is the only way from a bundle to a deserialised engine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from resvit_engines.builder.engine_report import EngineReport
from resvit_engines.builder.settings import TITLES
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.gpu import local_sm
from resvit_engines.run.engine_runner import MODULES, open_engine
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.run.golden_files import golden_inputs, golden_output, sqnr_db
from resvit_engines.run.npy import read_array
from resvit_engines.run.onnx_on_cpu import RUNTIME, OnnxOnCpu, open_cpu_engine, open_onnx
from resvit_engines.targets.table import Builder
from resvit_engines.trt.running import TensorSpec

RUNTIMES = ("auto", Builder.TENSORRT.value, Builder.RTX.value, RUNTIME)
ENGINE = "engine.plan"
MODEL = "model.onnx"
_ENGINE_MODEL = "model.tensorrt.onnx"
"""The copy that the engine was built from, where it is another than ``MODEL``."""
_AMPERE = 80
_BROKEN_DB = 10.0


class Lane(Protocol):
    """One stream of a runner: ``load`` images, ``submit`` the work, ``wait`` for it, take the ``results``."""

    note: str
    """What could not be done as it was asked for."""

    def load(self, feeds: Arrays) -> None:
        """Take checked arrays [B, …] over."""
        ...

    def submit(self) -> None:
        """Begin, without waiting where a GPU does the work."""
        ...

    def wait(self) -> float | None:
        """Wait for the end; returns the GPU's time for computing alone in ms, None where there is no GPU."""
        ...

    def results(self) -> Arrays:
        """The outputs [B, …] of the last batch."""
        ...


class Runner(Protocol):
    """A batch turned into outputs: call it with arrays [N, …] by input name, get arrays by output name."""

    runtime: str
    label: str
    """What computes, in words; it says so where that is not the engine."""
    why: str
    """Why it is not the engine, empty where it is."""

    @property
    def device_mib(self) -> float | None:
        """How much of the GPU's memory engine and buffers took, in MiB; None where nothing ran on one."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What goes in."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out."""
        ...

    @property
    def batch(self) -> tuple[int, int]:
        """The smallest and largest batch that run in one piece."""
        ...

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays:
        """Run any number of images."""
        ...

    def lane(self, batch: int, *, cuda_graph: bool = False) -> AbstractContextManager[Lane]:
        """A stream with buffers for ``batch`` images."""
        ...

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[tuple[str, float], ...]:
        """The mean time of every layer in microseconds, over ``calls`` runs; empty where the runtime tells none."""
        ...

    def close(self) -> None:
        """Give back what was taken."""
        ...

    def __enter__(self) -> Runner:
        """The runner itself."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""
        ...


def open_runner(folder: Path, manifest: Manifest, runtime: str = "auto") -> Runner:
    """A runner of an unpacked bundle whose signature was verified; ``manifest`` is that bundle's.

    ``auto`` takes the engine where there is one for this machine, and ONNX Runtime on the CPU elsewhere; the
    runner's ``label`` and ``why`` say so. An engine is deserialised only if its digest is the manifest's.

    Raises:
        ResvitError: UNTRUSTED for an engine that is not the manifest's, IMPOSSIBLE or MISSING where the runtime that
            was asked for cannot run here, and what ``open_engine`` and ``open_onnx`` raise.
    """
    if runtime not in RUNTIMES:
        raise ResvitError(f"There is no runtime {runtime!r}.", f"Use one of {', '.join(RUNTIMES)}.")
    if runtime == RUNTIME and not (manifest.engine and manifest.engine.builder is Builder.ONNXRUNTIME):
        return _onnx(folder, manifest, "ONNX Runtime was asked for")
    report = manifest.engine
    reason = why_no_engine(report, None if runtime == "auto" else Builder(runtime))
    if reason is not None and runtime != "auto":
        raise reason
    if report is None or reason is not None:
        return _onnx(folder, manifest, reason.problem.rstrip(".") if reason else "")
    onnx = folder / _ENGINE_MODEL
    return open_built(folder / ENGINE, manifest.digest_of(ENGINE), report, onnx if onnx.is_file() else folder / MODEL)


def open_built(engine: Path, sha256: str, report: EngineReport, onnx: Path) -> Runner:
    """An engine of any builder's as a runner; raises as ``open_engine`` and ``open_cpu_engine``."""
    if report.builder is Builder.ONNXRUNTIME:
        return open_cpu_engine(engine, sha256)
    return open_engine(engine, sha256, report, onnx)


def why_no_engine(report: EngineReport | None, wanted: Builder | None = None) -> ResvitError | None:
    """Why the engine of this record cannot run on this machine, or None where nothing speaks against it.

    ``wanted`` is the runtime that was asked for. Nothing is loaded.
    """
    if report is None:
        return ResvitError(
            "There is no engine in this bundle.",
            "Build one on the device with 'resvit-engine build', or use --runtime onnxruntime.",
            ExitCode.MISSING,
        )
    if wanted not in (None, report.builder):
        return ResvitError(
            f"The engine was built by {TITLES[report.builder]}, and {TITLES[wanted]} cannot run it.",
            f"Use --runtime {report.builder.value}.",
            ExitCode.IMPOSSIBLE,
        )
    return why_not_here(report.builder, report.sm, hardware_compatible=report.hardware_compatible)


def why_not_here(builder: Builder, sm: int, *, hardware_compatible: bool = False) -> ResvitError | None:
    """Why what ``builder`` makes for a GPU cannot run on this machine, or None where nothing speaks against it.

    ``hardware_compatible`` is whether newer GPUs run it too. Nothing is loaded.
    """
    if builder is Builder.ONNXRUNTIME:
        if installed("onnxruntime"):
            return None
        return ResvitError("ONNX Runtime is not installed.", "pip install onnxruntime", ExitCode.MISSING)
    here = local_sm()
    if here is None:
        return ResvitError(
            "There is no NVIDIA GPU here, or no driver for it.",
            "Run on the device that the engine is for, or use --runtime onnxruntime.",
            ExitCode.IMPOSSIBLE,
        )
    if sm != here and not (hardware_compatible and here >= _AMPERE):
        return ResvitError(
            f"The engine is for SM {sm / 10:.1f}, and this GPU has SM {here / 10:.1f}.",
            "Run on the device that the engine is for, or use --runtime onnxruntime.",
            ExitCode.IMPOSSIBLE,
        )
    for module, title in ((MODULES[builder], TITLES[builder]), ("cuda.bindings", "cuda-bindings")):
        if not installed(module):
            return ResvitError(
                f"{title} is not installed (Python module {module}).",
                "pip install 'resvit-export[device]' brings cuda-bindings; TensorRT comes with JetPack, or see "
                "'resvit-export doctor'.",
                ExitCode.MISSING,
            )
    return None


def installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def open_sound_onnx(
    model: Path,
    images: Array | None = None,
    expected: Array | None = None,
    beside: Mapping[str, Array] | None = None,
) -> OnnxOnCpu:
    """The ONNX file on the CPU, optimised where that changes nothing.

    Optimisers have been seen to break quantised graphs wholly: where the outputs of ``images``, with what is
    read ``beside`` them, are further than 10 dB from ``expected``, the graph runs as it is written, slower.

    Raises:
        ResvitError: as ``open_onnx``.
    """
    runner = open_onnx(model)
    if images is None or expected is None:
        return runner
    found = golden_output(runner, images, None, beside)
    near = found.shape == expected.shape and bool(np.isfinite(found).all())
    if near and ((sqnr := sqnr_db(expected, found)) is None or sqnr >= _BROKEN_DB):
        return runner
    runner.close()
    return open_onnx(model, optimize=False)


def _onnx(folder: Path, manifest: Manifest, why: str) -> OnnxOnCpu:
    golden = (folder / "golden_input.npy", folder / "golden_output.npy")
    if all(path.is_file() for path in golden):
        images, expected = (read_array(path, "golden") for path in golden)
        runner = open_sound_onnx(folder / MODEL, images, expected, golden_inputs(folder, manifest.golden, len(images)))
    else:
        runner = open_sound_onnx(folder / MODEL)
    runner.why = why
    return runner
