"""What every node of ours has: its name, its attributes, and how it takes the place of what was there."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import onnx_ir as ir

from resvit_engines.plugins.names import NAMESPACE, VERSION
from resvit_quantize.fusion.match import Config


def named_after(node: ir.Node, kind: str) -> str:
    """The module of ``node``, and what stands there now."""
    return f"{str(node.name).rpartition('/')[0] or node.name}/{kind}"


def plugin_attributes(config: Config) -> dict[str, Any]:
    """The names by which TensorRT finds the plugin, and the configuration as JSON."""
    plain = json.dumps(dataclasses.asdict(config))
    return {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "config": plain}


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give ``new`` the name, type and shape of ``old``, and all that reads it."""
    name = str(old.name)
    new.shape, new.type = old.shape, old.type
    old.name, new.name = f"{name}/before_fusion", name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
