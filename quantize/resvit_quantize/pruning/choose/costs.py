"""What a network costs at any widths, told from one recorded call: multiply-accumulates, parameters, microseconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from resvit_engines.targets.costs import CostModel
from resvit_engines.targets.layer_times import MeasuredTimes
from resvit_engines.targets.layer_work import LayerKind, LayerWork, MatrixShape, Read
from resvit_engines.targets.table import Precision, Target
from resvit_quantize.pruning.groups import Group, Kept, Kind

Widths: TypeAlias = Mapping[str, int]
"""Units kept by the group's name; groups that are not named are whole. A block is 1, or 0 once it is gone."""

TILES = {Precision.FP16: 8, Precision.FP8: 16, Precision.INT8: 32}
"""Channels that a tensor-core kernel takes at once; a narrower or odd width costs as much as the next multiple.

FP16 and FP8: 16 bytes, NVIDIA's "Matrix multiplication background user's guide". INT8: the 32 channels of
TensorRT's vectorised format ``kCHW32``."""


def widths_of(kept: Kept) -> dict[str, int]:
    """How many units stay, of which ones."""
    return {name: len(units) for name, units in kept.items()}


@dataclass(frozen=True)
class Axis:
    """A width, and how it shrinks: ``shares`` are (group, its units, channels here per unit)."""

    full: int
    shares: tuple[tuple[str, int, int], ...] = ()

    def at(self, widths: Widths) -> int:
        """Channels that stay."""
        return self.full - sum(each * (units - widths.get(name, units)) for name, units, each in self.shares)


@dataclass(frozen=True)
class Weights:
    """One parameter. ``blocks`` are the groups that take it away whole."""

    name: str
    axes: tuple[Axis, ...]
    blocks: tuple[str, ...] = ()

    @property
    def groups(self) -> frozenset[str]:
        """The groups that its size depends on."""
        return frozenset({name for axis in self.axes for name, _, _ in axis.shares} | set(self.blocks))

    def gone(self, widths: Widths) -> bool:
        """Whether its block was skipped."""
        return any(widths.get(block, 1) == 0 for block in self.blocks)

    def elements(self, widths: Widths) -> int:
        """Numbers that stay."""
        return 0 if self.gone(widths) else math.prod(axis.at(widths) for axis in self.axes)


