"""Recovery: the weights are trained briefly, with the quantisers in the loop, to answer as the float model does.

Quantisation-aware training by distillation (Polino et al. 2018) with straight-through gradients (Bengio et al.
2013). It works on the float ONNX graph, so that it serves every model that can be quantised here, and changes
constants only: the result is a float graph of the same nodes and names, which is calibrated and quantised by the
same passes as any other. The quantisers are our own (``fake_quant``) and not a library's, because they must stand
exactly where the placement puts the Q/DQ pairs.

Weight scales follow the weights at every step. Clips of activations start as calibrated and are learned with the
weights (LSQ, Esser et al. 2020); the report has them, since a graph without Q/DQ has no place for them, and
:func:`pinned_ranges` puts them where the quantiser reads. Fresh ranges of the trained graph would be others than
those that its weights were trained for, and at few bits that costs most of what was won.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from resvit_calibrate.ranges.estimators import Estimator
from resvit_calibrate.ranges.ranges import Ranges
from resvit_calibrate.ranges.statistics import Statistics
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import canonical_json, sha256_bytes, sha256_file
from resvit_engines.progress import SILENT, Reporter
from resvit_quantize.equalize.biases import add_biases
from resvit_quantize.graph.analysed import graph_from_onnx
from resvit_quantize.graph.external import EXTERNAL_ABOVE
from resvit_quantize.graph.network import onnx_from_network
from resvit_quantize.placement.grid import StoredWeight, quantise_weight
from resvit_quantize.placement.placement import WeightKey, weight_key
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.qdq.quantised import mean_errors
from resvit_quantize.recovery.options import FEWEST_IMAGES, USUAL, RecoverOptions, RecoverReport
from resvit_quantize.settings import Effort, QuantizeSettings
from resvit_quantize.training.objectives.objective import Teaching
from resvit_quantize.training.standing import TrainingImages


def recover_model(
    model: Path,
    ranges: Ranges,
    settings: QuantizeSettings,
    images: TrainingImages,
    out: Path,
    state: Path,
    options: RecoverOptions = USUAL,
    reporter: Reporter = SILENT,
    *,
    statistics: Statistics | None = None,
    teaching: Teaching | None = None,
) -> RecoverReport:
    """Train the constants of ``model`` as ``settings`` will quantise it; write the new float ONNX to ``out``.

    Weights that are quantised are written on their grid, so that quantising them again changes nothing; quantise
    the result with :func:`settings_behind_recovery` and :func:`pinned_ranges`. ``state`` keeps what a killed call
    needs to go on and is removed at the end; ``statistics`` serve as in :func:`plan_quantization`. Raises
    :class:`ResvitError` where nothing is quantised, where the graph has an operator without gradients, for fewer
    than 128 images, and for images that the graph cannot read. ``teaching`` says what the answers are, and so what
    loses beside their distance: boxes, masks or depths.
    """
    from resvit_quantize.recovery.training import train

    # What --effort best would learn, the training learns better.
    settings = dataclasses.replace(settings, effort=Effort.FAST)
    graph = graph_from_onnx(model)
    plan = plan_quantization(graph, ranges, settings, statistics)
    if not plan.placement.edges:
        raise ResvitError(
            f"Nothing is quantised to {settings.precision.value}, so there is nothing to recover.",
            "Leave recovery out, or quantise more with --include.",
            ExitCode.IMPOSSIBLE,
        )
    if settings.methods.bias_correction:  # what is known in closed form need not be learned
        add_biases(plan.network, mean_errors(plan, settings.bits), new_nodes=False)
    wanted = len(images) if options.limit is None else min(options.limit, len(images))
    if wanted < FEWEST_IMAGES:
        raise ResvitError(
            f"There are {wanted} training images; recovery needs {FEWEST_IMAGES} or more.",
            "Give more training images: thousands serve best.",
        )
    identity = {
        "model": sha256_file(model),
        "ranges": sha256_bytes(canonical_json(ranges.to_json())),
        "settings": settings_to_json(settings),
        "options": dataclasses.asdict(options),
        "images": images.digest,
        "statistics": statistics is not None,
        "teaching": teaching.identity if teaching else None,
    }
    key = sha256_bytes(canonical_json(identity))
    trained, report = train(plan, graph.network, settings.bits, images, wanted, options, state, key, reporter, teaching)
    grids = on_grid(plan)
    for name, array in trained.items():
        if name in grids:
            _, axis, precision = grids[name]
            stored = StoredWeight(*quantise_weight(array, axis, precision, settings.bits))
            array = stored.restored(axis)  # noqa: PLW2901
        plan.network.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    onnx_from_network(plan.network, out, external_above=EXTERNAL_ABOVE)
    state.unlink(missing_ok=True)
    return report


def settings_behind_recovery(settings: QuantizeSettings) -> QuantizeSettings:
    """How to quantise a recovered model: its weights lie on their grid already, with their errors trained away.

    What moves weights, biases or ranges to come nearer to the float graph would undo the training.
    """
    off = dict.fromkeys(("smoothing", "shifting", "output_ranges", "bias_correction"), False)
    where_only = dataclasses.replace(settings.methods, **off)
    return dataclasses.replace(settings, methods=where_only, effort=Effort.FAST)


def pinned_ranges(ranges: Ranges, clips: Mapping[str, Mapping[str, float]]) -> Ranges:
    """Ranges with the clips of a :class:`RecoverReport` in place of what calibration chose, by any estimator."""
    tensors = dict(ranges.tensors)
    for precision, by_tensor in clips.items():
        for name, clip in by_tensor.items():
            if name in tensors:
                every = {estimator.value: float(clip) for estimator in Estimator}
                tensors[name] = dataclasses.replace(tensors[name], amax={**tensors[name].amax, precision: every})
    return dataclasses.replace(ranges, tensors=tensors)


def settings_to_json(settings: QuantizeSettings) -> dict[str, Any]:
    """Settings as plain values, to tell whether two are equal."""
    plain = dataclasses.asdict(settings)
    plain["precisions"] = {name: precision.value for name, precision in sorted(settings.precisions.items())}
    return plain


def on_grid(plan: Plan) -> dict[str, WeightKey]:
    """The constants that are read through one and the same quantiser wherever they are read."""
    read = {(place.node, place.index): weight_key(place) for place in plan.placement.weights}
    found: dict[str, WeightKey] = {}
    for name, value in plan.network.graph.initializers.items():
        keys = {read.get((use.node, use.idx)) for use in value.uses()}
        key = keys.pop() if len(keys) == 1 else None
        if key is not None:
            found[name] = key
    return found
