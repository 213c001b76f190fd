"""Float ONNX models to quantised ones: Q/DQ where TensorRT, or ONNX Runtime, wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.equalize.biases import add_biases
from resvit_quantize.equalize.smoothing import Reader
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.network import onnx_from_network
from resvit_quantize.placement.grid import StoredWeight, quantise_weight, require_finite
from resvit_quantize.qdq.floors import floors_of
from resvit_quantize.qdq.half import KeptFloat, half_from_network
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.qdq.report import QuantizeReport, SmoothedTensor, Suit, as_it_is, report_from_graph
from resvit_quantize.qdq.wide_biases import widen_biases
from resvit_quantize.settings import Effort, QuantizeSettings, Rules

_REST = {Rules.TENSORRT: "FP16", Rules.ONNXRUNTIME: "FP32"}
"""What is not quantised computes in this."""


def quantize_model(
    model: Path,
    ranges: Ranges,
    settings: QuantizeSettings,
    out: Path,
    reporter: Reporter = SILENT,
    *,
    statistics: Statistics | None = None,
    images: Callable[[int], Iterable[Batch]] | None = None,
    suit: Suit = as_it_is,
) -> QuantizeReport:
    """Write the quantised form of ``model`` to ``out``, with inputs and outputs in FP32 as they were.

    ``statistics`` are the calibration's by channel; ``images(n)`` gives the first n calibration images or all,
    in batches, for ``Effort.BEST``. ``suit`` rewrites the file for a builder before it is reported
    on. Raises :class:`ResvitError` for a model that does not read
    or check, as :func:`plan_quantization` does, for weights that are not finite, and for ``Effort.BEST`` without
    images.
    """
    graph, compensation = graph_from_onnx(model), None
    if settings.effort is Effort.BEST and settings.precision.quantises:
        if images is None:
            raise ResvitError("--effort best learns from images, and none were given.", "Say --data.")
        from resvit_quantize.rounding.learned_plan import learned_plan

        plan, compensation = learned_plan(graph, ranges, settings, statistics, images, reporter)
    else:
        plan = plan_quantization(graph, ranges, settings, statistics)
    network, placement, precision, rules = plan.network, plan.placement, settings.precision, settings.rules
    floors = floors_of(plan, ranges) if rules is Rules.ONNXRUNTIME else None
    if not placement.edges and precision.quantises:
        reporter.warn(f"No node is quantised to {precision.value}: the rules and patterns leave all in {_REST[rules]}.")
    if compensation is not None:
        compensation.insert_into(network, placement, settings.bits, floors)
    else:
        biases = mean_errors(plan, settings.bits) if settings.methods.bias_correction else {}
        insert_qdq(network, placement, plan.amax, {}, settings.bits, floors)
        add_biases(network, biases)
    amax = plan.amax if compensation is None else compensation.amax
    moved = {item.tensor for item in plan.moved}
    clips = {n: float(clip) for (n, _), clip in sorted(amax.items()) if n in ranges.tensors and n not in moved}
    kept: tuple[KeptFloat, ...] = ()
    if rules is Rules.TENSORRT:
        largest = {name: max(abs(r.minimum), abs(r.maximum)) for name, r in ranges.tensors.items()}
        kept = half_from_network(network, largest)
    widen_biases(network)
    onnx_from_network(network, out)
    return report_from_graph(
        plan.analysis,
        suit(out) or network,
        placement.reasons,
        kept,
        precision=precision.value,
        quantizer="resvit",
        estimator=settings.estimator.value,
        sizes=(model.stat().st_size, out.stat().st_size),
        effort=settings.effort.value,
        clips=clips,
        smoothed=[SmoothedTensor(item.tensor, item.strength, round(item.gain_db, 2)) for item in plan.moved],
    )


def mean_errors(plan: Plan, bits: int = 8) -> dict[str, np.ndarray]:
    """What rounding the weights takes from the mean of each layer's outputs, [O] by node name.

    Bias correction in closed form (Nagel et al. 2019): (W - Ŵ) E[x], the padding of convolutions left out of
    account.
    """
    found: dict[str, np.ndarray] = {}
    for place_ in plan.placement.weights:
        node = place_.node
        value = node.inputs[0]
        mean = plan.means.get(str(value and value.name))
        weight = require_finite(place_)
        if mean is None or node.op_type == "ConvTranspose":
            continue
        rounded = StoredWeight(*quantise_weight(weight, place_.axis, place_.precision, bits))
        reader = Reader(node, weight - rounded.restored(place_.axis))
        if len(reader.by_input()) == len(mean):
            found[str(node.name)] = reader.mean_output(mean).astype(np.float32)
    return found
