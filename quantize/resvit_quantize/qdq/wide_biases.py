"""Biases in as many dimensions as what they are added to, where ONNX Runtime would refuse the file otherwise.

From opset 21 on its usual optimisation makes a Gemm of a MatMul on tokens and a bias of one dimension, moves a
QuantizeLinear through the Reshape in front, and gives that an ``output_dtype`` that does not fit its zero point (1.32
on x86): the session does not open. A bias [1, 1, N] is left alone. TensorRT's parser makes that of it anyway.
"""

from __future__ import annotations

import onnx_ir as ir

from resvit_quantize.graph.network import add_initializer, constant, opset_of

_FIRST_OPSET = 21
_TOKENS = 3
"""Dimensions from which on a Gemm needs a Reshape."""


def widen_biases(model: ir.Model) -> int:
    """Give in place every bias [N] behind a MatMul of three dimensions or more as many dimensions; returns how many."""
    if opset_of(model) < _FIRST_OPSET:
        return 0
    count = 0
    for node in model.graph:
        shape = node.outputs[0].shape if node.op_type == "Add" and not node.domain else None
        if shape is None or len(shape) < _TOKENS:
            continue
        for index, value in enumerate(node.inputs):
            other = node.inputs[1 - index]
            source = other.producer() if other is not None else None
            array = constant(value)
            if array is None or value is None or array.ndim != 1 or source is None or source.op_type != "MatMul":
                continue
            name = f"{value.name}/wide_{len(shape)}"
            wide = model.graph.initializers.get(name)
            if wide is None:
                wide = add_initializer(model, name, array.reshape([1] * (len(shape) - 1) + [-1]))
            node.replace_input_with(index, wide)
            if not value.uses() and not value.is_graph_output():
                model.graph.initializers.pop(str(value.name), None)
            count += 1
    return count
