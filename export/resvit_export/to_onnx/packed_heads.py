"""Packed queries, keys and values split along the heads, which moves the data once.

``qkv.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)`` and three selections along the first axis are the same numbers as
one transpose of [B, N, 3 * H, D] and one split along the heads. TensorRT makes one kernel of the second and three of
the first; and it cuts the first's packed weight in three behind the weight's DequantizeLinear, so that an 8-bit product
runs in FP16.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_PACKED = [2, 0, 3, 1, 4]


def split_along_heads(model: ir.Model) -> int:
    """Rewrite in place every packed [B, N, parts, H, D] that is selected part by part; returns how many."""
    return sum(_rewrite(model, node) for node in list(model.graph) if node.op_type == "Transpose")


def _rewrite(model: ir.Model, transpose: ir.Node) -> bool:
    source = transpose.inputs[0]
    reshape = source.producer() if source is not None else None
    if reshape is None or reshape.op_type != "Reshape" or list(transpose.attributes.get_ints("perm", [])) != _PACKED:
        return False
    shape = _ints(reshape.inputs[1])
    if source is None or len(list(source.uses())) != 1 or shape is None or len(shape) != 5 or min(shape[2:]) < 1:
        return False
    parts, heads, size = shape[2:]
    selected = _selections(transpose, parts)
    if selected is None or transpose.outputs[0].is_graph_output():
        return False
    graph, name = model.graph, str(transpose.name or transpose.outputs[0].name)
    target = ir.Value(
        name=f"{name}/heads", const_value=ir.tensor(np.array([*shape[:2], parts * heads, size], np.int64))
    )
    target.shape, target.type = ir.Shape([4]), ir.TensorType(ir.DataType.INT64)
    graph.register_initializer(target)
    rows = ir.node("Reshape", [reshape.inputs[0], target], dict(reshape.attributes), name=reshape.name)
    turned = ir.node("Transpose", [rows.outputs[0]], {"perm": [0, 2, 1, 3]}, name=transpose.name)
    attributes = {"axis": 1, "num_outputs": parts}
    split = ir.node("Split", [turned.outputs[0]], attributes, num_outputs=parts, name=f"{name}/Split")
    for new, old in ((rows, reshape), (turned, transpose), (split, transpose)):
        new.metadata_props.update(old.metadata_props)
        for index, value in enumerate(new.outputs):
            value.name, value.type = f"{name}/{new.op_type}/heads_{index}", old.outputs[0].type
    graph.insert_before(transpose, [rows, turned, split])
    for value, part in zip(selected, split.outputs, strict=True):
        part.shape = value.shape
        value.replace_all_uses_with(part)
    _remove(graph, [value.producer() for value in selected])
    return True


def _selections(transpose: ir.Node, parts: int) -> list[ir.Value] | None:
    """The values [B, H, N, D] of all parts in order, or None where anything else reads the transpose."""
    found: dict[int, ir.Value] = {}
    for use in transpose.outputs[0].uses():
        for part, value in _selected(use.node):
            if part in found or value.is_graph_output():
                return None
            found[part] = value
        if not _selected(use.node):
            return None
    return [found[part] for part in range(parts)] if sorted(found) == list(range(parts)) else None


def _selected(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """(part, value) for each part that ``node`` selects along the first axis; empty if it does something else."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        index = _array(node.inputs[1])
        return [(int(index), node.outputs[0])] if index is not None and index.ndim == 0 and index >= 0 else []
    if node.op_type == "Slice":
        start, end = _ints(node.inputs[1]), _ints(node.inputs[2])
        axes = _ints(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else [0]
        steps = _ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
        if axes != [0] or steps != [1] or start is None or end is None or start[0] < 0 or end[0] != start[0] + 1:
            return []
        return _squeezed([(start[0], node.outputs[0])])
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) == 0:
        whole = node.inputs[0].shape if node.inputs[0] is not None else None
        if whole is None or whole[0] != len(node.outputs):
            return []
        return _squeezed(list(enumerate(node.outputs)))
    return []


def _squeezed(parts: list[tuple[int, ir.Value]]) -> list[tuple[int, ir.Value]]:
    """The same parts without their first axis, where a Squeeze and nothing else reads each."""
    found = []
    for part, value in parts:
        users = [use.node for use in value.uses()]
        if len(users) != 1 or users[0].op_type != "Squeeze" or len(users[0].inputs) != 2:
            return []
        if _ints(users[0].inputs[1]) != [0]:
            return []
        found.append((part, users[0].outputs[0]))
    return found


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _ints(value: ir.Value | None) -> list[int] | None:
    array = _array(value)
    return None if array is None else [int(item) for item in array.reshape(-1)]


def _remove(graph: ir.Graph, nodes: list[ir.Node | None]) -> None:
    """Remove nodes that nothing reads, and then what only they read."""
    open_nodes = [node for node in nodes if node is not None]
    while open_nodes:
        node = open_nodes.pop()
        if node.graph is None or any(list(output.uses()) for output in node.outputs):
            continue
        before = [value.producer() for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        open_nodes += [producer for producer in before if producer is not None]
