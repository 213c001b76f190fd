"""The tail of a residual block in Triton; see residual.py for what it computes."""
# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language: parameters have its types, and constants are in capitals.

import triton
import triton.language as tl

from resvit_engines.kernels.triton.numerics import rectified, stored


@triton.jit
def residual(
    x, shortcut, y,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """One block of one image; ``SIZE`` elements an image, all counted from its own start."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    start = (tl.program_id(0) // blocks).to(tl.int64) * SIZE
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = inside < SIZE
    total = tl.load(x + start + inside, mask=real, other=0.0).to(tl.float32)
    total += tl.load(shortcut + start + inside, mask=real, other=0.0).to(tl.float32) * SCALE
    if RELU:
        total = rectified(total)
    tl.store(y + start + inside, stored(total, INVERSE, y.dtype.element_ty), mask=real)
