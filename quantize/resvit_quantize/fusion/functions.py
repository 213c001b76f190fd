"""The plain computation of each node of ours, as a model-local function: what any runtime without the plugin runs.

A body serves every node of its op type, whatever the element types: it casts to FP32, applies the scales, which are
attributes, and rounds where the kernel rounds. Names of tensors in it begin with the op type, since TensorRT before
10.8 confuses equal ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import onnx
import onnx.parser
import onnx_ir as ir

from resvit_engines.plugins.names import DOMAIN, OP_TYPES

_PARTS = """
 first = Constant <value_ints: ints = @first> ()
 whole = Cast <to = 1> (packed)
 viewed = Reshape (whole, first)
 turned = Transpose <perm: ints = @turn> (viewed)
 sizes = Constant <value_ints: ints = @parts> ()
 q32, k32, v32 = Split <axis = -1> (turned, sizes)
 q_view = Constant <value_ints: ints = @q_view> ()
 v_view = Constant <value_ints: ints = @v_view> ()
 q4 = Reshape (q32, q_view)
 k4 = Reshape (k32, q_view)
 v4 = Reshape (v32, v_view)
"""
_SPLIT = """
 q32 = Cast <to = 1> (q)
 k32 = Cast <to = 1> (k)
 v32 = Cast <to = 1> (v)
 q_view = Constant <value_ints: ints = @q_view> ()
 k_view = Constant <value_ints: ints = @k_view> ()
 v_view = Constant <value_ints: ints = @v_view> ()
 q4 = Reshape (q32, q_view)
 k_whole = Reshape (k32, k_view)
 v_whole = Reshape (v32, v_view)
 last = Constant <value_ints = [-1]> ()
 begin = Constant <value_ints = [0]> ()
 k_end = Constant <value_ints: ints = @k_end> ()
 v_start = Constant <value_ints: ints = @v_start> ()
 v_end = Constant <value_ints: ints = @v_end> ()
 k4 = Slice (k_whole, begin, k_end, last)
 v4 = Slice (v_whole, v_start, v_end, last)
"""
_LOGITS = """
 qh = Transpose <perm = [0, 2, 1, 3]> (q4)
 kh = Transpose <perm = [0, 2, 3, 1]> (k4)
 vh = Transpose <perm = [0, 2, 1, 3]> (v4)
 products = MatMul (qh, kh)
 logit_scale = Constant <value_float: float = @logit_scale> ()
 logits0 = Mul (products, logit_scale)
"""
_BIAS = """
 bias32 = Cast <to = 1> (bias)
 logits = Add (logits0, bias32)
"""
_NO_BIAS = """
 logits = Identity (logits0)
"""
# A row that the bias leaves nothing has shares of exactly 0 and a sum that is raised from 0. Shares are rounded as the
# kernel rounds them, though by the row's final maximum where the kernel goes by the one so far.
_SHARES = """
 axis = Constant <value_ints = [-1]> ()
 highest0 = ReduceMax (logits, axis)
 floor = Constant <value_float = -1e30> ()
 highest = Max (highest0, floor)
 less = Sub (logits, highest)
 exact = Exp (less)
 factor = Constant <value_float: float = @share_factor> ()
 magic = Constant <value_float: float = @share_magic> ()
 scaled = Mul (exact, factor)
 raised = Add (scaled, magic)
 stepped = Sub (raised, magic)
 narrow = Cast <to: int = @share_type> (stepped)
 shares = Cast <to = 1> (narrow)
 keep = Constant <value_float: float = @share_exact> ()
 lost = Sub (scaled, shares)
 put_back = Mul (lost, keep)
 summed = Add (shares, put_back)
 total0 = ReduceSum (summed, axis)
 least = Constant <value_float = 1e-30> ()
 total = Max (total0, least)
 mixed = MatMul (shares, vh)
 v_scale = Constant <value_float: float = @v_scale> ()
 unit = Div (v_scale, total)
 weighted = Mul (mixed, unit)
 tokens_first = Transpose <perm = [0, 2, 1, 3]> (weighted)
 joined_view = Constant <value_ints: ints = @joined> ()
 joined = Reshape (tokens_first, joined_view)
 last_turned = Transpose <perm: ints = @last_turn> (joined)
 last_view = Constant <value_ints: ints = @last_view> ()
 result = Reshape (last_turned, last_view)
