"""GroupNormalization of a user's file, written as our own export writes GroupNorm: nobody infers a shape behind it.

ONNX's shape inference knows nothing of the operator: behind it no layer has a shape, none is counted, and calibration
cannot tell one image from the next. ONNX Runtime computes its variance as E[x^2] - E[x]^2, which is NaN for a black
image. As InstanceNormalization over [B, groups, C / groups * H * W] (Wu and He 2018) it has neither fault.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from resvit_quantize.graph.network import add_initializer

_NAME = "GroupNormalization"
_PER_CHANNEL = 21
"""The opset from which weight and bias are per channel; they were per group before, in an operator now withdrawn."""


def replace_withdrawn_group_norms(proto: onnx.ModelProto, opset: int) -> None:
    """Write out in place those of opset 18 to 20, which ONNX's checker refuses by now."""
    if opset >= _PER_CHANNEL or all(node.op_type != _NAME for node in proto.graph.node):
        return
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        groups = next((a.i for a in node.attribute if a.name == "num_groups"), 0)
        if node.op_type != _NAME or node.domain not in ("", "ai.onnx") or len(node.input) != 3 or groups < 1:
            nodes.append(node)
            continue
        source, result = node.input[0], node.output[0]
        before, normal, shape, rows = (f"{result}/{name}" for name in ("grouped", "normal", "shape", "rows"))
        proto.graph.initializer.append(numpy_helper.from_array(np.array([0, groups, -1]), rows))
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        nodes += [
            helper.make_node("Reshape", [source, rows], [before], f"{node.name}/group"),
            helper.make_node("InstanceNormalization", [before, *node.input[1:]], [normal], node.name, epsilon=epsilon),
            helper.make_node("Shape", [source], [shape], f"{node.name}/shape"),
            helper.make_node("Reshape", [normal, shape], [result], f"{node.name}/back"),
        ]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def write_out_group_norms(model: ir.Model) -> int:
    """Write out in place every GroupNormalization whose input has a known rank; returns how many.

    Shapes are inferred anew, behind them too.
    """
    from resvit_export.to_onnx.canonical import infer_shapes

    norms = [node for node in model.graph if node.op_type == _NAME and not node.domain]
    if not norms:
        return 0
    for node in norms:  # has the same inputs, and its shape is inferred
        node.op_type = "InstanceNormalization"
    infer_shapes(model)
    for node in norms:
        node.op_type = _NAME
    count = sum(_write_out(model, node) for node in norms)
    infer_shapes(model)
    return count


def _write_out(model: ir.Model, node: ir.Node) -> bool:
    source, weight, bias = node.inputs[:3]
    groups = node.attributes.get_int("num_groups", 0)
    if source is None or source.shape is None or weight is None or bias is None or groups < 1:
        return False
    graph, parent = model.graph, str(node.name or node.outputs[0].name).rpartition("/")[0]
    prefix = f"{parent}/" if parent else ""
    made: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, **attributes: float) -> ir.Value:
        one = ir.node(kind, list(inputs), attributes, name=f"{prefix}{kind}")
        one.outputs[0].name = f"{node.outputs[0].name}/{kind}_{len(made)}"
        one.outputs[0].type = node.outputs[0].type or source.type
        made.append(one)
        return one.outputs[0]

    def constant(what: str, array: np.ndarray) -> ir.Value:
        name = f"{node.outputs[0].name}/{what}"
        while name in graph.initializers:
            name = f"{name}_"
        return add_initializer(model, name, array)

    sizes = list(source.shape)
    kind = (weight.dtype or ir.DataType.FLOAT).numpy()
    rows = op("Reshape", source, constant("rows", np.array([0, groups, -1], np.int64)))
    ones, zeros = constant("ones", np.ones(groups, kind)), constant("zeros", np.zeros(groups, kind))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    normal = op("InstanceNormalization", rows, ones, zeros, epsilon=epsilon)
    numbers = [size for size in sizes[1:] if isinstance(size, int)]
    if len(numbers) == len(sizes) - 1:
        whole = constant("whole", np.array([0, *numbers], np.int64))
    else:
        whole = op("Shape", source)
        whole.type = ir.TensorType(ir.DataType.INT64)
    maps = op("Reshape", normal, whole)
    per_channel = constant("per_channel", np.array([-1, *[1] * (len(sizes) - 2)], np.int64))
    scaled = op("Mul", maps, op("Reshape", weight, per_channel))
    result = op("Add", scaled, op("Reshape", bias, per_channel))
    old = node.outputs[0]
    result.shape, result.type = ir.Shape(sizes), old.type or source.type
    graph.insert_before(node, made)
    name, old.name = old.name, f"{old.name}/norm"
    result.name = name
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
