"""Float ONNX models to quantised ones: Q/DQ where TensorRT, or ONNX Runtime, wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ResvitError
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.check.choose import HeldBack, build, checked
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
    images: Callable[[int], Iterable[Batch]] | None = None,
    held_back: HeldBack | None = None,
    suit: Suit = as_it_is,
) -> QuantizeReport:
    """Write the quantised form of ``model`` to ``out``, with inputs and outputs in FP32 as they were.

    ``statistics`` are the calibration's by channel; ``images(n)`` gives the first n calibration images or all,
    in batches, for ``Effort.BEST``. On the images of ``held_back`` methods are judged that ``Effort.FAST`` uses, and
    those that hurt are left out (see :func:`checked`). ``suit`` rewrites the file for a builder before it is reported
    on. Raises :class:`ResvitError` for a model that does not read
    or check, as :func:`plan_quantization` does, for weights that are not finite, and for ``Effort.BEST`` without
    images.
    """
    graph, compensation = graph_from_onnx(model), None
    check: HeldBackCheck | None = None
    if settings.effort is Effort.BEST and settings.precision.quantises:
        if images is None:
            raise ResvitError("--effort best learns from images, and none were given.", "Say --data.")
        from resvit_quantize.rounding.learned_plan import learned_plan

        plan, compensation = learned_plan(graph, ranges, settings, statistics, images, reporter)
        floors = floors_of(plan, ranges) if settings.rules is Rules.ONNXRUNTIME else None
        compensation.insert_into(plan.network, plan.placement, settings.bits, floors)
    elif held_back is not None and settings.precision.quantises:
        built, check = checked(model, graph, ranges, settings, statistics, held_back)
        plan, settings = built.plan, built.settings
    else:
        plan = build(graph, ranges, settings, statistics).plan
    network, placement, precision, rules = plan.network, plan.placement, settings.precision, settings.rules
    if not placement.edges and precision.quantises:
        reporter.warn(f"No node is quantised to {precision.value}: the rules and patterns leave all in {_REST[rules]}.")
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
        held_back=check,
    )
