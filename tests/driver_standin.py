"""A stand-in for the CUDA driver, for tests of a kernel's launch without a GPU.

Device memory is host memory under its own addresses. A launch reads its arguments from the pointers it is given, by
the types that the PTX entry declares, and hands them to ``program``, which does the kernel's work in Python.
"""

# ruff: noqa: N802  (the names are CUDA's)

from __future__ import annotations

import ctypes
import enum
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class Launched(NamedTuple):
    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: list[tuple[str, int]]


class FakeDriver:
    """Answers like ``cuda.bindings.driver``. ``fail["cuMemAlloc"] = (2, Result.…)`` fails the second such call."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, program: Callable[[FakeDriver, Launched], None] = lambda *_: None) -> None:
        self.program = program
        self.fail: dict[str, tuple[int, Result]] = {}
        self.calls: Counter[str] = Counter()
        self.launches: list[Launched] = []
        self.live: dict[int, tuple[str, Any]] = {}
        self.context: int | None = None
        self.capturing: list[Callable[[], None]] | None = None
        self.clock = 0.0

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "cu":
            return found
        self.calls[name] += 1
        number, code = self.fail.get(name, (0, Result.CUDA_SUCCESS))
        return (lambda *_: (code, None)) if self.calls[name] == number else found

    def _take(self, kind: str, what: Any = None, key: int | None = None) -> tuple[Result, int]:
        key = key if key is not None else 0x1000 + len(self.calls) + sum(self.calls.values())
        self.live[key] = (kind, what)
        return Result.CUDA_SUCCESS, key

    def _free(self, kind: str, key: int) -> tuple[Result]:
        assert self.live.pop(int(key))[0] == kind
        return (Result.CUDA_SUCCESS,)

    def left(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.live.values())

    def array(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)

    def cuInit(self, flags):
        assert flags == 0
        return (Result.CUDA_SUCCESS,)

    def cuGetErrorName(self, code):
        return Result.CUDA_SUCCESS, Result(code).name.encode()

    def cuGetErrorString(self, code):
        return Result.CUDA_SUCCESS, b"it is so"

    def cuDeviceGet(self, index):
        return Result.CUDA_SUCCESS, index

    def cuDeviceGetName(self, length, device):
        return Result.CUDA_SUCCESS, b"Stand-in" + bytes(length - 8)

    def cuDeviceGetAttribute(self, attribute, device):
        return Result.CUDA_SUCCESS, {75: 8, 76: 7}[attribute]

    def cuDevicePrimaryCtxRetain(self, device):
        return self._take("context")

    def cuDevicePrimaryCtxRelease(self, device):
        return self._free("context", next(key for key, (kind, _) in self.live.items() if kind == "context"))

    def cuCtxGetCurrent(self):
        return Result.CUDA_SUCCESS, self.context

    def cuCtxSetCurrent(self, context):
        self.context = context
        return (Result.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image):
        return self._take("module", ctypes.string_at(image).decode())

    def cuModuleUnload(self, module):
        return self._free("module", module)

    def cuModuleGetFunction(self, module, name):
        ptx = self.live[module][1]
        found = re.search(rf"\.entry\s+{re.escape(name.decode())}\s*\(([^)]*)\)", ptx)
        assert found, name
        return Result.CUDA_SUCCESS, (name.decode(), re.findall(r"\.param\s+\.(\w+)", found[1]))

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert self.context is not None
        assert extra == 0
        entry, kinds = function
        pointers = (ctypes.c_void_p * len(kinds)).from_address(parameters)
        types = {"u64": ctypes.c_uint64, "u32": ctypes.c_int32}
        arguments = [(kind, types[kind].from_address(pointers[i]).value) for i, kind in enumerate(kinds)]
        launched = Launched(entry, (gx, gy, gz), (bx, by, bz), shared, arguments)
        self._do(lambda: (self.launches.append(launched), self.program(self, launched)))
        return (Result.CUDA_SUCCESS,)

    def _do(self, work):
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.clock += 0.25
            work()

    def cuMemAlloc(self, size):
        memory = np.full(size, 0x55, np.uint8)
        return self._take("memory", memory, memory.ctypes.data)

    def cuMemFree(self, address):
        return self._free("memory", address)

    def cuMemcpyHtoD(self, device, host, size):
        ctypes.memmove(device, host, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyDtoH(self, host, device, size):
        ctypes.memmove(host, device, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemsetD8(self, device, value, size):
        ctypes.memset(device, value, size)
        return (Result.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags):
        return self._take("stream")

    def cuStreamSynchronize(self, stream):
        assert self.live[stream][0] == "stream"
        return (Result.CUDA_SUCCESS,)

    def cuStreamDestroy(self, stream):
        return self._free("stream", stream)

    def cuEventCreate(self, flags):
        return self._take("event", [0.0])

    def cuEventRecord(self, event, stream):
        self.live[event][1][0] = self.clock
        return (Result.CUDA_SUCCESS,)

    def cuEventSynchronize(self, event):
        return (Result.CUDA_SUCCESS,)

    def cuEventElapsedTime(self, start, end):
        return Result.CUDA_SUCCESS, self.live[end][1][0] - self.live[start][1][0]

    def cuEventDestroy(self, event):
        return self._free("event", event)

    def cuStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (Result.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        work, self.capturing = self.capturing, None
        return self._take("graph", work)

    def cuGraphInstantiate(self, graph, flags):
        return self._take("executable", self.live[graph][1])

    def cuGraphLaunch(self, executable, stream):
        for work in self.live[executable][1]:
            self._do(work)
        return (Result.CUDA_SUCCESS,)

    def cuGraphDestroy(self, graph):
        return self._free("graph", graph)

    def cuGraphExecDestroy(self, executable):
        return self._free("executable", executable)
