"""Scales moved from activations into weights, channel by channel, where the network computes the same afterwards.

What writes a channel (a norm, a layer) is divided by a factor, and what reads it is multiplied. Behind a norm this is
SmoothQuant (Xiao et al. 2023); between convolutions with a ReLU it is cross-layer equalisation (Nagel et al. 2019);
here it also crosses residual additions and attention's values. The strength is chosen for each group of channels, by
the error of activations and weights that it predicts at the readers' outputs; where little is won, nothing is moved.
Factors that fit one half of the calibration images are judged by the other: a channel that was small by chance would
be cut off in every image where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_calibrate.observe.histogram import ChannelStatistics
from resvit_calibrate.ranges.channels import BEYOND
from resvit_calibrate.ranges.known import digest_of, known
from resvit_calibrate.ranges.reaches import reach_errors
from resvit_engines.targets.table import Precision
from resvit_quantize.equalize.channel_flow import Flow, channel_flow
from resvit_quantize.graph.network import add_initializer, constant, int_attribute
from resvit_quantize.placement.grid import largest_level
from resvit_quantize.placement.placement import Placement, channel_axis, edge_key

_STRENGTHS = (0.5, 0.75, 1.0)
_FURTHEST = 64.0
"""Largest factor between two channels, so that FP16 holds what is scaled."""
_WORTH = 0.95
"""Predicted errors within 5% of each other are taken as equal: then nothing is moved."""
_LINEAR = frozenset({"MatMul", "Gemm"})
_SETS = 3
"""Factors by all images, and by each half of them."""


@dataclass(frozen=True, eq=False)
class Moved:
    """What was moved at one tensor: ``scale`` [C] divides its channels; ``strength`` is SmoothQuant's alpha."""

    tensor: str
    scale: np.ndarray
    strength: float
    amax: dict[Precision, float]
    """The clips of the scaled tensor with the least predicted error."""
    gain_db: float
    """How much less error is predicted at the outputs of all readers of the group."""


@dataclass(frozen=True, eq=False)
class Reader:
    """How one reader weighs its input channels."""

    node: ir.Node
    weight: np.ndarray

    def by_input(self) -> np.ndarray:
        """The weight as [C, G-outputs·taps]: all that each input channel is multiplied by."""
        node, weight = self.node, self.weight
        if node.op_type in _LINEAR:
            transposed = node.op_type == "Gemm" and int_attribute(node, "transB")
            return np.asarray(weight.T if transposed else weight)
        groups = int_attribute(node, "group", 1)
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # [G, O/G, C/G, taps]
        return np.asarray(parts.transpose(0, 2, 1, 3).reshape(groups * weight.shape[1], -1))

    def energy(self) -> np.ndarray:
        """The sum of squares [C] of all that each input channel is multiplied by."""
        return np.asarray(np.square(self.by_input(), dtype=np.float64).sum(axis=1))

    def mean_output(self, mean: np.ndarray) -> np.ndarray:
        """What inputs of the constant values ``mean`` [C] give at the outputs [O]."""
        node, weight = self.node, self.weight
        if node.op_type in _LINEAR:
            transposed = node.op_type == "Gemm" and int_attribute(node, "transB")
            alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
            return np.asarray(alpha * (weight @ mean if transposed else mean @ weight))
        groups = int_attribute(node, "group", 1)
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).sum(axis=3)
        return np.asarray(np.einsum("goc,gc->go", parts, mean.reshape(groups, -1)).reshape(-1))

    def scaled(self, scale: np.ndarray) -> np.ndarray:
        """The weight with each input channel multiplied by ``scale`` [C]."""
        node, weight = self.node, self.weight
        if node.op_type in _LINEAR:
            transposed = node.op_type == "Gemm" and int_attribute(node, "transB")
            return np.asarray(weight * (scale if transposed else scale[:, None]))
        groups = int_attribute(node, "group", 1)
        factor = np.repeat(scale.reshape(groups, 1, weight.shape[1]), weight.shape[0] // groups, axis=1)
        return np.asarray(weight * factor.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2)))


