"""What an engine does, counted: kernels by their operation and precision, and the bytes that they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resvit_engines.audit.kernels import EIGHT_BITS, Kernel, Operation
from resvit_engines.records import Record

PRODUCTS = (Operation.CONV, Operation.GEMM, Operation.ATTENTION)
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

    @classmethod
    def from_json(cls, record: Record) -> KernelTotals:
        """What :meth:`to_json` wrote."""
        kinds = record.record("by_kind")
        return cls(
            record.whole("kernels"),
            _counts(record.record("of")),
            _counts(record.record("in_8_bits")),
            record.whole("reformats"),
            record.whole("activation_bytes"),
            record.whole("constant_bytes"),
            record.whole("unknown_bytes"),
            {kind: (kinds.record(kind).whole("kernels"), kinds.record(kind).whole("bytes")) for kind in kinds.names},
        )


def kernel_totals(kernels: Sequence[Kernel]) -> KernelTotals:
    """Count the kernels of one engine."""
    number: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    products = {operation.value: 0 for operation in PRODUCTS}
    eight_bits = dict(products)
    for kernel in kernels:
        kind = (
            f"{kernel.operation.value}: {'+'.join(sorted({*kernel.inputs}))} -> {'+'.join(sorted({*kernel.outputs}))}"
        )
        number[kind] += 1
        traffic[kind] += kernel.bytes_moved or 0
        if kernel.operation in PRODUCTS:
            products[kernel.operation.value] += 1
            eight_bits[kernel.operation.value] += kernel.precision in EIGHT_BITS
    return KernelTotals(
        kernels=len(kernels),
        products=products,
        eight_bits=eight_bits,
        reformats=sum(kernel.operation is Operation.REFORMAT for kernel in kernels),
        activation_bytes=sum(traffic.values()),
        constant_bytes=sum(kernel.constant_bytes for kernel in kernels),
        unknown=sum(kernel.bytes_moved is None for kernel in kernels),
        by_kind={kind: (number[kind], size) for kind, size in traffic.most_common()},
    )


def _counts(record: Record) -> dict[str, int]:
    return {name: record.whole(name) for name in record.names}
