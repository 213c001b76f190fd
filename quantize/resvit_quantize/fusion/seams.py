"""The seams between products: GroupNorm, LayerNorm and the ends of residual blocks, each made one node.

Compilers fuse most of them by themselves (``benchmarks/seams.py``), so these nodes are only taken where they are
measured to be faster, never because they fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.norms import GroupNormConfig, LayerNormConfig
from resvit_engines.kernels.numerics import EIGHT_BIT, FLOATS
from resvit_engines.kernels.residual import ResidualConfig
from resvit_engines.plugins.names import DOMAIN
from resvit_quantize.fusion.layout import Shapes
from resvit_quantize.fusion.match import (
    ONNX_TYPES,
    Kind,
    Match,
    RefusedError,
    dequantised_before,
    quantised_behind,
    type_of,
)
from resvit_quantize.fusion.nodes import named_after, plugin_attributes, take_over
from resvit_quantize.graph.network import add_initializer, constant
from resvit_quantize.qdq.rtx_norms import GroupNorm, group_norms

SeamConfig = GroupNormConfig | LayerNormConfig | ResidualConfig


@dataclass(frozen=True, eq=False)
class Seam:
    """A part that can become one node: what it reads, its constants by name, and the values that it replaces."""

    kind: Kind
    name: str
    config: SeamConfig
    inputs: tuple[ir.Value, ...]
    constants: tuple[tuple[str, np.ndarray], ...]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def seam_candidates(model: ir.Model, kind: Kind) -> Iterator[tuple[str, ir.Node | GroupNorm]]:
    """Everything of a kind in the graph, fit or not, with its name."""
    if kind is Kind.GROUP_NORM:
        yield from ((str(norm.last.name), norm) for norm in group_norms(model))
        return
    wanted = "LayerNormalization" if kind is Kind.LAYER_NORM else "Add"
    for node in list(model.graph):
        if node.op_type == wanted and (kind is Kind.LAYER_NORM or _activation(node.outputs[0]) is not None):
            yield str(node.name), node


def seam_of(kind: Kind, part: ir.Node | GroupNorm, shapes: Shapes) -> Seam:
    """Check one candidate.

    Raises:
        RefusedError: with the reason why it cannot be one node.
    """
    if isinstance(part, GroupNorm):
        return _group_norm(part)
    return _layer_norm(part, shapes) if kind is Kind.LAYER_NORM else _residual(part, shapes)


def op_type_of(config: SeamConfig) -> str:
    """The name of the node."""
    narrow = "Q" if config.out_dtype in EIGHT_BIT else ""
    if isinstance(config, LayerNormConfig):
        return f"ResvitLayerNorm{'Add' if config.add else ''}{narrow}"
    return f"{'ResvitGroupNorm' if isinstance(config, GroupNormConfig) else 'ResvitResidual'}{narrow}"


def match_of(found: Seam, shapes: Shapes) -> Match:
    """The part for a report."""
    read = [shapes[str(value.name)] for value in found.inputs]
    single = tuple((1, *shape[1:]) for shape in read)
    constants = tuple(tuple(array.shape) for _, array in found.constants)
    names = tuple(str(node.name) for node in found.nodes)
    return Match(found.kind, found.name, op_type_of(found.config), found.config, (*single, *constants), names)


def rewrite(model: ir.Model, found: Seam) -> ir.Node:
    """Put the node in place; nodes that nothing reads any more are left for the caller to remove."""
    kept = [add_initializer(model, f"{found.name}/{what}", array) for what, array in found.constants]
    node = ir.node(
        op_type_of(found.config),
        [*found.inputs, *kept],
        attributes_of(found.config),
        domain=DOMAIN,
        name=found.name,
        num_outputs=len(found.outputs),
    )
    first = found.outputs[0].producer()
    assert first is not None
    model.graph.insert_after(first, node)
    for old, new in zip(found.outputs, node.outputs, strict=True):
        take_over(old, new)
    return node


def attributes_of(config: SeamConfig) -> dict[str, Any]:
    """What the function's body reads, beside ``plugin_attributes``."""
    plain = {**plugin_attributes(config), "out_type": ONNX_TYPES[config.out_dtype]}
    if config.out_dtype in EIGHT_BIT:
        plain["out_scale"] = config.out_scale
    if isinstance(config, GroupNormConfig):
        rows = (0, config.groups, -1)
        return {
            **plain,
            "rows": rows,
            "by_channel": (1, config.channels, 1, 1),
            "eps": config.eps,
            "floor": _floor(config),
        }
    if isinstance(config, LayerNormConfig):
        total = {"sum_type": ONNX_TYPES[config.dtype]} if config.add else {}
        return {**plain, "eps": config.eps, **total}
    return {**plain, "shortcut_scale": config.shortcut_scale, "floor": _floor(config)}


def _floor(config: GroupNormConfig | ResidualConfig) -> float:
    """What the result is raised to: 0 for a ReLU, else less than any FP16 or BF16 result of interest."""
    return 0.0 if config.relu else -3.0e38


