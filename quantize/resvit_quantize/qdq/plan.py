"""The plan of a quantisation: which edges and weights get which scale, decided before the graph is touched."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from resvit_calibrate.observe.histogram import ChannelStatistics
from resvit_calibrate.ranges.channels import amax_for_output, channel_error
from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.known import known
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.targets.table import Precision
from resvit_quantize.equalize.shifting import Opened, close_activations, open_activations
from resvit_quantize.equalize.smoothing import Moved, Reader, smooth
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.graph.analysis import Analysis
from resvit_quantize.graph.network import constant
from resvit_quantize.placement.onnxruntime import placed_for_onnxruntime
from resvit_quantize.placement.patterns import node_matches
from resvit_quantize.placement.placement import Edge, EdgeKey, Placement, edge_key, place
from resvit_quantize.settings import QuantizeSettings, Rules

_SPARED = 0.02
"""The share of the multiply-accumulates that may stay in FP16 for accuracy's sake."""


_FEW_CHANNELS = 4
_LEAST_SHORTCUT_DB = 25.0
"""A shortcut that would keep a lower SQNR in 8 bits stays in FP16."""
_DB_PER_BIT = 6.0


@dataclass(frozen=True, eq=False)
class Plan:
    """All decisions that need no images: a float network, where it is quantised, and to which ranges."""

    network: ir.Model
    """In FP32; equal in its outputs to the model that the plan was made from."""
    analysis: Analysis
    placement: Placement
    amax: dict[EdgeKey, float]
    """The clip of each quantised tensor at each precision that it is quantised to."""
    moved: tuple[Moved, ...] = ()
    means: dict[str, np.ndarray] = field(default_factory=dict)
    """E[x] by channel [C] of the network's quantised tensors, where calibration knows it."""


def plan_quantization(
    graph: AnalysedGraph, ranges: Ranges, settings: QuantizeSettings, statistics: Statistics | None = None
) -> Plan:
    """Decide what is quantised and how far each range reaches.

    ``graph`` itself is left as it is. Smoothing and ranges for the least error at the output need the calibration's
    ``statistics`` by channel; without them ranges are the estimator's own. Raises :class:`ResvitError` for a pattern
    that matches nothing, and a tensor without a range.
    """
    graph = graph.copy()
    network, analysis = graph.network, graph.analysis
    precision, methods = settings.precision, settings.methods
    spared = _spared(analysis, settings) if methods.sparing and precision.quantises else {}
    own = dict.fromkeys(spared, Precision.FP16) | dict(settings.precisions)
    by_ort = settings.rules is Rules.ONNXRUNTIME
    placement = place(analysis, precision, settings.include, settings.exclude, own)
    if by_ort:
        placement = placed_for_onnxruntime(analysis, placement)
    placement.reasons.update({name: why for name, why in spared.items() if name not in settings.precisions})
    channels = _widened_channels(analysis, statistics) if statistics else {}
    opened: tuple[Opened, ...] = ()
    # Unsigned bytes have a zero point: there is nothing to shift for them.
    if methods.shifting and not by_ort:
        opened = open_activations(network, placement, channels, ranges.tensors, settings.bits)
        channels |= {item.tensor: item.channels for item in opened}
    shapes = dict(analysis.shapes)
    for item in opened:
        if item.source in shapes:
            shapes |= dict.fromkeys([str(item.factor.outputs[0].name), item.tensor], shapes[item.source])
    moved = smooth(network, placement, channels, settings.bits, shapes) if methods.smoothing else ()
    close_activations(network, opened)
    smoothed = {item.tensor: item for item in moved}
    shifted = {item.tensor for item in opened}
    amax: dict[EdgeKey, float] = {}
    for edge in placement.edges:
        value = edge.node.inputs[edge.index]
        key = edge_key(edge)
        if key in amax:
            continue
        if key[0] in smoothed:
            amax[key] = smoothed[key[0]].amax[edge.precision]
        elif key[0] in shifted:
            amax[key] = _output_amax(
                placement, value, channels[key[0]], float(channels[key[0]].absmax.max()), edge, settings
            )
        elif methods.output_ranges and settings.estimator is Estimator.MSE and key[0] in channels:
            seen = ranges.tensors[key[0]]
            absmax = max(abs(seen.minimum), abs(seen.maximum))
            amax[key] = _output_amax(placement, value, channels[key[0]], absmax, edge, settings)
        else:
            # Outputs have no histogram: TensorRT reads none of them in 8 bits for their own sake.
            plain = by_ort and key[0] in ranges.tensors and not ranges.tensors[key[0]].amax
            estimator = Estimator.MAX if plain else settings.estimator
            amax[key] = ranges.amax(key[0], edge.precision.value, estimator)
    if methods.sparing and not by_ort:
        scales = {name: item.scale for name, item in smoothed.items()}
        placement = _without_lost_shortcuts(placement, amax, channels, scales, settings.bits)
    means = {name: entry.mean for name, entry in channels.items()}
    means |= {name: channels[name].mean / item.scale for name, item in smoothed.items()}
    return Plan(network, analysis, placement, amax, moved, means)


