"""GroupNorm in the form that TensorRT for RTX turns into the fewest kernels.

Kept whole (as GroupNormalization, or as InstanceNormalization over groups) it becomes a fixed kernel: only an
activation and a quantisation fuse behind it, nothing in front, and no residual. Written out as means and products it
becomes generated code, which fuses with its neighbours on both sides. The mathematics is GroupNorm's (Wu and He 2018),
with the statistics in FP32 in either form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import add_initializer, constant, infer_types

LONGEST_ROW = 12544
"""Elements that a generated kernel of TensorRT for RTX 1.7 normalises in one pass; from about 15,000 on it writes
FP32 intermediates to memory."""


@dataclass(frozen=True, eq=False)
class GroupNorm:
    """One GroupNorm of a graph: ``result`` = norm of ``source`` [B, C, H, W], per channel times weight plus bias."""

    source: ir.Value
    result: ir.Value
    groups: int
    epsilon: float
    weight: np.ndarray
    bias: np.ndarray
    last: ir.Node

    @property
    def maps(self) -> tuple[int, ...]:
        """C, H, W."""
        assert self.source.shape is not None
        return tuple(int(size) for size in list(self.source.shape)[1:] if isinstance(size, int))

    @property
    def row(self) -> int:
        """Elements that share their statistics."""
        return int(np.prod(self.maps)) // self.groups


def group_norms(model: ir.Model) -> list[GroupNorm]:
    """All GroupNorms with fixed maps and constant parameters, in either of the forms that exporters write."""
    found = (_whole(node) or _as_instance_norm(node) for node in model.graph)
    return [norm for norm in found if norm is not None and len(norm.maps) == 3]


def write_out_group_norms(model: ir.Model) -> int:
    """Rewrite in place each GroupNorm that is cheaper as generated code; returns how many.

    Rows up to :data:`LONGEST_ROW` are normalised in one kernel. Longer ones take two: means and variances per channel,
    combined per group (Chan, Golub and LeVeque 1979), then one multiply-add per element. That reads the tensor once
    more than the fixed kernel does, so it is done only where it saves a residual's or a channel scale's own kernel.
    """
    count = 0
    for norm in group_norms(model):
        writer = _Writer(model, norm)
        if norm.row <= LONGEST_ROW:
            writer.rows()
        elif norm.maps[1] * norm.maps[2] <= LONGEST_ROW and (_adds_residual(norm) or _channel_scale(norm) is not None):
            writer.channels()
        else:
            continue
        count += 1
    if count:
        infer_types(model)
    return count


def _whole(node: ir.Node) -> GroupNorm | None:
    if node.op_type != "GroupNormalization" or node.domain or node.inputs[0] is None:
        return None
    weight, bias = constant(node.inputs[1]), constant(node.inputs[2])
    groups, epsilon = node.attributes.get_int("num_groups", 0), node.attributes.get_float("epsilon", 1e-5)
    if weight is None or bias is None or not groups or node.inputs[0].shape is None:
        return None
    if weight.shape != (node.inputs[0].shape[1],):  # opset 18 to 20 had one value per group
        return None
    return GroupNorm(node.inputs[0], node.outputs[0], groups, epsilon, weight, bias, node)


def _as_instance_norm(node: ir.Node) -> GroupNorm | None:
    """Reshape to [B, groups, -1], InstanceNormalization, Reshape back, Mul and Add per channel."""
    if node.op_type != "InstanceNormalization" or node.domain or node.inputs[0] is None:
        return None
    before, back = node.inputs[0].producer(), _only_user(node.outputs[0])
    ones, zeros = constant(node.inputs[1]), constant(node.inputs[2])
    if before is None or back is None or ones is None or zeros is None or np.any(ones != 1) or np.any(zeros != 0):
        return None
    if (before.op_type, back.op_type) != ("Reshape", "Reshape") or before.inputs[0] is None:
        return None
    source, result = before.inputs[0], back.outputs[0]
    if source.shape is None or result.shape is None or list(source.shape) != list(result.shape):
        return None
    weight = bias = None
    scaled, shifted = _only_user(result), None
    if scaled is not None and scaled.op_type == "Mul" and (weight := _per_channel(scaled, source)) is not None:
        shifted = _only_user(scaled.outputs[0])
    if shifted is None or shifted.op_type != "Add" or (bias := _per_channel(shifted, source)) is None:
        return None
    assert weight is not None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return GroupNorm(source, shifted.outputs[0], len(ones), epsilon, weight, bias, shifted)


def _per_channel(node: ir.Node, like: ir.Value) -> np.ndarray | None:
    """The constant operand of a Mul or Add as one value per channel of ``like`` [B, C, H, W]."""
    arrays = [array for value in node.inputs if (array := constant(value)) is not None]
    if len(arrays) != 1 or like.shape is None or arrays[0].ndim < 3 or arrays[0].ndim > 4:
        return None
    channels = like.shape[1]
    fits = arrays[0].shape[-3:] == (channels, 1, 1) and arrays[0].size == channels
    return arrays[0].reshape(-1) if fits else None


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _adds_residual(norm: GroupNorm) -> bool:
    user = _only_user(norm.result)
    return user is not None and user.op_type == "Add" and all(constant(value) is None for value in user.inputs)


def _channel_scale(norm: GroupNorm) -> tuple[ir.Value, np.ndarray] | None:
    """A Mul per channel in front, for this norm alone: what it reads, and its factors."""
    node = norm.source.producer()
    if node is None or node.op_type != "Mul" or _only_user(norm.source) is None:
        return None
    factors = _per_channel(node, norm.source)
    read = [value for value in node.inputs if constant(value) is None]
    return None if factors is None or len(read) != 1 or read[0] is None else (read[0], factors)


class _Writer:
    """Writes one norm out, right before the node that ended it, and takes that node's place."""

    def __init__(self, model: ir.Model, norm: GroupNorm) -> None:
        self.model, self.norm = model, norm
        self.name = str(norm.last.name)
        self.half = norm.source.dtype == ir.DataType.FLOAT16
        self.count = 0

    def rows(self) -> None:
        """[B, groups, row]: all of it in one generated kernel."""
        norm = self.norm
        rows = self._float(self._op("Reshape", norm.source, self._ints(0, norm.groups, -1)))
        off = self._op("Sub", rows, self._mean(rows))
        normal = self._op("Mul", off, self._inverse_root(self._mean(self._op("Mul", off, off))))
        maps = self._op("Reshape", self._as_before(normal), self._ints(0, *norm.maps))
        scaled = self._op("Mul", maps, self._array(norm.weight.reshape(-1, 1, 1)))
        self._replace(self._op("Add", scaled, self._array(norm.bias.reshape(-1, 1, 1))))

    def channels(self) -> None:
        """[B, C, H * W] for the statistics, then ``x * a + b`` with one a and b per channel."""
        norm = self.norm
        channels, width = norm.maps[0], norm.maps[0] // norm.groups
        source, factors = _channel_scale(norm) or (norm.source, np.ones(channels))
        grouped = self._ints(0, norm.groups, width)
        factor = factors.astype(np.float32).reshape(1, norm.groups, width)
        maps = self._float(self._op("Reshape", source, self._ints(0, channels, -1)))
        mean = self._mean(maps)
        off = self._op("Sub", maps, mean)
        spread = self._op("Reshape", self._mean(self._op("Mul", off, off)), grouped)
        mean = self._op("Reshape", mean, grouped)
        if np.any(factor != 1):
            mean = self._op("Mul", mean, self._constant(factor))
            spread = self._op("Mul", spread, self._constant(factor * factor))
        of_group = self._mean(mean)
        apart = self._op("Sub", mean, of_group)
        inverse = self._inverse_root(self._mean(self._op("Add", spread, self._op("Mul", apart, apart))))
        weight, bias = (array.astype(np.float32).reshape(1, norm.groups, width) for array in (norm.weight, norm.bias))
        slope = self._op("Mul", inverse, self._constant(weight))
        offset = self._op("Sub", self._constant(bias), self._op("Mul", slope, of_group))
        if np.any(factor != 1):
            slope = self._op("Mul", slope, self._constant(factor))
        shape = self._ints(0, channels, 1, 1)
        whole = self._op("Mul", self._float(source), self._op("Reshape", slope, shape))
        self._replace(self._as_before(self._op("Add", whole, self._op("Reshape", offset, shape))))

    def _mean(self, value: ir.Value) -> ir.Value:
        return self._op("ReduceMean", value, self._ints(2), keepdims=1)

    def _inverse_root(self, variance: ir.Value) -> ir.Value:
        added = self._op("Add", variance, self._constant(np.float32(self.norm.epsilon)))
        return self._op("Reciprocal", self._op("Sqrt", added))

    def _float(self, value: ir.Value) -> ir.Value:
        return self._op("Cast", value, to=int(ir.DataType.FLOAT)) if self.half else value

    def _as_before(self, value: ir.Value) -> ir.Value:
        return self._op("Cast", value, to=int(ir.DataType.FLOAT16)) if self.half else value

    def _array(self, array: np.ndarray) -> ir.Value:
        return self._constant(array.astype(np.float16 if self.half else np.float32))

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: np.ndarray | np.float32) -> ir.Value:
        self.count += 1
        return add_initializer(self.model, f"{self.name}/written_out/constant_{self.count}", np.asarray(array))

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        self.count += 1
        node = ir.node(op_type, inputs, attributes, name=f"{self.name}/written_out/{op_type}_{self.count}")
        node.outputs[0].name = f"{node.name}_output"
        node.metadata_props.update(self.norm.last.metadata_props)
        self.model.graph.insert_before(self.norm.last, node)
        return node.outputs[0]

    def _replace(self, value: ir.Value) -> None:
        old = self.norm.result
        if old.is_graph_output():
            index = list(self.model.graph.outputs).index(old)
            self.model.graph.outputs[index] = value
        name, shape, dtype = old.name, old.shape, old.type
        old.replace_all_uses_with(value)
        old.name = f"{name}/before"
        value.name, value.shape, value.type = name, shape, dtype
        remove_unused(self.model, self.norm.last)


def remove_unused(model: ir.Model, node: ir.Node) -> None:
    """Remove ``node`` if nothing reads it, then likewise what it alone read."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    read = list(dict.fromkeys(value for value in node.inputs if value is not None))
    model.graph.remove(node, safe=True)
    for value in read:
        producer = value.producer()
        if producer is not None:
            remove_unused(model, producer)
        elif value.is_initializer() and not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(str(value.name), None)
