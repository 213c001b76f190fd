"""An ONNX file as protobuf has it, within bounds, and the files beside it that hold its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from resvit_engines.errors import ResvitError
from resvit_engines.outside import open_outside, read_to_end

MOST_BYTES = 2**31 - 1
"""Of a file without its external data: protobuf ends there."""
_DEEPEST = 16
"""Graphs within graphs."""


def proto_from_file(path: Path) -> onnx.ModelProto:
    """Parse the file itself; weights that lie in others stay there.

    Raises:
        ResvitError: where there is no file, it is too large, damaged, or holds no operators.
    """
    with open_outside(path, f"the model {path}") as stream:
        size = os.fstat(stream.fileno()).st_size
        damaged = f"{path} is not a readable ONNX model ({size:,} bytes)"
        if size > MOST_BYTES:
            raise ResvitError(
                f"{damaged}: one file holds at most 2 GiB.",
                "Save it with its weights beside it (save_as_external_data).",
            )
        data = read_to_end(stream, MOST_BYTES)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ResvitError(f"{damaged}.", "The file is truncated or foreign; export it again.") from error
    if not proto.graph.node:
        raise ResvitError(f"{damaged}: it holds no operators.", "The file is empty or foreign; export it again.")
    return proto


def external_files(path: Path) -> dict[str, Path]:
    """The files beside the model at ``path`` that it names for its weights, by those names, as far as they are there.

    None for a model that does not read: whoever loads it says what is wrong.
    """
    try:
        proto = proto_from_file(path)
        folder = path.resolve().parent
        named = {
            entry.value: file_inside(folder, entry.value, tensor.name, path)
            for tensor in tensors_of(proto, path)
            if tensor.data_location == TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
    except ResvitError:
        return {}
    return {name: file for name, file in sorted(named.items()) if file.is_file()}


def invalid(path: Path, why: str, fix: str = "Export the model again.") -> ResvitError:
    """The error for a model that says what none may say."""
    return ResvitError(f"{path} is not valid ONNX: {why}.", fix)


def graphs_of(proto: onnx.ModelProto, path: Path) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, the bodies of functions, and all graphs inside them; raises where they lie too deep."""
    pending: list[tuple[onnx.GraphProto | onnx.FunctionProto, int]] = [(proto.graph, 0)]
    pending += [(function, 0) for function in proto.functions]
    while pending:
        graph, depth = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append((attribute.g, depth + 1))
        if depth > _DEEPEST:
            raise invalid(path, f"it holds graphs within graphs, over {_DEEPEST} deep")


def tensors_of(proto: onnx.ModelProto, path: Path) -> Iterator[TensorProto]:
    """All tensors, with the names of those that hang on a Constant."""
    for graph in graphs_of(proto, path):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    if not attribute.t.name and node.output:
                        attribute.t.name = node.output[0]
                    yield attribute.t


def file_inside(folder: Path, location: str, weights: str, path: Path) -> Path:
    """The weight file, which lies in the model's ``folder``, through no link out of it; raises ``ResvitError``."""
    inside = (
        location.isprintable()
        and location not in ("", ".")
        and not os.path.isabs(location)  # noqa: PTH117
        and "\\" not in location
        and ".." not in Path(location).parts
    )
    try:
        inside = inside and (folder / location).resolve().is_relative_to(folder)
        (folder / location).is_file()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a link to itself
        inside = False
    if not inside:
        raise ResvitError(
            f"{path}: the weights {weights} lie outside the model's folder ({location!r}).",
            "Put the model and its weight files into one folder and save it again with onnx.save.",
        )
    return folder / location
