"""The types of a graph's inputs and outputs: what an engine reads and writes without a kernel that converts.

TensorRT quantises or converts an image in FP32 by a kernel of its own (95 of 731 us in a ResNet-18 at batch 32 on an
A100), and four bytes are copied for each value. In FP16 these are two; in INT8 the host writes what the first
QuantizeLinear would; as uint8 the engine reads the pixels, and its first kernel normalises them.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.pictures.encoding import ENCODING_KEY, INPUT_TYPE_KEY, InputEncoding
from resvit_engines.pictures.preprocess import PicturePreprocess
from resvit_export.recipe.choices import InputType
from resvit_quantize.graph.network import add_initializer, constant

_WHITE = 255.0


def retype_bindings(network: ir.Model, kind: InputType, pixels: PicturePreprocess | None) -> InputEncoding | None:
    """Give the inputs and outputs of a quantised graph their types, in place; returns how images are encoded.

    In every kind but FP32 outputs that are cast from FP16 are FP16. ``fp16``: so is every float input. ``int8``: the
    image, the first input, is what its QuantizeLinear wrote. ``uint8``: it is ``pixels``' own, and the graph begins
    with their normalisation. The encoding is written into the file's metadata too.

    Raises:
        ResvitError: IMPOSSIBLE for ``int8`` where the image is read unquantised, and for ``uint8`` without ``pixels``.
    """
    if kind is InputType.FP32:
        return None
    image, encoding = network.graph.inputs[0], None
    if kind is InputType.INT8:
        encoding = _quantised_outside(image)
    elif kind is InputType.UINT8:
        encoding = _normalised_inside(network, image, pixels)
    for value in network.graph.inputs:
        if value.dtype == ir.DataType.FLOAT and not value.is_initializer():
            _read_half(network, value)
    for index in range(len(network.graph.outputs)):
        _write_half(network, index)
    network.metadata_props[INPUT_TYPE_KEY] = kind.value
    if encoding is not None:
        network.metadata_props[ENCODING_KEY] = json.dumps(encoding.to_json(), sort_keys=True)
    return encoding


def _quantised_outside(image: ir.Value) -> InputEncoding:
    """Take the QuantizeLinear nodes that read the image out of the graph: it is what they wrote."""
    quantizers = [node for node in _readers(image) if node.op_type == "QuantizeLinear"]
    scales = [constant(node.inputs[1]) for node in quantizers]
    zeros = [constant(node.inputs[2]) if len(node.inputs) > 2 else None for node in quantizers]
    plain = [scale is not None and scale.size == 1 and scale.item() > 0 for scale in scales]
    eight = [zero is not None and zero.dtype == np.int8 and not zero.any() for zero in zeros]
    alike = len({float(scale.item()) for scale in scales if scale is not None and scale.size == 1}) == 1
    if not quantizers or len(quantizers) != len(_readers(image)) or not all([*plain, *eight]) or not alike:
        others = [str(node.name) for node in _readers(image) if node.op_type != "QuantizeLinear"]
        why = f"{others[0]}, which reads it, stays in FP16" if others else "its QuantizeLinear is no symmetric INT8 one"
        raise ResvitError(
            f"The image cannot enter in INT8: {why}.",
            f"Say --input-type uint8 or fp16{f', or --include {others[0]!r} as well' if others else ''}.",
            ExitCode.IMPOSSIBLE,
        )
    assert scales[0] is not None
    casts = [use.node for use in image.uses() if use.node.op_type == "Cast"]
    for node in quantizers:
        node.outputs[0].replace_all_uses_with(image)
        _remove(node)
    for node in casts:
        _remove(node)
    image.type = ir.TensorType(ir.DataType.INT8)
    return InputEncoding("int8", (1.0 / float(scales[0].item()),), (0.0,))


def _readers(image: ir.Value) -> list[ir.Node]:
    """What reads the image, its casts to FP16 left out."""
    found: list[ir.Node] = []
    for use in image.uses():
        node = use.node
        if node.op_type == "Cast" and not node.outputs[0].is_graph_output():
            found += [inner.node for inner in node.outputs[0].uses()]
        else:
            found.append(node)
    return found


def _normalised_inside(network: ir.Model, image: ir.Value, pixels: PicturePreprocess | None) -> InputEncoding:
    """Put Cast, Mul and Add behind the image: (pixel / 255 - mean) / std."""
    if pixels is None:
        raise ResvitError(
            "The image cannot enter as uint8: a loader of your own prepares it, and only that knows its pixels.",
            "Say --input-type fp16, or int8 where the first layer is quantised.",
            ExitCode.IMPOSSIBLE,
        )
    mean, std = (np.asarray(values, np.float32) for values in (pixels.mean, pixels.std))
    shape = (1, len(mean), 1, 1)
    factor = add_initializer(network, "resvit.pixels/factor", (1.0 / (_WHITE * std)).reshape(shape).astype(np.float32))
    offset = add_initializer(network, "resvit.pixels/offset", (-mean / std).reshape(shape).astype(np.float32))
    readers = [(use.node, use.idx) for use in image.uses()]
    nodes = [ir.node("Cast", [image], {"to": int(ir.DataType.FLOAT)}, name="resvit.pixels/Cast")]
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], factor], name="resvit.pixels/Mul"))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], offset], name="resvit.pixels/Add"))
    for node in nodes:
        value = node.outputs[0]
        value.name, value.shape, value.type = f"{node.name}_output", image.shape, ir.TensorType(ir.DataType.FLOAT)
    network.graph.insert_before(network.graph[0], nodes)
    for node, index in readers:
        node.replace_input_with(index, nodes[-1].outputs[0])
    image.type = ir.TensorType(ir.DataType.UINT8)
    return InputEncoding("uint8", tuple(float(x) for x in _WHITE * std), tuple(float(x) for x in _WHITE * mean))


def _read_half(network: ir.Model, value: ir.Value) -> None:
    """Make a float input FP16: its casts to FP16 fall away, a QuantizeLinear gets an FP16 scale, others a Cast."""
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    wide: ir.Value | None = None
    for use in tuple(value.uses()):
        node, index = use.node, use.idx
        if node.op_type == "Cast":
            if node.outputs[0].dtype == ir.DataType.FLOAT16 and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(value)
                _remove(node)
            continue
        if node.op_type == "QuantizeLinear" and (scale := _half_scale(network, node)) is not None:
            node.replace_input_with(1, scale)
            continue
        if wide is None:
            wide = _cast(network, value)
        node.replace_input_with(index, wide)


def _half_scale(network: ir.Model, node: ir.Node) -> ir.Value | None:
    """The scale of a QuantizeLinear in FP16; None where FP16 does not hold it to three digits."""
    scale = constant(node.inputs[1])
    if scale is None:
        return None
    half = scale.astype(np.float16)
    if not np.allclose(half.astype(np.float64), scale, rtol=1e-3, atol=0.0):
        return None
    return add_initializer(network, f"{node.name}/scale_fp16", half)


def _cast(network: ir.Model, value: ir.Value) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/fp32/Cast")
    made = node.outputs[0]
    made.name, made.shape, made.type = f"{value.name}/fp32", value.shape, ir.TensorType(ir.DataType.FLOAT)
    network.graph.insert_before(network.graph[0], node)
    return made


def _write_half(network: ir.Model, index: int) -> None:
    """Leave out the Cast to FP32 in front of an output."""
    value = network.graph.outputs[index]
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" and not value.uses() else None
    if node is None or source is None or source.dtype != ir.DataType.FLOAT16 or source.producer() is None:
        return
    if source.is_graph_output() or list(network.graph.outputs).count(value) > 1:
        return
    name = value.name
    network.graph.outputs[index] = source
    _remove(node)
    source.name = name


def _remove(node: ir.Node) -> None:
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
