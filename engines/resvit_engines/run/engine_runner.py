"""An engine as a function from arrays to arrays, on this machine's GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from resvit_engines.builder.engine_report import EngineReport, LibraryRecord
from resvit_engines.builder.settings import TITLES
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import sha256_bytes
from resvit_engines.run.cuda import Cuda, load_cuda
from resvit_engines.run.engine_lane import EngineLane, open_lane
from resvit_engines.run.feeds import Array, Arrays, require_batch, run_in_pieces
from resvit_engines.targets.table import Builder
from resvit_engines.trt.api import Log, load_tensorrt, logger_into, said_by
from resvit_engines.trt.engine import engine_from_bytes, refit_from_onnx
from resvit_engines.trt.plugin_library import load_plugin_library
from resvit_engines.trt.running import EngineTensors, TensorSpec, profile, tensors_of_engine

MODULES = {Builder.TENSORRT: "tensorrt", Builder.RTX: "tensorrt_rtx_bindings"}
"""By what built an engine, the Python module that runs it."""


class EngineRunner:
    """A deserialised engine. For one thread at a time; closing it gives the GPU's memory back."""

    def __init__(self, report: EngineReport, trt: Any, cuda: Cuda, engine: Any, log: Log, free_before: int) -> None:
        self.runtime = report.builder.value
        self.why = ""
        self.tensors: EngineTensors = tensors_of_engine(trt, engine)
        self.label = f"{TITLES[report.builder]} {trt.__version__}"
        if report.rehearsal:
            self.label += ", a rehearsal"
        self.device_mib: float | None = None
        """By how many MiB the GPU's free memory had shrunk with the first lane; None before it has run."""
        self._trt, self._cuda, self._engine, self._log = trt, cuda, engine, log
        self._free_before = free_before
        self._owned = contextlib.ExitStack()
        self._lane: EngineLane | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What goes in."""
        return self.tensors.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out."""
        return self.tensors.outputs

    @property
    def batch(self) -> tuple[int, int]:
        """The smallest and largest batch that run in one piece."""
        return self.tensors.batch

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays:
        """Run any number of images; more than the largest batch run in pieces.

        Raises:
            ResvitError: INPUT for names, types and shapes that are not the engine's, SYSTEM for failures of the GPU.
        """
        return run_in_pieces(self._run, arrays, self.inputs, self.batch)

    @contextlib.contextmanager
    def lane(self, batch: int, *, cuda_graph: bool = False) -> Iterator[EngineLane]:
        """A stream with buffers for ``batch`` images, for timing and for running several at once.

        Raises:
            ResvitError: INPUT for a batch outside the engine's range, SYSTEM where memory is short.
        """
        require_batch(batch, self.batch, "The engine")
        with self._opened(batch, cuda_graph) as lane:
            yield lane

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[tuple[str, float], ...]:
        """The mean time of every layer in microseconds, in the engine's order, over ``calls`` runs with a profiler.

        A name that several layers have stands there as often, as TensorRT reports it.

        Raises:
            ResvitError: INPUT for a batch outside the engine's range, SYSTEM where memory is short or the run fails.
        """
        told: list[tuple[str, float]] = []
        batch = len(next(iter(feeds.values())))
        with self.lane(batch) as lane:
            lane.load(feeds)
            lane.submit()
            lane.wait()
            keeper = profile(self._trt, lane.context, lambda name, ms: told.append((name, 1e3 * ms)))
            for _ in range(calls):
                lane.submit()
                lane.wait()
            del keeper
        layers = len(told) // calls
        names = [name for name, _ in told[:layers]]
        runs = [told[begin : begin + layers] for begin in range(0, layers * calls, layers)] if layers else []
        if any([name for name, _ in run] != names for run in runs):
            return ()  # it left some out of a run: their times would be those of others
        return tuple((name, sum(run[place][1] for run in runs) / calls) for place, name in enumerate(names))

    def close(self) -> None:
        """Give everything back; the runner cannot be used afterwards."""
        self._lane = None
        self._owned.close()
        self._engine = None

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _opened(self, batch: int, cuda_graph: bool) -> AbstractContextManager[EngineLane]:
        if self._engine is None:
            raise ResvitError("The runner is closed.", "Open it again.")
        return open_lane(
            self._cuda,
            self._engine,
            self.tensors,
            batch,
            cuda_graph=cuda_graph,
            said=lambda: said_by(self._log),
            ran=self._note_memory,
        )

    def _run(self, feeds: Arrays) -> Arrays:
        needed = len(next(iter(feeds.values())))
        if self._lane is None or self._lane.capacity < needed:
            self._lane = None
            self._owned.close()
            self._lane = self._owned.enter_context(self._opened(needed, cuda_graph=False))
        self._lane.load(feeds)
        self._lane.submit()
        self._lane.wait()
        return self._lane.results()

    def _note_memory(self) -> None:
        if self.device_mib is None:
            self.device_mib = round(max(self._free_before - self._cuda.memory().free, 0) / (1 << 20), 1)


def open_engine(engine: Path, sha256: str, report: EngineReport, onnx: Path) -> EngineRunner:
    """Deserialise an engine, if it is the file whose digest is ``sha256``, and make a runner of it.

    Reading an engine runs code from it, so the digest must come from a manifest whose signature was verified, or be
    of an engine that was built here. ``report`` is its record (``engine.json``); ``onnx`` gives the weights where the
    engine was built without. A plugin library that the record names lies beside the engine, and is held to its digest.

    Raises:
        ResvitError: UNTRUSTED for another file, MISSING without TensorRT, cuda-bindings, GPU or driver, BUILD where
            TensorRT refuses the engine, SYSTEM where memory is short.
    """
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise ResvitError(f"The engine {engine} cannot be read: {error}.", "Install the bundle again.") from error
    # What is compared is what is deserialised: the bytes in memory, not the file, which could change in between.
    if sha256_bytes(content) != sha256:
        raise ResvitError(
            f"{engine.name} is not the engine that the manifest names: it was changed, and is not loaded.",
            "Install the bundle again, from a copy whose signature holds.",
            ExitCode.UNTRUSTED,
        )
    cuda = load_cuda()
    free_before = cuda.memory().free
    trt = load_tensorrt(MODULES[report.builder])
    log = Log()
    logger = logger_into(trt, log)
    host_code = report.version_compatible
    if report.plugin_library:
        load_plugin_library(trt, _library_beside(engine, report.plugin_library))
    loaded = engine_from_bytes(trt, logger, log, content, host_code=host_code)
    if report.strip_weights:
        whole = refit_from_onnx(trt, loaded, logger, log, onnx)
        loaded = engine_from_bytes(trt, logger, log, whole, host_code=host_code)
    return EngineRunner(report, trt, cuda, loaded, log, free_before)


def _library_beside(engine: Path, library: LibraryRecord) -> bytes:
    """The plugin library that an engine needs: like the engine, code that runs here, so only with its digest."""
    path = engine.with_name(library.name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResvitError(
            f"The engine needs the plugin library {path}, which cannot be read: {error.strerror}.",
            "Install the bundle again, or build the engine again on this device.",
            ExitCode.MISSING,
        ) from error
    if sha256_bytes(content) != library.sha256:
        raise ResvitError(
            f"{path.name} is not the plugin library that the engine was built with: it is not loaded.",
            "Install the bundle again, from a copy whose signature holds.",
            ExitCode.UNTRUSTED,
        )
    return content
