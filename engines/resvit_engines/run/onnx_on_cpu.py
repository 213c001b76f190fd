"""ONNX Runtime on this machine's processor: its own engines, and what stands in where there is no engine or no GPU.

What stands in computes what was validated (Q/DQ unfused, as calibration and validation run it), and says nothing of
the device. ONNX Runtime is optional: it is imported when it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from resvit_engines.errors import ExitCode, OutOfMemoryError, ResvitError, first_line, is_out_of_memory
from resvit_engines.files import sha256_bytes
from resvit_engines.ort.sessions import engine_options, exact_options, load_onnxruntime, open_session
from resvit_engines.plugins.onnx_wire import with_float32_quantizers
from resvit_engines.run.feeds import Array, Arrays, require_batch, run_in_pieces
from resvit_engines.trt.running import TensorSpec

RUNTIME = "onnxruntime"
NOT_THE_ENGINE = "not the engine"
"""How the label of what stands in for an engine ends."""
_SOUND = (1, 32)
"""The first release that is known to quantise FP16 rightly on the CPU."""
_ANY_BATCH = 1 << 30
_AT_ONCE = 64
"""Images that run together where the batch is dynamic: more only take more memory."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}


class OnnxOnCpu:
    """An ONNX Runtime session as a runner. Made by ``open_onnx``."""

    def __init__(self, session: Any, version: str, optimized: bool, *, engine: bool = False) -> None:
        self.runtime = RUNTIME
        self.why = ""
        self.device_mib = None
        """Nothing is on a device."""
        self.optimized = optimized
        self.label = f"ONNX Runtime {version} on the CPU" + ("" if engine else f", {NOT_THE_ENGINE}")
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))
        first = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else -1
        self.batch = (1, _ANY_BATCH) if first < 0 else (first, first)
        self._session: Any = session

    def __call__(self, arrays: Mapping[str, Array]) -> Arrays:
        """Run any number of images, in pieces.

        Raises:
            ResvitError: INPUT for names, types and shapes that are not the model's, SYSTEM without memory.
        """
        smallest, largest = self.batch
        return run_in_pieces(self.run, arrays, self.inputs, (smallest, max(smallest, min(largest, _AT_ONCE))))

    @contextlib.contextmanager
    def lane(self, batch: int, *, cuda_graph: bool = False) -> Iterator[CpuLane]:
        """What runs batches of this size; on a processor there are no streams and no CUDA graph.

        Raises:
            ResvitError: INPUT for another batch than the model's fixed one.
        """
        require_batch(batch, self.batch, "The model")
        yield CpuLane(self, "There is no CUDA graph on a processor." if cuda_graph else "")

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[tuple[str, float], ...]:
        """None: a session that ONNX Runtime profiles is another one, and writes its times when it ends."""
        del feeds, calls
        return ()

    def close(self) -> None:
        """Let go of the session; the runner cannot be used afterwards."""
        self._session = None

    def __enter__(self) -> OnnxOnCpu:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, feeds: Arrays) -> Arrays:
        """Run one batch that was checked."""
        if self._session is None:
            raise ResvitError("The runner is closed.", "Open it again.")
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    "Memory ran out while the model ran.", "Use a smaller batch.", ExitCode.SYSTEM
                ) from error
            raise ResvitError(
                f"ONNX Runtime failed: {first_line(error)}", "Export the model again; an operator of it does not run."
            ) from error


class CpuLane:
    """The same steps as an engine's lane, done by the processor while it waits."""

    def __init__(self, runner: OnnxOnCpu, note: str) -> None:
        self.note = note
        self._runner = runner
        self._feeds: Arrays = {}
        self._results: Arrays = {}

    def load(self, feeds: Arrays) -> None:
        """Keep checked arrays [B, …] for the run."""
        self._feeds = feeds

    def submit(self) -> None:
        """Nothing: a processor has no queue."""

    def wait(self) -> None:
        """Run the batch. There is no GPU time."""
        self._results = self._runner.run(self._feeds)

    def results(self) -> Arrays:
        """The outputs of the last batch."""
        return self._results


def open_onnx(model: Path, *, optimize: bool = True) -> OnnxOnCpu:
    """An ONNX file as a runner on the CPU, with the settings that validation uses.

    Without ``optimize`` the graph runs node by node as it is written.

    Raises:
        ResvitError: MISSING without ONNX Runtime; INPUT for a file that it cannot load.
    """
    ort = load_onnxruntime()
    if not model.is_file():
        raise ResvitError(f"There is no model file {model}.", "Check the path.")
    options = exact_options(ort, optimize=optimize)
    source: str | bytes = str(model)
    if _version(ort.__version__) < _SOUND:
        source = with_float32_quantizers(model.read_bytes())
        folder = str(model.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return OnnxOnCpu(open_session(ort, source, options, model), ort.__version__, optimize)


def open_cpu_engine(engine: Path, sha256: str, threads: int | None = None) -> OnnxOnCpu:
    """A processor's engine as a runner, if it is the file whose digest is ``sha256``; one thread a core unless said.

    Raises:
        ResvitError: UNTRUSTED for another file, MISSING without ONNX Runtime, INPUT where it cannot load the engine.
    """
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise ResvitError(f"The engine {engine} cannot be read: {error}.", "Install the bundle again.") from error
    if sha256_bytes(content) != sha256:
        raise ResvitError(
            f"{engine.name} is not the engine that the manifest names: it was changed, and is not loaded.",
            "Install the bundle again, from a copy whose signature holds.",
            ExitCode.UNTRUSTED,
        )
    ort = load_onnxruntime()
    return OnnxOnCpu(
        open_session(ort, content, engine_options(ort, threads), engine), ort.__version__, True, engine=True
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _spec(tensor: Any) -> TensorSpec:
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise ResvitError(
            f"The model's {tensor.name!r} is a {tensor.type}, which numpy does not have.",
            "Export the model with FP32 or FP16 inputs and outputs.",
            ExitCode.IMPOSSIBLE,
        )
    return TensorSpec(tensor.name, tuple(size if isinstance(size, int) else -1 for size in tensor.shape), dtype)
