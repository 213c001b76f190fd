"""Which channels of a network can be scaled together: where each comes from, and all that reads it.

Every output channel of a layer or norm is a variable: dividing what writes it and multiplying what reads it leaves
the network as it was. Variables are followed as labels through everything that commutes with a positive factor per
channel: views, ReLU, pooling, products with attention weights. A residual addition makes the channels of both
sides one. What anything else reads (a GELU, a softmax, a norm, the graph's outputs) is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.analysis import captured_values
from resvit_quantize.graph.network import constant, int_attribute
from resvit_quantize.graph.shapes import static_shapes
from resvit_quantize.placement.placement import channel_axis

_LINEAR = frozenset({"MatMul", "Gemm"})
_PRODUCTS = frozenset({"Conv", *_LINEAR})
_NORMS = frozenset({"LayerNormalization", "GroupNormalization", "BatchNormalization"})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_ALIKE = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout"})
_MOST = 1 << 23
"""Elements of one tensor's labels; larger ones are not followed."""

Labels = np.ndarray
"""int32, of the tensor's shape for one image: a variable's number, 0 for what is fixed."""


@dataclass(frozen=True, eq=False)
class Written:
    """Constants along the output channels of a node: input ``index``, its channel ``axis``, a variable for each."""

    node: ir.Node
    index: int
    axis: int
    variables: np.ndarray


@dataclass(frozen=True, eq=False)
class Read:
    """A weighted product and the variable of each of its input channels [C]."""

    node: ir.Node
    variables: np.ndarray


@dataclass(eq=False)
class Flow:
    """All that is known of a network's channels; variables are numbered by their group's first one."""

    written: list[Written] = field(default_factory=list)
    read: list[Read] = field(default_factory=list)
    free: np.ndarray = field(default_factory=lambda: np.zeros(1, bool))
    """[V] whether a variable may be scaled."""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """The variable of each channel [C] of the tensors that were asked for, by name."""


