"""Users' glob patterns on node names, module paths and op types."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from resvit_engines.errors import ResvitError
from resvit_quantize.graph.network import module_of


def nodes_matching(patterns: Iterable[str], nodes: Sequence[ir.Node], option: str) -> set[ir.Node]:
    """All ``nodes`` that match a pattern by name, op type, or module path (or a module that holds them).

    Raises :class:`ResvitError` for a pattern that matches nothing, with the names nearest to it.
    """
    found: set[ir.Node] = set()
    for pattern in patterns:
        matching = [node for node in nodes if node_matches(node, pattern)]
        if not matching:
            raise ResvitError(
                f"{option} '{pattern}' matches no node that could be quantised.", _suggestion(pattern, nodes)
            )
        found.update(matching)
    return found


def node_matches(node: ir.Node, pattern: str) -> bool:
    """Whether a pattern means this node."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in _names(node))


def _names(node: ir.Node) -> list[str]:
    parts = module_of(node).split(".")
    modules = [".".join(parts[: end + 1]) for end in range(len(parts)) if parts[0]]
    return [str(node.name), node.op_type, *modules]


def _suggestion(pattern: str, nodes: Sequence[ir.Node]) -> str:
    known = list(dict.fromkeys(name for node in nodes for name in _names(node)))
    near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.4) or known[:4]
    listed = ", ".join(f"'{name}'" for name in near)
    return f"Nearest names: {listed}. Patterns match whole names; * stands for any characters."
