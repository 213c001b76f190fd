"""Float ONNX models to quantised ones: Q/DQ where TensorRT, or ONNX Runtime, wants it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from resvit_calibrate.images.image_set import ImageSource
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.check.choose import Built, HeldBack, build, checked
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.network import onnx_from_network
from resvit_quantize.qdq.floors import floors_of
from resvit_quantize.qdq.half import KeptFloat, half_from_network
from resvit_quantize.qdq.held_back import HeldBackCheck
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
    images: ImageSource | None = None,
    held_back: HeldBack | None = None,
    suit: Suit = as_it_is,
) -> QuantizeReport:
    """Write the quantised form of ``model`` to ``out``, with inputs and outputs in FP32 as they were.

    ``statistics`` are the calibration's by channel; ``images(n)`` gives the first n calibration images or all,
    in batches, for ``Effort.BEST``. On the images of ``held_back`` methods are judged that ``Effort.FAST`` uses,
    those that hurt are left out, and so is what ``Effort.BEST`` learned where it is worse (see :func:`checked`).
    ``suit`` rewrites the file for a builder before it is reported on. Raises :class:`ResvitError` for a model that does
    not read or check, as :func:`plan_quantization` does, for weights that are not finite, and for ``Effort.BEST``
    without images.
    """
    graph = graph_from_onnx(model)

    def learned(chosen: QuantizeSettings, source: ImageSource | None = None) -> Built:
        from resvit_quantize.rounding.learned_plan import learned_plan

        source = source or images
        if source is None:
            raise ResvitError("--effort best learns from images, and none were given.", "Say --data.")
        plan, compensation = learned_plan(graph, ranges, chosen, statistics, source, reporter)
        floors = floors_of(plan, ranges) if chosen.rules is Rules.ONNXRUNTIME else None
        compensation.insert_into(plan.network, plan.placement, chosen.bits, floors)
        return Built(chosen, replace(plan, amax=compensation.amax), plan.network)

    learns = settings.effort is Effort.BEST and settings.precision.quantises
    check: HeldBackCheck | None = None
    if held_back is not None and settings.precision.quantises:
        built, check = checked(model, graph, ranges, settings, statistics, held_back, learned if learns else None)
    elif learns:
        built = learned(settings)
    else:
        built = build(graph, ranges, settings, statistics)
    plan, settings = built.plan, replace(built.settings, effort=settings.effort)
    network, placement, precision, rules = plan.network, plan.placement, settings.precision, settings.rules
    chosen = all(each.quantises for each in settings.precisions.values())  # else somebody wanted it so
    if not placement.edges and precision.quantises and chosen:
        reporter.warn(f"No node is quantised to {precision.value}: the rules and patterns leave all in {_REST[rules]}.")
    moved = {item.tensor for item in plan.moved}
    clips = {n: float(clip) for (n, _), clip in sorted(plan.amax.items()) if n in ranges.tensors and n not in moved}
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
        held_back=check,
    )
