"""Corrections of layers' biases, put into the constants that are there already wherever that is possible."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import add_initializer, constant


def add_biases(model: ir.Model, corrections: Mapping[str, np.ndarray], *, new_nodes: bool = True) -> None:
    """Add to the outputs of Conv, Gemm and MatMul nodes, by name, a float32 [O] for each output channel, in place.

    A Conv or Gemm takes it in its own bias. A MatMul's goes into the constant of the Add behind it; where there is
    none, an Add of its own follows the MatMul, or with ``new_nodes`` false, it is left as it is.
    """
    for node in list(model.graph):
        correction = corrections.get(str(node.name))
        if correction is None or not np.any(correction):
            continue
        if node.op_type == "MatMul":
            _behind(model, node, correction, new_nodes)
        else:
            _inside(model, node, correction, new_nodes)


def _inside(model: ir.Model, node: ir.Node, correction: np.ndarray, new_nodes: bool) -> None:
    old = node.inputs[2] if len(node.inputs) > 2 else None
    trained = constant(old)
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    if (old is not None and trained is None) or beta == 0.0:
        _behind(model, node, correction, new_nodes)
        return
    correction = correction / beta
    array = correction if trained is None else trained + correction
    bias = _named(model, f"{node.name}/bias/corrected", array)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)
    _drop_unused(model, old)


def _behind(model: ir.Model, node: ir.Node, correction: np.ndarray, new_nodes: bool) -> None:
    output = node.outputs[0]
    uses = list(output.uses())
    linear = node.op_type in ("MatMul", "Gemm")
    if linear and len(uses) == 1 and uses[0].node.op_type == "Add" and not output.is_graph_output():
        add, index = uses[0].node, 1 - uses[0].idx
        trained = constant(add.inputs[index])
        if trained is not None and trained.size == correction.size and trained.shape[-1:] == correction.shape:
            old = add.inputs[index]
            array = trained + correction.reshape(trained.shape)
            add.replace_input_with(index, _named(model, f"{node.name}/bias/corrected", array))
            _drop_unused(model, old)
            return
    if not new_nodes:
        return
    spatial = 0 if linear or output.shape is None else len(output.shape) - 2
    array = correction.reshape(-1, *[1] * spatial)
    add = ir.node("Add", [output, _named(model, f"{node.name}/bias/corrected", array)], name=f"{node.name}/corrected")
    value = add.outputs[0]
    value.name, value.shape, value.type = f"{output.name}/corrected", output.shape, output.type
    for use in uses:
        use.node.replace_input_with(use.idx, value)
    for position, graph_output in enumerate(model.graph.outputs):
        if graph_output is output:
            # What is outside knows the output by its name.
            value.name, output.name = str(output.name), f"{output.name}/uncorrected"
            model.graph.outputs[position] = value
    model.graph.insert_after(node, add)


def _named(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    while name in model.graph.initializers:  # corrected for another reason before
        name += "/again"
    return add_initializer(model, name, np.ascontiguousarray(array, np.float32))


def _drop_unused(model: ir.Model, value: ir.Value | None) -> None:
    if value is not None and not value.uses() and not value.is_graph_output():
        model.graph.initializers.pop(str(value.name), None)
