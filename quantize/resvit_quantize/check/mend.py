"""Layers whose error is out of line, left in FP16 where that is cheap and really helps the outputs.

Where the outputs keep little, one pass with gradients over a few images tells what the error of each layer makes at the
outputs. A layer is out of line if its share of that noise is far larger than its share of the arithmetic: depthwise
convolutions, whose few products average nothing out, above all. Every image counts as much: of a few images one may
make more noise than all others together, and what hurts there says little of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from resvit_calibrate.images.image_set import ImageSource
from resvit_calibrate.ranges.ranges import Ranges
from resvit_engines.errors import ResvitError
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.placement.patterns import node_matches
from resvit_quantize.qdq.held_back import MendedLayer
from resvit_quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from resvit_quantize.sensitivity.sensitivity import Sensitivity

LOW_DB = 25.0
"""Where the outputs keep more than this, no layer is looked for."""
BOUNDS = (0.02, 0.06)
"""Shares of the multiply-accumulates that may stay in FP16 for it: the larger one where it gains as much again."""
WORTH_DB = 0.5
"""What that must gain at the outputs, on the held-back images."""
_OUT_OF_LINE = 2.0
"""How much larger a layer's share of the noise is than its share of the arithmetic."""
_LEAST = 0.001
"""The share of the noise below which a layer is not worth naming."""


def layers_out_of_line(
    graph: AnalysedGraph,
    ranges: Ranges,
    settings: QuantizeSettings,
    images: ImageSource,
    count: int,
) -> tuple[dict[float, tuple[MendedLayer, ...]], str]:
    """By the bound, the layers that save most noise for their arithmetic within it; empty, and why, where none does.

    The first ``count`` images tell what each layer's error makes at the outputs.

    Layers that the user asked for by name or pattern are left alone. Operators without a gradient here are a reason to
    find none.
    """
    from resvit_quantize.sensitivity.sensitivity import measure_sensitivity

    precision = settings.precision.value
    try:
        found = measure_sensitivity(
            graph, ranges, settings, images(count), total=count, precisions=(precision,), probes=2, evenly=True
        )
    except ResvitError as error:
        return {}, f"Which layers are out of line was not told: {error.problem}"
    asked = _asked_for(graph, settings)
    lists = {bound: _within(found, precision, bound, asked) for bound in BOUNDS}
    if not any(lists.values()):
        return {}, "No layer's error is out of line."
    return lists, ""


def reasons(layers: Sequence[MendedLayer]) -> Mapping[str, str]:
    """Why each stays in FP16."""
    return {
        item.node: (
            f"its error is out of line: {item.noise:.0%} of the predicted noise at the outputs for {item.macs:.1%} of "
            "the multiply-accumulates"
        )
        for item in layers
    }


def _within(found: Sensitivity, precision: str, bound: float, asked: set[str]) -> tuple[MendedLayer, ...]:
    macs, total = max(found.macs, 1), found.total(precision)
    layers = [
        MendedLayer(layer.node, layer.damage[precision] / total, layer.macs / macs)
        for layer in found.chosen(precision)
        if layer.node not in asked and total > 0.0
    ]
    out = [item for item in layers if item.noise >= max(_LEAST, _OUT_OF_LINE * item.macs)]
    taken, left = [], bound
    for item in sorted(out, key=lambda item: (-item.noise / max(item.macs, 1e-9), item.node)):
        if item.macs <= left:
            taken.append(item)
            left -= item.macs
    return tuple(taken)


def _asked_for(graph: AnalysedGraph, settings: QuantizeSettings) -> set[str]:
    nodes = [product.node for product in graph.analysis.products]
    included = {str(node.name) for node in nodes if any(node_matches(node, each) for each in settings.include)}
    return included | set(settings.precisions)
