"""The few calls of the CUDA runtime that running an engine takes, each checked, through NVIDIA's cuda-python.

The package ``cuda.bindings`` answers every call with its error code first; here that code becomes a ``ResvitError``
with CUDA's own name for it. Memory, streams, events and graphs are context managers: what was taken is given back
however the block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from resvit_engines.errors import ExitCode, ResvitError

Array = NDArray[Any]

CALLS = (
    *("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaMemcpyAsync", "cudaMemGetInfo"),
    *("cudaStreamCreateWithFlags", "cudaStreamSynchronize", "cudaStreamDestroy"),
    *("cudaEventCreate", "cudaEventRecord", "cudaEventElapsedTime", "cudaEventDestroy"),
    *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"),
    *("cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGetErrorString", "cudaGetLastError"),
)
"""Every function that is called; the same in cuda-bindings 12.x and 13.x."""
VALUES = (
    *("cudaStreamNonBlocking", "cudaHostAllocDefault", "cudaMemcpyKind.cudaMemcpyHostToDevice"),
    *("cudaMemcpyKind.cudaMemcpyDeviceToHost", "cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal"),
)
"""Every constant that is read."""

_NO_DRIVER = "Check that the NVIDIA driver works (nvidia-smi), or use --runtime onnxruntime."
_FIXES = {
    "cudaErrorMemoryAllocation": (
        "Use a smaller batch or fewer streams, or close other programs that use the GPU.",
        ExitCode.SYSTEM,
    ),
    "cudaErrorInsufficientDriver": (
        "The driver is absent or older than this cuda-bindings: 12.x serves every driver from CUDA 12 on "
        "(pip install 'cuda-bindings>=12.8,<13').",
        ExitCode.MISSING,
    ),
    "cudaErrorNoDevice": (_NO_DRIVER, ExitCode.MISSING),
    "cudaErrorInitializationError": (_NO_DRIVER, ExitCode.MISSING),
    "cudaErrorSystemDriverMismatch": ("Reboot: the driver was updated while it was in use.", ExitCode.MISSING),
    "cudaErrorSystemNotReady": ("Start the services that the GPU needs (nvidia-fabricmanager).", ExitCode.MISSING),
    "cudaErrorDevicesUnavailable": ("Another program holds the GPU for itself: end it.", ExitCode.SYSTEM),
}
_FIX_FAULT = "The GPU can no longer be used by this process: run again. If it happens again, build the engine again."


class MemoryInfo(NamedTuple):
    """Memory of the GPU, in bytes."""

    free: int
    total: int


class Cuda:
    """The CUDA runtime, every call checked. ``api`` is ``cuda.bindings.runtime``."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``name`` and return what it gives besides the error code: nothing, one value or a tuple.

        Raises:
            ResvitError: MISSING where driver or device are not there, SYSTEM otherwise, with CUDA's name for it.
        """
        code, *values = getattr(self.api, name)(*arguments)
        if int(code) != 0:
            raise self._error(name, code)
        return values[0] if len(values) == 1 else tuple(values)

    def give_back(self, name: str, *arguments: Any) -> None:
        """Call ``name``, which frees something. Its code is of an error that an earlier call has told already."""
        getattr(self.api, name)(*arguments)

    def memory(self) -> MemoryInfo:
        """What the GPU has, and what of it is free now, for all programs together."""
        return MemoryInfo(*map(int, self.call("cudaMemGetInfo")))

    def upload(self, device: int, host: Array, stream: Any) -> None:
        """Begin to copy all of ``host`` to the device."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host.ctypes.data, host.nbytes, kind, stream)

    def download(self, host: Array, device: int, stream: Any) -> None:
        """Begin to fill ``host`` from the device."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host.ctypes.data, device, host.nbytes, kind, stream)

    def milliseconds(self, start: Any, end: Any) -> float:
        """GPU time between two recorded events, in ms."""
        return float(self.call("cudaEventElapsedTime", start, end))

    def begin_capture(self, stream: Any) -> None:
        """From here on, what is put on ``stream`` is recorded instead of run."""
        self.call("cudaStreamBeginCapture", stream, self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: Any) -> Any:
        """End the recording; returns the graph."""
        return self.call("cudaStreamEndCapture", stream)

    def abandon_capture(self, stream: Any) -> None:
        """End a recording that failed, and forget the error: the stream can be used as before."""
        code, graph = self.api.cudaStreamEndCapture(stream)
        if int(code) == 0 and graph is not None:
            self.give_back("cudaGraphDestroy", graph)
        self.api.cudaGetLastError()

    @contextlib.contextmanager
    def device_memory(self, size: int) -> Iterator[int]:
        """``size`` bytes on the device (at least one); yields their address."""
        address = self.call("cudaMalloc", max(size, 1))
        try:
            yield int(address)
        finally:
            self.give_back("cudaFree", address)

    @contextlib.contextmanager
    def pinned_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[Array]:
        """An array in host memory that the GPU can copy from and to while the processor goes on.

        The array must not be used after the block.
        """
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        address = self.call("cudaHostAlloc", max(size, 1), self.api.cudaHostAllocDefault)
        try:
            memory: Any = (ctypes.c_byte * size).from_address(int(address))
            yield np.ndarray(shape, kind, memory)
        finally:
            self.give_back("cudaFreeHost", address)

    @contextlib.contextmanager
    def stream(self) -> Iterator[Any]:
        """A stream that waits for no other; when the block ends, all of its work has."""
        made = self.call("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking)
        try:
            yield made
        finally:
            self.give_back("cudaStreamSynchronize", made)
            self.give_back("cudaStreamDestroy", made)

    @contextlib.contextmanager
    def event(self) -> Iterator[Any]:
        """An event that keeps the time."""
        made = self.call("cudaEventCreate")
        try:
            yield made
        finally:
            self.give_back("cudaEventDestroy", made)

    @contextlib.contextmanager
    def executable(self, graph: Any) -> Iterator[Any]:
        """``graph``, from ``end_capture``, ready to be launched; both are given back."""
        try:
            made = self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.give_back("cudaGraphDestroy", graph)
        try:
            yield made
        finally:
            self.give_back("cudaGraphExecDestroy", made)

    def _error(self, name: str, code: Any) -> ResvitError:
        told = self.api.cudaGetErrorString(code)[1]
        text = told.decode(errors="replace") if isinstance(told, bytes) else str(told)
        title = getattr(code, "name", str(code))
        fix, exit_code = _FIXES.get(title, (_FIX_FAULT, ExitCode.SYSTEM))
        # A failed allocation stays the "last error" that other libraries of this process look at.
        self.api.cudaGetLastError()
        return ResvitError(f"{name} failed with {title}: {text}.", fix, exit_code)


@functools.cache
def load_cuda() -> Cuda:
    """The CUDA runtime of ``cuda.bindings``; nothing is asked of a GPU yet.

    Raises:
        ResvitError: MISSING where cuda-bindings is not installed or does not load.
    """
    try:
        return Cuda(importlib.import_module("cuda.bindings.runtime"))
    except (ImportError, OSError) as error:
        raise ResvitError(
            f"The Python package cuda-bindings does not load: {error}.",
            "pip install 'resvit-export[device]', or use --runtime onnxruntime.",
            ExitCode.MISSING,
        ) from error
