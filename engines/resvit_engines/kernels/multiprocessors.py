"""What one multiprocessor of each GPU holds (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"), and how many thread blocks that comes to;
what tiles are chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from resvit_engines.errors import ExitCode, ResvitError


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor; each holds 65536 registers as well."""

    warps: int
    blocks: int
    shared_bytes: int


_KIB = 1024
MULTIPROCESSORS: Mapping[int, Multiprocessor] = {
    80: Multiprocessor(64, 32, 164 * _KIB),
    86: Multiprocessor(48, 16, 100 * _KIB),
    87: Multiprocessor(48, 16, 164 * _KIB),
    89: Multiprocessor(48, 24, 100 * _KIB),
    90: Multiprocessor(64, 32, 228 * _KIB),
    100: Multiprocessor(64, 32, 228 * _KIB),
    103: Multiprocessor(64, 32, 228 * _KIB),
    110: Multiprocessor(48, 24, 228 * _KIB),
    120: Multiprocessor(48, 24, 100 * _KIB),
    121: Multiprocessor(48, 24, 100 * _KIB),
}
"""By compute capability without its dot."""

_COUNTS: Mapping[int, int] = {80: 108, 87: 16, 90: 132, 100: 148, 103: 148, 110: 20, 120: 170, 121: 48}
"""Of the largest GPU with this compute capability that is in wide use (NVIDIA's data sheets); only tiles follow it."""
_USUAL_COUNT = 64

_REGISTERS = 65536
_REGISTER_UNIT = 256
"""Registers are given to a warp in units of this many."""
_WARP_UNIT = 4
"""A multiprocessor has four parts, each with a quarter of its registers."""
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024
"""Bytes of shared memory that the system takes for each block, from SM 8.0 on."""
_TENSOR_COLUMNS = 512
"""Columns of tensor memory, where there is any."""


def multiprocessors_of(sm: int) -> int:
    """How many multiprocessors a tile is chosen for."""
    return _COUNTS.get(sm, _USUAL_COUNT)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``: Triton's tiles have such sides."""
    return 1 << (number - 1).bit_length()


def warp_slots(sm: int) -> int:
    """How many warps one multiprocessor holds at most."""
    return _row(sm).warps


def resident_blocks(sm: int, threads: int, *, registers: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """How many blocks of ``threads`` threads one multiprocessor holds: 0 where not even one fits.

    ``registers`` is per thread, ``shared_bytes`` per block, static and dynamic together.
    """
    row = _row(sm)
    warps = -(-threads // 32)
    limits = [row.blocks, row.warps // warps]
    if registers:
        per_warp = _up(registers * 32, _REGISTER_UNIT)
        per_part = _REGISTERS // _WARP_UNIT // per_warp
        limits.append(per_part * _WARP_UNIT // warps)
    limits.append(row.shared_bytes // _up(shared_bytes + _SHARED_RESERVED, _SHARED_UNIT))
    if tensor_columns:
        limits.append(_TENSOR_COLUMNS // tensor_columns)
    return min(limits)


def _row(sm: int) -> Multiprocessor:
    if sm not in MULTIPROCESSORS:
        raise ResvitError(
            f"The limits of SM {sm / 10:.1f} are not in the table.",
            f"Known are {', '.join(f'{known / 10:.1f}' for known in MULTIPROCESSORS)}.",
            ExitCode.IMPOSSIBLE,
        )
    return MULTIPROCESSORS[sm]


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
