"""Activations of one sign, such as GELU's, moved to the middle of the signed grid, channel by channel.

What is behind a GELU lies between -0.17 and its maximum: a symmetric grid leaves half of its levels unused. Taking
a constant from each channel in front of Q, and adding what it makes in the reader to the reader's bias, leaves the
network as it was, and halves the step (Outlier Suppression+, Wei et al. 2023; RepQ-ViT, Li et al. 2023, has the
same behind LayerNorm). A factor for each channel stands beside it, for the module ``smoothing`` to fill.
Both are done in the pointwise kernel that computes the activation anyway and cost no kernel and no traffic. A ReLU is
part of its convolution's kernel, and stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_calibrate.observe.histogram import ChannelStatistics
from resvit_calibrate.ranges.channels import shift_error, shifted
from resvit_calibrate.ranges.known import digest_of, known
from resvit_calibrate.ranges.ranges import TensorRange
from resvit_engines.targets.table import Precision
from resvit_quantize.equalize.biases import add_biases
from resvit_quantize.equalize.smoothing import Reader
from resvit_quantize.graph.network import add_initializer, constant, int_attribute
from resvit_quantize.placement.placement import Edge, Placement

_POINTWISE = frozenset(
    {"Gelu", "Mul", "HardSwish", "Mish", "Swish", "Elu", "Celu", "Selu", "Softplus", "Sigmoid", "HardSigmoid"}
)
"""Activations that TensorRT computes in kernels of their own."""
_OFFSETS = frozenset({"Add", "Sub", "Identity"})
_LOPSIDED = 1.2
"""A symmetric grid that reaches this much further than half of the range is worth a shift."""
_REACHES = (1.0, 0.85, 0.7, 0.5)
"""Tried as the upper end of the range, as shares of the largest value."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A tensor that a factor and perhaps a shift were put behind, at one."""

    source: str
    """The activation's own name."""
    tensor: str
    """What is quantised now."""
    factor: ir.Node
    """A Mul by one for each channel, until smoothing changes it."""
    channels: ChannelStatistics
    """Of ``tensor``."""


def open_activations(
    model: ir.Model,
    placement: Placement,
    channels: Mapping[str, ChannelStatistics],
    ranges: Mapping[str, TensorRange],
    bits: int = 8,
) -> tuple[Opened, ...]:
    """Put factors and shifts, in place, behind the activations that quantised layers read."""
    by_value: dict[ir.Value, list[Edge]] = {}
    weighted = {weight.node for weight in placement.weights}
    for edge in placement.edges:
        value = edge.node.inputs[edge.index]
        if value is not None and edge.node in weighted:
            by_value.setdefault(value, []).append(edge)
    found = []
    for value, edges in by_value.items():
        seen, extent = channels.get(str(value.name)), ranges.get(str(value.name))
        if seen is not None and extent is not None and _is_pointwise(value) and value.shape is not None:
            readers = [_reader(edge.node) for edge in edges]
            if all(reader is not None and len(reader.energy()) == len(seen.count) for reader in readers):
                whole = [reader for reader in readers if reader is not None]
                found.append(_open(model, value, edges, whole, seen, extent, bits))
    return tuple(found)


def close_activations(model: ir.Model, opened: tuple[Opened, ...]) -> None:
    """Take out, in place, the factors that are still one."""
    for item in opened:
        node = item.factor
        factors = constant(node.inputs[1])
        if factors is not None and (factors == 1.0).all():
            source, result = node.inputs[0], node.outputs[0]
            assert source is not None
            result.replace_all_uses_with(source)
            model.graph.initializers.pop(str(node.inputs[1] and node.inputs[1].name), None)
            model.graph.remove(node, safe=True)


