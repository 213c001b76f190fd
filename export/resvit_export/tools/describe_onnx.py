"""What an ONNX file says about itself, as plain JSON values; weights kept beside it are not read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.tools.describe import counted, damaged

if TYPE_CHECKING:
    import onnx

LARGEST = 12
"""How many layers are listed, by the bytes of their weights."""
_PASSED_ON = ("QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity")


def describe_onnx(path: Path) -> dict[str, Any]:
    """Describe an ONNX file without reading external weights (they must be there and long enough, though)."""
    try:
        from resvit_export.loading.weights.onnx_proto import proto_from_file
    except ImportError as error:
        raise ResvitError(
            "Reading ONNX needs the package onnx, which is not installed.",
            "pip install 'resvit-export[host]'",
            ExitCode.MISSING,
        ) from error
    model = proto_from_file(path)
    graph = model.graph
    if not model.opset_import:
        raise damaged(path, "an ONNX file", "it holds no opset")
    weights = _weights(graph)
    external = _check_external(path, weights.values())
    operators = Counter(node.op_type for node in graph.node)
    initial = {tensor.name for tensor in graph.initializer}
    per_dtype: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for tensor in weights.values():
        entry = per_dtype[_dtype(tensor.data_type)]
        entry[0] += 1
        entry[1] += _bytes(tensor)
    return {
        "kind": "ONNX",
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip() or None,
        "inputs": [_value(value) for value in graph.input if value.name not in initial],
        "outputs": [_value(value) for value in graph.output],
        "nodes": len(graph.node),
        "functions": [function.name for function in model.functions],
        "quantize_nodes": operators["QuantizeLinear"],
        "dequantize_nodes": operators["DequantizeLinear"],
        "external_files": external,
        "operators": counted(node.op_type for node in graph.node),
        "weights": [
            {"dtype": dtype, "tensors": count, "bytes": size}
            for dtype, (count, size) in sorted(per_dtype.items(), key=lambda item: -item[1][1])
        ],
        "largest_layers": _largest_layers(graph, weights),
    }


def _dtype(data_type: int) -> str:
    import onnx

    try:
        name = str(onnx.TensorProto.DataType.Name(data_type)).lower()
    except ValueError:
        return f"type {data_type}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def _bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    values: int = math.prod(tensor.dims)
    if _dtype(tensor.data_type) in ("int4", "uint4", "float4e2m1"):
        return (values + 1) // 2
    try:
        return values * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError):
        return len(tensor.raw_data)


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "dynamic" for dim in kind.shape.dim]
    return {"name": value.name, "shape": dims, "dtype": _dtype(kind.elem_type)}


def _weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initialisers, and the tensors of Constant nodes, by the value they are."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], entry.t) for entry in node.attribute if entry.name == "value")
    return found


def _check_external(path: Path, tensors: Iterable[onnx.TensorProto]) -> list[str]:
    from resvit_export.loading.weights.onnx_proto import file_inside

    needed: dict[str, int] = {}
    files: dict[str, Path] = {}
    for tensor in tensors:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        try:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        except ValueError as error:
            raise damaged(path, "an ONNX file", error) from error
        location = entry.get("location", "")
        files[location] = file_inside(path.resolve().parent, location, tensor.name, path)
        needed[location] = max(needed.get(location, 0), end)
    for location, size in needed.items():
        file = files[location]
        if not file.is_file() or file.stat().st_size < size:
            state = "shorter than it says" if file.is_file() else "not there"
            raise ResvitError(
                f"{path} keeps its weights in {location}, which is {state}.",
                "Copy both files together into one folder.",
            )
    return sorted(needed)


def _largest_layers(graph: onnx.GraphProto, weights: dict[str, onnx.TensorProto]) -> list[dict[str, Any]]:
    """The nodes with most bytes of weights, each weight followed through DequantizeLinear and the like."""
    held_by = {name: [tensor] for name, tensor in weights.items()}
    layers = []
    for node in graph.node:
        held = [tensor for name in node.input for tensor in held_by.get(name, ())]
        if node.op_type in _PASSED_ON:
            if node.input[0] in held_by:  # else the scale of an activation, which is nobody's weight
                held_by[node.output[0]] = held
            continue
        if not held:
            continue
        largest = max(held, key=_bytes)
        layers.append(
            {
                "name": node.name or node.output[0],
                "op": node.op_type,
                "shape": list(largest.dims),
                "dtype": _dtype(largest.data_type),
                "bytes": sum(map(_bytes, held)),
            }
        )
    return sorted(layers, key=lambda layer: (-int(str(layer["bytes"])), str(layer["name"])))[:LARGEST]