def _group_norm(norm: GroupNorm) -> Seam:
    channels, height, width = norm.maps
    dtype = type_of(norm.source)
    if dtype not in (*FLOATS, "fp32"):
        raise RefusedError(f"it normalises {dtype.upper()}")
    config = GroupNormConfig(
        channels, norm.groups, height * width, norm.epsilon, dtype=dtype, out_dtype=type_of(norm.result)
    )
    end, nodes = norm.result, [norm.last]
    relu = _activation(end)
    if relu is not None:
        config, end = dataclasses.replace(config, relu=True), relu.outputs[0]
        nodes.append(relu)
    end, config = _narrowed(end, config, nodes)
    kept = (("gamma", norm.weight), ("beta", norm.bias))
    return Seam(
        Kind.GROUP_NORM,
        named_after(norm.last, "ResvitGroupNorm"),
        config,
        (norm.source,),
        _fp32(kept),
        (end,),
        tuple(nodes),
    )


def _layer_norm(node: ir.Node, shapes: Shapes) -> Seam:
    source = node.inputs[0]
    shape = shapes.get(str(source.name)) if source is not None else None
    if source is None or shape is None or len(shape) != 3 or node.attributes.get_int("axis", -1) not in (-1, 2):
        raise RefusedError("it does not normalise the last of three dimensions")
    parameters = [constant(value) for value in node.inputs[1:]]
    if not parameters or any(array is None for array in parameters) or len(node.outputs) > 1:
        raise RefusedError("its parameters are computed")
    if type_of(source) not in FLOATS:
        raise RefusedError(f"it normalises {type_of(source).upper()}")
    gamma = parameters[0]
    assert gamma is not None
    beta = parameters[1] if len(parameters) > 1 else None
    nodes = [node]
    inputs, outputs = [source], []
    config = LayerNormConfig(
        shape[-1],
        float(node.attributes.get_float("epsilon", 1e-5)),
        dtype=type_of(source),
        out_dtype=type_of(node.outputs[0]),
    )
    add = source.producer()
    if add is not None and add.op_type == "Add" and _same_shape(add, shapes):
        config = dataclasses.replace(config, add=True)
        inputs = [value for value in add.inputs if value is not None]
        outputs = [source]
        nodes.insert(0, add)
    end, config = _narrowed(node.outputs[0], config, nodes)
    kept = (("gamma", gamma), ("beta", np.zeros_like(gamma) if beta is None else beta))
    return Seam(
        Kind.LAYER_NORM,
        named_after(node, "ResvitLayerNorm"),
        config,
        tuple(inputs),
        _fp32(kept),
        (*outputs, end),
        tuple(nodes),
    )


def _residual(add: ir.Node, shapes: Shapes) -> Seam:
    relu = _activation(add.outputs[0])
    assert relu is not None
    if not _same_shape(add, shapes):
        raise RefusedError("its operands differ in shape")
    sides = [_stored(value) for value in add.inputs if value is not None]
    plain = [side for side in sides if side[1] in FLOATS]
    if not plain:
        raise RefusedError("neither operand is in 16 bits")
    main = plain[-1]
    other = sides[0] if sides[1] is main else sides[1]
    if _fed_by_conv(main[0]):
        raise RefusedError("a convolution feeds it, and takes it in by itself")
    shape = shapes[str(add.outputs[0].name)]
    if len(shape) != 4 or other[1] not in (*FLOATS, *EIGHT_BIT):
        raise RefusedError(f"its shortcut is {other[1].upper()} of {len(shape)} dimensions")
    config = ResidualConfig(shape[1:], main[1], other[1], other[2], out_dtype=type_of(relu.outputs[0]))
    nodes = [add, relu]
    end, config = _narrowed(relu.outputs[0], config, nodes)
    name = named_after(add, "ResvitResidual")
    return Seam(Kind.RESIDUAL, name, config, (main[0], other[0]), (), (end,), tuple(nodes))


def _narrowed(end: ir.Value, config: Any, nodes: list[ir.Node]) -> tuple[ir.Value, Any]:
    """Take in the QuantizeLinear that alone reads ``end``."""
    narrow = quantised_behind(end)
    if narrow is None:
        return end, config
    nodes.append(narrow.node)
    return narrow.node.outputs[0], dataclasses.replace(config, out_dtype=narrow.dtype, out_scale=narrow.scale)


def _stored(value: ir.Value) -> tuple[ir.Value, str, float]:
    """What is read: the 8-bit tensor behind a DequantizeLinear with one scale, or the value itself."""
    narrow = dequantised_before(value)
    source = narrow.node.inputs[0] if narrow is not None else None
    return (value, type_of(value), 1.0) if narrow is None or source is None else (source, narrow.dtype, narrow.scale)


def _fed_by_conv(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Conv"


def _activation(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    alone = len(uses) == 1 and not value.is_graph_output() and uses[0].node.op_type == "Relu"
    return uses[0].node if alone else None


def _same_shape(add: ir.Node, shapes: Shapes) -> bool:
    """Whether both operands are computed and of one shape."""
    seen = [shapes.get(str(value.name)) for value in add.inputs if value is not None and constant(value) is None]
    return len(seen) == 2 and seen[0] is not None and seen[0] == seen[1] and math.prod(seen[0]) > 0


def _fp32(constants: tuple[tuple[str, np.ndarray], ...]) -> tuple[tuple[str, np.ndarray], ...]:
    return tuple((name, np.ascontiguousarray(array.astype(np.float32))) for name, array in constants)
