"""What an ONNX graph asks of the compiler: its Q/DQ pairs, its attention blocks and its plugins, as plain values.

Written from the graph where ONNX can be read (``resvit_export.to_tensorrt.expectation``), compared anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """A node that reads a dequantised tensor, views between them left out. ``product``: it multiplies matrices."""

    node: str
    op: str
    product: bool


@dataclass(frozen=True)
class QdqPair:
    """One DequantizeLinear, its QuantizeLinear where it has one (a weight may be stored in 8 bits), and its readers.

    ``precision`` is ``int8``, ``fp8`` or another type's name.
    """

    tensor: str
    quantize: str | None
    dequantize: str
    precision: str
    weight: bool
    consumers: tuple[Consumer, ...]


@dataclass(frozen=True)
class Attention:
    """One attention block: an ``Attention`` node, or two products with a softmax between them.

    ``head_size`` and the lengths are None where a dimension is dynamic. ``precision`` is that of Q K^T: ``fp32``,
    ``fp16``, ``bf16``, ``int8`` or ``fp8``. ``mask`` is ``none``, ``causal``, ``constant`` or ``computed``.
    ``quantized`` says where Q/DQ stands: ``operands`` (both of Q K^T), ``softmax``, ``output``. ``foreign`` names
    operators between the products that are neither scale, mask, cast nor softmax.
    """

    name: str
    nodes: tuple[str, ...]
    head_size: int | None
    query_length: int | None
    key_length: int | None
    precision: str
    mask: str
    whole: bool
    """One ``Attention`` node of opset 23."""
    quantized: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plugin:
    """A node that shall be a plugin layer: its name, and the plugin's (the operator's) name."""

    node: str
    op: str


@dataclass(frozen=True)
class Expectation:
    """Everything that is expected of one ONNX file."""

    pairs: tuple[QdqPair, ...]
    attention: tuple[Attention, ...]
    plugins: tuple[Plugin, ...]