def _is_pointwise(value: ir.Value) -> bool:
    node = value.producer()
    # An offset of one number, as blocks with a learned affine have behind their activation, is in the same kernel.
    while node is not None and node.op_type in _OFFSETS:
        computed = [each for each in node.inputs if each is not None and constant(each) is None]
        arrays = [array for array in map(constant, node.inputs) if array is not None]
        if len(computed) != 1 or any(array.size != 1 for array in arrays):
            return False
        node = computed[0].producer()
    if node is None or node.op_type not in _POINTWISE:
        return False
    # A factor for each channel, as norms end with, is smoothing's already.
    arrays = [array for array in map(constant, node.inputs[:2]) if array is not None]
    return node.op_type != "Mul" or all(array.size == 1 for array in arrays)


def _reader(node: ir.Node) -> Reader | None:
    weight = constant(node.inputs[1])
    plain = node.op_type in ("Conv", "Gemm", "MatMul") and not int_attribute(node, "transA")
    return Reader(node, weight) if weight is not None and plain else None


def _takes_shift(node: ir.Node) -> bool:
    """Whether a constant in front of a layer is a constant behind it: padding with zeros spoils that."""
    if node.op_type != "Conv":
        return True
    padded = any(node.attributes.get_ints("pads", ()))
    return not padded and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _open(
    model: ir.Model,
    value: ir.Value,
    edges: list[Edge],
    readers: list[Reader],
    seen: ChannelStatistics,
    extent: TensorRange,
    bits: int,
) -> Opened:
    name, node = str(value.name), value.producer()
    assert node is not None
    spatial = [1, 1] if edges[0].node.op_type == "Conv" else []
    count = len(seen.count)
    factor = _behind(model, node, "Mul", value, f"{name}/factor", np.ones((count, *spatial), np.float32))
    last = factor
    reach, middle = max(-extent.minimum, extent.maximum), (extent.maximum - extent.minimum) / 2.0
    if (
        reach > _LOPSIDED * middle
        and all(edge.precision is Precision.INT8 for edge in edges)
        and all(_takes_shift(edge.node) for edge in edges)
    ):
        energy = np.sum([reader.energy() for reader in readers], axis=0)
        key = "centred", digest_of(energy), extent.minimum, extent.maximum, bits
        centre, moved = known(seen, key, functools.partial(_centred, seen, extent, energy, bits))
        shift = (-centre).astype(np.float32).reshape(count, *spatial)
        last = _behind(model, factor, "Add", factor.outputs[0], f"{name}/shift", shift)
        add_biases(model, {str(r.node.name): r.mean_output(centre).astype(np.float32) for r in readers})
        seen = moved
    for edge in edges:
        edge.node.replace_input_with(edge.index, last.outputs[0])
    return Opened(name, str(last.outputs[0].name), factor, seen)


def _centred(
    seen: ChannelStatistics, extent: TensorRange, energy: np.ndarray, bits: int
) -> tuple[np.ndarray, ChannelStatistics]:
    """The shift [C] with the least error at the readers' outputs, and the statistics of what is left."""
    sign = 1.0 if extent.maximum >= -extent.minimum else -1.0
    low = min(sign * extent.minimum, sign * extent.maximum)
    small = abs(float(low))
    largest = seen.absmax.astype(np.float64)
    lower = np.maximum(low, -largest)
    best: tuple[float, np.ndarray] | None = None
    for share in _REACHES:
        upper = np.maximum(largest * share, np.minimum(small, largest))
        centre = (sign * (upper + lower) / 2.0).astype(np.float32).astype(np.float64)
        clip = max(float((upper - lower).max()) / 2.0, 1e-12)
        error = float(shift_error(seen, centre, small, sign, clip, bits) @ energy)
        if best is None or error < best[0]:
            best = error, centre
    assert best is not None
    return best[1], shifted(seen, best[1], small, sign)


def _behind(model: ir.Model, node: ir.Node, op_type: str, value: ir.Value, name: str, array: np.ndarray) -> ir.Node:
    added = ir.node(op_type, [value, add_initializer(model, name, array)], name=name)
    output = added.outputs[0]
    output.name, output.shape, output.type = f"{name}/output", value.shape, value.type
    model.graph.insert_after(node, added)
    return added
