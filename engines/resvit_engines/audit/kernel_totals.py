"""What an engine does, counted: kernels by their work and precision, and the bytes that they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.audit.kernels import EIGHT_BITS, Kernel, Work

PRODUCTS = (Work.CONV, Work.GEMM, Work.ATTENTION)
"""What tensor cores do."""


@dataclass(frozen=True)
class KernelTotals:
    """Sums over the kernels of one engine; bytes are of one run, and leave out what is not known.

    ``products`` and ``eight_bits`` count convolutions, matrix products and attentions, all and in 8 bits;
    ``by_kind`` holds kernels and bytes by what a kernel does and the types that it reads and writes, the most bytes
    first. ``unknown`` kernels have a dynamic dimension or a type that is not known: their bytes count as 0.
    """

    kernels: int
    products: dict[str, int]
    eight_bits: dict[str, int]
    reformats: int
    activation_bytes: int
    constant_bytes: int
    unknown: int
    by_kind: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kernels": self.kernels,
            "of": self.products,
            "in_8_bits": self.eight_bits,
            "reformats": self.reformats,
            "activation_bytes": self.activation_bytes,
            "constant_bytes": self.constant_bytes,
            "unknown_bytes": self.unknown,
            "by_kind": {kind: {"kernels": count, "bytes": size} for kind, (count, size) in self.by_kind.items()},
        }


def kernel_totals(kernels: Sequence[Kernel]) -> KernelTotals:
    """Count the kernels of one engine."""
    number: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    products = {work.value: 0 for work in PRODUCTS}
    eight_bits = dict(products)
    for kernel in kernels:
        kind = f"{kernel.work.value}: {'+'.join(sorted({*kernel.inputs}))} -> {'+'.join(sorted({*kernel.outputs}))}"
        number[kind] += 1
        traffic[kind] += kernel.bytes_moved or 0
        if kernel.work in PRODUCTS:
            products[kernel.work.value] += 1
            eight_bits[kernel.work.value] += kernel.precision in EIGHT_BITS
    return KernelTotals(
        kernels=len(kernels),
        products=products,
        eight_bits=eight_bits,
        reformats=sum(kernel.work is Work.REFORMAT for kernel in kernels),
        activation_bytes=sum(traffic.values()),
        constant_bytes=sum(kernel.constant_bytes for kernel in kernels),
        unknown=sum(kernel.bytes_moved is None for kernel in kernels),
        by_kind={kind: (number[kind], size) for kind, size in traffic.most_common()},
    )
