"""Convolutions side by side whose results are added: one convolution computes both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from resvit_quantize.fold.editor import GraphEditor, module_path
from resvit_quantize.fold.rules import Item, is_foldable

aten = torch.ops.aten
_DEFAULTS: tuple[Any, ...] = (None, [1, 1], [0, 0], [1, 1], 1)
"""Of bias, stride, padding, dilation and groups."""


def merge_parallel_convolutions(editor: GraphEditor) -> Iterator[Item]:
    """Add the smaller filter into the middle of the larger one (RepVGG, Ding et al. 2021, 3.3).

    Both must read the same tensor with the same stride, dilation and groups, and their paddings must put the smaller
    filter over the larger one's middle. Each is alone with the sum; BatchNorms are folded before.
    """
    for total in list(editor.graph.nodes):
        if total.target is not aten.add.Tensor or len(total.args) != 2 or total.kwargs:
            continue
        pair = [part for part in total.args if _is_plain(editor, part)]
        if len(pair) != 2 or pair[0] is pair[1] or pair[0].args[0] is not pair[1].args[0]:
            continue
        large, small = sorted(pair, key=lambda node: -node.args[1].meta["val"].numel())
        margins = _margins(large, small)
        if margins is None:
            continue
        where = module_path(total)
        with editor.graph.inserting_before(total):
            merged = editor.graph.node_copy(large)
        merged.meta = dict(large.meta)
        weight, bias = large.args[1], _settings(large)[0]
        summed = editor.value(weight) + F.pad(editor.value(small.args[1]), margins)
        biases = [editor.value(node) for node in (bias, _settings(small)[0]) if node is not None]
        path, dtype = editor.path(weight), weight.meta["val"].dtype
        new = [editor.add_constant(summed, path, dtype), None]
        if biases:
            new[1] = editor.add_constant(sum(biases[1:], biases[0]), f"{path.rpartition('.')[0]}.bias", dtype)
        merged.args = (large.args[0], *new, *_settings(large)[1:])
        total.replace_all_uses_with(merged)
        editor.graph.eliminate_dead_code()
        yield "parallel_convolution", where


def _is_plain(editor: GraphEditor, node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.conv2d.default and is_foldable(editor, node)


def _settings(node: fx.Node) -> tuple[Any, ...]:
    """Bias, stride, padding, dilation and groups, those that are not said as they are by default."""
    said = node.args[2:]
    return (*said, *_DEFAULTS[len(said) :])


def _margins(large: fx.Node, small: fx.Node) -> list[int] | None:
    """What to pad the smaller filter with to lie in the larger one as they lie over the image; None if it does not."""
    (_, stride, padding, dilation, groups), (_, stride_, padding_, dilation_, groups_) = (
        _settings(large),
        _settings(small),
    )
    sizes, sizes_ = (list(node.args[1].meta["val"].shape[2:]) for node in (large, small))  # type: ignore[union-attr]
    if list(stride) != list(stride_) or groups != groups_:
        return None
    margins: list[int] = []
    for axis in (1, 0):  # the last dimension first, as F.pad has it
        more = sizes[axis] - sizes_[axis]
        same = sizes_[axis] == 1 or dilation[axis] == dilation_[axis]
        if more < 0 or more % 2 or not same or padding[axis] - padding_[axis] != dilation[axis] * (more // 2):
            return None
        margins += [more // 2, more // 2]
    return margins
