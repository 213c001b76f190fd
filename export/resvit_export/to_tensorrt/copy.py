"""What a builder wants of an ONNX: rewritten before it is validated, and the one thing that only a copy can hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resvit_engines.files import atomic_file
from resvit_engines.targets.table import Builder, Target
from resvit_export.to_tensorrt.sampling import rewrite_sampling

if TYPE_CHECKING:
    import onnx_ir as ir

TENSORRT_COPY = "model.tensorrt.onnx"
"""In the compile stage and the bundle: what TensorRT reads, where that is not the validated file itself."""


def suit_builder(model: Path, builder: Builder | None) -> ir.Model | None:
    """Rewrite a quantised ONNX, in place, into the form that ``builder`` does best.

    TensorRT for RTX gets the channel scales of 8-bit convolutions behind the convolution, and GroupNorm written out:
    both are measured there, by the kernels that it lists. The computation is the same but for the rounding of FP16,
    which can move a value to the next 8-bit step: so it comes before validation. Returns the graph that the file now
    holds, ``None`` where nothing changed.
    """
    import onnx_ir

    from resvit_quantize.qdq.rtx_norms import write_out_group_norms
    from resvit_quantize.qdq.rtx_scales import move_channel_scales

    if builder is not Builder.RTX:
        return None
    network = onnx_ir.load(model)
    if not move_channel_scales(network) + write_out_group_norms(network):
        return None
    with atomic_file(model) as partial:
        onnx_ir.save(network, partial)
    return network


def onnx_for_tensorrt(model: Path, out: Path, target: Target | None = None, plugins: str = "off") -> bool:
    """Write the copy that TensorRT reads in place of ``model`` to ``out``; ``False`` where that is ``model`` itself.

    It has ``TRT_decomposable`` on every ``Attention``. Without it TensorRT refuses an ``Attention`` that no fused
    kernel serves (in FP32, or with an odd head size) instead of computing it from smaller kernels. It cannot stand in
    the validated file: ONNX's checker and ONNX Runtime refuse attributes that the operator does not define.

    For a ``target`` of TensorRT's, what its version computes wrongly (``resvit_engines.targets.faults``) is said in
    another way, where there is one: ``GridSample`` (``sampling``), the scale of attention (``scaling``).

    Where ``plugins`` says how kernels of our own reach the engine (``aot`` or ``library``), each node of ours carries
    its kernel, compiled for ``target``.
    """
    import onnx_ir

    network = onnx_ir.load(model)
    changed = _let_attention_decompose(network)
    if target is not None:
        from resvit_export.to_tensorrt.scaling import rewrite_scaling

        changed += rewrite_sampling(network, target) + rewrite_scaling(network, target)
    if plugins != "off":
        from resvit_export.to_tensorrt.plugin_kernels import carry_kernels

        assert target is not None
        changed += carry_kernels(network, target, plugins)
    if changed:
        onnx_ir.save(network, out)
    return bool(changed)


def _let_attention_decompose(network: ir.Model) -> int:
    import onnx_ir

    attentions = [node for node in network.graph if node.op_type == "Attention" and node.domain == ""]
    for node in attentions:
        node.attributes["TRT_decomposable"] = onnx_ir.AttrInt64("TRT_decomposable", 1)
    return len(attentions)
