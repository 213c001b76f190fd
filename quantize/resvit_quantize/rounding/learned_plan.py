"""``--effort best``: what is worth learning from the calibration images themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from resvit_calibrate.images.image_set import Batch, ImageSource
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_calibrate.readers.user.loader import in_batches_of
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Reporter
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.graph.analysis import Analysis
from resvit_quantize.placement.patterns import node_matches
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.rounding.compensate import Compensation, compensate
from resvit_quantize.rounding.layer_rows import columns_of, rows_for
from resvit_quantize.sensitivity.sensitivity import COVERAGE, layers_to_exclude, measure_sensitivity
from resvit_quantize.settings import QuantizeSettings

_SENSED = 32
"""Images that decide which layers are spared."""
_MOST = 512
_MEMORY = 3 << 29
"""Bytes of activations that both networks may keep alive at once: 1.5 GiB."""
_DYNAMIC_CHUNK = 8


def learned_plan(
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    statistics: Statistics | None,
    images: ImageSource,
    reporter: Reporter,
) -> tuple[Plan, Compensation]:
    """Spare the layers that hurt most, within 2% of the multiply-accumulates, then round the others one by one.

    Where ``settings`` leave single layers in FP16 already, no others are spared. Says how long it will take before it
    starts. Raises :class:`ResvitError` for too few images for one batch of
    the model, and for operators that torch cannot run.
    """
    precision = settings.precision.value
    plan = plan_quantization(graph, ranges, settings, statistics)
    chunks = list(_chunks(images, plan))
    if not chunks:
        raise ResvitError(
            "There are fewer calibration images than the model's batch.", "Give more --calibration-images."
        )
    reporter.say(_announcement(plan, chunks))
    if settings.methods.sparing and Precision.FP16 not in settings.precisions.values():
        sensitivity = measure_sensitivity(
            graph, ranges, settings, images(_SENSED), reporter, _SENSED, precisions=(precision,), probes=2
        )
        asked = _asked_for(plan, settings)
        hurting = layers_to_exclude(sensitivity, precision, target=0.0, coverage=COVERAGE)
        spared = [layer for layer in hurting if layer.node not in asked]
        if spared:
            own = {layer.node: Precision.FP16 for layer in spared} | dict(settings.precisions)
            plan = plan_quantization(graph, ranges, replace(settings, precisions=own), statistics)
            for layer in spared:
                share = sensitivity.share(layer, precision)
                plan.placement.reasons[layer.node] = (
                    f"one of the few that hurt most: {share:.0%} of the predicted noise for "
                    f"{layer.macs / max(sensitivity.macs, 1):.1%} of the multiply-accumulates"
                )
    return plan, compensate(plan, chunks, settings, reporter)


def _asked_for(plan: Plan, settings: QuantizeSettings) -> set[str]:
    """Nodes whose precision the user has said: by a pattern of ``include``, or by name."""
    nodes = [product.node for product in plan.analysis.products]
    included = {str(n.name) for n in nodes if any(node_matches(n, pattern) for pattern in settings.include)}
    return included | set(settings.precisions)


def _chunks(images: ImageSource, plan: Plan) -> Iterator[Batch]:
    """Calibration images in whole chunks of the graph's batch, as many as the memory holds."""
    shape = plan.network.graph.inputs[0].shape
    fixed = shape[0] if shape is not None and len(shape) and isinstance(shape[0], int) else None
    size = fixed or _DYNAMIC_CHUNK
    wanted = max(min(_MOST, _MEMORY // max(2 * _live_bytes(plan), 1)), size)
    for chunk in in_batches_of(size, images(wanted if fixed is None else wanted - wanted % fixed)):
        if fixed is None or len(chunk.images) == fixed:
            yield chunk


def _live_bytes(plan: Plan) -> int:
    """The most bytes of FP32 activations that one image keeps alive at once."""
    network, shapes = plan.network, plan.analysis.shapes
    last: dict[str, int] = {}
    nodes = list(network.graph)
    for position, node in enumerate(nodes):
        for value in (*node.inputs, *node.outputs):
            if value is not None and not value.is_initializer():
                last[str(value.name)] = position
    alive: dict[str, int] = {}
    most = 0
    for position, node in enumerate(nodes):
        for output in node.outputs:
            alive[str(output.name)] = 4 * int(np.prod(shapes.get(str(output.name), (0,))))
        most = max(most, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last[name] > position}
    batch = shapes.get(str(network.graph.inputs[0].name), (1,))[0]
    return max(most // max(batch, 1), 1)


def _announcement(plan: Plan, chunks: list[Batch]) -> str:
    """How much there is to do and about how long it takes, by the speed of a matrix product on this machine."""
    side = 768
    square = torch.ones(side, side)
    _ = square @ square
    begin = time.perf_counter()
    for _ in range(3):
        _ = square @ square
    rate = 3 * side**3 / max(time.perf_counter() - begin, 1e-9)  # multiply-accumulates a second
    images = sum(len(chunk.images) for chunk in chunks)
    # Two forward passes, and about as much again around them at a third of the speed.
    passes = 6.0 * images * sum(product.macs for product in plan.analysis.products)
    seconds = (passes + _fitting(plan.analysis)) / rate
    minutes = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(seconds, 1):.0f} seconds"
    return f"Effort best: learns from {images} images, layer by layer; about {minutes} on this machine."


def _fitting(analysis: Analysis) -> float:
    """Multiply-accumulates of fitting all layers: Hessians from 16,384 rows at most, and three factorisations."""
    total = 0.0
    for product in analysis.products:
        shape = product.weight.shape if product.weight is not None and product.is_layer else None
        if shape is None or not shape.is_static():
            continue
        columns = columns_of(product.node, shape.numpy())
        total += rows_for(columns) * columns**2 + 3.0 * columns**3
    return total
