"""A compiled kernel as attributes of its node in the graph that TensorRT reads, and back.

Both kinds of plugin get nothing but these: the ahead-of-time one in ``trt.aot_plugins`` and the C++ library in
``engines/plugin``, which parses the same lists. All sizes are flat ``Extent``s (see ``kernels.launch``). No list is
ever empty, since an ONNX attribute without values has no type.

==============  ======================================================================================
kernel_entry    name of the kernel in its PTX
kernel_ptx      the PTX
kernel_block    threads per block, bytes of dynamic shared memory
kernel_grid     x, y and z
kernel_scalars  how many, then each of the extra int32 arguments
kernel_inputs   TensorRT's number of each input's data type
kernel_outputs  per output: number of its data type, rank, the size of each dimension
==============  ======================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.launch import LAUNCH_SHARED_BYTES, Extent, Kernel, Launch, Result, Term

DATA_TYPES: Mapping[str, int] = {"fp32": 0, "fp16": 1, "int8": 2, "int32": 3, "fp8": 6, "bf16": 7}
"""TensorRT's ``DataType`` numbers, the same from 10.3 to 11. Plugins take no BOOL (4) and no UINT8 (5) in any
version: "DataType::kBOOL and DataType::kUINT8 are not supported" (``PluginTensorDesc`` in TensorRT's reference)."""
TEXTS = ("kernel_entry", "kernel_ptx")
LISTS = ("kernel_block", "kernel_grid", "kernel_scalars", "kernel_inputs", "kernel_outputs")
NAMES = (*TEXTS, *LISTS)
"""All attributes, in the order in which a plugin declares them."""
_MAX_THREADS = 1024
_MAX_RANK = 8
_TYPE_OF = {number: dtype for dtype, number in DATA_TYPES.items()}


class CompiledNode(NamedTuple):
    """What a plugin reads from its node: a kernel without what it was compiled for."""

    entry: str
    ptx: str
    threads: int
    shared_bytes: int
    launch: Launch


def fields_from_kernel(kernel: Kernel) -> dict[str, str | list[int]]:
    """The attributes of a node that carries ``kernel``.

    Raises:
        ResvitError: IMPOSSIBLE for what no plugin can have: boolean tensors, or more shared memory than every launch
            may use.
    """
    launch = kernel.launch
    if kernel.shared_bytes > LAUNCH_SHARED_BYTES:
        raise ResvitError(
            f"The kernel {kernel.entry} wants {kernel.shared_bytes} bytes of shared memory, and a plugin's launch has "
            f"{LAUNCH_SHARED_BYTES}.",
            "Take smaller tiles or fewer stages for this GPU, or leave this node to TensorRT (--plugins off).",
            ExitCode.IMPOSSIBLE,
        )
    fields: dict[str, str | list[int]] = {
        "kernel_entry": kernel.entry,
        "kernel_ptx": kernel.ptx,
        "kernel_block": [kernel.threads, kernel.shared_bytes],
        "kernel_grid": _flat(launch.grid),
        "kernel_scalars": [len(launch.scalars), *_flat(launch.scalars)],
        "kernel_inputs": [_number(dtype, kernel.entry) for dtype in launch.inputs],
        "kernel_outputs": [
            number
            for result in launch.outputs
            for number in (_number(result.dtype, kernel.entry), len(result.shape), *_flat(result.shape))
        ],
    }
    kernel_from_fields(fields)
    return fields


def kernel_from_fields(fields: Mapping[str, Any]) -> CompiledNode:
    """Read the attributes back; the lists may be numpy arrays. Other attributes of the node are left alone.

    Raises:
        ResvitError: INPUT for attributes that are absent or malformed, with the name of the first such.
    """
    for name in NAMES:
        if name not in fields:
            _malformed(name, "it is absent")
    entry, ptx = (_text(name, fields[name]) for name in TEXTS)
    if not re.search(rf"\.entry\s+{re.escape(entry)}\b", ptx):
        _malformed("kernel_entry", f"its PTX has no kernel of that name, {entry}")
    inputs = tuple(_dtype("kernel_inputs", number) for number in _numbers("kernel_inputs", fields))
    if not inputs:
        _malformed("kernel_inputs", "there are none")
    threads, shared_bytes = _pair("kernel_block", _numbers("kernel_block", fields))
    if not (0 < threads <= _MAX_THREADS and shared_bytes >= 0):
        _malformed("kernel_block", f"{threads} threads and {shared_bytes} bytes cannot be")
    x, y, z = _Reader("kernel_grid", fields, len(inputs)).extents(3, last=True)
    counted = _Reader("kernel_scalars", fields, len(inputs))
    scalars = counted.extents(counted.number(), last=True)
    return CompiledNode(entry, ptx, threads, shared_bytes, Launch(inputs, scalars, _outputs(fields, inputs), (x, y, z)))


def _outputs(fields: Mapping[str, Any], inputs: Sequence[str]) -> tuple[Result, ...]:
    reader = _Reader("kernel_outputs", fields, len(inputs))
    outputs = []
    while reader.left:
        dtype, rank = _dtype("kernel_outputs", reader.number()), reader.number()
        if not 0 <= rank <= _MAX_RANK:
            _malformed("kernel_outputs", f"a rank of {rank} cannot be")
        outputs.append(Result(dtype, reader.extents(rank)))
    if not outputs:
        _malformed("kernel_outputs", "there are none")
    return tuple(outputs)


class _Reader:
    """Reads flat extents off a list, and says what is wrong with it."""

    def __init__(self, name: str, fields: Mapping[str, Any], inputs: int) -> None:
        self.name, self.left, self._inputs = name, _numbers(name, fields), inputs

    def number(self) -> int:
        if not self.left:
            _malformed(self.name, "it ends too early")
        return self.left.pop(0)

    def extent(self) -> Extent:
        factor, count = self.number(), self.number()
        if factor < 0 or not 0 <= count <= _MAX_RANK:
            _malformed(self.name, f"a size of {factor} times {count} terms cannot be")
        terms = tuple(Term(self.number(), self.number(), self.number()) for _ in range(count))
        for term in terms:
            if not (0 <= term.input < self._inputs and 0 <= term.axis < _MAX_RANK and term.divisor > 0):
                _malformed(self.name, f"it names dimension {term.axis} of input {term.input}, over {term.divisor}")
        return Extent(factor, terms)

    def extents(self, count: int, *, last: bool = False) -> tuple[Extent, ...]:
        found = tuple(self.extent() for _ in range(count))
        if last and self.left:
            _malformed(self.name, f"{len(self.left)} numbers are left over")
        return found


def _flat(extents: Iterable[Extent]) -> list[int]:
    return [number for extent in extents for number in extent.flat()]


def _number(dtype: str, entry: str) -> int:
    if dtype not in DATA_TYPES:
        raise ResvitError(
            f"The kernel {entry} has a tensor of type {dtype}, which TensorRT gives to no plugin.",
            f"Cast it in the graph to one of {', '.join(DATA_TYPES)}; a mask may become a bias.",
            ExitCode.IMPOSSIBLE,
        )
    return DATA_TYPES[dtype]


def _dtype(name: str, number: int) -> str:
    if number not in _TYPE_OF:
        _malformed(name, f"{number} is no data type of ours")
    return _TYPE_OF[number]


def _text(name: str, value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text or "\0" in text:
        _malformed(name, "it is no text")
    return text


def _numbers(name: str, fields: Mapping[str, Any]) -> list[int]:
    try:
        # Plain integers: TensorRT's symbolic arithmetic does not take numpy's.
        return [int(number) for number in fields[name]]
    except (TypeError, ValueError):
        _malformed(name, "it is no list of whole numbers")


def _pair(name: str, numbers: Sequence[int]) -> tuple[int, int]:
    if len(numbers) != 2:
        _malformed(name, f"it has {len(numbers)} numbers instead of 2")
    return numbers[0], numbers[1]


def _malformed(name: str, reason: str) -> NoReturn:
    raise ResvitError(
        f"The attribute {name} of a plugin's node is malformed: {reason}.",
        "Write the file for TensorRT again with this version of resvit-export.",
    )
