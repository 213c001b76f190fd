"""``GridSample`` in the copy that TensorRT reads: what its versions do wrong, and the way around."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resvit_engines.targets.software import version_of
from resvit_engines.targets.table import Builder, Target

if TYPE_CHECKING:
    import onnx_ir as ir

_FAULTY = ((10, 14), (11, 1))
"""The first and the last TensorRT known to lose a DETR's detections (NVIDIA/TensorRT 4813)."""
_OLD_WORDS = {"linear": "bilinear", "cubic": "bicubic"}


def rewrite_sampling(network: ir.Model, target: Target) -> int:
    """Say sampling, in place, so that the TensorRT of ``target`` does what ONNX means; returns how much changed.

    Where that TensorRT samples deformable attention wrongly, it reads its pixels by ``GatherND``: the body of our node,
    inlined. Any other ``GridSample`` says ``bilinear`` and ``bicubic``, as before opset 20: TensorRT's parsers up to
    11.1 take ``linear`` for a mode they don't know, and sample the nearest (NVIDIA/TensorRT 4646). ONNX Runtime refuses
    the old words. TensorRT for RTX has neither fault.
    """
    if target.builder is Builder.RTX:
        return 0
    gathered = _gather(network) if _FAULTY[0] <= version_of(target.tensorrt)[:2] <= _FAULTY[1] else 0
    return gathered + _spell(network)


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
        mode = node.attributes.get_string("mode", "linear") if node.op_type == "GridSample" and not node.domain else ""
        if mode in _OLD_WORDS:
            node.attributes["mode"] = onnx_ir.AttrString("mode", _OLD_WORDS[mode])
            count += 1
    return count
