"""The copy of a validated ONNX that TensorRT reads: the same computation, in the form that its compiler does best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.targets import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

TENSORRT_COPY = "model.tensorrt.onnx"
"""In the compile stage and the bundle: what TensorRT reads, where that is not the validated file itself."""


def onnx_for_tensorrt(model: Path, out: Path, builder: Builder | None = None) -> bool:
    """Write what ``builder`` reads in place of ``model`` to ``out``; ``False`` where that is ``model`` itself.

    For every TensorRT: ``TRT_decomposable`` on every ``Attention``. Without it TensorRT refuses an ``Attention`` that
    no fused kernel serves (in FP32, or with an odd head size) instead of computing it from smaller kernels. It cannot
    stand in the validated file: ONNX's checker and ONNX Runtime refuse attributes that the operator does not define.

    For TensorRT for RTX also: channel scales of 8-bit convolutions behind the convolution, and GroupNorm written out.
    Both are measured there, by the kernels that it lists; TensorRT itself gets them as they are in the model.
    """
    import onnx_ir

    from resvit_quantize.norms import write_out_group_norms
    from resvit_quantize.scales import move_channel_scales

    network = onnx_ir.load(model)
    changed = _let_attention_decompose(network)
    if builder is Builder.RTX:
        changed += move_channel_scales(network)
        changed += write_out_group_norms(network)
    if changed:
        onnx_ir.save(network, out)
    return bool(changed)


def _let_attention_decompose(network: ir.Model) -> int:
    import onnx_ir

    attentions = [node for node in network.graph if node.op_type == "Attention" and node.domain == ""]
    for node in attentions:
        node.attributes["TRT_decomposable"] = onnx_ir.AttrInt64("TRT_decomposable", 1)
    return len(attentions)
