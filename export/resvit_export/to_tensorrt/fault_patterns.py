"""What a graph contains that some TensorRT computes wrongly: the patterns of ``resvit_engines.targets.faults``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from resvit_engines.targets.faults import Pattern
from resvit_export.to_onnx.onnx_file import bounded_model, reading
from resvit_export.to_tensorrt.expectation import attention_chains, values_of_inputs
from resvit_export.to_tensorrt.sampling import is_in_new_words
from resvit_export.to_tensorrt.scaling import both_scaled
from resvit_quantize.fusion.deformable import groups, module_of
from resvit_quantize.graph.regions import is_view

_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_WITH_CONSTANT = frozenset({"Add", "Sub", "Mul", "Div"})
_CASTS = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear"})
_MOST = 4096
"""Nodes that one operand is followed through."""

Found = dict[Pattern, tuple[str, ...]]
"""The names of the nodes of each pattern."""


def found_to_json(found: Found) -> dict[str, list[str]]:
    """Plain JSON values."""
    return {pattern.value: list(nodes) for pattern, nodes in found.items()}


def found_from_json(document: Mapping[str, Sequence[str]]) -> Found:
    """What :func:`found_to_json` wrote."""
    return {Pattern(name): tuple(map(str, nodes)) for name, nodes in document.items()}


def patterns_in(path: Path) -> Found:
    """The patterns that the ONNX at ``path`` contains, with the names of the nodes of each, in order.

    Raises:
        ResvitError: INPUT where the file is no ONNX model.
    """
    proto = bounded_model(path)
    with reading(path):
        return patterns_of(ir.serde.deserialize_model(proto))


def patterns_of(model: ir.Model) -> Found:
    """The same of a graph in memory, which stays as it is."""
    found = _Patterns(model)
    listed: dict[Pattern, Sequence[ir.Node | str]] = {
        Pattern.SAMPLING_WORDS: [node for node in model.graph if is_in_new_words(node)],
        Pattern.DEFORMABLE: [module_of(group) for group in groups(model)],
        Pattern.ATTENTION: [chain[0] for chain in found.chains],
        Pattern.BOTH_SCALED: [chain[0] for chain in found.chains if both_scaled(chain[0]) is not None],
        Pattern.REDUCED_KEYS: list(found.reduced_keys()),
        Pattern.CONSTANT_QUERY: list(found.constant_queries()),
        Pattern.SHARED_INPUT: list(found.shared_inputs()),
    }
    return {
        pattern: tuple(node if isinstance(node, str) else _name(node) for node in nodes)
        for pattern, nodes in listed.items()
        if nodes
    }


class _Patterns:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.data = values_of_inputs(model)
        self.chains = attention_chains(model)

    def reduced_keys(self) -> Iterator[ir.Node]:
        """Attention whose keys, and not whose queries, come through a strided convolution of what both are made of."""
        for first, *_ in self.chains:
            query, key = (set(self._strided(value)) for value in first.inputs[:2])
            if key - query:
                yield first

    def _strided(self, value: ir.Value | None) -> Iterator[ir.Node]:
        """The strided convolutions in front of a value, behind which are only linear layers, norms and views."""
        waiting, seen = [value], set[ir.Node]()
        while waiting and len(seen) < _MOST:
            here = waiting.pop()
            node = here.producer() if here is not None else None
            if node is None or node in seen or node.domain not in ("", "ai.onnx"):
                continue
            seen.add(node)
            if node.op_type == "Conv":
                if max(node.attributes.get_ints("strides", [1])) > 1:
                    yield node
            elif is_view(node) or node.op_type in _CASTS | _NORMS or self._by_constant(node):
                waiting += [value for value in node.inputs if value in self.data]

    def _by_constant(self, node: ir.Node) -> bool:
        """Whether a node computes with one tensor of the input's and constants."""
        return node.op_type in _PRODUCTS | _WITH_CONSTANT and sum(value in self.data for value in node.inputs) == 1

    def constant_queries(self) -> Iterator[ir.Node]:
        """Attention whose queries do not depend on the input, whole or written out."""
        for node in self.model.graph:
            if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
                if node.inputs[0] not in self.data and node.inputs[1] in self.data:
                    yield node
            elif node.op_type == "Softmax" and self._mixes(node) and (first := self._scores(node)) is not None:
                yield first

    def _mixes(self, softmax: ir.Node) -> bool:
        """Whether the shares are multiplied with a tensor that depends on the input."""
        readers = [use.node for use in softmax.outputs[0].uses()]
        while len(readers) == 1 and (is_view(readers[0]) or readers[0].op_type in _CASTS):
            readers = [use.node for use in readers[0].outputs[0].uses()]
        return any(node.op_type == "MatMul" and all(v in self.data for v in node.inputs) for node in readers)

    def _scores(self, softmax: ir.Node) -> ir.Node | None:
        """The product of constant queries with transposed keys in front of a softmax, if that is what it reads."""
        value = softmax.inputs[0]
        for _ in range(12):
            node = value.producer() if value is not None else None
            if node is None:
                return None
            if node.op_type == "MatMul":
                query, key = node.inputs[:2]
                return node if query not in self.data and key in self.data else None
            if not (is_view(node) or node.op_type in _CASTS | _WITH_CONSTANT):
                return None
            value = next((value for value in node.inputs if value in self.data), None)
        return None

    def shared_inputs(self) -> Iterator[ir.Node]:
        """Norms that several products with weights read, through views, casts and Q/DQ."""
        for node in self.model.graph:
            if node.op_type in _NORMS and len(set(self._weighted_readers(node.outputs[0]))) > 1:
                yield node

    def _weighted_readers(self, value: ir.Value) -> Iterator[ir.Node]:
        for use in value.uses():
            node = use.node
            if node.op_type in _PRODUCTS:
                other = node.inputs[1 - use.idx] if use.idx < 2 else None
                if other is not None and other not in self.data:
                    yield node
            elif is_view(node) or node.op_type in _CASTS:
                yield from self._weighted_readers(node.outputs[0])


def _name(node: ir.Node) -> str:
    return str(node.name or node.outputs[0].name)
