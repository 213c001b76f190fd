"""Made-up kernels for tests of what carries them: the right tensors for an op type, and sizes of every kind."""

from __future__ import annotations

from resvit_engines.kernels.launch import Extent, Kernel, Launch, Result, dim, product
from resvit_engines.plugins.names import OP_TYPES

PTX = ".version 8.5\n.target sm_87\n.address_size 64\n.visible .entry {entry}(\n)\n{{ ret; }}\n"


def kernel_for(op_type: str, *, dtype: str = "fp16", shared_bytes: int = 4096, scalars: int = 2) -> Kernel:
    """A kernel over inputs [B, N, C] (the others are as large): tiles of 64 in N, outputs [B, N, C / 3] and [B, 7]."""
    op = OP_TYPES[op_type]
    eight = "int8" if op_type.endswith("Q") else dtype
    outputs = [Result(eight, (dim(0, 0), dim(0, 1), dim(0, 2, divisor=3))), Result(dtype, (dim(0, 0), Extent(7)))]
    entry = f"{op_type.lower()}_kernel"
    sizes = (dim(0, 1), product(dim(0, 0), dim(len(op.inputs) - 1, 2, factor=2)), Extent(5))
    launch = Launch(
        inputs=(dtype,) * len(op.inputs),
        scalars=sizes[:scalars],
        outputs=tuple(outputs[: len(op.outputs)]),
        grid=(dim(0, 1, divisor=64), dim(0, 0, factor=3), Extent(1)),
    )
    return Kernel(entry, PTX.format(entry=entry), 87, "8.5", 128, shared_bytes, launch)