def _widened_channels(analysis: Analysis, statistics: Statistics) -> dict[str, ChannelStatistics]:
    """Statistics by channel, with each channel's maximum over all values estimated from that of its sample.

    A sample of n of N values misses the largest: for Gaussian tails the expected maximum grows with the root of the
    logarithm, from n to N. No channel can exceed the tensor's exact maximum.
    """
    found: dict[str, ChannelStatistics] = {}
    for name, entry in statistics.tensors.items():
        if (seen := entry.channels) is None:
            continue
        values = math.prod(analysis.shapes.get(name, ())) * statistics.images / max(len(seen.count), 1)
        key = "widened", values, entry.absmax
        found[name] = known(seen, key, functools.partial(_widened, seen, values, entry.absmax))
    return found


def _widened(seen: ChannelStatistics, values: float, absmax: float) -> ChannelStatistics:
    halves = tuple(replace(half, reach=_widest(half, values / 2, absmax)) for half in seen.halves)
    return replace(seen, absmax=_widest(seen, values, absmax), halves=halves)


def _widest(seen: ChannelStatistics, values: float, largest: float) -> np.ndarray:
    """How far each channel [C] of so many ``values`` reaches, none of which is beyond ``largest``."""
    factor = np.sqrt(np.maximum(math.log(max(values, 2.0)) / np.log(np.maximum(seen.count, 2)), 1.0))
    return np.maximum(np.minimum(seen.absmax * factor, largest).astype(np.float32), seen.absmax)


def image_readers_in_half(analysis: Analysis, settings: QuantizeSettings) -> tuple[str, ...]:
    """The layers that read the image and stay in FP16, by name: an image in INT8 has no first Q there."""
    placement = place(analysis, settings.precision, settings.include, settings.exclude)
    quantised, spared = {edge.node for edge in placement.edges}, _spared(analysis, settings)
    return tuple(
        product.name
        for product in analysis.products
        if product.weight is not None
        and product.node.inputs[0] is not None
        and analysis.depth.get(product.node.inputs[0], 0) == 0
        and (product.node not in quantised or product.name in spared)
    )


def _spared(analysis: Analysis, settings: QuantizeSettings) -> dict[str, str]:
    """Convolutions that read the image and are cheap enough to stay in FP16, with the reason.

    What they lose, everything behind them loses; and with few input channels 8-bit kernels win nothing.
    """
    weighted = [product for product in analysis.products if product.weight is not None]
    total = analysis.weighted_macs
    found: dict[str, str] = {}
    left = 0
    for product in weighted:
        value = product.node.inputs[0]
        shape = product.weight.shape if product.weight is not None else None
        reads_image = product.node.op_type == "Conv" and value is not None and analysis.depth.get(value, 0) == 0
        asked = any(node_matches(product.node, pattern) for pattern in settings.include)
        channels = shape[1] if reads_image and shape is not None else None
        if not asked and isinstance(channels, int) and channels <= _FEW_CHANNELS:
            left += product.macs
            found[product.name] = "reads the image: costs little in FP16, and all that follows depends on it"
    return found if total and left <= _SPARED * total else {}


def _without_lost_shortcuts(
    placement: Placement,
    amax: Mapping[EdgeKey, float],
    channels: Mapping[str, ChannelStatistics],
    scales: Mapping[str, np.ndarray],
    bits: int,
) -> Placement:
    """The placement without the shortcuts of which 8 bits leave too little, by the calibration's statistics.

    What a layer reads, its weights and the mean over many products make small again; what a shortcut loses is lost to
    all blocks behind it. Where a few channels hold most of a stream, one step for all is too coarse for the others.
    """
    weighted = {weight.node for weight in placement.weights}
    least = _LEAST_SHORTCUT_DB - _DB_PER_BIT * (8 - bits)
    kept = []
    for edge in placement.edges:
        key = edge_key(edge)
        seen = None if edge.node in weighted else channels.get(key[0])
        if seen is not None:
            noise = channel_error(seen, amax[key], edge.precision.value, scales.get(key[0]), bits)[0].sum()
            if seen.mean_square.sum(dtype=np.float64) < 10.0 ** (least / 10.0) * noise:
                continue
        kept.append(edge)
    return replace(placement, edges=tuple(kept))


def _output_amax(
    placement: Placement,
    value: ir.Value | None,
    channels: ChannelStatistics,
    absmax: float,
    edge: Edge,
    settings: QuantizeSettings,
) -> float:
    """The clip up to ``absmax`` with the least error at the outputs of all weighted readers of one precision."""
    energy = np.zeros(len(channels.absmax))
    for weight in placement.weights:
        if weight.node.inputs[0] is not value or weight.precision is not edge.precision:
            continue
        array = constant(weight.node.inputs[weight.index])
        if array is None:
            continue
        read = Reader(weight.node, array).energy()
        if len(read) == len(energy):
            energy += read
    if not energy.any():
        energy += 1.0
    return amax_for_output(channels, energy, edge.precision.value, absmax, settings.bits)
