"""Predicted time of each fused layer on a target, by the rules of the builder that makes the engine.

For TensorRT: its kernels (:mod:`resvit_engines.targets.tensorrt_kernels`) and their times
(:mod:`resvit_engines.targets.tensorrt_rules`), held to real engines. For TensorRT for RTX no engine with times is
known: a layer takes the longer of its arithmetic and its memory traffic, plus a fixed cost for each of its kernels
(Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
CACM 52(4), 2009), at the shares of :class:`Efficiency`. What the peaks are stands in
:mod:`resvit_engines.targets.speeds`; which tensor is written in which format follows from who reads it. All traffic is
charged to the device memory: a large cache makes a real engine faster than predicted, in all precisions alike.
Times measured on the device replace predictions (:mod:`resvit_engines.targets.layer_times`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.records import Record
from resvit_engines.targets.layer_times import MeasuredTimes
from resvit_engines.targets.layer_work import Format, LayerKind, LayerWork, Precisions, Read
from resvit_engines.targets.table import TENSOR_CORES, Builder, Precision, Target
from resvit_engines.targets.tensorrt_kernels import PlacedKernel, Role, TensorRtKernels
from resvit_engines.targets.tensorrt_rules import TIME_RULES, TimeRules, kernel_time

BYTES = {Precision.FP16: 2, Precision.INT8: 1, Precision.FP8: 1}

WRITES_SEVERAL = frozenset({LayerKind.NORM, LayerKind.POINTWISE})
"""Generated kernels: they write a tensor in every format that its readers want, at once."""

ACCUMULATOR_BYTES = {LayerKind.CONV: 4, LayerKind.GEMM: 2}
"""What the 8-bit kernels of TensorRT for RTX write per element, before scale, bias and activation are applied."""

SEPARATE_EPILOGUE = frozenset({Builder.RTX})
"""Builders whose 8-bit convolutions and linear layers write accumulators, and leave scale, bias and activation to a
generated kernel behind: the LayerNorm or pointwise kernel that reads the result, else one of its own. Seen in the
kernels that TensorRT for RTX 1.7 lists. TensorRT runs them inside the 8-bit kernel."""


@dataclass(frozen=True)
class Efficiency:
    """Share of the peaks that layers reach by TensorRT for RTX at batch 1. One estimate for all, not a fit."""

    compute: float = 0.5
    memory: float = 0.75


EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class LayerTime:
    """Where one layer's microseconds go. ``reformat_us`` is for kernels that only change its output's format."""

    name: str
    kind: LayerKind
    precision: Precision
    compute_us: float
    memory_us: float
    fixed_us: float
    reformat_us: float
    total_us: float
    kernels: int
    activation_bytes: int
    weight_bytes: int
    measured: bool = False

    @classmethod
    def from_json(cls, record: Record) -> LayerTime:
        """What :meth:`Prediction.to_json` wrote of a layer."""
        return cls(
            record.text("name"),
            record.choice("kind", LayerKind),
            record.choice("precision", Precision),
            record.number("compute_us"),
            record.number("memory_us"),
            record.number("fixed_us"),
            record.number("reformat_us"),
            record.number("total_us"),
            record.whole("kernels"),
            record.whole("activation_bytes"),
            record.whole("weight_bytes"),
            record.flag("measured"),
        )


@dataclass(frozen=True)
class Prediction:
    """A network's predicted time on a target, layer by layer."""

    target: str
    layers: tuple[LayerTime, ...]

    @property
    def total_us(self) -> float:
        """Microseconds per call."""
        return sum(layer.total_us for layer in self.layers)

    @property
    def milliseconds(self) -> float:
        """Milliseconds per call."""
        return self.total_us / 1e3

    @property
    def kernels(self) -> int:
        """Kernels per call."""
        return sum(layer.kernels for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations read and written."""
        return sum(layer.activation_bytes for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, microseconds to the nanosecond."""
        layers = [
            {
                key: round(value, 3) if isinstance(value, float) else getattr(value, "value", value)
                for key, value in dataclasses.asdict(layer).items()
            }
            for layer in self.layers
        ]
        return {
            "target": self.target,
            "ms": round(self.milliseconds, 6),
            "kernels": self.kernels,
            "activation_bytes": self.activation_bytes,
            "weight_bytes": sum(layer.weight_bytes for layer in self.layers),
            "measured_layers": sum(layer.measured for layer in self.layers),
            "layers": layers,
        }

    @classmethod
    def from_json(cls, record: Record) -> Prediction:
        """What :meth:`to_json` wrote; ``ResvitError`` INPUT, naming the key, where it is malformed."""
        return cls(record.text("target"), tuple(map(LayerTime.from_json, record.records("layers"))))


class CostModel:
    """The layers of one network on one target; predicts the time of any assignment of precisions."""

    def __init__(
        self,
        works: Sequence[LayerWork],
        target: Target,
        measured: MeasuredTimes | None = None,
        efficiency: Efficiency = EFFICIENCY,
        rules: TimeRules = TIME_RULES,
    ) -> None:
        self.works = tuple(works)
        self.target = target
        self.efficiency = efficiency
        self.rules = rules
        self.measured = measured
        self._tensorrt = None if target.builder is Builder.RTX else TensorRtKernels(self.works)
        self._layer_of = {node: i for i, work in enumerate(self.works) for node in work.nodes}
        self._writer = {work.writes: i for i, work in enumerate(self.works)}
        self._readers: dict[str, list[tuple[LayerWork, Read]]] = {}
        for work in self.works:
            for read in work.reads:
                self._readers.setdefault(read.value, []).append((work, read))
        self._scale = self._measured_scale()

    def predict(self, assignment: Precisions) -> Prediction:
        """The time of every layer, in order."""
        return Prediction(self.target.name, tuple(self._time(work, assignment) for work in self.works))

    def total_us(self, assignment: Precisions) -> float:
        """Microseconds per call."""
        return sum(self._time(work, assignment).total_us for work in self.works)

    def change_us(self, assignment: Precisions, node: str, precision: Precision) -> float:
        """Microseconds added where ``node`` alone goes to ``precision``: its layer and those it reads from change.

        Through a layer that only moves elements those before it change as well.
        """
        layer = self._layer_of[node]
        changed = {layer}
        ends = [layer]
        while ends:
            writers = {self._writer[r.value] for r in self.works[ends.pop()].reads if r.value in self._writer} - changed
            changed |= writers
            ends += [writer for writer in writers if self.works[writer].commutes]
        after = {**assignment, node: precision}
        return sum(
            self._time(self.works[i], after).total_us - self._time(self.works[i], assignment).total_us
            for i in sorted(changed)
        )

    def _time(self, work: LayerWork, assignment: Precisions) -> LayerTime:
        time = self._predicted(work, assignment)
        if self.measured is None:
            return time
        found = self.measured.of((work.name, *work.nodes), time.precision)
        own = time.total_us - time.reformat_us
        scale = self._scale.get(time.precision, 1.0)
        total = (own * scale if found is None else found) + time.reformat_us * scale
        return dataclasses.replace(
            time, total_us=total, reformat_us=time.reformat_us * scale, measured=found is not None
        )

    def _predicted(self, work: LayerWork, assignment: Precisions) -> LayerTime:
        precision = work.precision(assignment)
        peak = self.target.peak(precision)
        if peak is None:
            raise ValueError(f"{self.target.name} has no {precision.value} tensor cores")
        if self._tensorrt is not None:
            return self._by_rules(work, precision, self._tensorrt.of(work, assignment))
        separate = precision is not Precision.FP16 and self.target.builder in SEPARATE_EPILOGUE
        compute = 2.0 * work.macs / (peak * 1e6 * self.efficiency.compute)
        written, reformats = self._formats(work, precision, assignment, several=separate)
        kernels, extra = self._epilogue(work) if separate else (0, 0)
        read = sum(
            r.elements * (r.form.bytes if r.form else BYTES[precision if r.follows else Precision.FP16])
            for r in work.reads
        )
        moved = 2 * work.moved * BYTES[Precision.FP16]
        own_bytes = read + moved + extra
        if work.kind is not LayerKind.INPUT:
            own_bytes += work.written * sum(BYTES[form] for form in written)
        weights = work.weights * BYTES[precision]
        reformat_bytes = work.written * sum(BYTES[Precision.FP16] + BYTES[form] for form in reformats)
        memory = self._memory_us(own_bytes + weights)
        kernels += work.kernels
        fixed = kernels * self.target.speed.kernel_us
        reformat = self._memory_us(reformat_bytes) + len(reformats) * self.target.speed.kernel_us
        return LayerTime(
            work.name, work.kind, precision, compute, memory, fixed, reformat,
            total_us=max(compute, memory) + fixed + reformat,
            kernels=kernels + len(reformats),
            activation_bytes=own_bytes + reformat_bytes,
            weight_bytes=weights,
        )  # fmt: skip

    def _by_rules(self, work: LayerWork, precision: Precision, kernels: Sequence[PlacedKernel]) -> LayerTime:
        """The sum of a layer's kernels in an engine of TensorRT's."""
        own = [kernel.work for kernel in kernels if kernel.role is Role.LAYER]
        times = [kernel_time(kernel, self.target.speed, self.rules) for kernel in own]
        reformats = [
            kernel_time(kernel.work, self.target.speed, self.rules).total_us
            for kernel in kernels
            if kernel.role is not Role.LAYER
        ]
        return LayerTime(
            work.name, work.kind, precision,
            sum(time.compute_us for time in times),
            sum(time.memory_us for time in times),
            sum(time.fixed_us for time in times),
            sum(reformats),
            total_us=sum(time.total_us for time in times) + sum(reformats),
            kernels=sum(kernel.work.count for kernel in kernels),
            activation_bytes=sum(kernel.work.activation_bytes for kernel in kernels),
            weight_bytes=sum(kernel.weight_bytes for kernel in own),
        )  # fmt: skip

    def _memory_us(self, size: int) -> float:
        return size / (self.target.speed.bandwidth * 1e3 * self.efficiency.memory)

    def _epilogue(self, work: LayerWork) -> tuple[int, int]:
        """Kernels and bytes that accumulators add: written, then read by the kernel that makes the output of them."""
        accumulator = ACCUMULATOR_BYTES[work.kind]
        readers = [reader for reader, _ in self._readers.get(work.writes, [])]
        if any(reader.kind in WRITES_SEVERAL and reader.kernels == 1 for reader in readers):
            return 0, 2 * work.written * (accumulator - BYTES[Precision.FP16])
        return 1, 2 * work.written * accumulator

    def _formats(
        self, work: LayerWork, precision: Precision, assignment: Precisions, *, several: bool
    ) -> tuple[list[Precision], list[Precision]]:
        """The formats in which a layer itself writes its output, and those that take a kernel of their own.

        An FP16 convolution has no 8-bit output, nor has an input in FP16; other kernels write one format of any kind,
        generated ones several.
        """
        if work.kind is LayerKind.INPUT and work.floats is Format.INT8:
            return [Precision.INT8], []
        readers = self._readers.get(work.writes, [])
        wanted = {reader.precision(assignment) if read.follows else Precision.FP16 for reader, read in readers}
        wanted = wanted or {Precision.FP16}
        ordered = [form for form in Precision if form in wanted]
        if several or work.kind in WRITES_SEVERAL:
            return ordered, []
        in_floats = work.kind is LayerKind.INPUT or (work.kind is LayerKind.CONV and precision is Precision.FP16)
        if in_floats or Precision.FP16 in wanted:
            return [Precision.FP16], [form for form in ordered if form is not Precision.FP16]
        return ordered[:1], ordered[1:]

    def _measured_scale(self) -> dict[Precision, float]:
        """By precision, the median ratio of measured to predicted time, for the layers that were not measured."""
        if self.measured is None:
            return {}
        ratios: dict[Precision, list[float]] = {}
        for precision in TENSOR_CORES:
            if self.target.peak(precision) is None:
                continue
            assignment = {node: precision for work in self.works for node in work.nodes}
            for work in self.works:
                found = self.measured.of((work.name, *work.nodes), work.precision(assignment))
                if found is not None and work.precision(assignment) is precision:
                    time = self._predicted(work, assignment)
                    own = time.total_us - time.reformat_us
                    if own > 0:  # An input of the network has no kernel of its own.
                        ratios.setdefault(precision, []).append(found / own)
        every = [ratio for some in ratios.values() for ratio in some]
        return {p: statistics.median(ratios.get(p) or every or [1.0]) for p in TENSOR_CORES}


def layer_times(
    works: Sequence[LayerWork], assignment: Precisions, target: Target, measured: MeasuredTimes | None = None
) -> Prediction:
    """Predict the time of each layer on ``target``, its products in the precisions of ``assignment``."""
    return CostModel(works, target, measured).predict(assignment)
