"""Where the elements of a value come from, through nodes that only rearrange or pick them.

A chain of views is run on numbers instead of recognised by its operators: whatever an exporter writes to split heads
or to join them, the same elements end at the same places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import constant
from resvit_quantize.graph.regions import is_view

BATCH = 2
"""Images at which shapes are looked at: enough to tell the batch from everything else."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Traced:
    """``value`` seen from ``source``: ``places`` [shape of value] numbers the elements of the source, row by row."""

    source: ir.Value
    places: np.ndarray


def traces(
    value: ir.Value | None, shapes: Shapes, through: Collection[ir.Node] = (), *, widened: bool = False
) -> list[Traced]:
    """The value seen from itself, and from every value that it is a view of, the farthest last.

    Nodes in ``through`` scale; the elements pass them in place. What lies between two of them is left out. With
    ``widened``, a cast of FP16 or BF16 to FP32 changes nothing.
    """
    traced: list[Traced] = []
    chain: list[ir.Node] = []
    source = value
    while source is not None:
        places = _run(source, chain, value, shapes)
        if places is None:
            break
        # Where a cast lies between, the numbers are others.
        if value is None or source.dtype == value.dtype or (widened and _same_numbers(source, value)):
            traced.append(Traced(source, places))
        node = source.producer()
        if node is None or not (is_view(node) or node in through):
            break
        if node in through:
            traced.clear()
        chain.insert(0, node)
        source = _data_of(node)
    return traced


def _same_numbers(narrow: ir.Value, wide: ir.Value) -> bool:
    return wide.dtype == ir.DataType.FLOAT and narrow.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _data_of(node: ir.Node) -> ir.Value | None:
    """What a view rearranges, or a scaling scales: the input that is no constant."""
    return next((value for value in node.inputs if value is not None and constant(value) is None), None)


def behind(value: ir.Value, shapes: Shapes) -> list[Traced]:
    """The value itself and every view of it that only one node reads, each as ``Traced`` from ``value``.

    ``source`` is then the view, and ``places`` its elements as numbers of ``value``.
    """
    traced: list[Traced] = []
    chain: list[ir.Node] = []
    end = value
    while True:
        places = _run(value, chain, end, shapes)
        if places is None:
            return traced
        if end.dtype == value.dtype:
            traced.append(Traced(end, places))
        uses = list(end.uses())
        if len(uses) != 1 or end.is_graph_output() or not is_view(uses[0].node) or uses[0].idx != 0:
            return traced
        chain.append(uses[0].node)
        if len(chain[-1].outputs) != 1:
            return traced
        end = chain[-1].outputs[0]


def _run(source: ir.Value, chain: list[ir.Node], end: ir.Value | None, shapes: Shapes) -> np.ndarray | None:
    shape = shapes.get(str(source.name))
    if shape is None or end is None:
        return None
    values = {source: np.arange(int(np.prod(shape))).reshape(shape)}
    for node in chain:
        first = _data_of(node)
        if first is None or first not in values or not _apply(node, values[first], values, shapes):
            return None
    return values.get(end)


def _apply(node: ir.Node, array: np.ndarray, values: dict[ir.Value, np.ndarray], shapes: Shapes) -> bool:
    """Add the outputs of one view to ``values``; False where that cannot be told."""
    wanted = [shapes.get(str(output.name)) for output in node.outputs]
    if any(shape is None for shape in wanted):
        return False
    out = node.outputs[0]
    shape = wanted[0]
    assert shape is not None
    axis = node.attributes.get_int("axis", 0)
    if node.op_type == "Transpose":
        values[out] = array.transpose(node.attributes.get_ints("perm", tuple(reversed(range(array.ndim)))))
    elif node.op_type == "Split":
        ends = np.cumsum([size[axis] for size in wanted if size is not None])[:-1]
        values.update(zip(node.outputs, np.split(array, ends, axis), strict=True))
    elif node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is None:
            return False
        values[out] = np.take(array, index, axis)
    elif node.op_type == "Slice":
        picked = _sliced(node, array)
        if picked is None:
            return False
        values[out] = picked
    elif array.size == int(np.prod(shape)):
        values[out] = array.reshape(shape)
    else:
        return False
    return values[out].shape == shape


def _sliced(node: ir.Node, array: np.ndarray) -> np.ndarray | None:
    parts = [constant(value) for value in node.inputs[1:]]
    if len(parts) < 2 or parts[0] is None or parts[1] is None:
        return None
    axes = parts[2] if len(parts) > 2 and parts[2] is not None else np.arange(len(parts[0]))
    steps = parts[3] if len(parts) > 3 and parts[3] is not None else np.ones(len(parts[0]), int)
    picks = [slice(None)] * array.ndim
    for axis, start, stop, step in zip(axes, parts[0], parts[1], steps, strict=True):
        picks[int(axis)] = slice(int(start), int(stop), int(step))
    return array[tuple(picks)]
