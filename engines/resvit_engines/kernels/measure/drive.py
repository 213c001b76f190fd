"""Launch a compiled kernel through the CUDA driver, as a plugin does: the same PTX, arguments, grid and shared memory.

For tests and benchmarks on a machine with a GPU; an engine never comes here. NVIDIA's package ``cuda.bindings``
answers every call with its error code first; here that code becomes a ``ResvitError`` with the driver's own name for
it. What was taken is given back however a block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_engines.kernels.launch import ITEM_SIZES, Kernel

Array = NDArray[Any]

CALLS = (
    *("cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuGetErrorName", "cuGetErrorString"),
    *("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease", "cuCtxGetCurrent", "cuCtxSetCurrent"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuModuleUnload", "cuLaunchKernel"),
    *("cuMemAlloc", "cuMemFree", "cuMemcpyHtoD", "cuMemcpyDtoH", "cuMemsetD8"),
    *("cuStreamCreate", "cuStreamSynchronize", "cuStreamDestroy"),
    *("cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime", "cuEventDestroy"),
    *("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"),
    *("cuGraphDestroy", "cuGraphExecDestroy"),
)
"""Every function that is called; the same in cuda-bindings 12.x and 13.x."""

OUTPUT_DTYPES: dict[str, Any] = {
    "fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8, "fp8": np.uint8, "int32": np.int32,
    "bool": np.bool_,
}  # fmt: skip
"""What outputs are returned as; numpy has no BF16 and no FP8, so those come as their bits."""

_GUARD = 256
"""Bytes before and behind every output that no kernel may touch."""
_POISON = 0xFF
"""Fills outputs beforehand: NaN in every floating-point type, so that an element that is never written shows."""

_NO_DRIVER = ("Check that the NVIDIA driver works (nvidia-smi).", ExitCode.MISSING)
_FIXES = {
    "CUDA_ERROR_NO_DEVICE": _NO_DRIVER,
    "CUDA_ERROR_NOT_INITIALIZED": _NO_DRIVER,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": ("Reboot: the driver was updated while it was in use.", ExitCode.MISSING),
    "CUDA_ERROR_OUT_OF_MEMORY": ("Use a smaller batch, or close other programs that use the GPU.", ExitCode.SYSTEM),
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": (
        "The driver is older than the PTX: compile for the PTX version that it reads.",
        ExitCode.IMPOSSIBLE,
    ),
    "CUDA_ERROR_INVALID_PTX": ("The PTX is not for this GPU: compile for its compute capability.", ExitCode.BUILD),
    "CUDA_ERROR_NO_BINARY_FOR_GPU": (
        "The PTX is not for this GPU: compile for its compute capability.",
        ExitCode.IMPOSSIBLE,
    ),
}
_FAULT = ("The GPU can no longer be used by this process: run again.", ExitCode.SYSTEM)


@dataclass(frozen=True)
class Driver:
    """The CUDA driver, every call checked. ``api`` is ``cuda.bindings.driver``."""

    api: Any

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``name`` and return what it gives besides the error code: nothing, one value or a tuple.

        Raises:
            ResvitError: MISSING where driver or GPU are not there, otherwise by the driver's name for the error.
        """
        try:
            code, *values = getattr(self.api, name)(*arguments)
        except (RuntimeError, OSError) as error:  # cuda-bindings looks for the driver when it is first called.
            said = first_line(error)
            raise ResvitError(f"There is no NVIDIA driver here ({said}).", *_NO_DRIVER) from error
        if int(code) != 0:
            title, text = (self._told(which, code) for which in ("cuGetErrorName", "cuGetErrorString"))
            fix, exit_code = _FIXES.get(title, _FAULT)
            raise ResvitError(f"{name} failed with {title}: {text}.", fix, exit_code)
        return values[0] if len(values) == 1 else tuple(values)

    def _told(self, which: str, code: Any) -> str:
        status, told = getattr(self.api, which)(code)
        if int(status) != 0 or told is None:
            return f"error {int(code)}"
        return told.decode(errors="replace") if isinstance(told, bytes) else str(told)

    @contextlib.contextmanager
    def taken(self, take: str, give: str, *arguments: Any) -> Iterator[Any]:
        """Call ``take`` and yield what it gives; at the end ``give`` frees it."""
        made = self.call(take, *arguments)
        try:
            yield made
        finally:
            # Its code would be of an error that an earlier call has told already.
            getattr(self.api, give)(made)

    @contextlib.contextmanager
    def device(self, index: int = 0) -> Iterator[Any]:
        """Work on GPU ``index`` inside the block, in the context that the CUDA runtime and PyTorch use as well."""
        self.call("cuInit", 0)
        device = self.call("cuDeviceGet", index)
        before = self.call("cuCtxGetCurrent")
        context = self.call("cuDevicePrimaryCtxRetain", device)
        try:
            self.call("cuCtxSetCurrent", context)
            yield device
        finally:
            self.api.cuCtxSetCurrent(before)
            self.api.cuDevicePrimaryCtxRelease(device)

    def name_and_sm(self, device: Any) -> tuple[str, int]:
        """What the GPU is called, and its compute capability without the dot."""
        kind = self.api.CUdevice_attribute
        major, minor = (
            self.call("cuDeviceGetAttribute", getattr(kind, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), device)
            for part in ("MAJOR", "MINOR")
        )
        name = self.call("cuDeviceGetName", 256, device)
        return name.split(b"\0")[0].decode(errors="replace"), int(major) * 10 + int(minor)

    @contextlib.contextmanager
    def loaded(self, kernel: Kernel) -> Iterator[Any]:
        """The kernel's function on the GPU, compiled by the driver."""
        image = ctypes.create_string_buffer(kernel.ptx.encode())
        with self.taken("cuModuleLoadData", "cuModuleUnload", ctypes.addressof(image)) as module:
            yield self.call("cuModuleGetFunction", module, kernel.entry.encode())

    def launch(
        self,
        function: Any,
        kernel: Kernel,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        stream: Any = 0,
    ) -> None:
        """Put one launch on ``stream``: ``shapes`` are those of the inputs; ``inputs`` and ``outputs`` addresses."""
        arguments = packed_arguments(kernel, shapes, inputs, outputs)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        grid = [extent.at(shapes) for extent in kernel.launch.grid]
        block = (kernel.threads, 1, 1)
        shared = kernel.shared_bytes
        self.call("cuLaunchKernel", function, *grid, *block, shared, stream, ctypes.addressof(pointers), 0)

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[int]:
        """``size`` bytes on the GPU; yields their address."""
        with self.taken("cuMemAlloc", "cuMemFree", max(size, 1)) as address:
            yield int(address)

    @contextlib.contextmanager
    def uploaded(self, arrays: Sequence[Array]) -> Iterator[list[int]]:
        """Copies of host arrays on the GPU; yields their addresses."""
        with contextlib.ExitStack() as stack:
            addresses = []
            for array in map(np.ascontiguousarray, arrays):
                addresses.append(stack.enter_context(self.memory(array.nbytes)))
                if array.nbytes:
                    self.call("cuMemcpyHtoD", addresses[-1], array.ctypes.data, array.nbytes)
            yield addresses


