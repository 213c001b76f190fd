"""ONNX operators as differentiable torch functions: those that exported vision networks are made of.

A function takes the operator's inputs (``None`` where one is left out) and its attributes, and returns one output
or a tuple of them, by the definitions of ONNX's operator reference from opset 17 on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resvit_quantize.torch_graph.layers import LAYER_OPERATORS
from resvit_quantize.torch_graph.shapes import SHAPE_OPERATORS, Attributes, Inputs, Operator, present

_DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _clip(inputs: Inputs, attributes: Attributes) -> Tensor:
    low, high = present(inputs, 1), present(inputs, 2)
    return inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high)


def _range(inputs: Inputs, attributes: Attributes) -> Tensor:
    start, limit, step = (value.item() for value in inputs)
    count = max(math.ceil((limit - start) / step), 0)
    return start + step * torch.arange(count, dtype=inputs[0].dtype)


def _where(inputs: Inputs, attributes: Attributes) -> Tensor:
    return torch.where(inputs[0], inputs[1], inputs[2])


def _div(inputs: Inputs, attributes: Attributes) -> Tensor:
    whole = not inputs[0].is_floating_point()
    return torch.div(inputs[0], inputs[1], rounding_mode="trunc" if whole else None)


def _global_pool(function: Callable[..., Tensor]) -> Operator:
    return lambda i, a: function(i[0], dim=tuple(range(2, i[0].ndim)), keepdim=True)


def _simple(function: Callable[..., Tensor]) -> Operator:
    return lambda inputs, attributes: function(*inputs)


OPERATORS: dict[str, Operator] = {
    **LAYER_OPERATORS,
    **SHAPE_OPERATORS,
    **{name: _simple(getattr(torch, name.lower())) for name in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log")},
    **{
        name: _simple(getattr(torch, name.lower()))
        for name in ("Neg", "Reciprocal", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Tanh")
    },
    "Add": _simple(torch.add),
    "And": _simple(torch.logical_and),
    "Cast": lambda i, a: i[0].to(_DTYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda i, a: torch.cat(tuple(i), a["axis"]),
    "Div": _div,
    "Dropout": lambda i, a: i[0],
    "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
    "Equal": _simple(torch.eq),
    "Gelu": lambda i, a: F.gelu(i[0], approximate=a.get("approximate", "none")),
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "Greater": _simple(torch.gt),
    "GreaterOrEqual": _simple(torch.ge),
    "HardSigmoid": lambda i, a: torch.clamp(i[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0.0, 1.0),
    "HardSwish": lambda i, a: F.hardswish(i[0]),
    "Identity": lambda i, a: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "Less": _simple(torch.lt),
    "LessOrEqual": _simple(torch.le),
    "LogSoftmax": lambda i, a: F.log_softmax(i[0], a.get("axis", -1)),
    "MatMul": _simple(torch.matmul),
    "Max": lambda i, a: functools.reduce(torch.maximum, i),
    "Min": lambda i, a: functools.reduce(torch.minimum, i),
    "Mish": _simple(F.mish),
    "Mod": lambda i, a: torch.fmod(i[0], i[1]) if a.get("fmod") else torch.remainder(i[0], i[1]),
    "Mul": _simple(torch.mul),
    "Not": _simple(torch.logical_not),
    "Or": _simple(torch.logical_or),
    "PRelu": lambda i, a: torch.where(i[0] < 0, i[0] * i[1], i[0]),
    "Pow": lambda i, a: torch.pow(i[0], i[1].to(i[0].dtype)),
    "Range": _range,
    "Relu": lambda i, a: F.relu(i[0]),
    "Size": lambda i, a: torch.tensor(i[0].numel()),
    "Softmax": lambda i, a: F.softmax(i[0], a.get("axis", -1)),
    "Softplus": lambda i, a: F.softplus(i[0]),
    "Sub": _simple(torch.sub),
    "Sum": lambda i, a: functools.reduce(torch.add, i),
    "Swish": lambda i, a: i[0] * torch.sigmoid(i[0] * a.get("alpha", 1.0)),
    "Transpose": lambda i, a: i[0].permute(a.get("perm") or tuple(range(i[0].ndim))[::-1]),
    "Where": _where,
}
