"""The bridge from trunk to tokens, found in a graph and made one node.

The pattern: a 1x1 convolution whose map is laid out as tokens [B, h w, E], and behind it what constants add: position,
level, class token, zeros in front. If a LayerNorm reads the tokens it joins, and so does a quantisation behind that.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.bridge import BridgeConfig
from resvit_engines.kernels.numerics import EIGHT_BIT, FLOATS
from resvit_engines.plugins.names import DOMAIN
from resvit_quantize.fusion.layout import Shapes, behind
from resvit_quantize.fusion.match import (
    ONNX_TYPES,
    Kind,
    Match,
    RefusedError,
    dequantised_before,
    is_symmetric,
    quantised_behind,
    type_of,
)
from resvit_quantize.fusion.nodes import named_after, plugin_attributes, take_over
from resvit_quantize.graph.network import add_initializer, constant


@dataclass(frozen=True, eq=False)
class Bridge:
    """A convolution that can become one node with all that follows up to ``tokens``, and the norm behind."""

    config: BridgeConfig
    conv: ir.Node
    image: ir.Value
    weight: np.ndarray
    weight_scale: np.ndarray | None
    table: np.ndarray
    tokens: ir.Value
    norm: ir.Node | None
    quantizer: ir.Node | None
    nodes: tuple[ir.Node, ...]


def is_bridge(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a convolution's map is only read as tokens [B, h w, E]."""
    if node.op_type != "Conv" or node.domain:
        return False
    shape = shapes.get(str(node.outputs[0].name))
    return shape is not None and len(shape) == 4 and _as_tokens(node, shape, shapes) is not None


def bridge_of(conv: ir.Node, shapes: Shapes) -> Bridge:
    """Check one convolution that ``is_bridge``.

    Raises:
        RefusedError: with the reason why it cannot be one node.
    """
    batch, embed, height, width = shapes[str(conv.outputs[0].name)]
    del batch
    image, weight, weight_scale, in_scale = _operands(conv)
    dtype = type_of(image)
    if weight.shape[2:] != (1, 1):
        raise RefusedError(f"its filter is {weight.shape[2]}x{weight.shape[3]}, and the kernel's is 1x1")
    plain = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
    if any(tuple(conv.attributes.get_ints(name, like)) != like for name, like in plain.items()):
        raise RefusedError("its convolution has a stride or a padding")
    if conv.attributes.get_int("group", 1) != 1:
        raise RefusedError("its convolution is grouped")
    added = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = constant(added)
    if added is not None and bias is None:
        raise RefusedError("its bias is computed")
    start = np.zeros(embed) if bias is None else bias.reshape(-1).astype(np.float64)
    table = np.tile(start, (height * width, 1))
    first = _as_tokens(conv, shapes[str(conv.outputs[0].name)], shapes)
    assert first is not None
    tokens, table, nodes = _absorbed(first, table, shapes)
    norm = _norm_behind(tokens)
    narrow = None
    token_type = type_of(tokens)
    config = BridgeConfig(
        channels=weight.shape[1],
        height=height,
        width=width,
        embed=embed,
        prefix=len(table) - height * width,
        dtype=dtype,
        in_scale=in_scale,
        token_dtype=token_type,
        out_dtype=token_type,
    )
    if norm is not None:
        config = dataclasses.replace(config, norm=True, eps=float(norm.attributes.get_float("epsilon", 1e-5)))
        narrow = quantised_behind(norm.outputs[0])
    if narrow is not None:
        config = dataclasses.replace(config, out_dtype=narrow.dtype, out_scale=narrow.scale)
    quantizer = narrow.node if narrow else None
    return Bridge(config, conv, image, weight[:, :, 0, 0], weight_scale, table, tokens, norm, quantizer, (conv, *nodes))


def op_type_of(config: BridgeConfig) -> str:
    """The name of the node."""
    eight = "W8" if config.dtype in EIGHT_BIT else ""
    norm = ("NormQ" if config.out_dtype in EIGHT_BIT else "Norm") if config.norm else ""
    return f"ResvitBridge{eight}{norm}"


