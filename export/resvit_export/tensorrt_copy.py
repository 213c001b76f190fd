"""The copy of a validated ONNX that TensorRT reads: the same computation, with hints that ONNX itself forbids."""

from __future__ import annotations

from pathlib import Path

TENSORRT_COPY = "model.tensorrt.onnx"
"""In the compile stage and the bundle: what TensorRT reads, where that is not the validated file itself."""


def onnx_for_tensorrt(model: Path, out: Path) -> bool:
    """Write ``model`` to ``out`` with ``TRT_decomposable`` on every ``Attention``; ``False`` where there is none.

    Without that attribute TensorRT refuses an ``Attention`` that no fused kernel serves (in FP32, or with an odd
    head size) instead of computing it from smaller kernels. It cannot stand in the validated file: ONNX's checker
    and ONNX Runtime refuse attributes that the operator does not define.
    """
    import onnx_ir as ir

    graph = ir.load(model)
    attentions = [node for node in graph.graph if node.op_type == "Attention" and node.domain == ""]
    for node in attentions:
        node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    if attentions:
        ir.save(graph, out)
    return bool(attentions)
