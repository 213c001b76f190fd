"""A quantised INT8 graph on fewer levels: what each method's ranges and placement are worth at 6 or 5 bits.

Q/DQ keep their 8-bit type and use fewer of its levels. For each activation pair the scale grows by 127 / (2^(b-1)-1)
(255 / (2^b-1) for an asymmetric one), and a Clip in front keeps the range as it was. Weights are rounded again to the
coarser grid with the same largest magnitude, from the float weights where those can be found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from peers.coverage import DEQUANTIZE, QUANTIZE, read_graph
from resvit_engines.errors import ResvitError
from resvit_engines.files import write_atomic
from resvit_quantize.graph.network import add_initializer, all_nodes, constant

_SAME_WEIGHT = 0.1
"""Relative error up to which a float array counts as what an 8-bit array was rounded from."""


@dataclass(frozen=True)
class Grid:
    """``low`` to ``high`` in steps of ``scale`` around ``zero``; arrays of one value or of one per channel."""

    scale: np.ndarray
    zero: np.ndarray
    low: int
    high: int

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest number on the grid."""
        zero = self.zero.astype(np.int64)
        low, high = ((end - zero) * self.scale.astype(np.float64) for end in (self.low, self.high))
        return low.astype(self.scale.dtype), high.astype(self.scale.dtype)

    def stored(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Round ``values`` to the grid: the integers."""
        scale, zero = (_along(part, axis, values.ndim) for part in (self.scale, self.zero))
        whole: np.ndarray = np.clip(np.rint(values / scale) + zero, self.low, self.high)
        return whole


def coarse_grid(scale: np.ndarray, zero: np.ndarray, bits: int) -> Grid:
    """The grid of 2^bits levels (one fewer if symmetric) over the range that an 8-bit grid covers.

    ``zero`` is the zero point, int8 or uint8; int8 with a zero point of 0 is taken as symmetric, -127 to 127.
    """
    wide, where = scale.astype(np.float64), zero.astype(np.float64)
    if zero.dtype == np.int8 and not zero.any():
        high = 2 ** (bits - 1) - 1
        return Grid((wide * 127 / high).astype(scale.dtype), zero, -high, high)
    first = -128 if zero.dtype == np.int8 else 0
    levels = 2**bits - 1
    zero = np.rint((where - first) * levels / 255 + first).astype(zero.dtype)
    return Grid((wide * 255 / levels).astype(scale.dtype), zero, first, first + levels)


def coarsen(quantized: Path, float_model: Path, out: Path, bits: int) -> list[str]:
    """Write ``quantized`` on ``bits`` bits to ``out``; returns remarks.

    Raises ``ResvitError`` for a Q/DQ pair whose scale or zero point is computed.
    """
    model = read_graph(quantized)
    originals = _by_size(read_graph(float_model))
    again = 0
    for node in list(all_nodes(model)):
        if node.op_type == QUANTIZE:
            weight = constant(node.inputs[0])
            if weight is None:
                _coarsen_pair(model, node, bits)
            else:
                _coarsen_float_weight(model, node, weight, bits)
        elif node.op_type == DEQUANTIZE:
            stored = constant(node.inputs[0])
            if stored is not None and stored.dtype in (np.int8, np.uint8):
                again += not _coarsen_stored_weight(model, node, stored, originals, bits)
    write_atomic(out, ir.serde.serialize_model(model).SerializeToString())
    return [f"{again} constants rounded again from 8 bits: their float values are not in the float graph"] * bool(again)


def _coarsen_pair(model: ir.Model, node: ir.Node, bits: int) -> None:
    grid = _grid_of(node, bits)
    if grid is None:
        return
    if grid.scale.size > 1:  # a weight behind a Transpose: its own range is the grid's
        _set_grid(model, [node, *_readers(node)], grid)
        return
    value = node.inputs[0]
    assert value is not None
    low, high = (
        add_initializer(model, _name(node, i), limit)
        for i, limit in enumerate(limit.reshape(()) for limit in grid.limits)
    )
    clip = ir.node("Clip", [value, low, high], name=_name(node, "clip"))
    clip.outputs[0].name = _name(node, "clipped")
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, clip)
    node.replace_input_with(0, clip.outputs[0])
    _set_grid(model, [node, *_readers(node)], grid)


def _coarsen_float_weight(model: ir.Model, node: ir.Node, weight: np.ndarray, bits: int) -> None:
    grid = _grid_of(node, bits)
    if grid is None:
        return
    axis = _axis(node)
    scale, zero = (_along(part.astype(np.float64), axis, weight.ndim) for part in (grid.scale, grid.zero))
    rounded = ((grid.stored(weight.astype(np.float64), axis) - zero) * scale).astype(weight.dtype)
    node.replace_input_with(0, add_initializer(model, _name(node, "weight"), rounded))
    _set_grid(model, [node, *_readers(node)], grid)


def _coarsen_stored_weight(
    model: ir.Model, node: ir.Node, stored: np.ndarray, originals: dict[int, list[np.ndarray]], bits: int
) -> bool:
    """Returns whether the float values were found."""
    grid = _grid_of(node, bits)
    if grid is None:
        return True
    axis = _axis(node)
    scale, zero = (constant(value) for value in (node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None))
    assert scale is not None
    old = _along(np.asarray(0 if zero is None else zero, np.float64), axis, stored.ndim)
    values = (stored - old) * _along(scale.astype(np.float64), axis, stored.ndim)
    original = _original(values, originals)
    whole = grid.stored(values if original is None else original, axis).astype(stored.dtype)
    node.replace_input_with(0, add_initializer(model, _name(node, "weight"), whole))
    _set_grid(model, [node], grid)
    return original is not None


def _grid_of(node: ir.Node, bits: int) -> Grid | None:
    """The coarser grid for a Q or DQ; ``None`` where it is not of 8-bit integers."""
    scale = constant(node.inputs[1])
    third = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(third)
    if scale is None or (third is not None and zero is None):
        raise ResvitError(f"{node.name} computes its scale or zero point.", "Such a graph cannot be coarsened.")
    if zero is None:
        stored = constant(node.inputs[0])
        kind = stored.dtype if node.op_type == DEQUANTIZE and stored is not None else np.dtype(np.uint8)
        zero = np.zeros(scale.shape, kind)
    if zero.dtype not in (np.int8, np.uint8):
        return None
    grid = coarse_grid(scale, zero, bits)
    if any(_scale_type(reader) == np.float16 for reader in _readers(node)):
        # Q in FP32 and DQ in FP16 must mean the same steps.
        grid = dataclasses.replace(grid, scale=grid.scale.astype(np.float16).astype(scale.dtype))
    return grid


def _set_grid(model: ir.Model, nodes: list[ir.Node], grid: Grid) -> None:
    zero = add_initializer(model, _name(nodes[0], "zero"), grid.zero)
    scales: dict[np.dtype[Any], ir.Value] = {}
    for node in nodes:
        kind = _scale_type(node)
        if kind not in scales:
            scales[kind] = add_initializer(model, _name(nodes[0], f"scale/{kind}"), grid.scale.astype(kind))
        node.replace_input_with(1, scales[kind])
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, zero)


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """The DequantizeLinear nodes behind a QuantizeLinear, also behind nodes that move the integers."""
    for use in node.outputs[0].uses():
        if use.node.op_type == DEQUANTIZE:
            yield use.node
        elif use.idx == 0:
            yield from _readers(use.node)


def _scale_type(node: ir.Node) -> np.dtype[Any]:
    scale = constant(node.inputs[1])
    if scale is None:
        raise ResvitError(f"{node.name} computes its scale.", "Such a graph cannot be coarsened.")
    return scale.dtype


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return attribute.as_int() if attribute is not None else 1


def _along(part: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """One value per channel, shaped to broadcast along ``axis``."""
    return part.reshape([-1 if i == axis % rank else 1 for i in range(rank)]) if part.size > 1 else part.reshape(())


def _by_size(model: ir.Model) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {}
    for value in model.graph.initializers.values():
        array = constant(value)
        if array is not None and array.dtype == np.float32:
            found.setdefault(array.size, []).append(array)
    return found


def _original(values: np.ndarray, originals: dict[int, list[np.ndarray]]) -> np.ndarray | None:
    """The float array, or its transpose, that ``values`` was rounded from."""
    size = np.linalg.norm(values)
    for array in originals.get(values.size, ()):
        shapes = [array.reshape(values.shape)] if array.squeeze().shape == values.squeeze().shape else []
        shapes += [array.T] if array.T.shape == values.shape else []
        for candidate in shapes:
            if size and np.linalg.norm(candidate - values) < _SAME_WEIGHT * size:
                return candidate
    return None


def _name(node: ir.Node, what: object) -> str:
    return f"coarse/{node.name or node.outputs[0].name}/{what}"
