"""The calls into TensorRT that run an engine; ``engine`` holds those that read it, ``api`` those that build it.

The same names in TensorRT 10.3 to 11.4 and in TensorRT for RTX; they stand in ``names``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from resvit_engines.errors import ExitCode, ResvitError

_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name, shape ([B, …], -1 where dynamic) and numpy type."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        sizes = ", ".join("B" if size < 0 else str(size) for size in self.shape)
        return f"{self.name} {self.dtype.name}[{sizes}]"


@dataclass(frozen=True)
class EngineTensors:
    """What an engine reads and writes, and the batches (smallest, largest) that it takes.

    ``largest`` holds the largest shape of every input without the batch, by name: sizes of images may vary too.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int]
    largest: Mapping[str, tuple[int, ...]]


def tensors_of_engine(trt: Any, engine: Any) -> EngineTensors:
    """The inputs and outputs of a deserialised engine, and the ranges of its (first) optimisation profile.

    Raises:
        ResvitError: IMPOSSIBLE for a type that numpy does not have.
    """
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    smallest, largest = 1, 1 << 30
    largest_shapes: dict[str, tuple[int, ...]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(int(size) for size in engine.get_tensor_shape(name))
        spec = TensorSpec(name, shape, _dtype(name, engine.get_tensor_dtype(name)))
        if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
            outputs.append(spec)
            continue
        inputs.append(spec)
        low = high = shape
        if any(size < 0 for size in shape):
            low, _, high = (tuple(map(int, part)) for part in engine.get_tensor_profile_shape(name, 0))
        largest_shapes[name] = high[1:]
        if not shape:
            continue
        bounds = (low[0], high[0])
        smallest, largest = max(smallest, bounds[0]), min(largest, bounds[1])
    return EngineTensors(tuple(inputs), tuple(outputs), (smallest, largest), largest_shapes)


def context_of_engine(engine: Any) -> Any:
    """An execution context: what one stream needs to run the engine.

    Raises:
        ResvitError: SYSTEM where there is no memory for it.
    """
    context = engine.create_execution_context()
    if context is None:
        raise ResvitError(
            "TensorRT could not make an execution context: most likely the GPU has too little free memory.",
            "Close other programs that use the GPU, use fewer streams, or build with a smaller batch or workspace.",
            ExitCode.SYSTEM,
        )
    return context


def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> None:
    """Tell the context the shape of a dynamic input.

    Raises:
        ResvitError: INPUT where the engine was not built for it.
    """
    if not context.set_input_shape(name, shape):
        raise ResvitError(
            f"The engine does not take {list(shape)} for its input {name!r}.",
            "Use a batch and sizes within the ranges that it was built for (manifest.json says them under 'build'), or "
            "build it with another --batch or --input-shape.",
        )


def shape_in_context(context: Any, name: str) -> tuple[int, ...]:
    """The shape of an output, now that the inputs' shapes are known.

    Raises:
        ResvitError: IMPOSSIBLE where it depends on the values of the inputs.
    """
    shape = tuple(int(size) for size in context.get_tensor_shape(name))
    if any(size < 0 for size in shape):
        raise ResvitError(
            f"The size of the output {name!r} depends on what is in the images ({list(shape)}).",
            "Export the model so that its outputs have fixed shapes.",
            ExitCode.IMPOSSIBLE,
        )
    return shape


def bind(context: Any, name: str, address: int) -> None:
    """Tell the context where on the device an input is read or an output written.

    Raises:
        ResvitError: SYSTEM where it has no such tensor.
    """
    if not context.set_tensor_address(name, address):
        raise ResvitError(
            f"TensorRT does not take an address for {name!r}.", "Build the engine again.", ExitCode.SYSTEM
        )


def enqueue(context: Any, stream: Any) -> bool:
    """Put one run on ``stream``; False where TensorRT refuses, with its reason in the log."""
    return bool(context.execute_async_v3(int(stream)))


def profile(trt: Any, context: Any, report: Callable[[str, float], None]) -> Any:
    """Have ``report`` told the name of every layer and its time in ms, after each run of the context.

    Runs are slower then, and cannot be recorded as a CUDA graph. Returns what must live as long as the context is used.
    """

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(str(layer_name), float(ms))

    found = Profiler()
    context.profiler = found
    return found


def _dtype(name: str, dtype: Any) -> np.dtype[Any]:
    found = _DTYPES.get(dtype.name)
    if found is None:
        raise ResvitError(
            f"The engine's {name!r} is of type {dtype.name}, which numpy does not have.",
            "Export the model with FP32 or FP16 inputs and outputs.",
            ExitCode.IMPOSSIBLE,
        )
    return found
