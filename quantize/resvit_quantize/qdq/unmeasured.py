"""The quantised form of a network whose ranges nobody measured yet: its kernels are right, its numbers are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges, TensorRange
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.network import onnx_from_network
from resvit_quantize.qdq.half import half_from_network
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.qdq.plan import plan_quantization
from resvit_quantize.settings import Effort, Methods, QuantizeSettings

_STEP = 1e-3
"""Between the ranges of two tensors: equal scales would be taken for one."""
_BY_SHAPE = Methods(smoothing=False, shifting=False, output_ranges=False, importance=False, bias_correction=False)


def quantise_unmeasured(model: Path, settings: QuantizeSettings, out: Path) -> dict[str, Precision]:
    """Write to ``out`` where Q/DQ and FP16 go in the float ``model``; returns the products in 8 bits, by name.

    Layers that the statistics of a calibration would spare are not spared. Raises as ``plan_quantization``.
    """
    graph = graph_from_onnx(model)
    values = {str(value.name) for node in graph.network.graph for value in (*node.inputs, *node.outputs) if value}
    ranges = {name: _range(1.0 + _STEP * index) for index, name in enumerate(sorted(values))}
    by_shape = dataclasses.replace(settings, estimator=Estimator.MAX, effort=Effort.FAST, methods=_BY_SHAPE)
    plan = plan_quantization(graph, Ranges(ranges, 0, ""), by_shape, None)
    insert_qdq(plan.network, plan.placement, plan.amax, {}, settings.bits)
    half_from_network(plan.network, {})
    onnx_from_network(plan.network, out)
    return {str(weight.node.name): weight.precision for weight in plan.placement.weights}


def _range(amax: float) -> TensorRange:
    return TensorRange(-amax, amax, {}, (), 0.0)
