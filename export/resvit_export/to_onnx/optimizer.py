"""Fewer nodes, and the same answers to rounding for every input: zeros, extremes, NaN and infinity among them.

The library's own selection of rules is not that. Its "x + 0" matches every constant up to 1e-8, which drops the
epsilon of a divisor; its "x * 1" matches within 1e-5; Min, Max and Clip are merged without regard for NaN; a ScatterND
that adds is taken for one that replaces; two unequal halves become one Split. So only rules that move data are taken
from it, and what computes is written here, or evaluated by ONNX Runtime (``constant_islands``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from resvit_export.to_onnx.constant_islands import fold_islands
from resvit_export.to_onnx.einsums import spell_out_einsums

Pass = Callable[[ir.Model], object]
"""Rewrites a model in place."""

_SAME_SIZE = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast"})
_MOVES = _SAME_SIZE | {"Concat", "Expand", "Flatten", "Gather", "Identity", "Range", "Shape", "Size", "Slice"}
_COUNTS = frozenset({"Add", "And", "Equal", "Greater", "Less", "Max", "Min", "Mul", "Neg", "Not", "Or", "Sub", "Where"})
"""What the library's evaluator may compute of integers: sizes and indices."""
_CONVOLUTIONS = ("Conv", "ConvTranspose", "Gemm")


def passes() -> tuple[Pass, ...]:
    """The passes in order, each exact by itself: see ``tests/test_exact_passes.py``, which takes them from here."""
    return (
        common.InlinePass(),
        *(simplify, spell_out_einsums, simplify, fold_islands, simplify),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )


def simplify(model: ir.Model) -> None:
    """Fold what moves constants or counts sizes, drop what does nothing, merge moves of data; until nothing changes."""
    from onnxscript.optimizer._constant_folding import (
        DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
        FoldConstantsPass,
    )
    from onnxscript.rewriter import RewritePass

    fold = FoldConstantsPass(
        shape_inference=True,
        input_size_limit=DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        output_size_limit=DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
        should_fold=_may_fold,
    )
    ir.passes.PassManager(
        [
            fold,
            _InPlace(drop_no_ops),
            _InPlace(replace_whole_scatters),
            _InPlace(write_out_auto_pads),
            RewritePass(_data_movements()),
            _InPlace(fold_batch_norms),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
        ],
        steps=2,
        early_stop=True,
    )(model)


def drop_no_ops(model: ir.Model) -> int:
    """Take out x * 1, x / 1, x - 0 and x + -0, and of integers x + 0, for these very constants; returns how many.

    Of floats, x + 0 stays: it turns -0 into 0, and the infinity that a division makes of it with it.
    """
    count = 0
    for node in list(model.graph):
        kept = None if node.domain else _only_operand(node)
        result = node.outputs[0]
        same = kept is not None and kept.shape is not None and kept.shape == result.shape and kept.dtype == result.dtype
        if not same or kept is None or result.is_graph_output():
            continue
        result.replace_all_uses_with(kept)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def replace_whole_scatters(model: ir.Model) -> int:
    """Take out every ScatterND that replaces all rows of its data in order; returns how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "ScatterND" or node.domain or node.attributes.get_string("reduction", "none") != "none":
            continue
        data, indices, updates = node.inputs[:3]
        rows = _constant(indices)
        if data is None or updates is None or rows is None or data.shape is None or updates.shape is None:
            continue
        known = all(isinstance(size, int) for size in data.shape) and data.shape == updates.shape
        if not known or not np.array_equal(rows, np.arange(int(str(data.shape[0])))[:, None]):
            continue
        if node.outputs[0].is_graph_output():
            continue
        node.outputs[0].replace_all_uses_with(updates)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def write_out_auto_pads(model: ir.Model) -> int:
    """Say the padding of every Conv of known size in numbers, dilation counted; returns how many."""
    count = 0
    for node in model.graph:
        kind = node.attributes.get_string("auto_pad", "NOTSET") if node.op_type == "Conv" and not node.domain else ""
        source, weight = node.inputs[:2] if kind else (None, None)
        if kind not in ("VALID", "SAME_UPPER", "SAME_LOWER") or source is None or weight is None:
            continue
        if source.shape is None or weight.shape is None:
            continue
        sizes, kernel = list(source.shape)[2:], list(weight.shape)[2:]
        axes = len(kernel)
        strides = node.attributes.get_ints("strides", [1] * axes)
        dilations = node.attributes.get_ints("dilations", [1] * axes)
        before, after = [0] * axes, [0] * axes
        if kind != "VALID":
            if not all(isinstance(size, int) for size in (*sizes, *kernel)):
                continue
            for axis in range(axes):
                size, stride = int(str(sizes[axis])), strides[axis]
                reach = (int(str(kernel[axis])) - 1) * dilations[axis] + 1
                total = max((-(-size // stride) - 1) * stride + reach - size, 0)
                small, large = total // 2, total - total // 2
                before[axis], after[axis] = (small, large) if kind == "SAME_UPPER" else (large, small)
        node.attributes["auto_pad"] = ir.AttrString("auto_pad", "NOTSET")
        node.attributes["pads"] = ir.AttrInt64s("pads", [*before, *after])
        count += 1
    return count


def fold_batch_norms(model: ir.Model) -> int:
    """Scale the weights of a Conv, ConvTranspose or Gemm by the BatchNormalization behind it; returns how many.

    Computed in float64 and rounded once. Only statistics that were trained are folded, factors that are finite, and
    weights that nothing else reads.
    """
    count = 0
    for norm in list(model.graph):
        if norm.op_type == "BatchNormalization" and not norm.domain and _fold_batch_norm(model.graph, norm):
            count += 1
    return count


class _InPlace(ir.passes.InPlacePass):
    """A function that counts its rewrites, as one of the library's passes."""

    def __init__(self, rewrite: Callable[[ir.Model], int]) -> None:
        super().__init__()
        self.rewrite = rewrite

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite, and say whether anything changed."""
        return ir.passes.PassResult(model, bool(self.rewrite(model)))


def _data_movements() -> list[object]:
    """The library's rules that move data, and compute nothing."""
    from onnxscript.rewriter.rules import common as rules

    return [
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.fuse_pad_into_conv_rule,
    ]


