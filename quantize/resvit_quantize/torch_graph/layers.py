"""ONNX operators with weights, windows or statistics, as differentiable torch functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_quantize.torch_graph.shapes import Attributes, Inputs, Operator, present


def pads_of(attributes: Attributes, size: Sequence[int], kernel: Sequence[int], *, ceil: bool = False) -> list[int]:
    """ONNX's begins and ends (``auto_pad`` resolved) as torch's last-dimension-first pairs."""
    count = len(kernel)
    strides = attributes.get("strides") or [1] * count
    dilations = attributes.get("dilations") or [1] * count
    begins = list(attributes.get("pads") or [0] * 2 * count)
    auto = attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begins = [0] * 2 * count
        for axis in range(count):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max((-(-size[axis] // strides[axis]) - 1) * strides[axis] + reach - size[axis], 0)
            small, large = total // 2, total - total // 2
            begins[axis], begins[axis + count] = (small, large) if auto == "SAME_UPPER" else (large, small)
    if ceil:
        for axis in range(count):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            room = size[axis] + begins[axis] + begins[axis + count] - reach
            steps = -(-room // strides[axis])
            # A last window must begin inside the image or the padding in front of it.
            if steps * strides[axis] >= size[axis] + begins[axis]:
                steps -= 1
            begins[axis + count] += max(steps * strides[axis] - room, 0)
    return [pad for axis in reversed(range(count)) for pad in (begins[axis], begins[axis + count])]


def _conv(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, weight = inputs[:2]
    count = weight.ndim - 2
    pads = pads_of(attributes, x.shape[2:], weight.shape[2:])
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[count]
    stride, dilation = attributes.get("strides") or [1] * count, attributes.get("dilations") or [1] * count
    groups = attributes.get("group", 1)
    if pads[0::2] == pads[1::2]:
        padding = pads[0::2][::-1]
        result: Tensor = function(x, weight, present(inputs, 2), stride, padding, dilation, groups)
    else:
        result = function(F.pad(x, pads), weight, present(inputs, 2), stride, 0, dilation, groups)
    return result


def _conv_transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, weight = inputs[:2]
    count, size, kernel = weight.ndim - 2, x.shape[2:], weight.shape[2:]
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[count]
    stride, dilation = attributes.get("strides") or [1] * count, attributes.get("dilations") or [1] * count
    extra = attributes.get("output_padding") or [0] * count
    pads = list(attributes.get("pads") or [0] * 2 * count)
    auto, wanted = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size[axis] * stride[axis] for axis in range(count)]
    if wanted is not None:
        for axis in range(count):
            whole = stride[axis] * (size[axis] - 1) + extra[axis] + (kernel[axis] - 1) * dilation[axis] + 1
            total = max(whole - wanted[axis], 0)
            small, large = total // 2, total - total // 2
            pads[axis], pads[axis + count] = (small, large) if auto == "SAME_UPPER" else (large, small)
    groups = attributes.get("group", 1)
    begins, ends = pads[:count], pads[count:]
    if begins == ends:
        padded: Tensor = function(x, weight, present(inputs, 2), stride, begins, extra, groups, dilation)
        return padded
    result: Tensor = function(x, weight, present(inputs, 2), stride, 0, extra, groups, dilation)
    return F.pad(result, [-cut for axis in reversed(range(count)) for cut in (begins[axis], ends[axis])])


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    a = inputs[0].mT if attributes.get("transA") else inputs[0]
    b = inputs[1].mT if attributes.get("transB") else inputs[1]
    product: Tensor = a @ b * attributes.get("alpha", 1.0)
    bias = present(inputs, 2)
    return product if bias is None else product + bias * attributes.get("beta", 1.0)


def _attention(inputs: Inputs, attributes: Attributes) -> Tensor:
    q, k, v = inputs[:3]
    if len(inputs) > 4 and any(value is not None for value in inputs[4:]):
        raise NotImplementedError("Attention with a key-value cache")
    if attributes.get("softcap"):
        raise NotImplementedError("Attention with softcap")
    heads = attributes.get("q_num_heads", 1), attributes.get("kv_num_heads", 1)
    flat = q.ndim == 3
    if flat:
        q, k, v = (
            value.reshape(*value.shape[:2], count, -1).transpose(1, 2)
            for value, count in ((q, heads[0]), (k, heads[1]), (v, heads[1]))
        )
    mask = present(inputs, 3)
    causal = bool(attributes.get("is_causal", 0))
    if causal and mask is not None:  # which PyTorch takes one at a time
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        mask = mask & ~future if mask.dtype == torch.bool else mask.masked_fill(future, -math.inf)
    result = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=attributes.get("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return result.transpose(1, 2).flatten(2) if flat else result


def _batch_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes.get("training_mode"):
        raise NotImplementedError("BatchNormalization in training mode")
    x, scale, bias, mean, variance = inputs
    return F.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _layer_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, scale = inputs[:2]
    axis = attributes.get("axis", -1) % x.ndim
    shape = x.shape[axis:]
    bias = present(inputs, 2)
    normal = F.layer_norm(x, shape, eps=attributes.get("epsilon", 1e-5)) * scale
    return normal if bias is None else normal + bias


def _group_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, scale, bias = inputs
    groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)
    if scale.shape[0] != x.shape[1]:  # opset 18: one scale per group
        scale, bias = (value.repeat_interleave(x.shape[1] // groups) for value in (scale, bias))
    return F.group_norm(x, groups, scale, bias, epsilon)


def _instance_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, scale, bias = inputs
    return F.group_norm(x, x.shape[1], scale, bias, attributes.get("epsilon", 1e-5))


def _rms_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, scale = inputs
    return F.rms_norm(x, x.shape[attributes.get("axis", -1) % x.ndim :], eps=attributes.get("epsilon", 1e-5)) * scale


def _max_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, kernel = inputs[0], attributes["kernel_shape"]
    pads = pads_of(attributes, x.shape[2:], kernel, ceil=bool(attributes.get("ceil_mode")))
    padded = F.pad(x, pads, value=-math.inf) if any(pads) else x
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    strides, dilations = attributes.get("strides") or [1] * len(kernel), attributes.get("dilations") or 1
    result: Tensor = function(padded, kernel, strides, 0, dilations)
    return result


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, kernel = inputs[0], attributes["kernel_shape"]
    if attributes.get("dilations") and set(attributes["dilations"]) != {1}:
        raise NotImplementedError("AveragePool with dilations")
    pads = pads_of(attributes, x.shape[2:], kernel, ceil=bool(attributes.get("ceil_mode")))
    strides = attributes.get("strides") or [1] * len(kernel)
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    sums: Tensor = function(F.pad(x, pads), kernel, strides)
    if not any(pads):
        return sums
    # Windows of the last row or column may reach beyond the padding in ceil mode: those cells never count.
    counted = torch.ones_like(x[:1, :1])
    if attributes.get("count_include_pad"):
        own = pads_of(attributes, x.shape[2:], kernel)
        counted = F.pad(counted, own, value=1.0)
        pads = [whole - part for whole, part in zip(pads, own, strict=True)]
    return sums / function(F.pad(counted, pads), kernel, strides)


LAYER_OPERATORS: dict[str, Operator] = {
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_norm,
}
