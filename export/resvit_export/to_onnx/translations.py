"""How attention, GroupNorm, unfold and fold become ONNX: without any arithmetic on shapes.

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


def translations(program: ExportedProgram, opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to translate in our own way: nothing that the opset has an operator for, or that shapes forbid."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    attention = aten.scaled_dot_product_attention.default
    attends = _nodes(program, attention)
    if opset < _OWN_ATTENTION_OPSET and all(map(_is_plain, attends)):
        table[attention] = _attention
    elif opset >= _OWN_ATTENTION_OPSET and not all(map(_has_operator, attends)) and all(map(_is_plain, attends)):
        table[attention] = _attention_or_operator
    norm = aten.group_norm.default
    if all(_has_fixed_channels(node) for node in _nodes(program, norm)):
        table[norm] = _group_norm
    if all(_has_fixed_channels(node) for node in _nodes(program, aten.im2col.default)):
        table[aten.im2col.default] = _unfold
    if all(_has_fixed_maps(node) for node in _nodes(program, aten.col2im.default)):
        table[aten.col2im.default] = _fold
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
    """softmax(Q K^T * scale + mask) V on [..., tokens, head size] (Vaswani et al. 2017), leading axes broadcast.

    The scale goes on Q alone, before the product: in FP16 the logits then stay in range. Keys and values of one head
    serve all heads of the queries (Shazeer 2019, "Fast Transformer Decoding").
    """
    del dropout_p, enable_gqa
    from onnxscript import opset20 as op

    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scaled = op.Mul(query, op.Constant(value_float=factor))
    rank = len(key.shape)
    logits = op.MatMul(scaled, op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2]))  # [..., tokens, tokens]
    if is_causal:
        allowed = np.tri(int(query.shape[-2]), int(key.shape[-2]), dtype=np.bool_)
        logits = op.Where(op.Constant(value=_tensor(allowed)), logits, op.Constant(value_float=-math.inf))
    elif attn_mask is not None and attn_mask.dtype.name == "BOOL":
        logits = op.Where(attn_mask, logits, op.Constant(value_float=-math.inf))
    elif attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _attention_or_operator(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The same as the operator ``Attention`` where ONNX defines that for such shapes."""
    from onnxscript import opset23 as op

    if not _fits_operator(query.shape, key.shape, value.shape, causal=is_causal, masked=attn_mask is not None):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))[0]