def match_of(bridge: Bridge) -> Match:
    """The part for a report."""
    config = bridge.config
    scale = ((config.embed,),) if bridge.weight_scale is not None else ()
    affine = ((config.embed,), (config.embed,)) if config.norm else ()
    shapes = (
        (1, config.channels, config.height, config.width),
        (config.embed, config.channels),
        *scale,
        (config.tokens, config.embed),
        *affine,
    )
    nodes = [*bridge.nodes, *(node for node in (bridge.norm, bridge.quantizer) if node is not None)]
    return Match(
        Kind.BRIDGE, name_of(bridge), op_type_of(config), config, shapes, tuple(str(node.name) for node in nodes)
    )


def name_of(bridge: Bridge) -> str:
    """After the convolution."""
    return named_after(bridge.conv, "ResvitBridge")


def rewrite(model: ir.Model, bridge: Bridge, name: str) -> ir.Node:
    """Put a node of this name in place; nodes that nothing reads any more are left for the caller to remove."""
    config = bridge.config

    def kept(what: str, array: np.ndarray) -> ir.Value:
        return add_initializer(model, f"{name}/{what}", np.ascontiguousarray(array))

    inputs = [bridge.image, kept("weight", bridge.weight)]
    if bridge.weight_scale is not None:
        inputs.append(kept("weight_scale", bridge.weight_scale.astype(np.float32)))
    inputs.append(kept("table", bridge.table.astype(np.float32)))
    outputs = [bridge.tokens]
    last = bridge.tokens.producer()
    if bridge.norm is not None:
        for index, what in ((1, "gamma"), (2, "beta")):
            array = constant(bridge.norm.inputs[index]) if len(bridge.norm.inputs) > index else None
            filled = np.zeros(config.embed) if array is None else array
            inputs.append(kept(what, filled.astype(np.float32)))
        outputs.append((bridge.quantizer or bridge.norm).outputs[0])
    assert last is not None
    node = ir.node(
        op_type_of(config), inputs, attributes_of(config), domain=DOMAIN, name=name, num_outputs=len(outputs)
    )
    # Before the first that reads any of it: the sum of the tokens comes before their norm.
    model.graph.insert_after(last, node)
    for old, new in zip(outputs, node.outputs, strict=True):
        take_over(old, new)
    return node


def attributes_of(config: BridgeConfig) -> dict[str, Any]:
    """What the function's body reads, beside ``plugin_attributes``."""
    quantized = config.out_dtype in EIGHT_BIT
    norm: dict[str, Any] = {"eps": config.eps, "out_type": ONNX_TYPES[config.out_dtype]} if config.norm else {}
    return {
        **plugin_attributes(config),
        "area": (0, config.channels, -1),
        "pads": (0, config.prefix, 0, 0, 0, 0),
        "in_scale": config.in_scale,
        "token_type": ONNX_TYPES[config.token_dtype],
        **norm,
        **({"out_scale": config.out_scale} if norm and quantized else {}),
    }


def _operands(conv: ir.Node) -> tuple[ir.Value, np.ndarray, np.ndarray | None, float]:
    """The map, the weight [E, C, kh, kw] as stored, its scales [E], and the map's scale; 8-bit only where both are."""
    image, weight = conv.inputs[0], conv.inputs[1]
    assert image is not None
    assert weight is not None
    stored, plain = weight.producer(), constant(weight)
    if stored is not None and stored.op_type == "DequantizeLinear" and is_symmetric(stored):
        values, scales = constant(stored.inputs[0]), constant(stored.inputs[1])
        if values is None or scales is None or scales.size not in (1, values.shape[0]):
            raise RefusedError("its weight is not a constant with a scale by channel")
        narrow = dequantised_before(image)
        source = narrow.node.inputs[0] if narrow is not None else None
        if narrow is None or source is None or narrow.dtype != type_of(stored.inputs[0]):
            raise RefusedError("its weight has 8 bits and its map has not")
        wide = np.broadcast_to(scales.reshape(-1), (values.shape[0],)).astype(np.float32)
        return source, values, wide, narrow.scale
    if plain is None:
        raise RefusedError("its weight is computed")
    if type_of(image) not in FLOATS:
        raise RefusedError(f"its map is {type_of(image).upper()}, and the kernel reads FP16, BF16 or 8 bits")
    return image, plain, None, 1.0


