"""What our nodes are called in an ONNX file, and our plugins in TensorRT; and which tensors each takes and gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

DOMAIN = "ai.resvit"
"""The ONNX domain of our nodes. TensorRT's parser ignores it and looks plugins up by name, namespace and version."""
NAMESPACE = "resvit"
VERSION = "1"


class OpType(NamedTuple):
    """One kind of node: its name, and its tensor inputs and outputs in order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _chosen(*suffixes: str) -> Iterator[tuple[str, ...]]:
    """Every selection of suffixes, in their order."""
    for present in itertools.product((False, True), repeat=len(suffixes)):
        yield tuple(suffix for suffix, wanted in zip(suffixes, present, strict=True) if wanted)


def _attention() -> Iterator[OpType]:
    for suffixes in _chosen("Split", "Bias", "Q"):
        operands = ("q", "k", "v") if "Split" in suffixes else ("packed",)
        extra = ("bias",) if "Bias" in suffixes else ()
        yield OpType("ResvitAttention" + "".join(suffixes), (*operands, *extra), ("output",))


def _bridge() -> Iterator[OpType]:
    for eight_bit_weight, norm in itertools.product(("", "W8"), ("", "Norm", "NormQ")):
        scale = ("weight_scale",) if eight_bit_weight else ()
        affine, normalised = (("gamma", "beta"), ("normalised",)) if norm else ((), ())
        yield OpType(
            f"ResvitBridge{eight_bit_weight}{norm}",
            ("map", "weight", *scale, "table", *affine),
            ("tokens", *normalised),
        )


def _deformable() -> Iterator[OpType]:
    for suffixes in _chosen("Q"):
        yield OpType("ResvitDeformable" + "".join(suffixes), ("value", "places", "weights"), ("output",))


OP_TYPES: Mapping[str, OpType] = {op.name: op for op in (*_attention(), *_bridge(), *_deformable())}
"""Every op type by name. Suffixes: ``Q`` the (normalised, else the only) output has 8 bits; ``Split`` q, k and v are
three inputs; ``W8`` the weight has 8 bits; ``Norm`` a LayerNorm follows."""