def channel_flow(
    model: ir.Model, wanted: Mapping[ir.Value, int], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Flow:
    """Follow all channels of a float graph with known shapes: ``shapes`` for one image, or what the graph tells.

    ``wanted`` are the tensors to tell the channels of, with the axis that they run along. Where one cannot be told,
    what it holds is fixed.
    """
    return _Follower(model, static_shapes(model) if shapes is None else shapes).flow(wanted)


class _Follower:
    def __init__(self, model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model, self.shapes = model, shapes
        self.parent: list[int] = [0]
        self.fixed: list[bool] = [True]
        self.labels: dict[ir.Value, Labels] = {}
        self.written: list[Written] = []
        self.read: list[Read] = []

    def flow(self, wanted: Mapping[ir.Value, int]) -> Flow:
        for node in self.model.graph:
            self.step(node)
            for value in captured_values(node):
                self.fix(value)
        for value in self.model.graph.outputs:
            self.fix(value)
        tensors: dict[str, np.ndarray] = {}
        for value, axis in wanted.items():
            variables = _by_channel(self.labels[value], axis) if value in self.labels else None
            if variables is None:
                self.fix(value)
            else:
                tensors[str(value.name)] = variables
        roots = np.array([self.root(variable) for variable in range(len(self.parent))])
        fixed = np.zeros(len(roots), bool)
        np.logical_or.at(fixed, roots, np.array(self.fixed))
        return Flow(
            [Written(w.node, w.index, w.axis, roots[w.variables]) for w in self.written],
            [Read(r.node, roots[r.variables]) for r in self.read],
            ~fixed,
            {name: roots[variables] for name, variables in tensors.items()},
        )

    def root(self, variable: int) -> int:
        while self.parent[variable] != variable:
            self.parent[variable] = self.parent[self.parent[variable]]
            variable = self.parent[variable]
        return variable

    def join(self, first: Labels, second: Labels) -> None:
        pairs = np.unique(np.stack([first.reshape(-1), second.reshape(-1)]), axis=1)
        for one, other in pairs.T.tolist():
            low, high = sorted((self.root(one), self.root(other)))
            self.parent[high] = low
            self.fixed[low] = self.fixed[low] or self.fixed[high]

    def fix(self, value: ir.Value | None) -> None:
        if value is not None and value in self.labels:
            for variable in np.unique(self.labels[value]).tolist():
                self.fixed[self.root(variable)] = True

    def new(self, count: int) -> np.ndarray:
        first = len(self.parent)
        self.parent += range(first, first + count)
        self.fixed += [False] * count
        return np.arange(first, first + count, dtype=np.int32)

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        found = self.shapes.get(str(value.name)) if value is not None else None
        return found if found is not None and math.prod(found) <= _MOST else None

    def step(self, node: ir.Node) -> None:
        computed = [v for v in node.inputs if v is not None and v in self.labels]
        result: Labels | list[Labels | None] | None = None
        shape = self.shape(node.outputs[0]) if node.outputs else None
        if shape is not None:
            if node.op_type in _PRODUCTS and constant(node.inputs[1]) is not None:
                result = self.product(node, shape)
            elif node.op_type in _NORMS:
                result = self.norm(node, shape)
            elif node.op_type in (*_ATTENTION, "MatMul"):
                result = self.attention(node, shape)
            elif node.op_type in _ALIKE:
                result = self.labels.get(node.inputs[0]) if node.inputs[0] is not None else None
            elif node.op_type in _POOLS:
                result = self.pool(node, shape)
            elif node.op_type in ("Add", "Mul"):
                result = self.pointwise(node, shape)
            else:
                result = self.view(node)
        if result is None:
            for value in computed:
                self.fix(value)
            return
        for output, labels in zip(node.outputs, result if isinstance(result, list) else [result], strict=False):
            if labels is not None:
                self.labels[output] = labels

    def product(self, node: ir.Node, shape: tuple[int, ...]) -> Labels | None:
        value, weight = node.inputs[0], constant(node.inputs[1])
        assert weight is not None
        # A stack of matrices has no one axis of channels, a transposed activation not at its end.
        if node.op_type in _LINEAR and (weight.ndim != 2 or int_attribute(node, "transA")):
            return None
        axis = 1 if node.op_type == "Conv" else len(shape) - 1
        if value is not None and value in self.labels:
            variables = _by_channel(self.labels[value], 1 if node.op_type == "Conv" else -1)
            if variables is None or not _own(node.inputs[1]) or weight.dtype != np.float32:
                self.fix(value)
            else:
                self.read.append(Read(node, variables))
        along = channel_axis(node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        offset = constant(bias)
        fits = bias is None or (_own(bias) and offset is not None and _ends_in(offset, shape[axis]))
        if not _own(node.inputs[1]) or weight.shape[along] != shape[axis] or not fits:
            return None
        fresh = self.new(shape[axis])
        self.written.append(Written(node, 1, along, fresh))
        if offset is not None:
            self.written.append(Written(node, 2, offset.ndim - 1, fresh))
        return _along(fresh, shape, axis)

    def norm(self, node: ir.Node, shape: tuple[int, ...]) -> Labels | None:
        for value in node.inputs[:1]:
            self.fix(value)
        axis = len(shape) - 1 if node.op_type == "LayerNormalization" else 1
        constants = [constant(value) for value in node.inputs[1:3] if value is not None]
        if any(array is None or array.shape != (shape[axis],) for array in constants) or not constants:
            return None
        if not all(_own(value) for value in node.inputs[1:3]):
            return None
        fresh = self.new(shape[axis])
        self.written += [Written(node, index, 0, fresh) for index in range(1, 1 + len(constants))]
        return _along(fresh, shape, axis)

    def attention(self, node: ir.Node, shape: tuple[int, ...]) -> Labels | None:
        """Rows are mixed within a channel of the last operand; all other operands are fixed."""
        position = 1 if node.op_type == "MatMul" else 2
        value = node.inputs[position] if len(node.inputs) > position else None
        for index, other in enumerate(node.inputs):
            if index != position:
                self.fix(other)
        # MultiHeadAttention's fourth input is a bias, of the values as well.
        biased = node.op_type == "MultiHeadAttention" and any(v is not None for v in node.inputs[3:4])
        if value is None or value not in self.labels or biased:
            return None
        labels = self.labels[value]
        if labels.ndim != len(shape) or (labels != labels[..., :1, :]).any():
            return None
        if labels.shape[:-2] != shape[:-2] or labels.shape[-1] != shape[-1]:
            return None
        return np.broadcast_to(labels[..., :1, :], shape)

    def pool(self, node: ir.Node, shape: tuple[int, ...]) -> Labels | None:
        value = node.inputs[0]
        variables = _by_channel(self.labels[value], 1) if value is not None and value in self.labels else None
        return None if variables is None else _along(variables, shape, 1)

    def pointwise(self, node: ir.Node, shape: tuple[int, ...]) -> Labels | None:
        first, second = node.inputs[:2]
        sides = [index for index, value in enumerate((first, second)) if constant(value) is not None]
        if not sides:
            if node.op_type != "Add" or first not in self.labels or second not in self.labels:
                return None
            one, other = self.labels[first], self.labels[second]
            if one.shape != other.shape:
                return None
            self.join(one, other)
            return one
        side = sides[0]
        value, array = node.inputs[1 - side], constant(node.inputs[side])
        if value is None or array is None:
            return None
        if value not in self.labels:
            return self.gain(node, side, array, shape)
        labels = self.labels[value]
        if labels.shape != shape:
            return None
        if node.op_type == "Mul":
            # A product with constants passes any factor on.
            return labels
        axis = _channel_axis(array, shape)
        variables = None if axis is None else _by_channel(labels, axis)
        if variables is None or axis is None or not _own(node.inputs[side]):
            return None
        self.written.append(Written(node, side, axis - len(shape) + array.ndim, variables))
        return labels

    def gain(self, node: ir.Node, side: int, array: np.ndarray, shape: tuple[int, ...]) -> Labels | None:
        """A product with a constant for each channel, as norms end with: its outputs are variables of their own."""
        axis = _channel_axis(array, shape)
        if node.op_type != "Mul" or axis is None or not _own(node.inputs[side]):
            return None
        fresh = self.new(shape[axis])
        self.written.append(Written(node, side, axis - len(shape) + array.ndim, fresh))
        return _along(fresh, shape, axis)

    def view(self, node: ir.Node) -> Labels | list[Labels | None] | None:
        value = node.inputs[0] if node.inputs else None
        if node.op_type == "Concat":
            parts = [self.labels.get(v) if v is not None else None for v in node.inputs]
            if any(part is None for part in parts):
                return None
            return np.asarray(np.concatenate([p for p in parts if p is not None], axis=int_attribute(node, "axis")))
        if value is None or value not in self.labels:
            return None
        labels, shapes = self.labels[value], [self.shape(output) for output in node.outputs]
        if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            fits = shapes[0] is not None and math.prod(shapes[0]) == labels.size
            return labels.reshape(shapes[0]) if fits and shapes[0] is not None else None
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            return np.asarray(np.transpose(labels, None if perm is None else list(perm.as_ints())))
        if node.op_type == "Split":
            axis = int_attribute(node, "axis")
            sizes = [shape[axis] for shape in shapes if shape is not None]
            whole = len(sizes) == len(shapes) and sum(sizes) == labels.shape[axis]
            return list(np.split(labels, np.cumsum(sizes)[:-1], axis)) if whole else None
        if node.op_type == "Slice":
            return _sliced(node, labels)
        if node.op_type == "Gather":
            index = constant(node.inputs[1])
            return None if index is None else np.asarray(np.take(labels, index, axis=int_attribute(node, "axis")))
        return None


def _sliced(node: ir.Node, labels: Labels) -> Labels | None:
    arrays = [constant(value) for value in node.inputs[1:]]
    if len(arrays) < 2 or any(array is None for array in arrays):
        return None
    plain = [[int(item) for item in np.reshape(array, -1)] for array in arrays if array is not None]
    axes = plain[2] if len(plain) > 2 else list(range(len(plain[0])))
    steps = plain[3] if len(plain) > 3 else [1] * len(plain[0])
    index = [slice(None)] * labels.ndim
    for start, end, axis, step in zip(plain[0], plain[1], axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return labels[tuple(index)] if min(steps) > 0 else None


def _by_channel(labels: Labels, axis: int) -> np.ndarray | None:
    """The variable of each channel along ``axis`` [C]; ``None`` where a channel holds several."""
    lined = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    return None if not lined.size or (lined != lined[:, :1]).any() else lined[:, 0].copy()


def _along(variables: np.ndarray, shape: tuple[int, ...], axis: int) -> Labels:
    lined = variables.reshape([-1 if index == axis else 1 for index in range(len(shape))])
    return np.broadcast_to(lined, shape)


def _channel_axis(array: np.ndarray, shape: tuple[int, ...]) -> int | None:
    """The axis of ``shape`` that a broadcast constant runs along, if it is one alone."""
    long = [index for index, size in enumerate(array.shape) if size > 1]
    if len(long) != 1 or array.ndim > len(shape):
        return None
    axis = long[0] + len(shape) - array.ndim
    return axis if array.shape[long[0]] == shape[axis] else None


def _ends_in(array: np.ndarray, size: int) -> bool:
    """Whether an array is a row of ``size`` numbers, whatever axes of one stand in front."""
    return array.size == size and array.shape[-1:] == (size,)


def _own(value: ir.Value | None) -> bool:
    """Whether a constant has one reader."""
    return value is not None and constant(value) is not None and len(list(value.uses())) == 1
