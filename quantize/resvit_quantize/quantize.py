"""Float ONNX models to quantised ones: Q/DQ where TensorRT wants it, FP16 everywhere else."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from resvit_calibrate.ranges import Ranges
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.graph import Analysis, analyse
from resvit_quantize.half import half_from_network
from resvit_quantize.network import network_from_onnx, onnx_from_network
from resvit_quantize.placement import place
from resvit_quantize.qdq import LARGEST, LARGEST_SCALE, SMALLEST_SCALE, insert_qdq
from resvit_quantize.report import QuantizeReport, report_from_graph
from resvit_quantize.settings import Precision, QuantizeSettings


def quantize_model(
    model: Path, ranges: Ranges, settings: QuantizeSettings, out: Path, reporter: Reporter = SILENT
) -> QuantizeReport:
    """Write the quantised form of ``model`` to ``out``, with inputs and outputs in FP32 as they were.

    Raises :class:`ResvitError` for a model that does not read or check, a pattern that matches nothing, a tensor
    without a range, and weights that are not finite.
    """
    network = network_from_onnx(model)
    analysis = analyse(network)
    precision = settings.precision
    unfit = {} if precision is Precision.FP16 else _unfit_tensors(analysis, ranges, settings)
    placement = place(analysis, precision, settings.include, settings.exclude, unfit)
    if placement.edges:
        tensors = {str(v.name) for edge in placement.edges if (v := edge.node.inputs[edge.index]) is not None}
        amax = {name: ranges.amax(name, precision.value, settings.estimator) for name in sorted(tensors)}
        insert_qdq(network, placement, amax, precision)
    elif precision is not Precision.FP16:
        reporter.warn(f"No node is quantised to {precision.value}: the rules and patterns leave all in FP16.")
    largest = {name: max(abs(r.minimum), abs(r.maximum)) for name, r in ranges.tensors.items()}
    kept = half_from_network(network, largest)
    size = onnx_from_network(network, out)
    return report_from_graph(
        analysis,
        network,
        placement.reasons,
        kept,
        precision=precision.value,
        quantizer="resvit",
        estimator=settings.estimator.value,
        sizes=(model.stat().st_size, size),
    )


def _unfit_tensors(analysis: Analysis, ranges: Ranges, settings: QuantizeSettings) -> dict[str, str]:
    """Tensors whose scale FP16 cannot hold, with the reason."""
    grid = LARGEST[settings.precision]
    unfit: dict[str, str] = {}
    for name in _candidates(analysis):
        if name not in ranges.tensors or not ranges.tensors[name].amax:
            continue
        amax = ranges.amax(name, settings.precision.value, settings.estimator)
        if not SMALLEST_SCALE <= amax / grid <= LARGEST_SCALE:
            unfit[name] = f"its input reaches {amax:.3g} in calibration, whose scale FP16 cannot hold"
    return unfit


def _candidates(analysis: Analysis) -> list[str]:
    """Tensors that the rules may quantise: inputs of weighted nodes and of the Adds behind them."""
    values: list[ir.Value | None] = [p.node.inputs[0] for p in analysis.products if p.weight is not None]
    for product in analysis.products:
        for use in product.node.outputs[0].uses():
            values += use.node.inputs if use.node.op_type == "Add" else ()
    return list(dict.fromkeys(str(v.name) for v in values if v is not None and v in analysis.data))
