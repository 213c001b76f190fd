"""Which kernels TensorRT makes of a fused layer, and in which formats tensors pass between them.

Read from NVIDIA's listings of ten engines (``benchmarks/results/predictions.md`` names them and shows how many layers
are told right) and from the rules of its documentation ("Working with quantized types: Q/DQ layer-placement"):

- An 8-bit convolution or linear layer writes 8 bits from its own kernel where all that reads it quantises at one scale;
  else it writes floats, and each QuantizeLinear is a kernel.
- What is added inside it has the type that it writes: a shortcut without Q/DQ makes it write floats, and a shortcut
  with Q/DQ is dequantised by a kernel where it writes floats.
- A convolution in floats does not write 8 bits. Norms and pointwise kernels, which are generated, write all formats.
- An input in floats is quantised by a kernel; one in whole numbers is there in 8 bits.
- Max pools and pads work in 8 bits where their readers do; other pools where they read and write 8 bits.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from resvit_engines.targets.layer_work import Format, LayerKind, LayerWork, Precisions, Read
from resvit_engines.targets.table import Precision
from resvit_engines.targets.tensorrt_rules import KernelWork

_EIGHT = (Format.INT8, Format.FP8)
_GENERATED = frozenset({LayerKind.NORM, LayerKind.POINTWISE})
_PRODUCTS = frozenset({LayerKind.CONV, LayerKind.GEMM})


class Role(str, enum.Enum):
    """What a kernel is for."""

    LAYER = "layer"
    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"


@dataclass(frozen=True)
class Wanted:
    """The format in which a tensor is wanted; ``scale`` tells 8-bit ones apart."""

    form: Format
    scale: str = ""

    @property
    def eight(self) -> bool:
        """Whether it is of 8 bits."""
        return self.form in _EIGHT


@dataclass(frozen=True)
class PlacedKernel:
    """One kernel of a layer: its work, and the tensors that it reads and writes, each with its format."""

    role: Role
    work: KernelWork
    reads: tuple[tuple[str, Wanted], ...]
    writes: tuple[tuple[str, Wanted], ...]


class TensorRtKernels:
    """The kernels of a network's layers, for any assignment of precisions to its products."""

    def __init__(self, works: Sequence[LayerWork]) -> None:
        self._readers: dict[str, list[tuple[LayerWork, Read]]] = {}
        for work in works:
            for read in work.reads:
                self._readers.setdefault(read.value, []).append((work, read))
        self._floats = {work.writes: work.floats for work in works}
        self._inputs = {work.writes for work in works if work.kind is LayerKind.INPUT}

    def of(self, work: LayerWork, assignment: Precisions) -> tuple[PlacedKernel, ...]:
        """The kernels of one layer in the order in which they run; none for an input that is read as it is given."""
        multiplies = self._multiplies(work, assignment)
        reads = [self._read(work, read, assignment) for read in work.reads]
        writes, apart = self._writes(work, multiplies, reads, assignment)
        before: list[PlacedKernel] = []
        if work.kind in _PRODUCTS and multiplies in _EIGHT and not writes[0].eight:
            for index, form in enumerate(reads[1:], 1):
                if form.eight:
                    before.append(_change(work, work.reads[index], form, Wanted(work.floats), Role.DEQUANTIZE))
                    reads[index] = Wanted(work.floats)
        layer = [] if work.kind is LayerKind.INPUT else [self._layer(work, multiplies, reads, writes)]
        out = Read(work.writes, work.written)
        behind = [_change(work, out, Wanted(work.floats), form, Role.QUANTIZE) for form in apart]
        return (*before, *layer, *behind)

    def _layer(self, work: LayerWork, multiplies: Format, reads: list[Wanted], writes: list[Wanted]) -> PlacedKernel:
        moved = 2 * work.moved * work.floats.bytes
        read = sum(r.elements * form.form.bytes for r, form in zip(work.reads, reads, strict=True))
        written = work.written * sum(form.form.bytes for form in writes)
        kernel = KernelWork(
            work.kind, multiplies, work.macs, read + written + moved, work.weights * multiplies.bytes, work.shape,
            image=work.image, reformats=work.copies, pools=work.pools, count=work.kernels,
            fp32_add=len(reads) > 1 and multiplies in _EIGHT and writes[0].form is Format.FP32,
        )  # fmt: skip
        return PlacedKernel(
            Role.LAYER,
            kernel,
            tuple((r.value, form) for r, form in zip(work.reads, reads, strict=True)),
            tuple((work.writes, form) for form in writes),
        )

    def _multiplies(self, work: LayerWork, assignment: Precisions) -> Format:
        precision = work.precision(assignment)
        return work.floats if precision is Precision.FP16 else Format(precision.value)

    def _read(self, work: LayerWork, read: Read, assignment: Precisions) -> Wanted:
        """The format in which a layer reads one tensor."""
        if read.form is not None:
            return Wanted(read.form, read.scale)
        if read.follows:
            return Wanted(self._multiplies(work, assignment))
        if work.commutes and read.value not in self._inputs:
            behind = self.wanted(work.writes, work.floats, assignment)
            if len(behind) == 1 and behind[0].eight:
                return behind[0]
        return Wanted(self._floats.get(read.value, work.floats))

    def wanted(self, value: str, floats: Format, assignment: Precisions) -> list[Wanted]:
        """The formats in which a tensor is read, floats first; floats alone where nothing reads it."""
        found = {
            Wanted(floats) if not (form := self._read(reader, read, assignment)).eight else form
            for reader, read in self._readers.get(value, [])
        } or {Wanted(floats)}
        return sorted(found, key=lambda form: (form.eight, form.form.value, form.scale))

    def _writes(
        self, work: LayerWork, multiplies: Format, reads: Sequence[Wanted], assignment: Precisions
    ) -> tuple[list[Wanted], list[Wanted]]:
        """The formats that the layer's own kernel writes, and those that take a kernel of their own."""
        wanted = self.wanted(work.writes, work.floats, assignment)
        one_eight = len(wanted) == 1 and wanted[0].eight
        if work.kind in _GENERATED and not (work.commutes or work.copies):
            return wanted, []
        if work.kind in _PRODUCTS and multiplies in _EIGHT:
            direct = one_eight and all(form.eight for form in reads[1:])
        elif work.kind is LayerKind.INPUT:
            direct = work.floats in _EIGHT
        elif work.kind is LayerKind.CONV:
            direct = False
        elif work.kind is LayerKind.POOL or work.commutes:
            direct = one_eight and all(form.eight for form in reads)
        else:
            direct = one_eight
        if direct:
            return wanted, []
        return [Wanted(work.floats)], [form for form in wanted if form.eight]


def _change(work: LayerWork, read: Read, before: Wanted, after: Wanted, role: Role) -> PlacedKernel:
    moved = read.elements * (before.form.bytes + after.form.bytes)
    image = work.image and role is Role.QUANTIZE
    kernel = KernelWork(LayerKind.POINTWISE, work.floats, 0, moved, image=image, reformats=True)
    return PlacedKernel(role, kernel, ((read.value, before),), ((read.value, after),))
