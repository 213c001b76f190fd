"""When TensorRT runs attention as one kernel, as a table, and what to do about a block that breaks a rule.

The rules of FP16 and INT8 are from NVIDIA's documentation ("Working with Transformers", multi-head attention fusion);
TensorRT for RTX 1.7 follows them, but pads a head size that 8 does not divide. Those of FP8 are what it was seen to do
for SM 8.9: the head sizes of FP16, any length, Q/DQ as for INT8 but none needed behind the second product.
"""

from __future__ import annotations

from dataclasses import dataclass

from resvit_engines.audit.expectation import Attention

SMALLEST_HEAD, LARGEST_HEAD, HEAD_STEP = 16, 256, 8
"""Head sizes of FP16, BF16 and FP8."""
INT8_HEADS = (16, 32, 64)
INT8_LENGTH = 512
_SAID = {
    "operands": "before Q K^T",
    "softmax": "behind the softmax",
    "output": "behind the second product",
}
_PLACES = {"int8": ("operands", "softmax", "output"), "fp8": ("operands", "softmax")}
_TO_FP16 = "leave its products in FP16 (the rules of --quantizer resvit do; else --exclude them)"


@dataclass(frozen=True)
class Breach:
    """A rule that a block breaks: which (head size, length, mask, precision, placement), how, and what mends it."""

    rule: str
    problem: str
    mend: str

    @property
    def sentence(self) -> str:
        """Both, for people."""
        return f"{self.problem}; {self.mend}"


def breaches_of(block: Attention) -> tuple[Breach, ...]:
    """The rules that a block breaks; empty where it should run as one kernel."""
    if block.precision == "fp32":
        return (
            Breach(
                "precision",
                "FP32 attention never runs as one kernel",
                "let it be FP16: see why validation or --exclude kept it in FP32",
            ),
        )
    found = [*_shape_breaches(block), *_mask_breaches(block)]
    if block.precision in _PLACES:
        found += _placement_breaches(block)
    return tuple(found)


def _shape_breaches(block: Attention) -> list[Breach]:
    found: list[Breach] = []
    head = block.head_size
    if block.precision == "int8":
        if head is not None and head not in INT8_HEADS:
            sizes = ", ".join(str(size) for size in INT8_HEADS[:-1])
            found.append(
                Breach("head size", f"a head size of {head}, where INT8 needs {sizes} or {INT8_HEADS[-1]}", _TO_FP16)
            )
        lengths = [length for length in (block.query_length, block.key_length) if length is not None]
        if lengths and max(lengths) > INT8_LENGTH:
            found.append(
                Breach("length", f"a length of {max(lengths)}, where INT8 ends at {INT8_LENGTH} tokens", _TO_FP16)
            )
    elif head is not None and (head % HEAD_STEP or not SMALLEST_HEAD <= head <= LARGEST_HEAD):
        found.append(
            Breach(
                "head size",
                f"a head size of {head}, where {block.precision.upper()} needs a multiple of {HEAD_STEP} from "
                f"{SMALLEST_HEAD} to {LARGEST_HEAD}",
                "train with another number of heads, or pad the heads' weights with zeros",
            )
        )
    return found


def _mask_breaches(block: Attention) -> list[Breach]:
    if not block.foreign:
        return []
    return [
        Breach(
            "mask",
            f"{', '.join(block.foreign)} between the products, where only a scale and a mask may stand",
            "move it in front of or behind attention, or write it as an additive mask",
        )
    ]


def _placement_breaches(block: Attention) -> list[Breach]:
    if block.whole:
        return [
            Breach(
                "placement",
                "Q/DQ in front of an Attention node, whose one kernel computes in FP16",
                "export for opset 20, where both products can be quantised, or " + _TO_FP16,
            )
        ]
    missing = [_SAID[place] for place in _PLACES[block.precision] if place not in block.quantized]
    if not missing:
        return []
    return [Breach("placement", f"no Q/DQ {' and '.join(missing)}, which {block.precision.upper()} needs", _TO_FP16)]
