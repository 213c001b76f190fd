"""Proof that our nodes became plugin layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.plugins.nodes import PluginNode


def require_plugin_layers(trt: Any, network: Any, nodes: Sequence[PluginNode]) -> tuple[str, ...]:
    """The names of the layers that are plugins, if all ``nodes`` became such.

    Where a plugin is missing, TensorRT builds the plain body of a node instead and says nothing.

    Raises:
        ResvitError: BUILD with the names of nodes that did not.
    """
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.PLUGIN_V3:
            found.append(str(layer.name))
    if len(found) < len(nodes):
        absent = [node for node in nodes if node.name not in found] or list(nodes)
        shown = ", ".join(f"{node.name!r} ({node.op_type})" for node in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ResvitError(
            f"Only {len(found)} of {len(nodes)} nodes became plugins in TensorRT {trt.__version__}; these did not: "
            f"{shown}{more}.",
            "Check that the file was written for this version of TensorRT, or build it without plugins "
            "(--plugins off); a 10.3 to 10.8 needs the plugin library.",
            ExitCode.BUILD,
        )
    return tuple(found)