def smooth(
    model: ir.Model,
    placement: Placement,
    channels: Mapping[str, ChannelStatistics],
    bits: int = 8,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Moved, ...]:
    """Move scales in place, for every group of channels that gains by it; the network's outputs stay the same.

    ``channels`` are the calibration's statistics by tensor name, and ``shapes`` all tensors' for one image where they
    are known already.
    """
    if not placement.edges or not channels:
        return ()
    wanted: dict[ir.Value, int] = {}
    for edge in placement.edges:
        value = edge.node.inputs[edge.index]
        if value is not None and value not in wanted:
            rank = len(value.shape) if value.shape is not None else 0
            wanted[value] = 1 if edge.node.op_type not in _LINEAR and rank == 4 else -1
    flow = channel_flow(model, wanted, shapes)
    for value in wanted:
        variables = flow.tensors.get(str(value.name))
        seen = channels.get(str(value.name))
        if variables is not None and (seen is None or len(seen.absmax) != len(variables)):
            flow.free[variables] = False
    scales = np.ones((_SETS, len(flow.free)))
    strengths = np.zeros(len(flow.free))
    gains = np.zeros(len(flow.free))
    for variables in _groups(flow):
        group = _Group(flow, placement, channels, variables, bits)
        if found := group.factors():
            scales[:, variables], strengths[variables], gains[variables] = found
    if not gains.any():
        return ()
    moved = []
    for name, variables in flow.tensors.items():
        own = scales[:, variables]
        if own[0].max() != own[0].min() or own[0, 0] != 1.0:
            clips = _clips(placement, name, channels[name], own, bits)
            at = variables[gains[variables].argmax()]
            moved.append(Moved(name, own[0], float(strengths[at]), clips, float(gains[at])))
    _apply(model, flow, scales[0])
    return tuple(moved)


def _groups(flow: Flow) -> list[np.ndarray]:
    """Free variables that share a tensor or a reader, group by group."""
    parent = np.arange(len(flow.free))

    def root(variable: int) -> int:
        while parent[variable] != variable:
            parent[variable] = parent[parent[variable]]
            variable = int(parent[variable])
        return variable

    sets = [*flow.tensors.values(), *(read.variables for read in flow.read)]
    for variables in sets:
        free = variables[flow.free[variables]]
        for variable in free[1:]:
            parent[root(int(variable))] = root(int(free[0]))
    seen = np.unique(np.concatenate(sets)) if sets else np.zeros(0, int)
    grouped: dict[int, list[int]] = {}
    for variable in seen[flow.free[seen]]:
        grouped.setdefault(root(int(variable)), []).append(int(variable))
    return [np.array(variables) for variables in grouped.values() if len(variables) > 1]


