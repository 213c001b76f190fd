"""``GridSample`` in the copy that TensorRT reads: what its versions do wrong, and the way around."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resvit_engines.targets.faults import Pattern, is_rewritten
from resvit_engines.targets.table import Target

if TYPE_CHECKING:
    import onnx_ir as ir

_OLD_WORDS = {"linear": "bilinear", "cubic": "bicubic"}


def rewrite_sampling(network: ir.Model, target: Target) -> int:
    """Say sampling, in place, so that the TensorRT of ``target`` does what ONNX means; returns how much changed.

    Where that TensorRT samples deformable attention wrongly, it reads its pixels by ``GatherND``: the body of our node,
    inlined. Where its parser takes ``linear`` for a mode that it does not know, and samples the nearest, any other
    ``GridSample`` says ``bilinear`` and ``bicubic``, as before opset 20. ONNX Runtime refuses these words. Which
    release does what stands in ``resvit_engines.targets.faults``.
    """
    gathered = _gather(network) if is_rewritten(target, Pattern.DEFORMABLE) else 0
    return gathered + (_spell(network) if is_rewritten(target, Pattern.SAMPLING_WORDS) else 0)


def is_in_new_words(node: ir.Node) -> bool:
    """Whether a node is a GridSample whose mode is called as from opset 20 on."""
    return node.op_type == "GridSample" and not node.domain and _mode(node) in _OLD_WORDS


def _mode(node: ir.Node) -> str:
    return node.attributes.get_string("mode", "linear") or ""


def _gather(network: ir.Model) -> int:
    from onnx_ir.passes import common

    from resvit_quantize.fusion.fuse import fuse, our_nodes
    from resvit_quantize.fusion.match import Kind

    ours = {node.op_type for node in our_nodes(network)}
    report = fuse(network, frozenset({Kind.DEFORMABLE}))
    made = {match.op_type for match in report.matches} - ours
    if report.matches:
        common.InlinePass(criteria=lambda function: function.name in made)(network)
    return len(report.matches)


def _spell(network: ir.Model) -> int:
    import onnx_ir

    count = 0
    for node in network.graph:
        if is_in_new_words(node):
            node.attributes["mode"] = onnx_ir.AttrString("mode", _OLD_WORDS[_mode(node)])
            count += 1
    return count
