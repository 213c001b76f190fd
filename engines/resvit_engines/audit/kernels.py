"""The kernels of an engine, read from the builder's log: no engine is deserialised to learn what is in it."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resvit_engines.records import Record

_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1}

# TensorRT for RTX, and TensorRT where it prints the inspector's lines.
_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]+), ")
_INPUTS = re.compile(r", Inputs: \[(.*?)\], (?:Constants|Outputs): \[")
_CONSTANTS = re.compile(r", Constants: \[(.*?)\], Outputs: \[")
_OUTPUTS = re.compile(r", Outputs: \[(.*?)\], (?:ParameterType|TacticName|TacticValue|StreamId|Metadata)\b")
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_TACTIC = re.compile(r", TacticName: (.*?), (?:TacticValue|StreamId|Metadata)\b")
_METADATA = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|\s*$)")
# TensorRT 10's own short form.
_SHORT = re.compile(r"^Layer\((?P<type>[^)]*)\): (?P<name>.*), Tactic: 0x[0-9a-f]+(?: \([^)]*\))?, (.*?)-> ?(.*)$")
_SHORT_TENSOR = re.compile(r"\((\w+)\[([-\d,]*)[^\]]*\]\)")

_NO_KERNEL = frozenset({"signal", "wait"})
"""How streams wait for each other: listed among the kernels, but nothing runs."""
EIGHT_BITS = frozenset({"Int8", "FP8"})
# What a tactic multiplies in is part of its name, as in sm80_xmma_gemm_i8f16_i8i32_f32_tn.
_INT8_TACTIC = re.compile(r"_i8(?:i8|f16|f32)?_i8i32|int8x4|_imma_|_int8_")
_FP8_TACTIC = re.compile(r"e4m3")
# TensorRT for RTX names generated kernels after their operations, four letters each: __myl_MulAddReshTran_myl0_7.
_GENERATED = re.compile(r"^__myl_((?:[A-Z][a-z]+)+)_")
_MOVES = frozenset({"Move", "Resh", "Tran", "Cast", "Conc", "Slic", "Repl", "Sque", "Expa", "Pad"})
_QUANTISES = frozenset({"Mul", "Div", "Min", "Max", "Roun"})


class Operation(str, enum.Enum):
    """What a kernel does, as far as its type and name tell."""

    CONV = "conv"
    GEMM = "gemm"
    ATTENTION = "attention"
    REFORMAT = "reformat"
    """Moves, casts, quantises or dequantises, and computes nothing."""
    PLUGIN = "plugin"
    OTHER = "other"


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name and type, and of every activation it reads and writes the data type and shape.

    Data types are the builder's words (``Float``, ``Half``, ``Int8``, ``FP8``); a dynamic dimension is -1.
    ``layers`` are the names of the ONNX nodes that it computes, ``constants`` the data types of its weights, scales
    and biases, where the log tells. ``input_names`` and ``output_names`` are the tensors' names, empty where it does
    not; ``tactic`` is the builder's name for the code that runs.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...]
    constants: tuple[str, ...] = ()
    constant_shapes: tuple[tuple[int, ...], ...] = ()
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    tactic: str = ""

    @property
    def operation(self) -> Operation:
        """What it does."""
        kind, tactic = self.type.lower(), self.tactic.lower()
        if "plugin" in kind:
            return Operation.PLUGIN
        if "mha" in self.name or "mha" in tactic:
            return Operation.ATTENTION
        if kind == "correlation" or "conv" in kind or "_fprop_" in tactic:
            return Operation.CONV
        if kind == "reformat":
            return Operation.REFORMAT
        generated = _GENERATED.match(self.name)
        operations = re.findall("[A-Z][a-z]+", generated.group(1)) if generated else []
        if "gemm" in kind or "matrixmultiply" in kind or "Fc" in operations or "_gemm_" in tactic:
            return Operation.GEMM
        quantises = EIGHT_BITS & {*self.inputs, *self.outputs}
        idle = _MOVES | _QUANTISES if quantises else _MOVES
        return Operation.REFORMAT if operations and idle.issuperset(operations) else Operation.OTHER

    @property
    def precision(self) -> str:
        """What a convolution, matrix product or attention multiplies in: the type of its weights, else its inputs."""
        weights = [t for t, s in zip(self.constants, self.constant_shapes, strict=True) if len(s) > 1]
        low = [t for t in weights if t in EIGHT_BITS]
        if low and low[0] in self.inputs:
            return low[0]
        for kind, named in (("Int8", _INT8_TACTIC), ("FP8", _FP8_TACTIC)):
            if not weights and kind in self.inputs and named.search(self.tactic):
                return kind
        if self.operation is Operation.ATTENTION:
            eight = [t for t in self.inputs if t in EIGHT_BITS]
            if len(eight) >= 3:  # Q, K and V; a mask beside them may have any type.
                return eight[0]
        # Where the weights are not constants of the kernel, it reads them: all must be of 8 bits.
        read = {*self.inputs}
        return read.pop() if len(read) == 1 else max(read, key=lambda t: _BYTES.get(t, 0), default="")

    @property
    def constant_bytes(self) -> int:
        """Bytes of weights, scales and biases that it reads."""
        return sum(_BYTES.get(t, 0) * math.prod(s) for t, s in zip(self.constants, self.constant_shapes, strict=True))

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
            "constants": list(self.constants),
            "constant_shapes": [list(shape) for shape in self.constant_shapes],
            "input_names": list(self.input_names),
            "output_names": list(self.output_names),
            "tactic": self.tactic,
            "bytes": self.bytes_moved,
        }

    @classmethod
    def from_json(cls, record: Record) -> Kernel:
        """What :meth:`to_json` wrote."""
        return cls(
            record.text("name"),
            record.text("type"),
            record.texts("inputs"),
            record.texts("outputs"),
            record.shapes("input_shapes"),
            record.shapes("output_shapes"),
            record.texts("layers"),
            record.texts("constants"),
            record.shapes("constant_shapes"),
            record.texts("input_names"),
            record.texts("output_names"),
            record.text("tactic"),
        )


def kernels_from_log(messages: Iterable[str]) -> tuple[Kernel, ...]:
    """Read the kernels from the messages of a build at verbose severity and detailed profiling verbosity.

    Both forms are read: ``Layers:`` of TensorRT for RTX and ``Engine Layer Information:`` of TensorRT 10. The last
    listing counts, without what only synchronises streams. A log without one gives no kernels, since its form is not
    part of TensorRT's interface.
    """
    kernels: tuple[Kernel, ...] = ()
    for message in messages:
        if message.startswith(("Layers:", "Engine Layer Information:")):
            found = (_kernel(line) for line in message.splitlines()[1:])
            kernels = tuple(kernel for kernel in found if kernel is not None and kernel.type not in _NO_KERNEL)
    return kernels


def onnx_layers(metadata: str) -> tuple[str, ...]:
    """The names of ONNX nodes in a kernel's ``Metadata``: ``[ONNX Layer: a]``, apart by control characters or not."""
    return tuple(dict.fromkeys(_METADATA.findall(metadata)))


