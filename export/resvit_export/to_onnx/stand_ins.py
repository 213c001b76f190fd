"""What stands for infinity in a constant (the largest float, -1e9), brought to what FP16 holds where that is the same.

RT-DETR's anchors outside the image are such, and masks. In front of a sigmoid, or of a softmax that has something else
to choose from, 30,000 is as good: exp(-30,000) is 0 as well. A row that is masked wholly is another thing. There the
largest float swallows every score, and the softmax is uniform; 30,000 would let the scores through. Such constants
stay, and so does the FP32 around them (``resvit_quantize.qdq.guards``).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_LARGEST_HALF = 65504.0
_BOUND = 30_000.0
"""As long as scores stay within half of it: those of a network that runs in FP16 do."""
_MOVES = frozenset(
    (
        *("Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice"),
        *("Split", "Squeeze", "Transpose", "Unsqueeze"),
    )
)


def bound_stand_ins(model: ir.Model) -> int:
    """Replace in place the constants whose every reader ends in a sigmoid or a softmax; returns how many."""
    count = 0
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            array = _huge(value)
            if array is None or value is None or not _saturates(node, index, array):
                continue
            bounded = np.clip(array, -_BOUND, _BOUND).astype(np.float32)
            bounded = np.where(np.isfinite(array) & (np.abs(array) <= _LARGEST_HALF), array, bounded)
            bounded = np.where(np.isfinite(array), bounded, array).astype(np.float32)
            name = f"{value.name}/bounded"
            if name not in model.graph.initializers:
                new = ir.Value(name=name, const_value=ir.tensor(bounded, name=name))
                new.shape, new.type = value.shape, value.type
                model.graph.register_initializer(new)
                count += 1
            node.replace_input_with(index, model.graph.initializers[name])
    return count


def _huge(value: ir.Value | None) -> np.ndarray | None:
    """A float constant that holds finite numbers beyond FP16, None for any other value."""
    if value is None or value.const_value is None or value.const_value.dtype is not ir.DataType.FLOAT:
        return None
    array = value.const_value.numpy()
    return array if (np.isfinite(array) & (np.abs(array) > _LARGEST_HALF)).any() else None


def _saturates(node: ir.Node, index: int, array: np.ndarray) -> bool:
    """Whether all that comes of input ``index`` of ``node`` is the same with the bound in its place."""
    if node.domain or node.graph is None:
        return False
    if node.op_type == "Attention":
        return index == 3 and not _masks_a_row(array)
    if node.op_type == "Where":
        others = [value for at, value in enumerate(node.inputs[1:], 1) if at != index and value is not None]
        return index > 0 and not any(_huge(other) is not None for other in others) and _ends_saturated(node, rows=True)
    if node.op_type == "Add":
        return _ends_saturated(node, rows=not _masks_a_row(array) and _spans_rows(node, array))
    return node.op_type in _MOVES and _ends_saturated(node, rows=False)


def _ends_saturated(node: ir.Node, *, rows: bool) -> bool:
    """Whether every reader behind ``node`` is a sigmoid, or, if ``rows``, right behind it a softmax of rows."""
    for value in node.outputs:
        if value.is_graph_output() or not list(value.uses()):
            return False
        for use in value.uses():
            reader = use.node
            if reader.domain:
                return False
            if reader.op_type == "Sigmoid" or (rows and _softmax_of_rows(reader, value)):
                continue
            goes_on = reader.op_type in _MOVES or (reader.op_type == "Add" and not _adds_huge(reader))
            if not goes_on or not _ends_saturated(reader, rows=False):
                return False
    return True


def _softmax_of_rows(node: ir.Node, value: ir.Value) -> bool:
    rank = len(value.shape) if value.shape is not None else 0
    return node.op_type == "Softmax" and node.attributes.get_int("axis", -1) in (-1, rank - 1)


def _masks_a_row(array: np.ndarray) -> bool:
    """Whether a row has nothing but huge or infinite values, or one that is huge and positive."""
    masked = np.abs(array) > _LARGEST_HALF
    return array.ndim == 0 or bool(masked.all(axis=-1).any() or (masked & (array > 0)).any())


def _spans_rows(node: ir.Node, array: np.ndarray) -> bool:
    """Whether a constant has an entry of its own for each place of a row."""
    shape = node.outputs[0].shape
    return bool(shape is not None and array.ndim and len(shape) and array.shape[-1] == shape[-1])


def _adds_huge(node: ir.Node) -> bool:
    return any(_huge(value) is not None for value in node.inputs)
