"""Time on a GPU: CUDA graphs of many repetitions between two events, medians; and what the GPU can do at best."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kernel_peers.cases import Case
from resvit_engines.kernels.launch import Kernel
from resvit_engines.kernels.measure.drive import load_driver, output_shapes

LAUNCHES = 20
"""In one graph."""
_L2_BYTES = 128 << 20
_OUTPUTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8,
            "fp8": torch.float8_e4m3fn}  # fmt: skip


def copies_for(tensors: Sequence[torch.Tensor]) -> int:
    """How many copies of the inputs it takes so that a repetition doesn't find its own in the cache."""
    touched = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return min(LAUNCHES, 1 + _L2_BYTES // max(touched, 1))


def time_us(work: Callable[[int], Any], repeats: int) -> float:
    """Median time of ``work(turn)`` in microseconds, turns taken in order."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(3):
            work(turn)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for turn in range(LAUNCHES):
                work(turn)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for number in range(repeats + 3):
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if number >= 3:
                times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def time_rival(function: Callable[..., Any], context: Any, copies: Sequence[Sequence[Any]], repeats: int) -> float:
    """Median time of a PyTorch function in microseconds, its inputs cold."""
    with context, torch.no_grad():
        return time_us(lambda turn: function(*copies[turn % len(copies)]), repeats)


def time_ours(kernel: Kernel, case: Case, copies: Sequence[Sequence[torch.Tensor]], repeats: int) -> float:
    """Median time of our kernel in microseconds, launched through the driver on PyTorch's stream."""
    outputs = [_poisoned(kernel, case) for _ in copies]
    with _launcher(kernel, case) as launch:
        return time_us(lambda turn: launch(copies[turn % len(copies)], outputs[turn % len(copies)]), repeats)


def disagreement(kernel: Kernel, case: Case, inputs: Sequence[torch.Tensor], rival: Callable[..., Any]) -> float:
    """How far ours is from a rival on the same inputs: the largest relative error of an output, by norms.

    Both round, so FP16 and INT8 differ by less than 0.02 and FP8 by less than 0.05. NaN where ours left gaps.
    """
    outputs = _poisoned(kernel, case)
    with _launcher(kernel, case) as launch, torch.no_grad():
        launch(inputs, outputs)
        torch.cuda.synchronize()
        theirs = rival(*inputs)
    pairs = zip(outputs, theirs if isinstance(theirs, tuple) else (theirs,), strict=True)
    errors = [float((ours.double() - other.double()).norm() / other.double().norm()) for ours, other in pairs]
    return max(errors, key=lambda error: (math.isnan(error), error))


def _poisoned(kernel: Kernel, case: Case) -> list[torch.Tensor]:
    """Outputs full of NaN (of -1, where they are whole numbers)."""
    results = zip(output_shapes(kernel, case.shapes), kernel.launch.outputs, strict=True)
    made = [torch.empty(shape, dtype=_OUTPUTS[result.dtype], device="cuda") for shape, result in results]
    for tensor in made:
        tensor.view(torch.uint8).fill_(0xFF)
    return made


@contextlib.contextmanager
def _launcher(kernel: Kernel, case: Case) -> Iterator[Callable[[Sequence[Any], Sequence[Any]], None]]:
    driver = load_driver()
    with driver.device(), driver.loaded(kernel) as function:

        def launch(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
            read, written = ([tensor.data_ptr() for tensor in group] for group in (inputs, outputs))
            stream = torch.cuda.current_stream().cuda_stream
            driver.launch(function, kernel, case.shapes, read, written, stream)

        yield launch


def measured_bandwidth() -> float:
    """GB/s of a large copy, bytes read and written together."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / time_us(lambda _: target.copy_(source), 10) / 1e3


def measured_peak(dtype: str) -> float | None:
    """TFLOPS (or TOPS) of a large matrix product in the library's best kernel; None where it has none."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda") for _ in range(2))
    try:
        if dtype == "int8":
            x, y = ((value * 40).clamp(-128, 127).to(torch.int8) for value in (a, b))
            took = time_us(lambda _: torch._int_mm(x, y.t()), 5)
        elif dtype == "fp8":
            x, y = (value.to(torch.float8_e4m3fn) for value in (a, b))
            one = torch.ones((), device="cuda")
            took = time_us(lambda _: torch._scaled_mm(x, y.t(), scale_a=one, scale_b=one, out_dtype=torch.float16), 5)
        else:
            x, y = a.half(), b.half()
            took = time_us(lambda _: x @ y, 5)
    except RuntimeError:
        return None
    return 2 * size**3 / took / 1e6
