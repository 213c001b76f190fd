"""Which nodes of an ONNX file are to become plugins, read without the package onnx (see ``run.onnx_wire``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from resvit_engines.errors import ResvitError
from resvit_engines.plugins.names import DOMAIN, OP_TYPES
from resvit_engines.plugins.onnx_wire import records

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 2, 3, 4, 5, 7
_ATTRIBUTE_NAME = 1


class PluginNode(NamedTuple):
    """A node that carries a compiled kernel. ``name`` is its own or, where it has none, its first output's."""

    name: str
    op_type: str


def plugin_nodes(onnx: Path) -> tuple[PluginNode, ...]:
    """The nodes of our domain that carry a kernel, in the file's order. A node without one is built from its body.

    Raises:
        ResvitError: INPUT for what is no ONNX file, and for a node of a kind that this version does not know.
    """
    try:
        graphs = (value for number, _, value in records(onnx.read_bytes()) if number == _MODEL_GRAPH)
        nodes = (
            value
            for graph in graphs
            if isinstance(graph, bytes)
            for number, _, value in records(graph)
            if number == _GRAPH_NODE and isinstance(value, bytes)
        )
        found = tuple(ours for node in nodes if (ours := _ours(node)) is not None)
    except OSError as error:
        raise ResvitError(f"{onnx} cannot be read: {error.strerror}.", "Give the path of an ONNX file.") from error
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise ResvitError(f"{onnx.name} cannot be read as an ONNX file.", "Check that it is complete.") from error
    for node in found:
        if node.op_type not in OP_TYPES:
            raise ResvitError(
                f"The node {node.name!r} is of the kind {node.op_type}, which this version has no plugin for.",
                "Use the version of resvit-export on the device that wrote the file, or write it again.",
            )
    return found


def _ours(node: bytes) -> PluginNode | None:
    texts: dict[int, str] = {}
    carries = False
    for number, _, value in records(node):
        if not isinstance(value, bytes):
            continue
        if number == _NODE_ATTRIBUTE:
            carries = carries or any(n == _ATTRIBUTE_NAME and name == b"kernel_entry" for n, _, name in records(value))
        elif number in (_NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_DOMAIN):
            texts.setdefault(number, value.decode())
    if texts.get(_NODE_DOMAIN) != DOMAIN or not carries:
        return None
    return PluginNode(texts.get(_NODE_NAME) or texts.get(_NODE_OUTPUT, ""), texts.get(_NODE_OP_TYPE, ""))


def counts(nodes: tuple[PluginNode, ...]) -> Mapping[str, int]:
    """How many nodes there are of each op type."""
    return {op: sum(node.op_type == op for node in nodes) for op in dict.fromkeys(node.op_type for node in nodes)}