"""
_BRIDGE = """
 map32 = Cast <to = 1> (image)
 area_view = Constant <value_ints: ints = @area> ()
 flat = Reshape (map32, area_view)
 positions = Transpose <perm = [0, 2, 1]> (flat)
 weight32 = Cast <to = 1> (weight)
 columns = Transpose <perm = [1, 0]> (weight32)
 product0 = MatMul (positions, columns)
 in_scale = Constant <value_float: float = @in_scale> ()
 product1 = Mul (product0, in_scale)
"""
_W8 = """
 product = Mul (product1, weight_scale)
"""
_W16 = """
 product = Identity (product1)
"""
_TOKENS = """
 front = Constant <value_ints: ints = @pads> ()
 padded = Pad (product, front)
 tokens32 = Add (padded, table)
 tokens = Cast <to: int = @token_type> (tokens32)
"""
_NORM = """
 again = Cast <to = 1> (tokens)
 result = LayerNormalization <axis = -1, epsilon: float = @eps> (again, gamma, beta)
"""
_NARROW = """
 OUTPUT = Cast <to: int = @out_type> (result)
"""
_QUANTIZED = """
 scale = Constant <value_float: float = @out_scale> ()
 nothing = Constant <value_float = 0.0> ()
 zero = Cast <to: int = @out_type> (nothing)
 OUTPUT = QuantizeLinear (result, scale, zero)
"""


def function_of(op_type: str, opset: int) -> ir.Function:
    """The function of one op type for models of this opset (20 or newer)."""
    body = next(write for start, write in _BODIES.items() if op_type.startswith(start))(op_type)
    known = OP_TYPES[op_type]
    # ``map`` is a word of the text format.
    inputs = ["image" if name == "map" else name for name in known.inputs]
    attributes = dict.fromkeys(re.findall(r"@(\w+)", body))
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{op_type} <{', '.join(attributes)}> ({', '.join(inputs)}) => ({', '.join(known.outputs)})\n"
        f"{{{body}}}"
    )
    proto = onnx.parser.parse_function(text)
    _own_names(proto, op_type)
    return ir.serde.deserialize_function(proto)


def _attention(op_type: str) -> str:
    suffixes = op_type.removeprefix("ResvitAttention")
    parts = _SPLIT if "Split" in suffixes else _PARTS
    bias = _BIAS if "Bias" in suffixes else _NO_BIAS
    return parts + _LOGITS + bias + _SHARES + _end(op_type, "output")


def _bridge(op_type: str) -> str:
    suffixes = op_type.removeprefix("ResvitBridge")
    body = _BRIDGE + (_W8 if "W8" in suffixes else _W16) + _TOKENS
    if "Norm" in suffixes:
        body += _NORM + _end(op_type, "normalised")
    return body


def _end(op_type: str, output: str) -> str:
    return (_QUANTIZED if op_type.endswith("Q") else _NARROW).replace("OUTPUT", output)


_BODIES: Mapping[str, Callable[[str], str]] = {
    "ResvitAttention": _attention,
    "ResvitBridge": _bridge,
}


def _own_names(function: onnx.FunctionProto, op_type: str) -> None:
    """Prefix every tensor inside with the op type; inputs and outputs keep their names."""
    outside = {*function.input, *function.output}
    for node in function.node:
        for names in (node.input, node.output):
            names[:] = [name if name in outside or not name else f"{op_type}/{name}" for name in names]
