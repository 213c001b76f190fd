"""An input or output of a network as records name it: without numpy, so that every type of TensorRT's has a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resvit_engines.pictures.encoding import InputEncoding
from resvit_engines.records import Record


@dataclass(frozen=True)
class IoTensor:
    """Name, shape and data type (``float32``, ``bfloat16``, …) of an input or output.

    A dynamic dimension is -1 in an engine's record, and a name such as ``B`` in that of an ONNX graph, where the type
    may not be told: then it is empty.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = ""
    encoding: InputEncoding | None = None
    """How prepared images become it, where it reads whole numbers."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        said = {"dtype": self.dtype} if self.dtype else {}
        encoded = {"encoding": self.encoding.to_json()} if self.encoding else {}
        return {"name": self.name, "shape": list(self.shape), **said, **encoded}

    @classmethod
    def from_json(cls, record: Record) -> IoTensor:
        """What :meth:`to_json` wrote."""
        encoding = record.optional("encoding", record.plain)
        return cls(
            record.text("name"),
            record.shape("shape"),
            record.optional("dtype", record.text) or "",
            InputEncoding.from_json(encoding) if encoding is not None else None,
        )


def io_tensors_from_json(records: Iterable[Record]) -> tuple[IoTensor, ...]:
    """All of a list."""
    return tuple(map(IoTensor.from_json, records))