class _Group:
    """Channels that are scaled together: what quantises and what reads them."""

    def __init__(
        self,
        flow: Flow,
        placement: Placement,
        channels: Mapping[str, ChannelStatistics],
        variables: np.ndarray,
        bits: int,
    ) -> None:
        self.variables, self.bits, self.count = variables, bits, len(flow.free)
        precisions = {weight.node: weight.precision for weight in placement.weights}
        self.readers: list[tuple[Reader, np.ndarray, Precision | None, ChannelStatistics | None]] = []
        for read in flow.read:
            weight = constant(read.node.inputs[1])
            value = read.node.inputs[0]
            if weight is not None and np.isin(read.variables, variables).any():
                seen = channels.get(str(value and value.name))
                self.readers.append((Reader(read.node, weight), read.variables, precisions.get(read.node), seen))
        self.tensors = {n: v for n, v in flow.tensors.items() if np.isin(v, variables).any()}
        self.seen = {name: channels[name] for name in self.tensors}
        self.kinds = {name: {e.precision for e in placement.edges if edge_key(e)[0] == name} for name in self.tensors}
        self.energy = {name: self._energy(name) for name in self.tensors}

    def _energy(self, name: str) -> np.ndarray:
        """What an error in each channel [C] weighs, as a share of each reader's output power."""
        total = np.zeros(len(self.seen[name].absmax))
        power = self.seen[name].mean_square.astype(np.float64)
        for reader, _, precision, _ in self.readers:
            if str(_name(reader.node, 0)) == name and precision is not None:
                energy = reader.energy()
                total += energy / max(float(energy @ power), 1e-30)
        return total if total.any() else np.full(len(power), 1.0 / max(float(power.sum()), 1e-30))

    def factors(self) -> tuple[np.ndarray, float, float] | None:
        """(factors [3, V] of the group's variables, strength, gain in dB) with the least predicted error."""
        weigh = np.zeros(self.count)
        for reader, variables, _, _ in self.readers:
            largest = np.abs(reader.by_input()).max(axis=1, initial=0.0).astype(np.float64)
            np.maximum.at(weigh, variables, largest / max(float(largest.max()), 1e-30))
        weigh = weigh[self.variables]
        reaches = [self._reach(number) for number in range(_SETS)]
        if not self.tensors or ((reaches[0] > 0) & (weigh > 0)).sum() < 2:
            return None
        plain = self._error(np.ones((_SETS, len(weigh))))
        least, best = plain * _WORTH, None
        for strength in _STRENGTHS:
            scales = np.stack([_factors(reach, weigh, strength) for reach in reaches])
            error = self._error(scales)
            if error < least:
                least = error
                best = scales, strength, float(10.0 * np.log10(plain / max(error, 1e-300)))
        return best

    def _reach(self, number: int) -> np.ndarray:
        """How far each of the group's variables reaches, as a share of its tensor, in all images or in a half."""
        reach = np.zeros(self.count)
        for name, variables in self.tensors.items():
            absmax = _seen_by(self.seen[name])[number].extent.astype(np.float64)
            np.maximum.at(reach, variables, absmax / max(float(absmax.max()), 1e-30))
        return np.asarray(reach[self.variables])

    def _error(self, factors: np.ndarray) -> float:
        """The predicted noise-to-signal ratios of all readers' outputs, added up."""
        scales = np.ones((_SETS, self.count))
        scales[:, self.variables] = factors
        total = 0.0
        for name, variables in self.tensors.items():
            for precision in self.kinds[name]:
                own = scales[:, variables]
                total += _least_error(self.seen[name], self.energy[name], own, precision, self.bits)[0]
        for reader, variables, kind, seen in self.readers:
            if kind is Precision.INT8 and seen is not None:
                total += _weight_error(seen, reader, scales[0, variables], kind, self.bits)
        return total


def _factors(reach: np.ndarray, weigh: np.ndarray, strength: float) -> np.ndarray:
    """SmoothQuant's factors of channels that reach and weigh so much [V], in the units of the largest."""
    scale = np.ones(len(reach))
    alive = (reach > 0) & (weigh > 0)
    if not alive.any():
        return scale
    scale[alive] = reach[alive] ** strength / weigh[alive] ** (1.0 - strength)
    middle = np.exp(np.log(scale[alive]).mean())
    scale[alive] = np.clip(scale[alive] / middle, _FURTHEST**-0.5, _FURTHEST**0.5)
    # No channel reaches further than its tensor did before, so that FP16 holds it as well.
    scale *= max(float((reach / scale).max() / reach.max()), 1.0)
    return np.asarray(scale.astype(np.float32).astype(np.float64))


def _seen_by(seen: ChannelStatistics) -> tuple[ChannelStatistics, ...]:
    """Of all images, and of each half: of all again where there are no halves."""
    return (seen, *seen.halves) if seen.halves else (seen,) * _SETS


def _least_error(
    seen: ChannelStatistics,
    energy: np.ndarray,
    scales: np.ndarray,
    precision: Precision,
    bits: int,
    candidates: int = 6,
) -> tuple[float, float]:
    """The least error that quantised activations cause, each channel's weighed by ``energy``, and its clip.

    ``scales`` [3, C] are by all images and by each half. A clip is a share of the largest value of one half, and its
    error that of the other half's values.
    """
    key = "least error", digest_of(energy, scales), precision, bits, candidates
    return known(seen, key, lambda: _searched(seen, energy, scales, precision, bits, candidates))