def _group_norm(
    input: Any,  # noqa: A002 - the operator's own name for it
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """GroupNorm (Wu and He 2018) as InstanceNormalization over [B, groups, C / groups * H * W].

    At every opset: ONNX defines GroupNormalization's variance as E[x^2] - E[x]^2, and so ONNX Runtime computes it. Of a
    black image rounding makes that less than minus epsilon, and its root NaN.
    """
    del cudnn_enabled
    from onnxscript import opset20 as op

    channels, maps = int(input.shape[1]), _fixed(input.shape[2:])
    grouped = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    ones, zeros = [1.0] * num_groups, [0.0] * num_groups
    normal = op.InstanceNormalization(
        grouped, op.Constant(value_floats=ones), op.Constant(value_floats=zeros), epsilon=eps
    )
    whole = op.Shape(input) if maps is None else op.Constant(value_ints=[0, channels, *maps])
    result = op.Reshape(normal, whole)
    per_channel = op.Constant(value_ints=[channels] + [1] * len(input.shape[2:]))
    if weight is not None:
        result = op.Mul(result, op.Reshape(weight, per_channel))
    if bias is not None:
        result = op.Add(result, op.Reshape(bias, per_channel))
    return result


def _unfold(input: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:  # noqa: A002
    """Patches [B, C, H, W] to [B, C * kh * kw, positions]: by shape alone, or as a convolution with ones and zeros."""
    from onnxscript import opset20 as op

    kernel, steps = _pair(kernel_size), _pair(stride)
    channels, maps = int(input.shape[1]), _fixed(input.shape[2:])
    if maps is not None and _is_tiling(kernel, steps, _pair(dilation), _pair(padding), (maps[0], maps[1])):
        rows, columns = maps[0] // kernel[0], maps[1] // kernel[1]
        tiles = op.Reshape(input, op.Constant(value_ints=[0, channels, rows, kernel[0], columns, kernel[1]]))
        patches = op.Transpose(tiles, perm=[0, 1, 3, 5, 2, 4])
        return op.Reshape(patches, op.Constant(value_ints=[0, channels * kernel[0] * kernel[1], rows * columns]))
    pads = [*_pair(padding), *_pair(padding)]
    maps = op.Conv(
        input,
        op.Constant(value=_tensor(_one_hot(channels, kernel))),
        dilations=_pair(dilation),
        group=channels,
        kernel_shape=kernel,
        pads=pads,
        strides=steps,
    )
    return op.Reshape(maps, op.Constant(value_ints=[0, channels * kernel[0] * kernel[1], -1]))


def _fold(input: Any, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:  # noqa: A002
    """Patches [B, C * kh * kw, positions] added up to [B, C, H, W]: TensorRT has no Col2Im."""
    from onnxscript import opset20 as op

    kernel, steps, spread, edge = _pair(kernel_size), _pair(stride), _pair(dilation), _pair(padding)
    height, width = _pair(output_size)
    channels = int(input.shape[1]) // (kernel[0] * kernel[1])
    if _is_tiling(kernel, steps, spread, edge, (height, width)):
        rows, columns = height // kernel[0], width // kernel[1]
        patches = op.Reshape(input, op.Constant(value_ints=[0, channels, kernel[0], kernel[1], rows, columns]))
        tiles = op.Transpose(patches, perm=[0, 1, 4, 2, 5, 3])
        return op.Reshape(tiles, op.Constant(value_ints=[0, channels, height, width]))
    spans = [spread[axis] * (kernel[axis] - 1) for axis in (0, 1)]
    rows, columns = (
        (size + 2 * edge[axis] - spans[axis] - 1) // steps[axis] + 1 for axis, size in enumerate((height, width))
    )
    maps = op.Reshape(input, op.Constant(value_ints=[0, channels * kernel[0] * kernel[1], rows, columns]))
    beyond = [
        size + 2 * edge[axis] - spans[axis] - 1 - (count - 1) * steps[axis]
        for axis, (size, count) in enumerate(((height, rows), (width, columns)))
    ]
    return op.ConvTranspose(
        maps,
        op.Constant(value=_tensor(_one_hot(channels, kernel))),
        dilations=spread,
        group=channels,
        kernel_shape=kernel,
        output_padding=beyond,
        pads=[*edge, *edge],
        strides=steps,
    )


def _is_tiling(kernel: list[int], steps: list[int], spread: list[int], edge: list[int], size: tuple[int, int]) -> bool:
    """Whether patches lie side by side and cover the image: then they are a matter of shape."""
    whole = all(length % step == 0 for length, step in zip(size, kernel, strict=True))
    return kernel == steps and spread == [1, 1] and edge == [0, 0] and whole


def _one_hot(channels: int, kernel: list[int]) -> np.ndarray[Any, Any]:
    """Weights [C * kh * kw, 1, kh, kw] that take one value of a window each."""
    count = kernel[0] * kernel[1]
    return np.tile(np.eye(count, dtype=np.float32).reshape(count, 1, *kernel), (channels, 1, 1, 1))


def _fixed(sizes: Any) -> list[int] | None:
    """The sizes as numbers; None where one of them is free, as of an image that may have several."""
    return [int(size) for size in sizes] if all(isinstance(size, int) for size in sizes) else None


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(size) for size in value]


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(array)


def _nodes(program: ExportedProgram, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def _is_plain(node: fx.Node) -> bool:
    """Known head sizes and numbers of heads, which are equal or one; known numbers of tokens where it is causal."""
    shapes = _shapes(node)
    rank = len(shapes[0])
    if rank < 3 or any(len(shape) != rank for shape in shapes):
        return False
    known = [-1, *([-2] if _is_causal(node) else []), *([-3] if rank > 3 else [])]
    fixed = all(isinstance(shape[axis], int) for shape in shapes for axis in known)
    heads = [shape[-3] if rank > 3 else 1 for shape in shapes]
    return fixed and heads[1] == heads[2] and heads[1] in (1, heads[0])


def _has_operator(node: fx.Node) -> bool:
    """Whether ONNX's ``Attention`` is defined for a node's shapes."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    grouped = bool(node.kwargs.get("enable_gqa", False))
    return grouped or _fits_operator(*_shapes(node), causal=_is_causal(node), masked=mask is not None)


def _fits_operator(query: Any, key: Any, value: Any, *, causal: bool, masked: bool) -> bool:
    """Rank 4, and as many heads of keys and values as of queries; not both a mask and the causal one."""
    return len(query) == len(key) == len(value) == 4 and query[1] == key[1] == value[1] and not (causal and masked)


def _shapes(node: fx.Node) -> list[Any]:
    return [each.meta["val"].shape for each in node.args[:3] if isinstance(each, fx.Node)]


def _is_causal(node: fx.Node) -> bool:
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def _has_fixed_channels(node: fx.Node) -> bool:
    value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
    return value is not None and isinstance(value.shape[1], int)


def _has_fixed_maps(node: fx.Node) -> bool:
    value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
    return value is not None and all(isinstance(size, int) for size in value.shape[1:])
