"""A float graph that was read and analysed once, as a value to hand on; passes that edit take a copy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from resvit_quantize.graph.analysis import Analysis, Product, analyse
from resvit_quantize.graph.network import network_from_onnx


@dataclass(frozen=True, eq=False)
class AnalysedGraph:
    """A float network, and what the placement rules need to know about it."""

    network: ir.Model
    analysis: Analysis

    def copy(self) -> AnalysedGraph:
        """Nodes and values of its own, with the same names and analysis; constants are shared until they are set."""
        network = self.network.clone()
        nodes = dict(zip(self.network.graph, network.graph, strict=True))
        values = dict(zip(self.network.graph.inputs, network.graph.inputs, strict=True))
        for name, value in self.network.graph.initializers.items():
            values[value] = network.graph.initializers[name]
        for node, copied in nodes.items():
            values.update(zip(node.outputs, copied.outputs, strict=True))
        return AnalysedGraph(network, _moved(self.analysis, nodes, values))


def graph_from_onnx(path: Path) -> AnalysedGraph:
    """Read a float model, plain as :func:`network_from_onnx` makes it, and analyse it. Raises as that does."""
    network = network_from_onnx(path)
    return AnalysedGraph(network, analyse(network))


def _moved(analysis: Analysis, nodes: dict[ir.Node, ir.Node], values: dict[ir.Value, ir.Value]) -> Analysis:
    def moved(product: Product) -> Product:
        weight = None if product.weight is None else values[product.weight]
        return replace(product, node=nodes[product.node], weight=weight)

    products = tuple(moved(product) for product in analysis.products)
    depth = {values[value]: depth for value, depth in analysis.depth.items()}
    data = frozenset(values[value] for value in analysis.data)
    return Analysis(products, {product.node: product for product in products}, depth, dict(analysis.shapes), data)