@dataclass(frozen=True)
class Weighted:
    """A convolution, linear layer or norm, and its positions per image: those written, and those read."""

    name: str
    kind: LayerKind
    weights: Weights
    written: int
    read: int
    grouped: bool = False
    """A convolution in groups (depthwise, for one that shrinks): it reads the channels that it writes."""
    kernels: int = 1

    @property
    def groups(self) -> frozenset[str]:
        """The groups that its cost depends on."""
        return self.weights.groups

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates per image."""
        return 0 if self.kind is LayerKind.NORM else self.written * self.weights.elements(widths)

    def layer_work(self, widths: Widths, tile: int) -> LayerWork | None:
        """Its work with channels rounded up to whole tiles; ``None`` once its block is gone."""
        if self.weights.gone(widths):
            return None
        sizes = [axis.at(widths) for axis in self.weights.axes]
        out = _rounded(sizes[0], tile)
        product = self.kind is not LayerKind.NORM
        inner = _rounded(sizes[1], tile) if product and not self.grouped else 1
        inside = inner if product and not self.grouped else out
        weights = out * inner * math.prod(sizes[2:])
        if self.grouped:
            weights *= sizes[1]
        return LayerWork(
            name=self.name,
            kind=self.kind,
            reads=(Read(f"{self.name}:in", self.read * inside, follows=product),),
            writes=f"{self.name}:out",
            written=self.written * out,
            macs=self.written * weights if product else 0,
            weights=weights,
            kernels=self.kernels,
            nodes=(self.name,) if product else (),
            shape=self._shape(out, weights // out, inner) if product else None,
        )

    def _shape(self, out: int, depth: int, channels: int) -> MatrixShape:
        groups = out if self.grouped else 1
        return MatrixShape(self.written, out // groups, depth, channels, groups)


@dataclass(frozen=True)
class Attending:
    """The products of activations in one module; they shrink with the heads that stay."""

    name: str
    whole: int
    """Multiply-accumulates per image with all heads."""
    read: int
    written: int
    heads: tuple[str, int] | None = None
    """The group of the heads, and how many there are."""
    blocks: tuple[str, ...] = ()

    @property
    def groups(self) -> frozenset[str]:
        """The groups that its cost depends on."""
        return frozenset({*self.blocks, *([self.heads[0]] if self.heads else [])})

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates per image."""
        return self._part(self.whole, widths)

    def layer_work(self, widths: Widths, tile: int) -> LayerWork | None:
        """One fused kernel in FP16; ``None`` once its block is gone."""
        del tile
        if any(widths.get(block, 1) == 0 for block in self.blocks):
            return None
        return LayerWork(
            name=self.name,
            kind=LayerKind.ATTENTION,
            reads=(Read(f"{self.name}:in", self._part(self.read, widths)),),
            writes=f"{self.name}:out",
            written=self._part(self.written, widths),
            macs=self.macs(widths),
        )

    def _part(self, whole: int, widths: Widths) -> int:
        if any(widths.get(block, 1) == 0 for block in self.blocks):
            return 0
        if self.heads is None:
            return whole
        name, heads = self.heads
        return -(-whole * widths.get(name, heads) // heads)


@dataclass(frozen=True)
class Costs:
    """One image's way through a network, as a function of the units that each group keeps.

    Convolutions, linear layers, attention and norms are seen; pooling, and pointwise layers that do not fuse, are
    not, nor is what lies between two layers in another format: latencies compare widths, and are no promise.
    """

    layers: tuple[Weighted | Attending, ...]
    parameters: tuple[Weights, ...]

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates per image, products of activations among them."""
        return sum(layer.macs(widths) for layer in self.layers)

    def params(self, widths: Widths) -> int:
        """Parameters; one that two modules share counts once."""
        return sum(weights.elements(widths) for weights in self.parameters)

    def latency_us(
        self, widths: Widths, target: Target, precision: Precision, measured: MeasuredTimes | None = None
    ) -> float:
        """Predicted microseconds for one image, every convolution and linear layer in ``precision``.

        Where times of the whole network were measured, every layer's prediction is scaled by its own. Never more for
        fewer units. Raises ``ValueError`` where the target has no such tensor cores.
        """
        scale = self.time_scale(target, precision, measured)
        return sum(scale[layer.name] * layer_us(layer, widths, target, precision) for layer in self.layers)

    def time_scale(self, target: Target, precision: Precision, measured: MeasuredTimes | None) -> dict[str, float]:
        """Measured over predicted time of each layer at its whole width; the median of them for those not measured.

        Measured names are those of ONNX nodes, ``module.path/Operator``. Raises ``ResvitError`` where none of them
        is a layer of this network.
        """
        if measured is None:
            return dict.fromkeys((layer.name for layer in self.layers), 1.0)
        nodes: dict[str, list[str]] = {}
        for node in measured.layers:
            nodes.setdefault(node.partition("/")[0], []).append(node)
        measured.require_known([next(iter(nodes.get(layer.name, [layer.name]))) for layer in self.layers])
        found: dict[str, float] = {}
        for layer in self.layers:
            time = measured.of(nodes.get(layer.name, ()), precision)
            if time is not None:
                found[layer.name] = time / layer_us(layer, {}, target, precision)
        middle = statistics.median(found.values()) if found else 1.0
        return {layer.name: found.get(layer.name, middle) for layer in self.layers}


def layer_us(layer: Weighted | Attending, widths: Widths, target: Target, precision: Precision) -> float:
    """Predicted microseconds of one layer."""
    work = layer.layer_work(widths, TILES[precision])
    if work is None:
        return 0.0
    return CostModel([work], target).total_us({layer.name: precision})


def heads_over(groups: Sequence[Group], path: str) -> tuple[str, int] | None:
    """The heads that a product of activations inside module ``path`` belongs to: those of the nearest module around."""
    best: tuple[int, str, int] | None = None
    for group in groups:
        if group.kind is not Kind.HEADS or not group.slices:
            continue
        around = _common([part.tensor.split(".")[:-1] for part in group.slices])
        if path.split(".")[: len(around)] == around and (best is None or len(around) > best[0]):
            best = len(around), group.name, group.units
    return None if best is None else best[1:]


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _rounded(width: int, tile: int) -> int:
    return -(-width // tile) * tile
