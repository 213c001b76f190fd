"""What is quantised together: a product's input and weight, and the shortcut of the Add that it feeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from resvit_calibrate.ranges.ranges import Ranges
from resvit_engines.targets.table import Precision
from resvit_quantize.graph.analysed import AnalysedGraph
from resvit_quantize.graph.analysis import Product
from resvit_quantize.placement.placement import Edge, Placement, Weight
from resvit_quantize.qdq.plan import Plan, plan_quantization
from resvit_quantize.settings import QuantizeSettings


@dataclass(frozen=True, eq=False)
class QuantizedProduct:
    """One product with all that is in 8 bits only if it is.

    The Q/DQ on the shortcut of a residual Add belongs to the convolution that feeds the Add: the placement puts it
    there if and only if that convolution is quantised.
    """

    product: Product
    edges: tuple[Edge, ...]
    weights: tuple[Weight, ...]


@dataclass(frozen=True, eq=False)
class QuantizableProducts:
    """One precision: everything that it can quantise, by product name, and what the rules and the recipe choose."""

    precision: Precision
    plan: Plan
    products: dict[str, QuantizedProduct]
    chosen: frozenset[str]

    def placement_of(self, names: Iterable[str], network: ir.Model | None = None) -> Placement:
        """The placement that quantises these products alone, in ``network``: a clone of the plan's, or that itself."""
        products = [self.products[name] for name in names]
        edges = tuple(edge for product in products for edge in product.edges)
        weights = tuple(weight for product in products for weight in product.weights)
        if network is not None:
            nodes = {str(node.name): node for node in network.graph}
            edges = tuple(replace(edge, node=nodes[str(edge.node.name)]) for edge in edges)
            weights = tuple(replace(weight, node=nodes[str(weight.node.name)]) for weight in weights)
        return Placement(edges, weights, {})


def quantizable_products(
    graph: AnalysedGraph, ranges: Ranges, settings: QuantizeSettings, precision: Precision
) -> QuantizableProducts:
    """Plan for every product that can be quantised at all, also where the rules or the recipe leave it in FP16.

    Raises :class:`ResvitError` as :func:`plan_quantization` does.
    """
    own = precision is settings.precision
    settings = replace(settings, precision=precision, precisions=settings.precisions if own else {})
    ruled = plan_quantization(graph, ranges, settings)
    every = {product.name: precision for product in ruled.analysis.products if product.weight is not None}
    plan = plan_quantization(graph, ranges, replace(settings, include=(), exclude=(), precisions=every))
    products = _products(plan)
    chosen = {str(weight.node.name) for weight in ruled.placement.weights if weight.precision is precision}
    return QuantizableProducts(precision, plan, products, frozenset(chosen & set(products)))


def sharing_a_network(formats: Iterable[QuantizableProducts]) -> list[list[QuantizableProducts]]:
    """Formats whose float networks are equal to the bit, so that one pass serves all of them."""
    groups: list[list[QuantizableProducts]] = []
    for each in formats:
        for group in groups:
            if _same_network(group[0], each):
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


def _same_network(first: QuantizableProducts, second: QuantizableProducts) -> bool:
    one, two = first.plan.network.graph, second.plan.network.graph
    if [node.name for node in one] != [node.name for node in two] or set(one.initializers) != set(two.initializers):
        return False
    for name, value in one.initializers.items():
        other = two.initializers[name]
        if value.const_value is None or other.const_value is None:
            return False
        if not np.array_equal(value.const_value.numpy(), other.const_value.numpy()):
            return False
    return True


def _products(plan: Plan) -> dict[str, QuantizedProduct]:
    edges: dict[ir.Node, list[Edge]] = {}
    weights: dict[ir.Node, list[Weight]] = {}
    for edge in plan.placement.edges:
        owner = edge.node
        if owner not in plan.analysis.of:
            feeding = edge.node.inputs[1 - edge.index]
            producer = feeding.producer() if feeding is not None else None
            assert producer is not None
            owner = producer
        edges.setdefault(owner, []).append(edge)
    for weight in plan.placement.weights:
        weights.setdefault(weight.node, []).append(weight)
    return {
        product.name: QuantizedProduct(
            product, tuple(edges.get(product.node, ())), tuple(weights.get(product.node, ()))
        )
        for product in plan.analysis.products
        if product.node in weights or product.node in edges
    }
