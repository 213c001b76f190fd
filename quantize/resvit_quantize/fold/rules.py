"""The exact folds, each a function of the graph editor that says what it did."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from resvit_engines.errors import ResvitError
from resvit_quantize.fold.editor import GraphEditor, module_path

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_BATCH_NORMS = (aten._native_batch_norm_legit_no_training.default,)
_ALWAYS_NO_OPS = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
"""What a program checks while it runs. The trace took it as given, and neither ONNX nor an engine can check it."""
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other)
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default)
_SLICE_END = 2**63 - 1

Item = tuple[str, str]
"""(kind, module path)."""


def fold_constants(editor: GraphEditor) -> Iterator[Item]:
    """Replace what depends on parameters only by its value: standardised weights, position tables.

    Such a value that is much larger than the parameters behind it (an expanded token) stays computed.
    """
    constant: dict[fx.Node, Any] = {node: None for node in editor.graph.nodes if editor.is_constant(node)}
    values: dict[fx.Node, Any] = {}
    for node in list(editor.graph.nodes):
        if node.op == "call_function" and _is_pure(node) and all(n in constant for n in node.all_input_nodes):
            constant[node] = None
    for node in list(constant):
        frontier = any(user not in constant for user in node.users)
        if node.op != "call_function" or not frontier or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        sources = _sources(node)
        if node.meta["val"].numel() > max(65536, 2 * sum(n.meta["val"].numel() for n in sources)):
            continue
        value = _evaluate(editor, node, values)
        path = editor.path(sources[0]) if sources else f"{module_path(node) or 'constant'}.{node.name}"
        folded = editor.add_constant(value, path, node.meta["val"].dtype)
        for user in [user for user in node.users if user not in constant]:
            user.replace_input_with(node, folded)
        yield "constant", module_path(node) or path


def remove_no_ops(editor: GraphEditor) -> Iterator[Item]:
    """Remove what returns its input: dropout and identity of eval mode, clones, casts to the same type."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CHECKS and not node.users:
            editor.graph.erase_node(node)
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _is_no_op(node, source):
            if node.target in (aten.view.default, aten._unsafe_view.default):
                # A view asks for strides that only the clone in front of it, removed here, would give.
                node.target = aten.reshape.default
            continue
        if _brings_into_order(node, source):
            continue
        if source.op == "placeholder" and any(user.op == "output" for user in node.users):
            continue
        node.replace_all_uses_with(source)
        editor.graph.erase_node(node)
        yield "no_op", module_path(node)


def say_sizes(editor: GraphEditor) -> Iterator[Item]:
    """Say in numbers what a reshape leaves open (-1), where it is known and heights or widths are free.

    TensorRT asks for the number of heads of an attention, and finds none in a shape that is computed. What alone is
    free becomes the -1.
    """
    for node in editor.graph.nodes:
        if node.target not in _RESHAPES[:3] or not isinstance(node.args[1], (list, tuple)):
            continue
        made = list(node.meta["val"].shape)
        if all(isinstance(size, int) for size in made[1:]):
            continue
        free = [axis for axis, size in enumerate(made) if not isinstance(size, int)]
        said = [size if isinstance(size, int) else given for size, given in zip(made, node.args[1], strict=True)]
        if len(free) == 1:
            said[free[0]] = -1
        if said != list(node.args[1]):
            node.update_arg(1, said)
            yield "known_size", module_path(node)


def fold_batch_norms(editor: GraphEditor) -> Iterator[Item]:
    """Scale the weights of a convolution or linear layer by the BatchNorm behind it (Jacob et al. 2018, 3.2)."""
    for norm in list(editor.graph.nodes):
        if norm.target not in _BATCH_NORMS:
            continue
        source, weight, bias, mean, variance, _, epsilon = norm.args
        results = [user for user in norm.users if user.args[1] == 0]
        others = any(user.users for user in norm.users if user not in results)
        if not is_foldable(editor, source) or not isinstance(source, fx.Node) or len(results) != 1 or others:
            continue
        if source.target is aten.linear.default and source.meta["val"].dim() != 2:
            continue  # channels are on dimension 1, and those of a linear layer on the last
        parts = [part for part in (weight, bias, mean, variance) if part is not None]
        if not all(editor.is_constant(part) for part in parts):
            continue
        scale = torch.rsqrt(_constant(editor, variance) + float(epsilon))
        if weight is not None:
            scale = scale * _constant(editor, weight)
        shift = -_constant(editor, mean) * scale
        if bias is not None:
            shift = shift + _constant(editor, bias)
        where = module_path(norm)
        _require_finite(scale, where)
        _scale_outputs(editor, source, scale, shift)
        _replace(editor, results[0], source)
        yield "batch_norm", where


def fold_layer_scales(editor: GraphEditor) -> Iterator[Item]:
    """Multiply a per-channel factor into the layer before it (LayerScale, Touvron et al. 2021)."""
    for product in list(editor.graph.nodes):
        if product.target is not aten.mul.Tensor or len(product.args) != 2:
            continue
        for source, factor in (product.args, product.args[::-1]):
            if not editor.is_constant(factor) or not is_foldable(editor, source):
                continue
            scale = _per_channel(editor.value(factor), source)
            if scale is None or product.meta["val"].dtype != source.meta["val"].dtype:
                continue
            where = module_path(product) or editor.path(factor)
            _require_finite(scale, where)
            _scale_outputs(editor, source, scale, None)
            _replace(editor, product, source)
            yield "layer_scale", where
            break


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and node.target.namespace in ("aten", "prims")


