"""An ONNX file with FP32 in front of every INT8 QuantizeLinear, without the package onnx.

ONNX Runtime 1.23 and 1.24 on the CPU truncate where they should round when QuantizeLinear's input is FP16, and 1.23 is
the last for Python 3.10. A cast to FP32 changes no value and leads around it. The file is a tree of protobuf records
(protobuf.dev/programming-guides/encoding; the field numbers are those of onnx.proto); what is not touched is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from resvit_engines.errors import ResvitError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _FUNCTION_NODE = 1, 5, 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TYPE, _TYPE_INT = 1, 3, 20, 2
_TENSOR_TYPE, _TENSOR_NAME = 2, 8
_FLOAT = 1
_FP8_TYPES = (17, 18, 19, 20)  # FLOAT8E4M3FN to FLOAT8E5M2FNUZ


def with_float32_quantizers(model: bytes) -> bytes:
    """Cast value and scale of every QuantizeLinear to integers to FP32, in the graph and in model-local functions.

    FP8 is left alone: it has no such defect. External data stays where it is.

    Raises:
        ResvitError: INPUT for what is no ONNX file.
    """
    try:
        out = bytearray()
        for number, kind, value in records(model):
            if number in (_MODEL_GRAPH, _MODEL_FUNCTION) and isinstance(value, bytes):
                value = _body(value, _GRAPH_NODE if number == _MODEL_GRAPH else _FUNCTION_NODE)  # noqa: PLW2901
            out += _field(number, kind, value)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise ResvitError("The model cannot be read as an ONNX file.", "Check that the file is complete.") from error
    return bytes(out)


def _body(body: bytes, node_field: int) -> bytes:
    fp8: set[bytes] = set()
    if node_field == _GRAPH_NODE:
        tensors = (value for number, _, value in records(body) if number == _GRAPH_INITIALIZER)
        fp8 = {name for tensor in tensors if isinstance(tensor, bytes) for name in _fp8_name(tensor)}
    out = bytearray()
    for number, kind, value in records(body):
        nodes = _with_casts(value, fp8) if number == node_field and isinstance(value, bytes) else [value]
        for node in nodes:
            out += _field(number, kind, node)
    return bytes(out)


def _fp8_name(tensor: bytes) -> list[bytes]:
    """The name of an FP8 initializer, none for others."""
    found: dict[int, int | bytes] = {}
    for number, _, value in records(tensor):
        if number in (_TENSOR_TYPE, _TENSOR_NAME):
            found[number] = value
    name = found.get(_TENSOR_NAME)
    return [name] if found.get(_TENSOR_TYPE) in _FP8_TYPES and isinstance(name, bytes) else []


def _with_casts(node: bytes, fp8: set[bytes]) -> list[int | bytes]:
    fields = list(records(node))
    inputs = [value for number, _, value in fields if number == _NODE_INPUT]
    if not any(number == _NODE_OP_TYPE and value == b"QuantizeLinear" for number, _, value in fields) or fp8 & {
        value for value in inputs[2:] if isinstance(value, bytes)
    }:
        return [node]
    output = next(value for number, _, value in fields if number == _NODE_OUTPUT)
    assert isinstance(output, bytes)
    wide = [output + b"/float32_0", output + b"/float32_1"]
    casts: list[int | bytes] = [
        _cast(source, name) for source, name in zip(inputs, wide, strict=False) if isinstance(source, bytes)
    ]
    renamed = iter([*wide, *inputs[2:]])
    return [
        *casts,
        b"".join(_field(n, kind, next(renamed) if n == _NODE_INPUT else value) for n, kind, value in fields),
    ]


def _cast(source: bytes, name: bytes) -> bytes:
    to = (
        _field(_ATTRIBUTE_NAME, _BYTES, b"to")
        + _field(_ATTRIBUTE_INT, _VARINT, _FLOAT)
        + _field(_ATTRIBUTE_TYPE, _VARINT, _TYPE_INT)
    )
    return (
        _field(_NODE_INPUT, _BYTES, source)
        + _field(_NODE_OUTPUT, _BYTES, name)
        + _field(_NODE_NAME, _BYTES, name)
        + _field(_NODE_OP_TYPE, _BYTES, b"Cast")
        + _field(_NODE_ATTRIBUTE, _BYTES, to)
    )


def records(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """The records of a message: field number, wire type, and the number or bytes that it holds."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, kind, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(kind)
        if at + size > len(data):
            raise IndexError(at)
        yield number, kind, data[at : at + size]
        at += size


def _field(number: int, kind: int, value: int | bytes) -> bytes:
    head = _to_varint(number << 3 | kind)
    if isinstance(value, int):
        return head + _to_varint(value)
    return head + (_to_varint(len(value)) if kind == _BYTES else b"") + value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(shift)


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])