def _may_fold(node: ir.Node) -> bool | None:
    """Whether the library's evaluator may compute a node; None where its limits of size decide."""
    if node.domain:
        return False
    if node.op_type in _SAME_SIZE:
        # Transposed weights of any size are folded; what grows (an expanded token) keeps the library's limits.
        return True
    counts = node.op_type in _COUNTS and all(
        value is None or value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
        for value in node.inputs
    )
    return None if node.op_type in _MOVES or counts else False


def _only_operand(node: ir.Node) -> ir.Value | None:
    """What a node returns as it is, None where it computes."""
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if _is_neutral(node.op_type, second):
        return first
    return second if node.op_type in ("Add", "Mul") and _is_neutral(node.op_type, first) else None


def _is_neutral(operator: str, value: ir.Value | None) -> bool:
    array = _constant(value)
    if array is None or not array.size or array.dtype.kind not in "fiu":
        return False
    if operator in ("Mul", "Div"):
        return bool((array == 1).all())
    signed = np.signbit(array) if array.dtype.kind == "f" else np.full(array.shape, operator == "Add")
    return bool((array == 0).all() and (signed == (operator == "Add")).all())


def _fold_batch_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    source = norm.inputs[0]
    layer = source.producer() if source is not None else None
    if layer is None or layer.op_type not in _CONVOLUTIONS or layer.domain or source is None:
        return False
    alone = len(list(source.uses())) == 1 and not source.is_graph_output()
    others = any(list(value.uses()) or value.is_graph_output() for value in norm.outputs[1:])
    if not alone or others or norm.attributes.get_int("training_mode", 0) != 0:
        return False
    parameters = [_constant(value) for value in norm.inputs[1:]]
    weight, bias = _constant(layer.inputs[1]), _constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    if weight is None or any(array is None for array in parameters):
        return False
    if len(layer.inputs) > 2 and layer.inputs[2] is not None and bias is None:
        return False
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        old = np.zeros_like(mean) if bias is None else bias.astype(np.float64)
        if layer.op_type == "Gemm":
            old = old * layer.attributes.get_float("beta", 1.0)
        new_weight = (weight * _along_outputs(layer, weight, scale)).astype(weight.dtype)
        new_bias = ((old - mean) * scale + beta).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return False
    name = str(norm.outputs[0].name)
    layer.replace_input_with(1, _weight(graph, layer.inputs[1], f"{name}/weight", new_weight))
    new = _weight(graph, layer.inputs[2] if len(layer.inputs) > 2 else None, f"{name}/bias", new_bias)
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, new)
    layer.attributes.pop("beta", None)
    layer.outputs[0].shape = norm.outputs[0].shape
    norm.outputs[0].replace_all_uses_with(layer.outputs[0], replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    layer.outputs[0].name = name
    return True


def _along_outputs(layer: ir.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``scale`` [outputs] in a shape that multiplies a layer's weight."""
    if layer.op_type == "Gemm":
        return scale[:, None] if layer.attributes.get_int("transB", 0) else scale[None, :]
    spatial = (1,) * (weight.ndim - 2)
    if layer.op_type == "Conv":
        return scale.reshape(-1, 1, *spatial)
    # [in, out / groups, ...]: a group's outputs read its own block of input rows.
    groups = layer.attributes.get_int("group", 1)
    rows = np.repeat(scale.reshape(groups, 1, weight.shape[1]), weight.shape[0] // groups, axis=1)
    return rows.reshape(weight.shape[0], weight.shape[1], *spatial)


def _weight(graph: ir.Graph, old: ir.Value | None, name: str, array: np.ndarray) -> ir.Value:
    """An initialiser in place of ``old``; it takes over the name where nothing else reads that."""
    if old is not None and old.name in graph.initializers and len(list(old.uses())) == 1:
        name = str(old.name)
        del graph.initializers[name]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
