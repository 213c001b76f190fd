"""Constants that guard a computation, and that FP16 would lose: the epsilon of a divisor, the floor of a norm.

In FP16 1e-8 is 0, and 0 / (0 + 1e-8) is not 0 but NaN; where it isn't quite lost, as 1e-6, the sum of squares beside it
has few digits left, or none. So what is guarded stays in FP32 from the reduction in front of the guard to the division
behind it. The same holds for what stands for infinity, from where it is added to what saturates on it: -3.4e38 is
-inf in FP16, and a softmax over nothing else is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import constant
from resvit_quantize.graph.schema import is_float

FP16_MAX = 65504.0
FP16_TINY = 2.0**-14
"""The smallest normal FP16 number; below it, digits are lost."""
_FP16_ZERO = 2.0**-24
"""The smallest FP16 number above zero."""
_LAYOUT = frozenset(["Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
_CARRIES = _LAYOUT | frozenset(
    ["Abs", "Clip", "Max", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Sqrt"]
)
"""What a guard may pass through on its way to a division, and stay one."""
_REDUCES = _LAYOUT | frozenset(
    ["Abs", "Mul", "Pow", "ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt", "Sub", "Relu"]
)
"""What lies between the values that are summed up and their guard."""
_NORMS = frozenset({"BatchNormalization", "InstanceNormalization", "LpNormalization"})
_WIDE_NORMS = frozenset({"GroupNormalization", "LayerNormalization", "RMSNormalization"})


def guarded_nodes(model: ir.Model) -> dict[ir.Node, str]:
    """The nodes that must compute in FP32 for a constant's sake, each with the reason in words."""
    found: dict[ir.Node, str] = {}
    for node in model.graph:
        if node.domain:
            continue
        if (reason := _lost_epsilon(node)) is not None:
            found.setdefault(node, reason)
        for value in _guards(node):
            path = _to_division(node)
            if path:
                array = constant(value)
                assert array is not None
                smallest = float(np.abs(array[array != 0]).min())
                reason = f"'{value.name}' guards a divisor with {smallest:.3g}, where FP16 loses digits or all"
                for member in (*_summed_before(node), node, *path):
                    found.setdefault(member, reason)
        for read in node.inputs:
            if read is not None and _is_beyond(read):
                reason = f"'{read.name}' stands for infinity, and FP16 would make it that"
                for member in _readers(node):
                    found.setdefault(member, reason)
    return found


def _guards(node: ir.Node) -> Iterator[ir.Value]:
    """The constants of a node that only keep something from zero: all of them tiny, none of them zero."""
    indices = {"Add": (0, 1), "Sub": (1,), "Max": range(len(node.inputs)), "Clip": (1,), "Where": (1, 2)}
    for index in indices.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = constant(value) if is_float(value) else None
        if value is not None and array is not None and array.size:
            sizes = np.abs(array.astype(np.float64))
            if ((sizes > 0) & (sizes < FP16_TINY)).all():
                yield value


def _to_division(node: ir.Node) -> list[ir.Node]:
    """The nodes from a guard to the division or logarithm that it guards, with what scales by a quotient alone."""
    found: dict[ir.Node, None] = {}
    for use in node.outputs[0].uses():
        reader = use.node
        if reader.domain:
            continue
        exponent = constant(reader.inputs[1]) if reader.op_type == "Pow" and use.idx == 0 else None
        inverts = reader.op_type == "Reciprocal" or (exponent is not None and bool((exponent < 0).all()))
        if reader.op_type == "Div" and use.idx == 1:
            found[reader] = None
            if constant(reader.inputs[0]) is not None:
                found.update(dict.fromkeys(_products(reader)))
        elif inverts:
            found.update(dict.fromkeys([reader, *_products(reader)]))
        elif reader.op_type == "Log":
            found[reader] = None
        elif (reader.op_type in _CARRIES or exponent is not None or _scales(reader)) and (path := _to_division(reader)):
            found.update(dict.fromkeys([reader, *path]))
    return list(found)


def _products(node: ir.Node) -> Iterator[ir.Node]:
    """What multiplies by the result of a node, which may be far beyond FP16 where the other factor is 0."""
    for use in node.outputs[0].uses():
        if use.node.op_type == "Mul" and not use.node.domain:
            yield use.node
            if _scales(use.node):
                yield from _products(use.node)
        elif use.node.op_type in _LAYOUT and not use.node.domain:
            yield use.node
            yield from _products(use.node)


def _summed_before(node: ir.Node) -> list[ir.Node]:
    """What reduces values to the one that is guarded: squares, their mean, its root."""
    found: dict[ir.Node, None] = {}
    pending = [value.producer() for value in node.inputs if value is not None]
    while pending:
        producer = pending.pop()
        if producer is None or producer in found or producer.domain or producer.op_type not in _REDUCES:
            continue
        first, *others = producer.inputs
        if producer.op_type == "Mul" and not (_scales(producer) or (others and first is others[0])):
            continue
        found[producer] = None
        if producer.op_type != "Sub":
            pending += [value.producer() for value in producer.inputs if value is not None]
    reduced = any(member.op_type.startswith("Reduce") for member in found)
    return list(found) if reduced else []


def _lost_epsilon(node: ir.Node) -> str | None:
    """Why a normalisation or a division cannot hold its own guard or divisor in FP16."""
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    narrow = node.op_type in _NORMS or (node.op_type in _WIDE_NORMS and node.attributes.get_int("stash_type", 1) != 1)
    if narrow and "epsilon" in node.attributes and 0 < epsilon < _FP16_ZERO:
        return f"its epsilon of {epsilon:.3g} is 0 in FP16"
    divisor = constant(node.inputs[1]) if node.op_type == "Div" and len(node.inputs) > 1 else None
    if divisor is not None and is_float(node.inputs[1]) and ((divisor != 0) & (divisor.astype(np.float16) == 0)).any():
        return f"its divisor '{node.inputs[1] and node.inputs[1].name}' is 0 in FP16"
    return None


def _is_beyond(value: ir.Value | None) -> bool:
    array = constant(value) if is_float(value) else None
    return array is not None and bool((np.isfinite(array) & (np.abs(array) > FP16_MAX)).any())


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """What reads the outputs of a node, behind changes of layout as well."""
    for value in node.outputs:
        for use in value.uses():
            if is_float(value):
                yield use.node
                if use.node.op_type in _LAYOUT and not use.node.domain:
                    yield from _readers(use.node)


def _scales(node: ir.Node) -> bool:
    """Whether a node multiplies by a constant alone."""
    return node.op_type == "Mul" and not node.domain and any(constant(value) is not None for value in node.inputs)
