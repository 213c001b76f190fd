"""How fast a runner is: latency, throughput and memory, after a warm-up and with the clocks on record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from resvit_engines.bench.clocks import Conditions, clock_warnings, conditions_now
from resvit_engines.errors import ResvitError
from resvit_engines.process import peak_memory_mib
from resvit_engines.records import Record
from resvit_engines.run.feeds import Arrays, checked_feeds
from resvit_engines.run.onnx_on_cpu import RUNTIME
from resvit_engines.run.runner import Lane, Runner

PERCENTILES = (50, 90, 95, 99)
_AT_LEAST = 10


@dataclass(frozen=True)
class BenchSettings:
    """How to measure: images per call, seconds to measure and to warm up, streams, and whether by CUDA graph.

    ``iterations`` replaces ``seconds`` where it is given.
    """

    batch: int = 1
    seconds: float = 5.0
    warmup: float = 1.0
    iterations: int | None = None
    streams: int = 1
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        wrong = [
            f"--{name} {getattr(self, name)}"
            for name, least in (("batch", 1), ("streams", 1), ("seconds", 0.0), ("warmup", 0.0))
            if not getattr(self, name) >= least
        ]
        if self.iterations is not None and self.iterations < 1:
            wrong.append(f"--iterations {self.iterations}")
        if wrong:
            raise ResvitError(f"{wrong[0]} makes no sense.", "Give a number from 1 up (seconds: from 0).")


@dataclass(frozen=True)
class Samples:
    """What was measured, one entry a call: ``wall_ms`` from numpy in to numpy out, ``gpu_ms`` of computing alone.

    ``gpu_ms`` is empty where no GPU was used. ``seconds`` is the wall time of all calls together.
    """

    wall_ms: tuple[float, ...]
    gpu_ms: tuple[float, ...]
    seconds: float

    @property
    def typical_ms(self) -> float:
        """The median time of one call: the GPU's where there is one, which no host program disturbs."""
        return float(np.median(self.gpu_ms or self.wall_ms))


@dataclass(frozen=True)
class BenchReport:
    """One runner, timed. Latencies are in ms by percentile ("p50" …), memory in MiB, throughput in images/s.

    ``latency_ms`` is wall time from numpy in to numpy out, copies included; ``gpu_ms`` is the time between two CUDA
    events around the computing, None without a GPU. ``device_mib`` is the GPU memory that engine and buffers took,
    ``host_peak_mib`` the process's peak resident memory.
    """

    label: str
    runtime: str
    batch: int
    streams: int
    cuda_graph: bool
    iterations: int
    latency_ms: dict[str, float]
    gpu_ms: dict[str, float] | None
    images_per_second: float
    device_mib: float | None
    host_peak_mib: int
    before: Conditions
    after: Conditions
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "label": self.label,
            "runtime": self.runtime,
            "batch": self.batch,
            "streams": self.streams,
            "cuda_graph": self.cuda_graph,
            "iterations": self.iterations,
            "latency_ms": self.latency_ms,
            "gpu_ms": self.gpu_ms,
            "images_per_second": round(self.images_per_second, 2),
            "device_mib": self.device_mib,
            "host_peak_mib": self.host_peak_mib,
            "conditions": {"before": self.before.to_json(), "after": self.after.to_json()},
            "remarks": list(self.warnings),
        }

    @classmethod
    def from_json(cls, record: Record) -> BenchReport:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        conditions = record.record("conditions")
        return cls(
            label=record.text("label"),
            runtime=record.text("runtime"),
            batch=record.whole("batch", 1),
            streams=record.whole("streams", 1),
            cuda_graph=record.flag("cuda_graph"),
            iterations=record.whole("iterations", 1),
            latency_ms=record.numbers_by_name("latency_ms"),
            gpu_ms=record.optional("gpu_ms", record.numbers_by_name),
            images_per_second=record.number("images_per_second", 0),
            device_mib=record.optional("device_mib", lambda key: record.number(key, 0)),
            host_peak_mib=record.whole("host_peak_mib"),
            before=Conditions.from_json(conditions.record("before")),
            after=Conditions.from_json(conditions.record("after")),
            warnings=record.texts("remarks"),
        )


