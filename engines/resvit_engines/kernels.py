"""The kernels of an engine, read from the builder's log: no engine is deserialised to learn what is in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1}

# TensorRT for RTX, and TensorRT where it prints the inspector's lines.
_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]+), ")
_INPUTS = re.compile(r", Inputs: \[(.*?)\], (?:Constants|Outputs): \[")
_OUTPUTS = re.compile(r", Outputs: \[(.*?)\], (?:ParameterType|TacticName|TacticValue|StreamId|Metadata)\b")
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_METADATA = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|\s*$)")
# TensorRT 10's own short form.
_SHORT = re.compile(r"^Layer\((?P<type>[^)]*)\): (?P<name>.*), Tactic: 0x[0-9a-f]+(?: \([^)]*\))?, (.*?)-> ?(.*)$")
_SHORT_TENSOR = re.compile(r"\((\w+)\[([-\d,]*)[^\]]*\]\)")


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name and type, and of every activation it reads and writes the data type and shape.

    Data types are the builder's words (``Float``, ``Half``, ``Int8``, ``FP8``); a dynamic dimension is -1.
    ``layers`` are the names of the ONNX nodes that it computes.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...]

    @property
    def bytes_moved(self) -> int | None:
        """Bytes of activations read and written; None where a dimension is dynamic or a type unknown."""
        tensors = [
            *zip(self.inputs, self.input_shapes, strict=True),
            *zip(self.outputs, self.output_shapes, strict=True),
        ]
        if any(dtype not in _BYTES or min(shape, default=1) < 0 for dtype, shape in tensors):
            return None
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "type": self.type,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "output_shapes": [list(shape) for shape in self.output_shapes],
            "layers": list(self.layers),
            "bytes": self.bytes_moved,
        }


def kernel_from_json(plain: dict[str, Any]) -> Kernel:
    """Undo ``Kernel.to_json``."""
    return Kernel(
        plain["name"],
        plain["type"],
        tuple(plain["inputs"]),
        tuple(plain["outputs"]),
        tuple(tuple(shape) for shape in plain["input_shapes"]),
        tuple(tuple(shape) for shape in plain["output_shapes"]),
        tuple(plain["layers"]),
    )


def kernels_from_log(messages: Iterable[str]) -> tuple[Kernel, ...]:
    """Read the kernels from the messages of a build at verbose severity and detailed profiling verbosity.

    Both forms are read: ``Layers:`` of TensorRT for RTX and ``Engine Layer Information:`` of TensorRT 10. The last
    listing counts. A log without one gives no kernels, since its form is not part of TensorRT's interface.
    """
    kernels: tuple[Kernel, ...] = ()
    for message in messages:
        if message.startswith(("Layers:", "Engine Layer Information:")):
            found = (_kernel(line) for line in message.splitlines()[1:])
            kernels = tuple(kernel for kernel in found if kernel is not None)
    return kernels


def _kernel(line: str) -> Kernel | None:
    if head := _LINE.match(line):
        inputs, outputs = _tensors(_INPUTS.search(line)), _tensors(_OUTPUTS.search(line))
        layers = tuple(dict.fromkeys(_METADATA.findall(line.partition("Metadata: ")[2])))
    elif head := _SHORT.match(line):
        inputs, outputs = ([(t, s) for t, s in _SHORT_TENSOR.findall(side)] for side in head.groups()[2:])
        layers = tuple(head["name"].split(" + "))
    else:
        return None
    return Kernel(
        head["name"],
        head["type"],
        tuple(dtype for dtype, _ in inputs),
        tuple(dtype for dtype, _ in outputs),
        tuple(_shape(shape) for _, shape in inputs),
        tuple(_shape(shape) for _, shape in outputs),
        layers,
    )


def _tensors(section: re.Match[str] | None) -> list[tuple[str, str]]:
    return [(dtype, shape) for shape, dtype in _TENSOR.findall(section.group(1))] if section else []


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
