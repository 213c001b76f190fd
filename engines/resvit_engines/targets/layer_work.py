"""What the layers of a network compute and move, counted in elements, before it is said in which formats."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from resvit_engines.targets.table import Precision

Precisions = Mapping[str, Precision]
"""Precision by the name of a product's node; FP16 for nodes not named."""

IMAGE_CHANNELS = 4
"""A tensor of at most so many channels is an image: kernels made for it read and write it, and none fast."""


class LayerKind(str, enum.Enum):
    """What a fused layer does; kernels of different kinds can write different formats."""

    CONV = "conv"
    GEMM = "gemm"
    ATTENTION = "attention"
    NORM = "norm"
    POOL = "pool"
    POINTWISE = "pointwise"
    INPUT = "input"
    """An input of the network as it is given: no kernel, but what changes its format is one."""


class Format(str, enum.Enum):
    """The number format of a tensor between two kernels, or of the operands of a product."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return {Format.FP32: 4, Format.FP16: 2}.get(self, 1)


@dataclass(frozen=True)
class MatrixShape:
    """The matrix product that a convolution or linear layer is, for each of its ``groups``.

    ``rows`` are positions or tokens of the whole batch, ``columns`` output channels, ``depth`` input channels times
    the positions of the filter. ``channels`` are the input channels alone.
    """

    rows: int
    columns: int
    depth: int
    channels: int
    groups: int = 1


@dataclass(frozen=True)
class Read:
    """A tensor that a layer reads. ``follows``: in the layer's own precision (a quantised operand), else as floats.

    Where the graph says so itself, ``form`` is the format: that of the Q/DQ on this edge, whose scale ``scale`` names
    (one kernel can write a tensor in 8 bits for several readers only at one scale), or that of an input of the network.
    """

    value: str
    elements: int
    follows: bool = False
    form: Format | None = None
    scale: str = ""


@dataclass(frozen=True)
class LayerWork:
    """One fused layer: what it computes and moves, counted in elements, so that any precision can be costed.

    ``macs`` are multiply-accumulates and ``weights`` the elements of constants, ``written`` those of the tensor
    ``writes``. ``moved`` elements are rearranged (read and written in FP16) by kernels in front of the main one.
    ``nodes`` are the products in it; only a layer with a weighted product (conv, gemm) can leave FP16.
    ``shape`` is that of its one weighted product. ``members`` are the names of all ONNX nodes in it.
    """

    name: str
    kind: LayerKind
    reads: tuple[Read, ...]
    writes: str
    written: int
    macs: int = 0
    weights: int = 0
    kernels: int = 1
    moved: int = 0
    nodes: tuple[str, ...] = ()
    shape: MatrixShape | None = None
    members: tuple[str, ...] = ()
    floats: Format = Format.FP16
    """What a float is in it: FP32 where the graph says so. Of an input in whole numbers, INT8."""
    image: bool = False
    """Whether it writes an image (of at most four channels)."""
    commutes: bool = False
    """Whether it only picks or moves elements (max pool, pad), so that it works in 8 bits where its readers do."""
    copies: bool = False
    """Whether it only changes the type or the layout (Cast, Transpose)."""
    pools: bool = False
    """A convolution that takes the max pool behind it in."""

    def precision(self, assignment: Precisions) -> Precision:
        """The precision that it computes in."""
        if self.kind not in (LayerKind.CONV, LayerKind.GEMM):
            return Precision.FP16
        return next((assignment[node] for node in self.nodes if node in assignment), Precision.FP16)