def packed_arguments(
    kernel: Kernel, shapes: Sequence[Sequence[int]], inputs: Sequence[int], outputs: Sequence[int]
) -> list[Any]:
    """The arguments in the order of the entry's parameters: input addresses, 32-bit integers, output addresses."""
    launch = kernel.launch
    return [
        *(ctypes.c_uint64(address) for address in inputs),
        *(ctypes.c_int32(extent.at(shapes)) for extent in launch.scalars),
        *(ctypes.c_uint64(address) for address in outputs),
    ]


def output_shapes(kernel: Kernel, shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The shape of each output, for input ``shapes``."""
    return [tuple(extent.at(shapes) for extent in result.shape) for result in kernel.launch.outputs]


def run_kernel(kernel: Kernel, inputs: Sequence[Array], driver: Driver | None = None) -> list[Array]:
    """Run a kernel on GPU 0 and return its outputs, BF16 and FP8 as bits.

    Raises:
        ResvitError: INPUT where ``inputs`` are not what the kernel takes, MISMATCH where it wrote beside an output,
            and by the driver's error otherwise.
    """
    require_inputs(kernel, inputs)
    driver = driver or load_driver()
    shapes = [array.shape for array in inputs]
    results = [
        np.empty(shape, OUTPUT_DTYPES[result.dtype])
        for shape, result in zip(output_shapes(kernel, shapes), kernel.launch.outputs, strict=True)
    ]
    with driver.device(), contextlib.ExitStack() as stack:
        function = stack.enter_context(driver.loaded(kernel))
        addresses = stack.enter_context(driver.uploaded(inputs))
        # The default stream, on which memory is copied and filled, and this one wait for each other.
        places = [stack.enter_context(driver.memory(array.nbytes + 2 * _GUARD)) for array in results]
        for place, array in zip(places, results, strict=True):
            driver.call("cuMemsetD8", place, _POISON, array.nbytes + 2 * _GUARD)
        stream = stack.enter_context(driver.taken("cuStreamCreate", "cuStreamDestroy", 0))
        driver.launch(function, kernel, shapes, addresses, [place + _GUARD for place in places], stream)
        driver.call("cuStreamSynchronize", stream)
        for place, array in zip(places, results, strict=True):
            whole = np.empty(array.nbytes + 2 * _GUARD, np.uint8)
            driver.call("cuMemcpyDtoH", whole.ctypes.data, place, whole.nbytes)
            _require_guards(kernel, whole)
            array[...] = whole[_GUARD:-_GUARD].view(array.dtype).reshape(array.shape)
    return results


@functools.cache
def load_driver() -> Driver:
    """The CUDA driver of ``cuda.bindings``; nothing is asked of a GPU yet.

    Raises:
        ResvitError: MISSING where cuda-bindings is not installed or does not load.
    """
    try:
        return Driver(importlib.import_module("cuda.bindings.driver"))
    except (ImportError, OSError) as error:
        raise ResvitError(
            f"The Python package cuda-bindings does not load: {error}.",
            "pip install 'resvit-export[device]'.",
            ExitCode.MISSING,
        ) from error


def require_inputs(kernel: Kernel, inputs: Sequence[Array]) -> None:
    """Refuse arrays that are not what the kernel takes.

    Raises:
        ResvitError: INPUT with what it takes and what was given.
    """
    wanted = kernel.launch.inputs
    if len(inputs) != len(wanted) or any(
        array.itemsize != ITEM_SIZES[dtype] for array, dtype in zip(inputs, wanted, strict=True)
    ):
        given = ", ".join(str(array.dtype) for array in inputs)
        raise ResvitError(f"{kernel.entry} takes {', '.join(wanted)}, and was given {given}.", "Give it those.")


def _require_guards(kernel: Kernel, whole: Array) -> None:
    if (whole[:_GUARD] != _POISON).any() or (whole[-_GUARD:] != _POISON).any():
        raise ResvitError(
            f"{kernel.entry} wrote outside of its output.",
            "Do not use it: report this with the model's name.",
            ExitCode.MISMATCH,
        )
