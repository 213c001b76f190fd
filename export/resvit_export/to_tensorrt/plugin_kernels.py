"""The kernel of each node of ours: whether there is one for a target, and its PTX in the file that TensorRT reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resvit_engines.kernels.attention import AttentionConfig, attention_refusal, attention_source
from resvit_engines.kernels.bridge import BridgeConfig, bridge_refusal, bridge_source
from resvit_engines.kernels.deformable import DeformableConfig, deformable_refusal, deformable_source
from resvit_engines.kernels.launch import Kernel, Source
from resvit_engines.plugins.fields import fields_from_kernel
from resvit_engines.targets.table import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from resvit_quantize.fusion.match import Config


_KERNELS: dict[type, tuple[Callable[[Any, int], str | None], Callable[[Any, int], Source]]] = {
    AttentionConfig: (attention_refusal, attention_source),
    BridgeConfig: (bridge_refusal, bridge_source),
    DeformableConfig: (deformable_refusal, deformable_source),
}
"""For each configuration: why a GPU has no such kernel, and the kernel before it is compiled."""


def refusal(config: Config, target: Target) -> str | None:
    """Why there is no kernel with this configuration for the target; None where there is."""
    why_not, _ = _KERNELS[type(config)]
    return why_not(config, target.sm)


def source_of(config: Config, target: Target) -> Source:
    """The kernel, before it is compiled."""
    _, source = _KERNELS[type(config)]
    return source(config, target.sm)


def carry_kernels(network: ir.Model, target: Target, way: str) -> int:
    """Give every node of ours its kernel, compiled for the target, as attributes; returns how many there are.

    For the way ``library`` the functions are taken out: TensorRT up to 10.6 prefers a function to a plugin of the same
    name. For ``aot`` they stay, and an attribute says that the kernel goes into the engine.

    Raises:
        ResvitError: what ``kernel_from_source`` and ``require_fits`` raise.
    """
    from resvit_engines.kernels.compile.compile import kernel_from_source
    from resvit_engines.kernels.compile.resources import require_fits
    from resvit_quantize.fusion.fuse import config_of, our_nodes

    compiled: dict[Config, Kernel] = {}
    count = 0
    for node in our_nodes(network):
        config = config_of(node)
        if config not in compiled:
            kernel = kernel_from_source(source_of(config, target), target.sm, target.ptx)
            require_fits(kernel, target)
            compiled[config] = kernel
        _write(node, {**fields_from_kernel(compiled[config]), **({"aot": 1} if way == "aot" else {})})
        count += 1
    if way == "library":
        network.functions.clear()
    return count


def _write(node: ir.Node, fields: dict[str, str | int | list[int]]) -> None:
    import onnx_ir

    for name, value in fields.items():
        if isinstance(value, str):
            node.attributes[name] = onnx_ir.AttrString(name, value)
        elif isinstance(value, int):
            node.attributes[name] = onnx_ir.AttrInt64(name, value)
        else:
            node.attributes[name] = onnx_ir.AttrInt64s(name, value)
