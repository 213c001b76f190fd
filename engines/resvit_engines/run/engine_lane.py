"""One stream of an engine: its buffers on both sides, its execution context, and its CUDA graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.run.cuda import Cuda
from resvit_engines.run.feeds import Array, Arrays
from resvit_engines.trt.running import (
    EngineTensors,
    TensorSpec,
    bind,
    context_of_engine,
    enqueue,
    set_shape,
    shape_in_context,
)


@dataclass(frozen=True)
class _Buffer:
    """An input or output: pinned memory on the host, flat, and as many bytes on the device."""

    spec: TensorSpec
    host: Array
    device: int

    def view(self, shape: tuple[int, ...]) -> Array:
        return self.host[: math.prod(shape)].reshape(shape)


@dataclass
class EngineLane:
    """Runs batches of at most ``capacity`` images, of any size that it takes, on a stream of its own. ``open_lane``
    makes it.

    In turn: ``load`` images, ``submit`` the work, which returns at once, ``wait`` for it, take the ``results``.
    """

    cuda: Cuda
    context: Any
    tensors: EngineTensors
    capacity: int
    stream: Any
    events: tuple[Any, Any]
    cuda_graph: bool
    said: Callable[[], str]
    """The last words of TensorRT's log."""
    ran: Callable[[], None] = lambda: None
    """Told when a run is over."""
    note: str = ""
    """Why there is no CUDA graph although one was asked for."""
    inputs: list[_Buffer] = field(default_factory=list)
    outputs: list[_Buffer] = field(default_factory=list)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _graph: Any = None
    _graph_owner: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def load(self, feeds: Arrays) -> None:
        """Take checked arrays [B, …], with 1 ≤ B ≤ capacity, over into pinned memory.

        Raises:
            ResvitError: INPUT for a batch or a size that the engine does not take.
        """
        given = {spec.name: feeds[spec.name].shape for spec in self.tensors.inputs}
        if any(self._shapes.get(name) != shape for name, shape in given.items()):
            self._set_shapes(given)
        for buffer in self.inputs:
            buffer.view(self._shapes[buffer.spec.name])[...] = feeds[buffer.spec.name]

    def submit(self) -> None:
        """Put copying in, computing and copying out on the stream.

        Raises:
            ResvitError: SYSTEM where CUDA or TensorRT refuse, with their words.
        """
        for buffer in self.inputs:
            self.cuda.upload(buffer.device, buffer.view(self._shapes[buffer.spec.name]), self.stream)
        if self.cuda_graph and self._graph is None:
            self._capture()
        start, end = self.events
        self.cuda.call("cudaEventRecord", start, self.stream)
        if self._graph is not None:
            self.cuda.call("cudaGraphLaunch", self._graph, self.stream)
        else:
            self._enqueue()
        self.cuda.call("cudaEventRecord", end, self.stream)
        for buffer in self.outputs:
            self.cuda.download(buffer.view(self._shapes[buffer.spec.name]), buffer.device, self.stream)

    def wait(self) -> float:
        """Wait for what was submitted; returns the GPU's time for computing alone, in ms.

        Raises:
            ResvitError: SYSTEM where the work failed on the GPU.
        """
        self.cuda.call("cudaStreamSynchronize", self.stream)
        self.ran()
        return self.cuda.milliseconds(*self.events)

    def results(self) -> Arrays:
        """The outputs of the last batch, copied out of pinned memory."""
        return {buffer.spec.name: buffer.view(self._shapes[buffer.spec.name]).copy() for buffer in self.outputs}

    def close(self) -> None:
        """Give the graph back; ``open_lane`` does the rest."""
        self._graph = None
        self._graph_owner.close()

    def _set_shapes(self, given: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = {}
        shapes = shapes_at(self.context, self.tensors, given)
        self.close()
        self._shapes = shapes

    def _enqueue(self) -> None:
        if not enqueue(self.context, self.stream):
            raise ResvitError(
                f"TensorRT could not run the engine: {self.said() or 'it gave no reason'}",
                "Build the engine again on this device.",
                ExitCode.SYSTEM,
            )

    def _capture(self) -> None:
        """Record the computing as one graph, which is launched in one call; where that fails, go on without."""
        # TensorRT finishes setting up a new shape in a first run, which cannot be recorded.
        self._enqueue()
        self.cuda.call("cudaStreamSynchronize", self.stream)
        try:
            self.cuda.begin_capture(self.stream)
            self._enqueue()
            graph = self.cuda.end_capture(self.stream)
            self._graph = self._graph_owner.enter_context(self.cuda.executable(graph))
        except ResvitError as error:
            self.cuda.abandon_capture(self.stream)
            self.cuda_graph = False
            self.note = f"There is no CUDA graph: {error.problem}"


@contextlib.contextmanager
def open_lane(
    cuda: Cuda,
    engine: Any,
    tensors: EngineTensors,
    capacity: int,
    *,
    cuda_graph: bool,
    said: Callable[[], str],
    ran: Callable[[], None] = lambda: None,
) -> Iterator[EngineLane]:
    """Take what one stream needs for batches of up to ``capacity``; all of it is given back, also when this fails.

    Raises:
        ResvitError: SYSTEM where memory is short.
    """
    with contextlib.ExitStack() as owned:
        context = context_of_engine(engine)
        most = {name: (capacity, *shape) for name, shape in tensors.largest.items()}
        shapes = shapes_at(context, tensors, most)
        # The stream comes after the buffers, so that it ends, and with it all work, before they are freed.
        buffers = {}
        for spec in (*tensors.inputs, *tensors.outputs):
            size = math.prod(shapes[spec.name])
            host = owned.enter_context(cuda.pinned_array((size,), spec.dtype))
            device = owned.enter_context(cuda.device_memory(host.nbytes))
            bind(context, spec.name, device)
            buffers[spec.name] = _Buffer(spec, host, device)
        events = (owned.enter_context(cuda.event()), owned.enter_context(cuda.event()))
        stream = owned.enter_context(cuda.stream())
        lane = EngineLane(
            cuda,
            context,
            tensors,
            capacity,
            stream,
            events,
            cuda_graph,
            said,
            ran=ran,
            inputs=[buffers[spec.name] for spec in tensors.inputs],
            outputs=[buffers[spec.name] for spec in tensors.outputs],
        )
        owned.callback(lane.close)
        yield lane


def shapes_at(context: Any, tensors: EngineTensors, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tell the context the inputs' shapes, ``given`` by name; returns the shape of every input and output.

    Raises:
        ResvitError: INPUT where the engine does not take these.
    """
    shapes = {}
    for spec in tensors.inputs:
        shapes[spec.name] = given[spec.name] if spec.shape else ()
        if any(size < 0 for size in spec.shape):
            set_shape(context, spec.name, shapes[spec.name])
    return shapes | {spec.name: shape_in_context(context, spec.name) for spec in tensors.outputs}
