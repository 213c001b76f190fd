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
# Every point reads four pixels, by their positions in all levels together; a pixel that is not in its level counts
# nothing. It is said by a factor of zero and not by a choice, so that what is no number stays so.
_DEFORMABLE = """
 value32 = Cast <to = 1> (value)
 value_view = Constant <value_ints: ints = @value_view> ()
 value4 = Reshape (value32, value_view)
 value_heads = Transpose <perm = [0, 2, 1, 3]> (value4)
 pyramid_view = Constant <value_ints: ints = @pyramid_view> ()
 pyramid = Reshape (value_heads, pyramid_view)
 places32 = Cast <to = 1> (places)
 places_view = Constant <value_ints: ints = @places_view> ()
 places5 = Reshape (places32, places_view)
 places_heads = Transpose <perm = [0, 2, 1, 3, 4]> (places5)
 weights32 = Cast <to = 1> (weights)
 weights_view = Constant <value_ints: ints = @weights_view> ()
 weights4 = Reshape (weights32, weights_view)
 shares = Transpose <perm = [0, 2, 1, 3]> (weights4)
 coordinate = Constant <value_int = 0> ()
 x0 = Gather <axis = -1> (places_heads, coordinate)
 other_coordinate = Constant <value_int = 1> ()
 y0 = Gather <axis = -1> (places_heads, other_coordinate)
 x_factor = Constant <value_floats: floats = @x_factor> ()
 y_factor = Constant <value_floats: floats = @y_factor> ()
 x_shift = Constant <value_floats: floats = @x_shift> ()
 y_shift = Constant <value_floats: floats = @y_shift> ()
 x1 = Mul (x0, x_factor)
 y1 = Mul (y0, y_factor)
 x = Add (x1, x_shift)
 y = Add (y1, y_shift)
 left = Floor (x)
 top = Floor (y)
 to_right = Sub (x, left)
 to_bottom = Sub (y, top)
 one = Constant <value_float = 1.0> ()
 to_left = Sub (one, to_right)
 to_top = Sub (one, to_bottom)
 nought = Constant <value_float = 0.0> ()
 x_last = Constant <value_floats: floats = @x_last> ()
 y_last = Constant <value_floats: floats = @y_last> ()
 x_most = Constant <value_ints: ints = @x_most> ()
 y_most = Constant <value_ints: ints = @y_most> ()
 width = Constant <value_ints: ints = @width> ()
 start = Constant <value_ints: ints = @start> ()
 least = Constant <value_int = 0> ()
 index_view = Constant <value_ints: ints = @index_view> ()
 right = Add (left, one)
 bottom = Add (top, one)
"""
_CORNER = """
 x_before_N = GreaterOrEqual (COLUMN, nought)
 x_behind_N = LessOrEqual (COLUMN, x_last)
 y_before_N = GreaterOrEqual (ROW, nought)
 y_behind_N = LessOrEqual (ROW, y_last)
 x_inside_N = And (x_before_N, x_behind_N)
 y_inside_N = And (y_before_N, y_behind_N)
 inside_N = And (x_inside_N, y_inside_N)
 counts_N = Cast <to = 1> (inside_N)
 area_N = Mul (ACROSS, DOWN)
 weighted_N = Mul (area_N, shares)
 share4_N = Mul (weighted_N, counts_N)
 share_N = Reshape (share4_N, index_view)
 column_N = Cast <to = 7> (COLUMN)
 row_N = Cast <to = 7> (ROW)
 column_low_N = Max (column_N, least)
 column_in_N = Min (column_low_N, x_most)
 row_low_N = Max (row_N, least)
 row_in_N = Min (row_low_N, y_most)
 row_start_N = Mul (row_in_N, width)
 in_level_N = Add (row_start_N, column_in_N)
 position_N = Add (in_level_N, start)
 index_N = Reshape (position_N, index_view)
 pixel_N = GatherND <batch_dims = 1> (pyramid, index_N)
 part_N = Mul (pixel_N, share_N)
"""
_SUMMED = """
 upper = Add (part_0, part_1)
 lower = Add (part_2, part_3)
 points = Add (upper, lower)
 points_view = Constant <value_ints: ints = @points_view> ()
 points4 = Reshape (points, points_view)
 axis = Constant <value_ints = [2]> ()
 summed = ReduceSum <keepdims = 0> (points4, axis)
 summed_view = Constant <value_ints: ints = @summed_view> ()
 summed4 = Reshape (summed, summed_view)
 queries_first = Transpose <perm = [0, 2, 1, 3]> (summed4)
 joined_view = Constant <value_ints: ints = @joined> ()
 joined = Reshape (queries_first, joined_view)
 value_scale = Constant <value_float: float = @value_scale> ()
 result = Mul (joined, value_scale)
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


def _deformable(op_type: str) -> str:
    body = _DEFORMABLE
    for number, (column, row, across, down) in enumerate(
        (
            ("left", "top", "to_left", "to_top"),
            ("right", "top", "to_right", "to_top"),
            ("left", "bottom", "to_left", "to_bottom"),
            ("right", "bottom", "to_right", "to_bottom"),
        )
    ):
        corner = _CORNER.replace("_N", f"_{number}").replace("COLUMN", column).replace("ROW", row)
        body += corner.replace("ACROSS", across).replace("DOWN", down)
    return body + _SUMMED + _end(op_type, "output")


def _end(op_type: str, output: str) -> str:
    return (_QUANTIZED if op_type.endswith("Q") else _NARROW).replace("OUTPUT", output)


_BODIES: Mapping[str, Callable[[str], str]] = {
    "ResvitAttention": _attention,
    "ResvitBridge": _bridge,
    "ResvitDeformable": _deformable,
}


def _own_names(function: onnx.FunctionProto, op_type: str) -> None:
    """Prefix every tensor inside with the op type; inputs and outputs keep their names."""
    outside = {*function.input, *function.output}
    for node in function.node:
        for names in (node.input, node.output):
            names[:] = [name if name in outside or not name else f"{op_type}/{name}" for name in names]
