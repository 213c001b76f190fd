"""The node that takes the place of an attention block, and what must be put in front of it and behind it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from resvit_engines.kernels.attention import THREE_TENSORS, AttentionConfig
from resvit_engines.kernels.numerics import EIGHT_BIT
from resvit_engines.plugins.names import DOMAIN
from resvit_quantize.fusion.attention import Attention
from resvit_quantize.fusion.layout import Shapes
from resvit_quantize.fusion.match import ONNX_TYPES, Kind, Match
from resvit_quantize.fusion.nodes import named_after, plugin_attributes, take_over
from resvit_quantize.graph.network import add_initializer, constant
from resvit_quantize.graph.regions import AttentionBlock

_SHARES: dict[str, tuple[float, float, bool]] = {
    "fp16": (1.0, 0.0, True),
    "bf16": (1.0, 0.0, True),
    "int8": (127.0, 12582912.0, False),
    "fp8": (256.0, 0.0, False),
}
"""Of each type of the shares: what they are multiplied by, what rounds them, and whether their sum is the exact one."""


def op_type_of(config: AttentionConfig) -> str:
    """The name of the node."""
    parts = (
        ("Split", config.layout in THREE_TENSORS),
        ("Bias", config.bias is not None),
        ("Q", config.out_dtype in EIGHT_BIT),
    )
    return "ResvitAttention" + "".join(name for name, there in parts if there)


def match_of(attention: Attention, shapes: Shapes) -> Match:
    """The block for a report."""
    config = attention.config
    tokens: list[tuple[int, ...]] = [
        (1, config.keys if index else config.queries, shapes[str(value.name)][-1])
        for index, value in enumerate(attention.inputs)
    ]
    if config.area is not None:
        tokens = [(1, config.width, *config.area)]
    if config.bias is not None:
        sizes = (1, config.heads, config.queries)
        tokens.append((*(size if by else 1 for size, by in zip(sizes, config.bias, strict=True)), config.keys))
    return Match(
        Kind.ATTENTION,
        name_of(attention.block),
        op_type_of(config),
        config,
        tuple(tokens),
        tuple(str(node.name) for node in attention.block.nodes),
    )


def rewrite(model: ir.Model, attention: Attention, name: str) -> ir.Node:
    """Put a node of this name in place of the block; nodes that nothing reads any more are left for the caller."""
    config, last = attention.config, attention.before
    builder = Inserter(model, last)
    inputs = [builder.tokens(value, index, attention) for index, value in enumerate(attention.inputs)]
    if attention.bias is not None and config.bias is not None:
        inputs.append(builder.in_four(builder.added(attention.bias, config), config.bias, config))
    node = ir.node(op_type_of(config), inputs, attributes_of(config), domain=DOMAIN, name=name)
    replaced = last.outputs[0]
    node.outputs[0].name, node.outputs[0].type = f"{replaced.name}/attended", replaced.type
    model.graph.insert_before(last, node)
    out = node.outputs[0]
    if attention.end_sequence_first:
        out = builder.transposed(out, str(replaced.name))
    if attention.end_view is not None:
        out = builder.reshaped(out, [-1, *attention.end_view], str(replaced.name))
    take_over(replaced, out)
    return node


class Inserter:
    """Adds nodes in front of ``before``."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model, self.before = model, before

    def tokens(self, value: ir.Value, index: int, attention: Attention) -> ir.Value:
        """An operand as [B, N, channels], where its dimensions are others."""
        config = attention.config
        if attention.sequence_first:
            return self.transposed(value, f"{value.name}/{index}/{self.before.name}")
        if config.layout == "channels" or (value.shape is not None and len(value.shape) == 3):
            return value
        assert value.shape is not None
        tokens = config.queries if index == 0 else config.keys
        return self.reshaped(value, [-1, tokens, value.shape[-1]], f"{value.name}/{index}/{self.before.name}")

    def added(self, value: ir.Value, config: AttentionConfig) -> ir.Value:
        """A bias as it is; of a mask, minus infinity where it is False."""
        if value.dtype != ir.DataType.BOOL:
            return value
        dtype = np.dtype(np.float16) if config.bias_dtype == "fp16" else np.dtype(ml_dtypes.bfloat16)
        name = f"{value.name}/for_attention/{self.before.name}/mask"
        ends = [
            add_initializer(self.model, f"{name}/{side}", np.array(number, dtype))
            for side, number in (("seen", 0.0), ("unseen", -np.inf))
        ]
        out = self.node("Where", [value, *ends], name)
        out.type, out.shape = ir.TensorType(ir.DataType.from_numpy(dtype)), value.shape
        return out

    def in_four(self, value: ir.Value, by: tuple[bool, bool, bool], config: AttentionConfig) -> ir.Value:
        """The bias or mask as [B, H, Nq, Nk], where it has fewer dimensions."""
        if value.shape is not None and len(value.shape) == 4:
            return value
        sizes = (config.heads, config.queries)
        rest = [size if differs else 1 for size, differs in zip(sizes, by[1:], strict=True)]
        shape = [-1 if by[0] else 1, *rest, config.keys]
        array = constant(value)
        name = f"{value.name}/for_attention/{self.before.name}"
        if array is None:
            return self.reshaped(value, shape, name)
        return add_initializer(self.model, name, np.ascontiguousarray(array.reshape(shape)))

    def reshaped(self, value: ir.Value, shape: list[Any], name: str) -> ir.Value:
        """A Reshape; ``shape`` begins with -1 or 1."""
        target = add_initializer(self.model, f"{name}/shape", np.array(shape, np.int64))
        out = self.node("Reshape", [value, target], name)
        out.shape = ir.Shape([None if size == -1 else size for size in shape])
        return out

    def transposed(self, value: ir.Value, name: str) -> ir.Value:
        """[N, B, C] to [B, N, C] and back; for one image it moves nothing."""
        out = self.node("Transpose", [value], f"{name}/turned", {"perm": (1, 0, 2)})
        if value.shape is not None:
            out.shape = ir.Shape([value.shape[axis] for axis in (1, 0, 2)])
        return out

    def quantised(self, value: ir.Value, scale: float, dtype: np.dtype[Any], name: str) -> ir.Value:
        """A QuantizeLinear per tensor."""
        ends = [
            add_initializer(self.model, f"{name}/scale", np.array(scale, np.float16)),
            add_initializer(self.model, f"{name}/zero", np.zeros((), dtype)),
        ]
        out = self.node("QuantizeLinear", [value, *ends], name)
        out.type = ir.TensorType(ir.DataType.from_numpy(dtype))
        return out

    def node(
        self, op_type: str, inputs: list[ir.Value], name: str, attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        """Add a node whose output is of the first input's type and shape; returns that output."""
        node = ir.node(op_type, inputs, attributes or {}, name=f"{name}/{op_type}")
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{name}/{op_type.lower()}", inputs[0].type, inputs[0].shape
        self.model.graph.insert_before(self.before, node)
        return out


def attributes_of(config: AttentionConfig) -> dict[str, Any]:
    """What the function's body reads, beside ``plugin_attributes``."""
    heads, dk, dv = config.heads, config.head_size, config.value_size
    parts, first, turn = (heads * dk, heads * dk, heads * dv), (0, 0, config.width), (0, 1, 2)
    if config.layout == "per_head":
        parts, first, turn = (dk, dk, dv), (0, 0, heads, 2 * dk + dv), (0, 1, 2, 3)  # type: ignore[assignment]
    elif config.layout == "channels":
        first, turn = (0, config.width, -1), (0, 2, 1)
    last_turn, last_view = (0, 1, 2), (0, 0, heads * dv)
    if config.layout == "channels":
        assert config.area is not None
        last_turn, last_view = (0, 2, 1), (0, heads * dv, *config.area)  # type: ignore[assignment]
    factor, magic, exact = _SHARES[config.pv]
    both = dk + dv if config.layout == "q_kv" else 0
    where: dict[str, Any] = {"first": first, "turn": turn, "parts": parts}
    if config.layout in THREE_TENSORS:
        where = {"k_view": (0, 0, heads, both or dk), "k_end": (dk,), "v_start": (both and dk,), "v_end": (both or dv,)}
    return {
        **plugin_attributes(config),
        **where,
        "q_view": (0, 0, heads, dk),
        "v_view": (0, 0, heads, both or dv),
        "logit_scale": config.scale * config.q_scale * config.k_scale,
        "v_scale": config.v_scale,
        "share_type": ONNX_TYPES[config.pv],
        "share_factor": factor,
        "share_magic": magic,
        "share_exact": float(exact),
        "joined": (0, 0, heads * dv),
        "last_turn": last_turn,
        "last_view": last_view,
        "out_type": ONNX_TYPES[config.out_dtype],
        **({"out_scale": config.out_scale} if op_type_of(config).endswith("Q") else {}),
    }


def name_of(block: AttentionBlock) -> str:
    """After the module, which the softmax or the node stands in."""
    node = next((n for n in block.nodes if n.op_type in ("Softmax", "Attention")), block.nodes[0])
    return named_after(node, "ResvitAttention")
