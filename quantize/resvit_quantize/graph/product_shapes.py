"""The matrix product that a weighted node is, for the times of its kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from resvit_engines.targets.layer_work import MatrixShape
from resvit_quantize.graph.analysis import Product
from resvit_quantize.graph.network import int_attribute

Shapes = Mapping[str, tuple[int, ...]]


def matrix_shape(product: Product, shapes: Shapes, images: int) -> MatrixShape | None:
    """Rows, columns and depth of a convolution or linear layer for so many images; None where they cannot be told."""
    if product.weight is None or not product.is_layer or not product.macs:
        return None
    node, sizes = product.node, shapes.get(str(product.weight.name), ())
    macs = product.macs * images
    if node.op_type == "Conv" and sizes:
        depth = math.prod(sizes[1:])
        groups = int_attribute(node, "group", 1)
        return MatrixShape(macs // (sizes[0] * depth), sizes[0] // groups, depth, sizes[1], groups)
    out = shapes.get(str(node.outputs[0].name), ())
    if node.op_type not in ("MatMul", "Gemm") or len(sizes) != 2 or not out or not out[-1]:
        return None
    depth = math.prod(sizes) // out[-1]
    return MatrixShape(macs // math.prod(sizes), out[-1], depth, depth)


def skips_positions(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a convolution reads only some positions: its filter is one pixel, and it has a stride."""
    weight = node.inputs[1] if node.op_type == "Conv" else None
    kernel = shapes.get(str(weight.name), ())[2:] if weight is not None else ()
    return bool(kernel) and math.prod(kernel) == 1 and math.prod(node.attributes.get_ints("strides", [1])) > 1