def _searched(
    seen: ChannelStatistics, energy: np.ndarray, scales: np.ndarray, precision: Precision, bits: int, candidates: int
) -> tuple[float, float]:
    largest = [float((own.extent / scale).max()) for own, scale in zip(_seen_by(seen), scales, strict=True)]
    # Fewer levels want more clipping; a factor of four is enough at 8 bits.
    shares = np.geomspace(0.25 if bits == 8 else 1.0 / 16.0, 1.0, candidates)
    pairs = [(seen, largest[0], scales[0])]
    if seen.halves and min(largest) > 0.0:
        shares = np.append(shares, np.geomspace(1.0, BEYOND, candidates // 2 + 1)[1:])
        pairs = list(zip(reversed(seen.halves), largest[1:], scales[1:], strict=True))
    errors = [reach_errors(each, precision.value, bits)((shares * reach)[:, None] * own) for each, reach, own in pairs]
    weighed = np.mean(errors, axis=0) @ energy
    best = int(weighed.argmin())
    return float(weighed[best]), float(shares[best] * largest[0])


def _weight_error(seen: ChannelStatistics, reader: Reader, scale: np.ndarray, precision: Precision, bits: int) -> float:
    """The share of noise at the outputs from weights in INT8: uniform within the steps of each output channel."""
    weight = reader.scaled(scale).astype(np.float64)
    axis = channel_axis(reader.node)
    others = tuple(index for index in range(weight.ndim) if index != axis)
    steps = np.abs(weight).max(axis=others) / largest_level(precision, bits)
    power = seen.mean_square.astype(np.float64)
    inputs = weight.size / weight.shape[axis]
    noise = np.square(steps).sum() / 12.0 * inputs * float((power / np.square(scale)).mean())
    signal = float(reader.energy() @ power)
    return float(noise) / max(signal, 1e-30)


def _clips(
    placement: Placement, name: str, seen: ChannelStatistics, scales: np.ndarray, bits: int
) -> dict[Precision, float]:
    """The clip of a tensor scaled with ``scales`` [3, C] at each precision that it is quantised to."""
    found: dict[Precision, float] = {}
    for edge in placement.edges:
        if edge_key(edge)[0] != name or edge.precision in found:
            continue
        energy = np.zeros(scales.shape[1])
        for weight in placement.weights:
            array = constant(weight.node.inputs[1]) if _name(weight.node, 0) == name else None
            if array is not None:
                read = Reader(weight.node, array).energy()
                energy += read if len(read) == scales.shape[1] else 0.0
        energy = energy if energy.any() else np.ones(scales.shape[1])
        found[edge.precision] = _least_error(seen, energy, scales, edge.precision, bits, candidates=24)[1]
    return found


def _apply(model: ir.Model, flow: Flow, scales: np.ndarray) -> None:
    """Divide all that writes and multiply all that reads."""
    for written in flow.written:
        scale = scales[written.variables]
        array = constant(written.node.inputs[written.index])
        if array is not None and (scale != 1.0).any():
            shape = [-1 if axis == written.axis else 1 for axis in range(array.ndim)]
            _replace(model, written.node, written.index, array / scale.reshape(shape))
    for read in flow.read:
        array = constant(read.node.inputs[1])
        if array is not None and (scales[read.variables] != 1.0).any():
            _replace(model, read.node, 1, Reader(read.node, array).scaled(scales[read.variables]))


def _replace(model: ir.Model, node: ir.Node, index: int, array: np.ndarray) -> None:
    old = node.inputs[index]
    assert old is not None
    name = str(old.name)
    model.graph.initializers.pop(name)
    node.replace_input_with(index, add_initializer(model, name, array.astype(np.float32)))


def _name(node: ir.Node, index: int) -> str | None:
    value = node.inputs[index]
    return None if value is None else value.name
