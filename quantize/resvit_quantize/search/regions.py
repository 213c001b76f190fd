"""Parts of a network that are quantised together or not at all, when placements are tried on the device.

Layers that are alike stand for each other: what is true of the MLP of one block is true of all twelve, so a region
holds every layer of one kind and shape. Convolutions of one resolution are one region, for Q/DQ
between 8 bits and floats in the middle of a chain cost more than they save.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from resvit_quantize.graph.analysis import Analysis, Product
from resvit_quantize.graph.network import int_attribute


@dataclass(frozen=True)
class Region:
    """A name for people, the products by name, and their share of all weighted multiply-accumulates, 0 to 1.

    ``pattern`` says what its layers are, however many there are: what was measured of it on a device is likely of a
    region of the same pattern in another network.
    """

    name: str
    nodes: tuple[str, ...]
    share: float
    pattern: str = ""


def regions_of(analysis: Analysis, quantised: Collection[str]) -> tuple[Region, ...]:
    """The regions of the products that are ``quantised``, by name; the largest first."""
    weighted = [product for product in analysis.products if product.weight is not None]
    total = analysis.weighted_macs or 1
    found: dict[str, list[Product]] = {}
    for product in weighted:
        if product.name in quantised:
            found.setdefault(_kind(product, analysis), []).append(product)
    regions = [
        Region(f"{name} ({len(of)})", tuple(p.name for p in of), sum(p.macs for p in of) / total, _pattern(name, of))
        for name, of in found.items()
    ]
    return tuple(sorted(regions, key=lambda region: (-region.share, region.name)))


def _pattern(kind: str, products: Sequence[Product]) -> str:
    """The kind, and every size of its layers once: weights, and the tokens or positions that they are used on."""
    sizes = {
        f"{'x'.join(map(str, (p.weight.shape if p.weight is not None else None) or ()))}@{p.rows}" for p in products
    }
    return f"{kind}: {' '.join(sorted(sizes))}"


def _kind(product: Product, analysis: Analysis) -> str:
    node = product.node
    if node.op_type not in ("Conv", "ConvTranspose"):
        shape = product.weight.shape if product.weight is not None else ()
        return f"{product.part.value}: linear {'x'.join(map(str, shape or ()))}"
    depthwise = "depthwise" if int_attribute(node, "group", 1) > 1 else "conv"
    spatial = analysis.shapes.get(str(node.outputs[0].name), ())[2:]
    return f"{product.part.value}: {depthwise} at {'x'.join(map(str, spatial)) or 'one size'}"
