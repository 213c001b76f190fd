"""Channel scales of 8-bit convolutions, moved from the weight to behind the convolution.

TensorRT for RTX scales an 8-bit convolution's result per tensor inside its kernel, but per channel in a kernel of its
own, and hands the unscaled sums over in FP32. With a scale per tensor on the weight and the rest of it in a Mul behind,
the sums are scaled within FP16's range, leave in FP16, and the Mul is fused into what follows. The arithmetic is the
same: the scale per tensor is a power of two, so what remains per channel is exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from resvit_quantize.graph.network import add_initializer, constant, infer_types

_FP16_MAX = 65504.0


def move_channel_scales(model: ir.Model) -> int:
    """Rewrite in place each FP16 convolution of an 8-bit activation and weight; returns how many.

    One is left as it was where a sum could leave FP16's range on its way, whatever the image.
    """
    count = sum(_move(model, node) for node in list(model.graph) if node.op_type == "Conv")
    if count:
        infer_types(model)
    return count


def _move(model: ir.Model, conv: ir.Node) -> bool:
    activation, weight = (_dequantizer(conv.inputs[index]) for index in (0, 1))
    if activation is None or weight is None or conv.outputs[0].dtype != ir.DataType.FLOAT16:
        return False
    clip, scale, stored = constant(activation.inputs[1]), constant(weight.inputs[1]), constant(weight.inputs[0])
    axis = weight.attributes.get_int("axis", 1)
    if clip is None or clip.size != 1 or scale is None or scale.size < 2 or stored is None or axis != 0:
        return False
    if len(list(weight.outputs[0].uses())) != 1:
        return False
    whole = 2.0 ** np.round(np.log2(np.float64(scale.max())))
    rest = scale.astype(np.float64) / whole
    grid = 128.0 if stored.dtype == np.int8 else 448.0
    sums = np.abs(stored.astype(np.float64)).reshape(len(scale), -1).sum(1)
    largest = float(clip) * grid * whole * sums.max(initial=0.0)
    moved = rest.astype(np.float16)
    if largest > _FP16_MAX or np.any(moved.astype(np.float64) != rest) or np.float16(whole) != whole:
        return False
    name, after = str(conv.name), conv
    replaced = [*weight.inputs[1:3], *conv.inputs[2:3]]
    # A scalar needs a scalar zero point, and ``axis`` no longer says anything.
    zero = add_initializer(model, f"{name}/weight/zero", np.zeros((), stored.dtype))
    weight.replace_input_with(1, add_initializer(model, f"{name}/weight/scale", np.array(whole, np.float16)))
    weight.replace_input_with(2, zero)
    del weight.attributes["axis"]
    shape = (1, -1, *(1 for _ in stored.shape[2:]))
    factor = add_initializer(model, f"{name}/channel_scale", moved.reshape(shape))
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    old = conv.outputs[0]
    users = list(old.uses())
    for op_type, operand in (("Mul", factor), ("Add", _bias(model, name, bias, shape))):
        if operand is None:
            continue
        node = ir.node(op_type, [after.outputs[0], operand], name=f"{name}/{op_type}")
        node.metadata_props.update(conv.metadata_props)
        made = node.outputs[0]
        made.name, made.shape, made.type = f"{name}/{op_type}_output", old.shape, old.type
        model.graph.insert_after(after, node)
        after = node
    if bias is not None:
        conv.resize_inputs(2)
    for use in users:
        use.node.replace_input_with(use.idx, after.outputs[0])
    if old.is_graph_output():
        model.graph.outputs[list(model.graph.outputs).index(old)] = after.outputs[0]
        old.name, after.outputs[0].name = after.outputs[0].name, old.name
    for value in replaced:
        if value is not None and not list(value.uses()) and not value.is_graph_output():
            model.graph.initializers.pop(str(value.name), None)
    return True


def _bias(model: ir.Model, name: str, bias: np.ndarray | None, shape: tuple[int, ...]) -> ir.Value | None:
    return None if bias is None else add_initializer(model, f"{name}/bias", bias.reshape(shape))


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None
