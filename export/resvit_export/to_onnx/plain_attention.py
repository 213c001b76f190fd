"""ONNX's ``Attention`` (opset 23) written out where TensorRT has no such operator.

Its own refuses keys and values of different width (Conditional DETR's decoder puts the position beside the content in
queries and keys alone). And where a guard keeps the mask in FP32 (a -1e9 that may hide a whole row), the whole of
``Attention`` would run in FP32: written out, only the sum and the softmax do, and both products stay in FP16.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import add_initializer
from resvit_quantize.qdq.guards import guarded_nodes


def write_out_attention(model: ir.Model) -> int:
    """Replace in place every ``Attention`` that TensorRT's own operator does not do well; returns how many.

    softmax(Q K^T * scale + mask) V on [B, heads, tokens, head size] (Vaswani et al. 2017), the scale on Q alone. One
    with a cache, a soft cap, shared heads, sizes that nobody knows or more than one output stays as it is.
    """
    found = [node for node in model.graph if node.op_type == "Attention" and node.domain in ("", "ai.onnx")]
    guarded = guarded_nodes(model) if found else {}
    count = 0
    for node in found:
        writer = _Writer(model, node)
        if writer.plain and (writer.widths_differ or node in guarded):
            writer.write()
            count += 1
    return count


class _Writer:
    """Writes one ``Attention`` out, right before it, and takes its place."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.node = model, node
        self.name = str(node.name or node.outputs[0].name)
        self.count = 0
        inputs = [*node.inputs, *(None for _ in range(4))]
        self.operands, self.mask = inputs[:3], inputs[3]
        rank = {len(value.shape) for value in self.operands if value is not None and value.shape is not None}
        self.packed = rank == {3}
        self.heads = [node.attributes.get_int(f"{side}_num_heads", 0) for side in ("q", "kv", "kv")]
        one_output = all(not value.uses() and not value.is_graph_output() for value in node.outputs[1:])
        no_extras = not any(inputs[4:]) and not node.attributes.get_float("softcap", 0.0)
        self.shapes = (
            [self._shape(index) for index in range(3)] if rank in ({3}, {4}) and None not in inputs[:3] else []
        )
        self.plain = bool(
            one_output
            and no_extras
            and all(isinstance(size, int) for shape in self.shapes for size in shape[1:])
            and self.shapes
            and self.shapes[0][1] == self.shapes[1][1]
        )

    @property
    def widths_differ(self) -> bool:
        return bool(self.shapes[1][3] != self.shapes[2][3])

    def write(self) -> None:
        query, key, value = (self._by_head(index) for index in range(3))
        width, rows, columns = self.shapes[0][3], self.shapes[0][2], self.shapes[1][2]
        scale = self.node.attributes.get_float("scale", 1.0 / math.sqrt(width))
        scaled = self._op("Mul", query, self._constant(np.float32(scale)))
        logits = self._op("MatMul", scaled, self._op("Transpose", key, perm=[0, 1, 3, 2]))
        if self.node.attributes.get_int("is_causal", 0):
            logits = self._hide(self._constant(np.tri(rows, columns, dtype=np.bool_)), logits)
        if self.mask is not None and self.mask.dtype is ir.DataType.BOOL:
            logits = self._hide(self.mask, logits)
        elif self.mask is not None:
            logits = self._op("Add", logits, self.mask)
        result = self._op("MatMul", self._op("Softmax", logits, axis=-1), value)
        if self.packed:
            tokens = self._op("Transpose", result, perm=[0, 2, 1, 3])
            result = self._op("Reshape", tokens, self._constant(np.array([0, 0, -1], np.int64)))
        old = self.node.outputs[0]
        result.name, result.shape, result.type = f"{old.name}/plain", old.shape, old.type
        ir.convenience.replace_nodes_and_values(self.model.graph, self.node, [self.node], [], [old], [result])

    def _shape(self, index: int) -> list[int]:
        """[B, heads, tokens, head size] of an operand; the batch may be open."""
        value = self.operands[index]
        assert value is not None
        assert value.shape is not None
        sizes: list[int] = list(value.shape)  # type: ignore[arg-type]
        if not self.packed:
            return sizes
        heads = self.heads[index]
        fits = heads > 0 and isinstance(sizes[2], int) and sizes[2] % heads == 0
        return [sizes[0], heads, sizes[1], sizes[2] // heads] if fits else [sizes[0], -1 - index, sizes[1], -1]

    def _by_head(self, index: int) -> ir.Value:
        value = self.operands[index]
        assert value is not None
        if not self.packed:
            return value
        split = self._op("Reshape", value, self._constant(np.array([0, 0, self.heads[index], -1], np.int64)))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    def _hide(self, allowed: ir.Value, logits: ir.Value) -> ir.Value:
        return self._op("Where", allowed, logits, self._constant(np.float32(-np.inf)))

    def _constant(self, array: np.ndarray | np.generic) -> ir.Value:
        self.count += 1
        return add_initializer(self.model, f"{self.name}/plain/constant_{self.count}", np.asarray(array))

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        self.count += 1
        node = ir.node(op_type, inputs, attributes, name=f"{self.name}/plain/{op_type}_{self.count}")
        node.metadata_props.update(self.node.metadata_props)
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].type = self.node.outputs[0].type
        self.model.graph.insert_before(self.node, node)
        return node.outputs[0]