class Stopwatch:
    """A runner with its lanes open and its images loaded, ready to be timed again and again."""

    def __init__(self, runner: Runner, settings: BenchSettings, images: Arrays | None = None) -> None:
        self.runner = runner
        self.settings = settings
        self.on_gpu = runner.runtime != RUNTIME
        self.streams = settings.streams if self.on_gpu else 1
        self.feeds = bench_feeds(runner, settings.batch, images)
        self._owned = contextlib.ExitStack()
        self._lanes: list[Lane] = []

    def __enter__(self) -> Stopwatch:
        with contextlib.ExitStack() as owned:
            for _ in range(self.streams):
                lane = self.runner.lane(self.settings.batch, cuda_graph=self.settings.cuda_graph)
                self._lanes.append(owned.enter_context(lane))
            self._owned = owned.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lanes.clear()
        self._owned.close()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be done as it was asked for."""
        found = dict.fromkeys(lane.note for lane in self._lanes if lane.note and self.on_gpu)
        if self.settings.streams > self.streams:
            found[f"There are no streams on a processor; {self.settings.streams} were asked for."] = None
        return tuple(found)

    @property
    def cuda_graph(self) -> bool:
        """Whether calls went through a CUDA graph."""
        return self.on_gpu and self.settings.cuda_graph and not any(lane.note for lane in self._lanes)

    def warm_up(self) -> None:
        """Run for the time set, and at least twice on every stream: first runs set things up."""
        end = time.perf_counter() + self.settings.warmup
        self.take(2 * self.streams)
        while time.perf_counter() < end:
            self.take(self.streams)

    def take(self, calls: int) -> Samples:
        """Time so many calls; with several streams that many are under way at once."""
        wall: list[float] = []
        gpu: list[float] = []
        started: dict[int, float] = {}
        begin = time.perf_counter()
        for call in range(calls):
            index = call % self.streams
            if index in started:
                self._end(index, started, wall, gpu)
            started[index] = time.perf_counter()
            self._lanes[index].load(self.feeds)
            self._lanes[index].submit()
        for index in sorted(started, key=started.__getitem__):
            self._end(index, started, wall, gpu)
        return Samples(tuple(wall), tuple(gpu), time.perf_counter() - begin)

    def _end(self, index: int, started: dict[int, float], wall: list[float], gpu: list[float]) -> None:
        spent = self._lanes[index].wait()
        self._lanes[index].results()
        wall.append((time.perf_counter() - started.pop(index)) * 1e3)
        if spent is not None:
            gpu.append(spent)


def measure(runner: Runner, settings: BenchSettings | None = None, images: Arrays | None = None) -> BenchReport:
    """Time one runner. ``images`` are repeated or cut to the batch; without them noise goes in.

    Raises:
        ResvitError: INPUT for a batch that the runner does not take, SYSTEM where memory is short.
    """
    settings = settings or BenchSettings()
    with Stopwatch(runner, settings, images) as watch:
        watch.warm_up()
        before = conditions_now(on_gpu=watch.on_gpu)
        samples = _enough(watch, settings)
        after = conditions_now(on_gpu=watch.on_gpu)
        return report_from(watch, samples, before, after)


def _enough(watch: Stopwatch, settings: BenchSettings) -> Samples:
    if settings.iterations is not None:
        return watch.take(settings.iterations)
    parts = [watch.take(max(_AT_LEAST, watch.streams))]
    while (spent := sum(part.seconds for part in parts)) < settings.seconds:
        rate = sum(len(part.wall_ms) for part in parts) / spent
        # In a few long pieces: between two of them the streams run empty.
        parts.append(watch.take(max(_AT_LEAST, watch.streams, int(rate * min(settings.seconds - spent, 2.0)))))
    return joined(parts)


def joined(parts: Sequence[Samples]) -> Samples:
    """All samples as one."""
    return Samples(
        tuple(ms for part in parts for ms in part.wall_ms),
        tuple(ms for part in parts for ms in part.gpu_ms),
        sum(part.seconds for part in parts),
    )


def report_from(watch: Stopwatch, samples: Samples, before: Conditions, after: Conditions) -> BenchReport:
    """The figures of what was measured."""
    runner, settings = watch.runner, watch.settings
    return BenchReport(
        runner.label,
        runner.runtime,
        settings.batch,
        watch.streams,
        watch.cuda_graph,
        len(samples.wall_ms),
        percentiles(samples.wall_ms),
        percentiles(samples.gpu_ms) if samples.gpu_ms else None,
        settings.batch * len(samples.wall_ms) / samples.seconds,
        runner.device_mib,
        peak_memory_mib(),
        before,
        after,
        (*watch.warnings, *clock_warnings(before, after)),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """``p50`` to ``p99``, in the unit of the values."""
    found = np.percentile(np.asarray(values), PERCENTILES)
    return {f"p{name}": round(float(value), 4) for name, value in zip(PERCENTILES, found, strict=True)}


def bench_feeds(runner: Runner, batch: int, images: Arrays | None) -> Arrays:
    """``batch`` images: those given, repeated or cut, or else noise of unit variance (zeros for whole numbers)."""
    if images is None and any(size < 0 for spec in runner.inputs for size in spec.shape[1:]):
        raise ResvitError(
            f"The network takes images of several sizes ({', '.join(map(str, runner.inputs))}), and there are none to "
            "say which to time.",
            "Give a bundle with golden images, as 'resvit-export build' writes them.",
        )
    if images is None:
        random = np.random.default_rng(0)
        images = {
            spec.name: random.standard_normal((1, *spec.shape[1:])).astype(spec.dtype)
            if spec.dtype.kind == "f"
            else np.zeros((1, *spec.shape[1:]), spec.dtype)
            for spec in runner.inputs
        }
    # How long it takes does not hang on the values: an engine that reads another kind of numbers gets noise.
    given = {spec.name: images[spec.name] for spec in runner.inputs if spec.name in images}
    images = images | {
        spec.name: np.zeros(given[spec.name].shape, spec.dtype)
        for spec in runner.inputs
        if spec.name in given and given[spec.name].dtype.kind != spec.dtype.kind
    }
    feeds, count = checked_feeds(images, runner.inputs)
    places = np.arange(batch) % count
    return {name: np.ascontiguousarray(array[places]) for name, array in feeds.items()}
