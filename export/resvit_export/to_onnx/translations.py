"""How attention and GroupNorm become ONNX below opset 23: without any arithmetic on shapes.

The exporter's own translations read head and channel counts from the tensors while the network runs (Shape,
Slice, Concat). In an exported program these are known, so they are written as constants here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten
_OWN_ATTENTION_OPSET = 23
_OWN_GROUP_NORM_OPSET = 21


def translations(program: ExportedProgram, opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to translate in our own way: nothing that the opset has an operator for, or that shapes forbid."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    attention = aten.scaled_dot_product_attention.default
    if opset < _OWN_ATTENTION_OPSET and all(_is_plain(node) for node in _nodes(program, attention)):
        table[attention] = _attention
    norm = aten.group_norm.default
    if opset < _OWN_GROUP_NORM_OPSET and all(_has_fixed_maps(node) for node in _nodes(program, norm)):
        table[norm] = _group_norm
    return table


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(Q K^T * scale + mask) V on [B, heads, tokens, head size] (Vaswani et al. 2017).

    The scale goes on Q alone, before the product: in FP16 the logits then stay in range.
    """
    del dropout_p, enable_gqa
    from onnxscript import opset20 as op

    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scaled = op.Mul(query, op.Constant(value_float=factor))
    logits = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))  # [B, heads, tokens, tokens]
    if is_causal:
        allowed = np.tri(int(query.shape[-2]), int(key.shape[-2]), dtype=np.bool_)
        logits = op.Where(op.Constant(value=_tensor(allowed)), logits, op.Constant(value_float=-math.inf))
    elif attn_mask is not None and attn_mask.dtype.name == "BOOL":
        logits = op.Where(attn_mask, logits, op.Constant(value_float=-math.inf))
    elif attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _group_norm(
    input: Any,  # noqa: A002 - the operator's own name for it
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """GroupNorm (Wu and He 2018) as InstanceNormalization over [B, groups, C / groups * H * W]."""
    del cudnn_enabled
    from onnxscript import opset20 as op

    channels, *maps = (int(size) for size in input.shape[1:])
    grouped = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    ones, zeros = [1.0] * num_groups, [0.0] * num_groups
    normal = op.InstanceNormalization(
        grouped, op.Constant(value_floats=ones), op.Constant(value_floats=zeros), epsilon=eps
    )
    result = op.Reshape(normal, op.Constant(value_ints=[0, channels, *maps]))
    per_channel = op.Constant(value_ints=[channels] + [1] * len(maps))
    if weight is not None:
        result = op.Mul(result, op.Reshape(weight, per_channel))
    if bias is not None:
        result = op.Add(result, op.Reshape(bias, per_channel))
    return result


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(array)


def _nodes(program: ExportedProgram, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def _is_plain(node: fx.Node) -> bool:
    """Rank 4, fixed sizes but for the batch, and as many key as query heads."""
    tensors = [node.args[0], node.args[1]]
    shapes = [n.meta["val"].shape for n in tensors if isinstance(n, fx.Node)]
    fixed = all(len(shape) == 4 and all(isinstance(size, int) for size in shape[1:]) for shape in shapes)
    return fixed and shapes[0][1] == shapes[1][1]


def _has_fixed_maps(node: fx.Node) -> bool:
    value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
    return value is not None and all(isinstance(size, int) for size in value.shape[1:])
