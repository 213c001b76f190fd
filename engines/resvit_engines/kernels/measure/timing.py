"""How long one launch of a kernel takes on the GPU of this machine."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from resvit_engines.kernels.launch import ITEM_SIZES, Kernel
from resvit_engines.kernels.measure.drive import Array, Driver, load_driver, output_shapes, require_inputs

_WARM_UP = 3
_L2_BYTES = 128 << 20
"""As large as the largest second-level cache of any target (126 MB on B200)."""


def time_kernel(
    kernel: Kernel,
    inputs: Sequence[Array],
    *,
    repeats: int = 50,
    launches: int = 20,
    cold: bool = False,
    driver: Driver | None = None,
) -> float:
    """Median time of one launch on GPU 0 in ms, between two CUDA events.

    ``launches`` launches are recorded into a CUDA graph, which is measured ``repeats`` times: Python's own time per
    launch, larger than many a kernel, does not count. They read the same arrays over and over, so from the L2 cache
    where they fit; with ``cold``, from copies that together are larger than the cache.

    Raises:
        ResvitError: as ``run_kernel``.
    """
    require_inputs(kernel, inputs)
    driver = driver or load_driver()
    shapes = [array.shape for array in inputs]
    sizes = [
        int(np.prod(shape, dtype=np.int64)) * ITEM_SIZES[result.dtype]
        for shape, result in zip(output_shapes(kernel, shapes), kernel.launch.outputs, strict=True)
    ]
    touched = sum(sizes) + sum(array.nbytes for array in inputs)
    copies = min(launches, 1 + -(-_L2_BYTES // max(touched, 1))) if cold else 1
    with driver.device(), contextlib.ExitStack() as stack:
        function = stack.enter_context(driver.loaded(kernel))
        read = [stack.enter_context(driver.uploaded(inputs)) for _ in range(copies)]
        written = [[stack.enter_context(driver.memory(size)) for size in sizes] for _ in range(copies)]
        stream = stack.enter_context(driver.taken("cuStreamCreate", "cuStreamDestroy", 0))

        def work() -> None:
            for number in range(launches):
                turn = number % copies
                driver.launch(function, kernel, shapes, read[turn], written[turn], stream)

        graph = stack.enter_context(_captured(driver, stream, work))
        start, end = (stack.enter_context(driver.taken("cuEventCreate", "cuEventDestroy", 0)) for _ in range(2))
        times = []
        for number in range(_WARM_UP + repeats):
            driver.call("cuEventRecord", start, stream)
            driver.call("cuGraphLaunch", graph, stream)
            driver.call("cuEventRecord", end, stream)
            driver.call("cuEventSynchronize", end)
            if number >= _WARM_UP:
                times.append(float(driver.call("cuEventElapsedTime", start, end)) / launches)
    return statistics.median(times)


@contextlib.contextmanager
def _captured(driver: Driver, stream: Any, work: Callable[[], None]) -> Iterator[Any]:
    """What ``work`` puts on ``stream``, as a graph that can be launched."""
    driver.call("cuStreamBeginCapture", stream, driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    try:
        work()
    except BaseException:
        _, unfinished = driver.api.cuStreamEndCapture(stream)
        if unfinished is not None:
            driver.api.cuGraphDestroy(unfinished)
        raise
    graph = driver.call("cuStreamEndCapture", stream)
    try:
        with driver.taken("cuGraphInstantiate", "cuGraphExecDestroy", graph, 0) as made:
            yield made
    finally:
        driver.api.cuGraphDestroy(graph)
