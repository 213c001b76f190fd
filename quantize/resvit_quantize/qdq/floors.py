"""The lower end of each tensor that ONNX Runtime reads in unsigned bytes.

Its kernels on x86 multiply unsigned activations by signed weights, and turn signed ones into unsigned first, if they
serve them at all. A zero point costs them nothing: what a ReLU writes gets all 256 levels, and what a GELU writes
nearly all, where the symmetric grid of TensorRT has 128 of them.
"""

from __future__ import annotations

from resvit_calibrate.ranges.ranges import Ranges
from resvit_engines.targets.table import Precision
from resvit_quantize.placement.placement import edge_key
from resvit_quantize.qdq.plan import Plan

_MOVES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Resize", "Pad"})
"""Operators that ONNX Runtime runs on bytes as they are, where they write on the grid that they read."""
_APART = 1.0 + 2.0**-12
"""Between the clips of what a MaxPool reads and writes: small beside a step, and enough that it computes in FP32."""


def floors_of(plan: Plan, ranges: Ranges) -> dict[str, float]:
    """The lowest value, 0 or below, of every tensor that the plan reads in INT8, by name.

    No lower than the clip reaches on the other side. Where channels were scaled only the sign of the lowest value is
    known, so that the whole clip is taken below zero too. Tensors that only move elements of another one get its clip
    and its lower end, in place in ``plan.amax`` too; so do those of a MaxPool, a hair apart.
    """
    moved = {item.tensor for item in plan.moved}
    floors: dict[str, float] = {}
    for edge in plan.placement.edges:
        name, precision = key = edge_key(edge)
        if precision is not Precision.INT8 or name in floors:
            continue
        clip, seen = plan.amax[key], ranges.tensors.get(name)
        if seen is None or (name in moved and seen.minimum < 0.0):
            floors[name] = -clip
        elif name in moved or seen.minimum >= 0.0:
            floors[name] = 0.0
        else:
            # What was not seen may lie further out on both sides, as far as the clip was put beyond what was seen.
            reach = max(1.0, clip / max(-seen.minimum, seen.maximum, 1e-30))
            floors[name] = -min(clip, -seen.minimum * reach)
            if 0.0 < seen.maximum * reach < clip:
                plan.amax[key] = seen.maximum * reach
    for node in plan.network.graph:
        if node.op_type in (*_MOVES, "MaxPool") and node.inputs[0] is not None:
            source, result = str(node.inputs[0].name), str(node.outputs[0].name)
            if source in floors and result in floors:
                floors[result] = floors[source]
                apart = _APART if node.op_type == "MaxPool" else 1.0
                plan.amax[result, Precision.INT8] = plan.amax[source, Precision.INT8] * apart
    return floors