def _as_tokens(conv: ir.Node, shape: tuple[int, ...], shapes: Shapes) -> ir.Value | None:
    """The view of the convolution's map that is [B, h w, E]; the last of them."""
    wanted = np.arange(math.prod(shape)).reshape(shape[0], shape[1], -1).swapaxes(1, 2)
    tokens = None
    for trace in behind(conv.outputs[0], shapes):
        if trace.places.shape == wanted.shape and np.array_equal(trace.places, wanted):
            tokens = trace.source
    return tokens


def _absorbed(tokens: ir.Value, table: np.ndarray, shapes: Shapes) -> tuple[ir.Value, np.ndarray, list[ir.Node]]:
    """Follow the tokens through what only adds constants or puts constant tokens in front."""
    nodes: list[ir.Node] = []
    while True:
        uses = list(tokens.uses())
        if len(uses) != 1 or tokens.is_graph_output():
            return tokens, table, nodes
        node = uses[0].node
        step = _added(node, tokens, table) if node.op_type == "Add" else _in_front(node, tokens, table, shapes)
        if step is None:
            return tokens, table, nodes
        table, tokens = step, node.outputs[0]
        nodes.append(node)


def _added(node: ir.Node, tokens: ir.Value, table: np.ndarray) -> np.ndarray | None:
    array = next((a for value in node.inputs if value is not tokens and (a := constant(value)) is not None), None)
    if array is None or array.size == 0:
        return None
    shape = (*(1 for _ in range(3 - array.ndim)), *array.shape)
    if array.ndim > 3 or shape[0] != 1 or shape[1] not in (1, len(table)) or shape[2] not in (1, table.shape[1]):
        return None
    return np.asarray(table + array.reshape(shape)[0].astype(np.float64))


def _in_front(node: ir.Node, tokens: ir.Value, table: np.ndarray, shapes: Shapes) -> np.ndarray | None:
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        pads = constant(node.inputs[1])
        value = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        zero = len(node.inputs) <= 2 or node.inputs[2] is None or (value is not None and not np.any(value))
        if pads is None or len(pads) != 6 or not zero or any(pads[index] for index in (0, 2, 3, 4, 5)) or pads[1] < 0:
            return None
        return np.concatenate([np.zeros((int(pads[1]), table.shape[1])), table])
    if node.op_type != "Concat" or node.attributes.get_int("axis", 0) not in (1, -2) or len(node.inputs) != 2:
        return None
    front = _repeated(node.inputs[0], shapes) if node.inputs[1] is tokens else None
    return None if front is None or front.shape[1] != table.shape[1] else np.concatenate([front, table])


def _repeated(value: ir.Value | None, shapes: Shapes) -> np.ndarray | None:
    """Constant tokens [n, E] that are expanded to the batch."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Cast", "Identity"):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if node is None or node.op_type != "Expand":
        return None
    array, shape = constant(node.inputs[0]), shapes.get(str(node.outputs[0].name))
    if array is None or array.ndim != 3 or len(array) != 1 or shape is None or shape[1:] != array.shape[1:]:
        return None
    return np.asarray(array[0].astype(np.float64))


def _norm_behind(tokens: ir.Value) -> ir.Node | None:
    """The LayerNorm that reads the tokens, if exactly one does."""
    norms = [use.node for use in tokens.uses() if use.node.op_type == "LayerNormalization" and use.idx == 0]
    if len(norms) != 1 or norms[0].attributes.get_int("axis", -1) not in (-1, 2):
        return None
    weights = [constant(value) for value in norms[0].inputs[1:] if value is not None]
    return norms[0] if weights and all(array is not None for array in weights) else None
