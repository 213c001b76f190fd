"""A plan put into its graph: Q/DQ, stored weights and corrected biases, everything else in FP32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from resvit_calibrate.ranges.ranges import Ranges
from resvit_quantize.equalize.biases import add_biases
from resvit_quantize.equalize.smoothing import Reader
from resvit_quantize.placement.grid import StoredWeight, quantise_weight, require_finite
from resvit_quantize.qdq.floors import floors_of
from resvit_quantize.qdq.insert import insert_qdq
from resvit_quantize.qdq.plan import Plan
from resvit_quantize.settings import QuantizeSettings, Rules


def insert_plan(plan: Plan, ranges: Ranges, settings: QuantizeSettings) -> ir.Model:
    """Quantise the plan's network in place as ``--effort fast`` does; returns it. ``ranges`` are those of the plan.

    Raises :class:`ResvitError` for weights that are not finite.
    """
    biases = mean_errors(plan, settings.bits) if settings.methods.bias_correction else {}
    floors = floors_of(plan, ranges) if settings.rules is Rules.ONNXRUNTIME else None
    insert_qdq(plan.network, plan.placement, plan.amax, {}, settings.bits, floors)
    add_biases(plan.network, biases)
    return plan.network


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
