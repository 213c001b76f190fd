"""A stand-in for the CUDA runtime and for TensorRT's engine objects, for tests of the runner without a GPU.

Device memory is host memory under other addresses, streams do their work at once, captures record it. Calls can be
told to fail, and what was taken and not given back is counted. It shows that our calls fit together; that they fit
CUDA is for the tests marked ``gpu``.
"""

# ruff: noqa: N802, N815  (the names are CUDA's)

from __future__ import annotations

import ctypes
import enum
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class FakeCuda:
    """Answers like ``cuda.bindings.runtime``. ``fail["cudaMalloc"] = (2, Error.…)`` fails the second such call."""

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.fail: dict[str, tuple[int, Error]] = {}
        self.calls: Counter[str] = Counter()
        self.live: dict[int, tuple[str, object]] = {}
        self.recorded: dict[int, list] = {}
        self.graphs: dict[int, list] = {}
        self.clock = 0.0
        self.times: dict[int, float] = {}
        self.total = 1 << 30
        self.fault: Error | None = None
        self._next = 0x1000

    def __getattribute__(self, name: str):
        if not name.startswith("cuda") or name in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
            return object.__getattribute__(self, name)
        if name in ("cudaStreamNonBlocking", "cudaHostAllocDefault"):
            return object.__getattribute__(self, name)
        self.calls[name] += 1
        call = object.__getattribute__(self, name)
        number, code = self.fail.get(name, (0, Error.cudaSuccess))
        if self.calls[name] == number:
            return lambda *arguments: (code, None)
        return call

    def _take(self, kind: str, what: object, address: int | None = None) -> int:
        self._next += 0x1000
        key = self._next if address is None else address
        self.live[key] = (kind, what)
        return key

    def _free(self, kind: str, key: int):
        assert self.live.pop(int(key))[0] == kind
        return (Error.cudaSuccess,)

    def left(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.live.values())

    def memory(self, address: int) -> int:
        """Where on the host the device's ``address`` lies."""
        return self.live[address][1].ctypes.data

    def cudaMalloc(self, size):
        return Error.cudaSuccess, self._take("device", np.zeros(size, np.uint8))

    def cudaFree(self, address):
        return self._free("device", address)

    def cudaHostAlloc(self, size, flags):
        array = np.zeros(size, np.uint8)
        return Error.cudaSuccess, self._take("pinned", array, array.ctypes.data)

    def cudaFreeHost(self, address):
        return self._free("pinned", address)

    def cudaMemGetInfo(self):
        used = sum(what.nbytes for kind, what in self.live.values() if kind == "device")
        return Error.cudaSuccess, self.total - used, self.total

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert self.live[stream][0] == "stream"
        assert stream not in self.recorded, "copies are not part of a graph"
        to, source = (self.memory(to), source) if kind == 1 else (to, self.memory(source))
        ctypes.memmove(to, source, size)
        return (Error.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        return Error.cudaSuccess, self._take("stream", None)

    def cudaStreamSynchronize(self, stream):
        assert self.live[stream][0] == "stream"
        fault, self.fault = self.fault, None
        return (fault or Error.cudaSuccess,)

    def cudaStreamDestroy(self, stream):
        return self._free("stream", stream)

    def cudaEventCreate(self):
        return Error.cudaSuccess, self._take("event", None)

    def cudaEventRecord(self, event, stream):
        self.times[event] = self.clock
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start, end):
        return Error.cudaSuccess, self.times[end] - self.times[start]

    def cudaEventDestroy(self, event):
        return self._free("event", event)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recorded[stream] = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        if stream not in self.recorded:
            return Error.cudaErrorStreamCaptureInvalidated, None
        return Error.cudaSuccess, self._take("graph", self.recorded.pop(stream))

    def cudaGraphInstantiate(self, graph, flags):
        return Error.cudaSuccess, self._take("executable", self.live[graph][1])

    def cudaGraphLaunch(self, graph, stream):
        for work in self.live[graph][1]:
            work()
        return (Error.cudaSuccess,)

    def cudaGraphDestroy(self, graph):
        return self._free("graph", graph)

    def cudaGraphExecDestroy(self, graph):
        return self._free("executable", graph)

    def cudaGetErrorString(self, code):
        return Error.cudaSuccess, f"said of {code.name}".encode()

    def cudaGetLastError(self):
        return (Error.cudaSuccess,)

    def run(self, stream: int, work) -> None:
        """What a kernel launch does: now, or into the graph that is being recorded."""
        if stream in self.recorded:
            self.recorded[stream].append(work)
        else:
            work()


class FakeContext:
    """Computes ``logits[b] = [sum of image b, its negative]`` where the addresses point."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes = {"input": engine.shape}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        if not all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        if self.engine.unknown_output and name == "logits":
            return (-1, 2)
        return (self.shapes["input"][0], 2) if name == "logits" else self.shapes["input"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        cuda = self.engine.cuda
        if self.engine.refuses or (self.engine.no_capture and stream in cuda.recorded):
            return False
        shape = self.shapes["input"]

        def work() -> None:
            source = cuda.memory(self.addresses["input"])
            to = cuda.memory(self.addresses["logits"])
            kind = np.float16 if self.engine.dtype == "HALF" else np.float32
            size = math.prod(shape) * np.dtype(kind).itemsize
            images = np.frombuffer(ctypes.string_at(source, size), kind).reshape(shape).astype(np.float32)
            sums = images.reshape(len(images), -1).sum(1)
            logits = np.stack([sums, -sums], 1).astype(np.float32)
            ctypes.memmove(to, logits.ctypes.data, logits.nbytes)
            cuda.clock += 0.25
            self.engine.runs += 1

        cuda.run(stream, work)
        return True


class FakeEngine:
    """One input [B, 3, 2, 2], one output [B, 2]; ``profile`` is the range of B, ``shape[0]`` -1 where it is one.

    With ``largest`` height and width are from 2 to so much.
    """

    def __init__(
        self,
        cuda: FakeCuda,
        batch: int = -1,
        profile: tuple[int, int] = (1, 4),
        dtype: str = "FLOAT",
        largest: int | None = None,
    ) -> None:
        self.cuda = cuda
        self.shape = (batch, 3, 2, 2) if largest is None else (batch, 3, -1, -1)
        self.profile = profile
        self.largest = largest or 2
        self.dtype = dtype
        self.runs = 0
        self.refuses = self.no_capture = self.unknown_output = self.no_context = False
        self.num_io_tensors = 2

    def get_tensor_name(self, index):
        return ("input", "logits")[index]

    def get_tensor_mode(self, name):
        return FakeTensorRT.TensorIOMode.INPUT if name == "input" else FakeTensorRT.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return self.shape if name == "input" else (self.shape[0], 2)

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.dtype if name == "input" else "FLOAT")

    def get_tensor_profile_shape(self, name, profile):
        low, high = self.profile
        most = (high, 3, self.largest, self.largest)
        return [(low, 3, 2, 2), most, most]

    def create_execution_context(self):
        return None if self.no_context else FakeContext(self)


class FakeTensorRT:
    """The module. Deserialising gives ``engine``, where the file begins with ``engine``."""

    class TensorIOMode(enum.Enum):
        INPUT = 1
        OUTPUT = 2

    class ILogger:
        pass

    __version__ = "10.3.0"

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.deserialized: list[bytes] = []

    def Runtime(self, logger):
        def deserialize(content):
            self.deserialized.append(bytes(content))
            if not bytes(content).startswith(b"engine"):
                logger.log(SimpleNamespace(name="ERROR"), "Serialization assertion failed: version tag does not match")
                return None
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)
