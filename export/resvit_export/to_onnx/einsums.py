"""Every Einsum as the transposes, reshapes and matrix product that it stands for.

A projection written as Einsum (JAX, MaxViT) is a linear layer, and an Einsum of two computed tensors is attention.
Spelled as MatMul, the passes behind see them: they are counted, quantised and fused like any other. What is left as
Einsum takes a diagonal, or has sizes that nobody knows; TensorRT reads no diagonal either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

Size = int | None


class _UnclearError(Exception):
    """The equation cannot be spelled out with what is known of the sizes."""


def spell_out_einsums(model: ir.Model) -> int:
    """Replace in place every Einsum that can be by products of matrices; returns how many were."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "Einsum" and node.domain in ("", "ai.onnx"):
            count += _replace(model.graph, node)
    return count


def terms_of_einsum(equation: str, ranks: Sequence[int | None]) -> tuple[list[list[str]], list[str]]:
    """The labels of each operand and of the result; the axes behind an ellipsis are called ``.0`` from the right.

    Raises:
        ValueError: for an equation that does not fit the operands, or whose ellipsis stands for unknown axes.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if len(sides) != len(ranks):
        raise ValueError(equation)
    operands = [_labels(side, rank) for side, rank in zip(sides, ranks, strict=True)]
    hidden = max((sum(label.startswith(".") for label in labels) for labels in operands), default=0)
    if arrow:
        return operands, _labels(right, hidden + len(right.replace("...", "")) if "..." in right else len(right))
    named = [label for labels in operands for label in labels if not label.startswith(".")]
    dots = [f".{index}" for index in reversed(range(hidden))]
    return operands, dots + sorted(label for label in set(named) if named.count(label) == 1)


def _labels(side: str, rank: int | None) -> list[str]:
    before, dots, behind = side.partition("...")
    if not all(label.isalpha() for label in before + behind):
        raise ValueError(side)
    hidden = 0
    if dots:
        if rank is None:
            raise ValueError(side)
        hidden = rank - len(before) - len(behind)
    if hidden < 0 or (rank is not None and rank != len(before) + hidden + len(behind)):
        raise ValueError(side)
    return [*before, *(f".{index}" for index in reversed(range(hidden))), *behind]


@dataclass
class _Term:
    """A tensor, the label of each of its axes, and their sizes; ``array`` of one that is constant.

    ``value`` is None for a constant that is not in the graph yet.
    """

    value: ir.Value | None
    labels: list[str]
    sizes: list[Size]
    array: np.ndarray | None = None

    def size(self, labels: Iterable[str]) -> list[Size]:
        known = dict(zip(self.labels, self.sizes, strict=True))
        return [known[label] for label in labels]


def _replace(graph: ir.Graph, node: ir.Node) -> bool:
    if any(value is None or value.shape is None for value in node.inputs):
        return False
    operands = [value for value in node.inputs if value is not None]
    arrays = [value.const_value.numpy() if value.const_value is not None else None for value in operands]
    ranks = [len(value.shape) if value.shape is not None else None for value in operands]
    try:
        labels, result = terms_of_einsum(node.attributes.get_string("equation", ""), ranks)
        if any(len(set(each)) < len(each) for each in (*labels, result)) or all(a is not None for a in arrays):
            return False
        terms = [
            _Term(value, each, [size if isinstance(size, int) else None for size in value.shape or ()], array)
            for value, each, array in zip(operands, labels, arrays, strict=True)
        ]
        made = _Spelling(node)
        whole = made.contracted(terms, result)
    except (ValueError, _UnclearError):
        return False
    old = node.outputs[0]
    if whole.value is None or whole.value.producer() not in made.nodes:
        whole = made.copied(whole)
    assert whole.value is not None
    for constant in made.constants:
        graph.register_initializer(constant)
    graph.insert_before(node, made.nodes)
    name, old.name = old.name, f"{old.name}/einsum"
    whole.value.name, whole.value.shape = name, old.shape
    old.replace_all_uses_with(whole.value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


@dataclass
class _Spelling:
    """The nodes and constants that take an Einsum's place, in order."""

    origin: ir.Node
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def contracted(self, terms: list[_Term], result: list[str]) -> _Term:
        """All operands in one, its axes in the order of ``result``."""
        here, *others = terms
        while others:
            # First what shares an axis that ends here: anything else only grows.
            index = next((i for i, other in enumerate(others) if set(here.labels) & set(other.labels)), 0)
            other = others.pop(index)
            kept = {*result, *(label for term in others for label in term.labels)}
            here = self._product(here, other, kept)
        here = self._summed(here, [label for label in here.labels if label not in result])
        if set(here.labels) != set(result):
            raise _UnclearError
        return self._arranged(here, result)

    def copied(self, term: _Term) -> _Term:
        """An operand as it was, behind an Identity."""
        return self._made("Identity", [self._value(term)], term.labels, term.sizes)

    def _product(self, x: _Term, y: _Term, kept: set[str]) -> _Term:
        x = self._summed(x, [label for label in x.labels if label not in y.labels and label not in kept])
        y = self._summed(y, [label for label in y.labels if label not in x.labels and label not in kept])
        if x.array is not None and y.array is None:
            x, y = y, x  # the weight goes to the right
        both = [label for label in x.labels if label in y.labels]
        for label, one, other in zip(both, x.size(both), y.size(both), strict=True):
            # Einsum stretches an axis of 1, and so does MatMul, but for the axis that is summed.
            if (one is None or other is None or one != other) and label not in kept:
                raise _UnclearError
        summed = [label for label in both if label not in kept]
        if not summed:
            return self._scaled(x, y)
        batch = [label for label in both if label in kept]
        rows = [label for label in x.labels if label not in both]
        columns = [label for label in y.labels if label not in both]
        inner = math.prod(size for size in x.size(summed) if size is not None)
        plain = y.array is not None and not batch
        if plain:
            batch, rows = rows, []  # a weight of two axes serves any number of axes in front
        x = self._arranged(x, [*batch, *rows, *summed])
        y = self._arranged(y, [*batch, *summed, *columns] if not plain else [*summed, *columns])
        sizes = [*self._batch_sizes(x, y, batch), *x.size(rows), *y.size(columns)]
        left = self._merged(x, len(batch), [] if plain else [rows], summed, inner)
        right = self._merged(y, 0 if plain else len(batch), [], summed, inner, columns)
        product = self._made("MatMul", [left, right], [], [])
        if len(columns) == 1 and (plain or len(rows) == 1):
            return _Term(product.value, [*batch, *rows, *columns], sizes)
        target = [0] * len(batch) + _open([*x.size(rows), *y.size(columns)])
        return self._reshaped(product, target, [*batch, *rows, *columns], sizes)

    def _batch_sizes(self, x: _Term, y: _Term, batch: list[str]) -> list[Size]:
        stretched = dict(zip(x.labels, x.sizes, strict=True))
        for label, size in zip(y.labels, y.sizes, strict=True):
            if label in batch and stretched.get(label) == 1:
                stretched[label] = size
        return [stretched[label] for label in batch]

    def _merged(
        self,
        term: _Term,
        lead: int,
        rows: list[list[str]],
        summed: list[str],
        inner: int,
        columns: list[str] | None = None,
    ) -> ir.Value:
        """``[lead…, rows, inner]``, or ``[lead…, inner, columns]``: each group of axes as one."""
        groups = [*rows, summed] if columns is None else [summed, columns]
        if all(len(group) == 1 for group in groups):
            return self._value(term)
        sizes = [
            inner if group is summed else (_open([_whole(term.size(group))])[0] if group else 1) for group in groups
        ]
        return self._value(self._reshaped(term, [0] * lead + sizes, [], []))

    def _scaled(self, x: _Term, y: _Term) -> _Term:
        """The product where nothing is summed: both stretched to all axes."""
        labels = [*x.labels, *(label for label in y.labels if label not in x.labels)]
        sizes = self._batch_sizes(_Term(None, labels, [*x.sizes, *([1] * (len(labels) - len(x.labels)))]), y, labels)
        spread = []
        for term in (x, y):
            own = self._arranged(term, [label for label in labels if label in term.labels])
            missing = [index for index, label in enumerate(labels) if label not in term.labels]
            if own.array is not None:
                array = np.expand_dims(own.array, tuple(missing))
                spread.append(self._value(_Term(None, labels, list(array.shape), array)))
            elif missing:
                axes = self._constant(np.array(missing, np.int64))
                spread.append(self._value(self._made("Unsqueeze", [self._value(own), axes], labels, sizes)))
            else:
                spread.append(self._value(own))
        return self._made("Mul", spread, labels, sizes)

    def _summed(self, term: _Term, labels: list[str]) -> _Term:
        if not labels:
            return term
        axes = [term.labels.index(label) for label in labels]
        rest = [label for label in term.labels if label not in labels]
        if term.array is not None:
            return _Term(None, rest, term.size(rest), term.array.sum(axis=tuple(axes)))
        inputs = [self._value(term), self._constant(np.array(axes, np.int64))]
        return self._made("ReduceSum", inputs, rest, term.size(rest), keepdims=0)

    def _arranged(self, term: _Term, labels: list[str]) -> _Term:
        if term.labels == labels:
            return term
        order, sizes = [term.labels.index(label) for label in labels], term.size(labels)
        if term.array is not None:
            return _Term(None, labels, sizes, term.array.transpose(order))
        return self._made("Transpose", [self._value(term)], labels, sizes, perm=order)

    def _reshaped(self, term: _Term, target: list[int], labels: list[str], sizes: list[Size]) -> _Term:
        if term.array is not None:
            lead = [size if wanted == 0 else wanted for size, wanted in zip(term.array.shape, target, strict=False)]
            return _Term(None, labels, sizes, term.array.reshape([*lead, *target[len(lead) :]]))
        return self._made("Reshape", [self._value(term), self._constant(np.array(target, np.int64))], labels, sizes)

    def _value(self, term: _Term) -> ir.Value:
        if term.value is None:
            assert term.array is not None
            term.value = self._constant(np.ascontiguousarray(term.array))
        return term.value

    def _constant(self, array: np.ndarray) -> ir.Value:
        name = f"{self._base()}/einsum_{len(self.constants)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.constants.append(value)
        return value

    def _made(
        self, op: str, inputs: list[ir.Value], labels: list[str], sizes: list[Size], **attributes: int | list[int]
    ) -> _Term:
        first = op == "MatMul" and all(node.op_type != op for node in self.nodes)
        name = str(self.origin.name) if first else f"{self._base()}/{op}_{len(self.nodes)}"
        node = ir.node(op, inputs, attributes, name=name)
        node.metadata_props.update(self.origin.metadata_props)
        node.outputs[0].name = f"{self._base()}/spelled_{len(self.nodes)}"
        node.outputs[0].type = self.origin.outputs[0].type
        self.nodes.append(node)
        return _Term(node.outputs[0], list(labels), list(sizes))

    def _base(self) -> str:
        return str(self.origin.name or self.origin.outputs[0].name)


def _whole(sizes: Sequence[Size]) -> Size:
    return None if any(size is None for size in sizes) else math.prod(size or 0 for size in sizes)


def _open(sizes: Sequence[Size]) -> list[int]:
    """Sizes for a Reshape, which finds one that is not known."""
    if sum(size is None for size in sizes) > 1:
        raise _UnclearError
    return [-1 if size is None else size for size in sizes]