def _sources(node: fx.Node) -> list[fx.Node]:
    """The constant placeholders behind ``node``, the largest first."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found[current] = None
        pending.extend(current.all_input_nodes)
    return sorted(found, key=lambda n: (-n.meta["val"].numel(), n.name))


def _evaluate(editor: GraphEditor, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a constant node, floats in float64; ``values`` remembers what was computed."""
    if node in values:
        return values[node]
    if node.op == "placeholder":
        values[node] = editor.value(node)
        return values[node]
    for source in node.all_input_nodes:
        _evaluate(editor, source, values)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    assert callable(node.target)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    values[node] = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(torch.float64) if t.is_floating_point() else t, result
    )
    return values[node]


def _brings_into_order(node: fx.Node, source: fx.Node) -> bool:
    """Whether a copy of a transposed tensor is read by a view that splits and merges sizes at once.

    Of such, without the copy, the exporter takes the strides of the original; ONNX has no strides, and the copy goes.
    """
    if node.target not in (aten.clone.default, aten.contiguous.default) or source.meta["val"].is_contiguous():
        return False
    views = [user for user in node.users if user.target in _RESHAPES]
    return any(len(user.meta["val"].shape) >= len(source.meta["val"].shape) for user in views)


def _is_no_op(node: fx.Node, source: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target in _ALWAYS_NO_OPS:
        return True
    if node.target is aten.dropout.default:
        return node.args[2] is False or float(node.args[1]) == 0.0  # type: ignore[arg-type]
    if node.target in _CASTS:
        return bool(before.dtype == after.dtype and before.device == after.device)
    if node.target in _RESHAPES:
        return [str(size) for size in before.shape] == [str(size) for size in after.shape]
    if node.target is aten.slice.Tensor:
        given = list(node.args[2:])
        start, end, step = given + [0, _SLICE_END, 1][len(given) :]
        return bool(start in (0, None) and end in (_SLICE_END, None) and step == 1)
    return False


def is_foldable(editor: GraphEditor, node: object) -> bool:
    """Whether ``node`` is a weighted layer with constant weights whose output has one single use."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.target not in (*_CONVOLUTIONS, *_TRANSPOSED, aten.linear.default):
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    return editor.is_constant(node.args[1]) and (bias is None or editor.is_constant(bias)) and not node.kwargs


def _constant(editor: GraphEditor, node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    return editor.value(node)


def _per_channel(factor: torch.Tensor, layer: fx.Node) -> torch.Tensor | None:
    """``factor`` as one value per output channel [C], or None where it broadcasts in any other way."""
    shape = layer.meta["val"].shape
    axis = len(shape) - 1 if layer.target is aten.linear.default else 1
    if factor.dim() > len(shape):
        return None
    padded = [1] * (len(shape) - factor.dim()) + list(factor.shape)
    if any(size != 1 for position, size in enumerate(padded) if position != axis):
        return None
    if padded[axis] not in (1, int(shape[axis])):
        return None
    return factor.reshape(-1).expand(int(shape[axis]))


def _scale_outputs(editor: GraphEditor, layer: fx.Node, scale: torch.Tensor, shift: torch.Tensor | None) -> None:
    """Change a layer's weight and bias so that it returns ``scale`` [C] times its old output plus ``shift`` [C]."""
    weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight, fx.Node)
    old = editor.value(weight)
    if layer.target in _TRANSPOSED:
        # [in, out / groups, ...]: a group's outputs read its own block of input rows.
        groups = int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]
        blocks = old.reshape(groups, old.shape[0] // groups, old.shape[1], *old.shape[2:])
        factors = scale.reshape(groups, 1, old.shape[1], *[1] * (old.dim() - 2))
        new = (blocks * factors).reshape(old.shape)
    else:
        new = old * scale.reshape(-1, *[1] * (old.dim() - 1))
    dtype = weight.meta["val"].dtype
    path = editor.path(weight)
    layer.update_arg(1, editor.add_constant(new, path, dtype))
    if bias is None and shift is None:
        return
    offset = torch.zeros_like(scale) if shift is None else shift
    if isinstance(bias, fx.Node):
        offset = editor.value(bias) * scale + offset
        bias_path = editor.path(bias)
    else:
        bias_path = f"{path.rpartition('.')[0]}.bias".removeprefix(".")
    node = editor.add_constant(offset, bias_path, dtype)
    layer.args = (*layer.args[:2], node, *layer.args[3:])


def _replace(editor: GraphEditor, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    editor.graph.eliminate_dead_code()


def _require_finite(scale: torch.Tensor, where: str) -> None:
    bad = int((~torch.isfinite(scale)).sum())
    if bad:
        raise ResvitError(
            f"{where}: folding needs finite factors, and {bad} of {scale.numel()} channels have none "
            "(a running variance that is negative, NaN, or zero with eps = 0).",
            "The checkpoint holds a broken BatchNorm or LayerScale; train or load that layer again.",
        )