def _kernel(line: str) -> Kernel | None:
    constants: list[tuple[str, str, str]] = []
    tactic = ""
    if head := _LINE.match(line):
        constants = _tensors(_CONSTANTS.search(line))
        inputs, outputs = _tensors(_INPUTS.search(line)), _tensors(_OUTPUTS.search(line))
        layers = onnx_layers(line.partition("Metadata: ")[2])
        found = _TACTIC.search(line)
        tactic = found[1] if found else ""
    elif head := _SHORT.match(line):
        inputs, outputs = ([("", s, t) for t, s in _SHORT_TENSOR.findall(side)] for side in head.groups()[2:])
        layers = tuple(head["name"].split(" + "))
    else:
        return None
    return Kernel(
        head["name"],
        head["type"],
        tuple(dtype for _, _, dtype in inputs),
        tuple(dtype for _, _, dtype in outputs),
        tuple(_shape(shape) for _, shape, _ in inputs),
        tuple(_shape(shape) for _, shape, _ in outputs),
        layers,
        tuple(dtype for _, _, dtype in constants),
        tuple(_shape(shape) for _, shape, _ in constants),
        tuple(name for name, _, _ in inputs if name),
        tuple(name for name, _, _ in outputs if name),
        tactic,
    )


def _tensors(section: re.Match[str] | None) -> list[tuple[str, str, str]]:
    """Name, dimensions and data type of each tensor of a section."""
    return _TENSOR.findall(section.group(1)) if section else []


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
