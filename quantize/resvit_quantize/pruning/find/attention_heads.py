"""Finding multi-head attention in any module, by watching it run.

An attention is known by what it computes, not by its class: linear layers (or 1x1 convolutions) that write Q, K
and V, then ``scaled_dot_product_attention`` or a softmax over a square of tokens, then the layer that reads the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from resvit_quantize.pruning.copies import copy_of, forgetting
from resvit_quantize.pruning.structure import number_attributes, set_tensor

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENDS = frozenset({F.scaled_dot_product_attention})
_SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
_SAME_AS_INPUT = frozenset({"dim", "embed_dim", "d_model", "hidden_size", "in_dim", "dim_in", "in_features", "embed"})
"""Names that usually mean the width of the token stream, which is often equal to that of all heads together."""


@dataclass(frozen=True)
class Attention:
    """One multi-head attention: paths, and how its heads are laid out."""

    path: str
    heads: int
    head_dim: int
    """Of queries and keys; 0 where it could not be told."""
    value_dim: int
    writers: tuple[str, ...]
    """The layers that write Q, K and V, in the order of their calls."""
    reader: str | None
    """The layer that reads the heads' outputs; None where that happens outside of ``path``."""
    refusal: str = ""
    """Why its heads cannot be told apart; empty where they can."""

    @property
    def inner(self) -> int:
        """Channels of all heads' outputs together."""
        return self.heads * self.value_dim

    def rows(self) -> dict[str, npt.NDArray[np.int64]]:
        """By writer, [heads, each]: the output channels of each head. Q, K and V stand one after the other."""
        parts = [self.head_dim, self.head_dim, self.value_dim]
        split = {1: [parts], 2: [parts[:1], parts[1:]], 3: [parts[:1], parts[1:2], parts[2:]]}[len(self.writers)]
        found: dict[str, npt.NDArray[np.int64]] = {}
        for writer, widths in zip(self.writers, split, strict=True):
            start, blocks = 0, []
            for width in widths:
                blocks.append(start + np.arange(self.heads * width).reshape(self.heads, width))
                start += self.heads * width
            found[writer] = np.concatenate(blocks, axis=1).astype(np.int64)
        return found


@dataclass(frozen=True)
class Call:
    """One call of a module: what it was given, and the tensor that it made, the first where it made several."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: Tensor
    alone: bool
    """Whether it takes one tensor and nothing else, and gives one."""

    @property
    def given(self) -> Tensor:
        """The first tensor that it was given: the token stream, or the image's features."""
        found = first_tensor(self.args, self.kwargs)
        assert found is not None
        return found

    def on(self, module: nn.Module) -> Tensor | None:
        """What ``module`` makes of the same; None where that is no tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (self.args, dict(self.kwargs)))
        return made_tensor(module(*args, **kwargs))


def call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> Call | None:
    """The call as it was seen; None where no tensor comes in first, or none goes out first."""
    made = made_tensor(output)
    if made is None or first_tensor(args, kwargs) is None:
        return None
    return Call(args, kwargs, made, len(args) == 1 and not kwargs and made is output)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of a call's arguments; libraries name theirs."""
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)


def made_tensor(output: object) -> Tensor | None:
    """A module's output where it is a tensor, or the first of several, as of an attention that gives its shares too."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


@dataclass
class _Frame:
    path: str
    module: nn.Module
    batch: int
    layers: list[str] = field(default_factory=list)
    """Layers called inside, in order."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """(heads, head_dim, value_dim) with 0 for what the call does not tell."""
    before: int = 0
    """How many layers had been called when it attended."""
    times: int = 0
    width: int = 0


def attentions(module: nn.Module, example: Tensor) -> tuple[Attention, ...]:
    """Run ``module`` once on ``example`` and find its attentions, in the order of their calls.

    ``torch.nn.MultiheadAttention`` is not among them: its heads and its width are tied together.
    """
    stack: list[_Frame] = []
    done: list[_Frame] = []
    handles = []

    def entering(path: str, each: nn.Module) -> Callable[..., None]:
        def enter(_: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
            first = first_tensor(inputs, named)
            stack.append(_Frame(path, each, first.shape[0] if first is not None and first.ndim else 1))

        return enter

    def leave(each: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        del inputs
        frame = stack.pop()
        if isinstance(each, LAYERS):
            for outer in stack:
                outer.layers.append(frame.path)
        if frame.times:
            made = made_tensor(output)
            if made is not None:
                frame.width = made.shape[1] if made.ndim == 4 else made.shape[-1]
            done.append(frame)

    for path, each in module.named_modules():
        handles.append(each.register_forward_pre_hook(entering(path, each), with_kwargs=True))
        handles.append(each.register_forward_hook(leave))
    try:
        with forgetting(module), _Watch(stack):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_attention(module, frame) for frame in done if frame.path)


class _Watch(TorchFunctionMode):
    """Notes in the frames where attention is computed."""

    def __init__(self, stack: list[_Frame]) -> None:
        super().__init__()
        self.stack = stack

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _ATTENDS:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            self._note(math.prod(named["query"].shape[:-2]), named["query"].shape[-1], named["value"].shape[-1])
        elif func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            if scores.ndim >= 3 and scores.shape[-1] == scores.shape[-2]:
                self._note(math.prod(scores.shape[:-2]), 0, 0)
        return func(*args, **kwargs)

    def _note(self, products: int, head_dim: int, value_dim: int) -> None:
        for frame in reversed(self.stack):
            if isinstance(frame.module, nn.MultiheadAttention):
                return
            if frame.layers:
                frame.shape = (products // frame.batch, head_dim, value_dim)
                frame.before = len(frame.layers)
                frame.times += 1
                return


def _attention(module: nn.Module, frame: _Frame) -> Attention:
    heads, head_dim, value_dim = frame.shape
    writers = tuple(frame.layers[: frame.before])
    reader = frame.layers[frame.before] if len(frame.layers) > frame.before else None
    inner = _width(module.get_submodule(reader), 1) if reader else frame.width
    total = sum(_width(module.get_submodule(each), 0) for each in writers)
    value_dim = value_dim or inner // max(heads, 1)
    head_dim = head_dim or (total - heads * value_dim) // (2 * max(heads, 1))

    def answer(refusal: str) -> Attention:
        return Attention(frame.path, heads, head_dim, value_dim, writers, reader, refusal)

    if frame.times > 1 or heads < 1:
        return answer("it attends more than once, or over something other than heads")
    if inner != heads * value_dim or total != heads * (2 * head_dim + value_dim) or not 1 <= len(writers) <= 3:
        return answer(f"its layers' widths ({total} written, {inner} read) are not those of {heads} heads")
    widths = [_width(module.get_submodule(each), 0) for each in writers]
    found = answer("")
    if [rows.size for rows in found.rows().values()] != widths:
        return answer("its queries, keys and values do not stand one after the other")
    return found if heads > 1 else answer("it has a single head")


@dataclass(frozen=True)
class OfHeads:
    """What an attention's module holds for each head, besides its layers."""

    counts: Mapping[str, int]
    """Number attributes that go down with the heads: {name: how much for each head}."""
    tensors: tuple[tuple[str, int], ...] = ()
    """(name, axis) of what has an entry for each head, as a table of biases by relative position."""


def found_of_heads(module: nn.Module, attention: Attention, call: Call) -> OfHeads | None:
    """What goes with the heads of the attention's module besides the rows of its layers.

    Every guess is tried on the module itself, given what it was in ``call``: with a head removed it must give what it
    gives with that head's outputs unread. None where no guess holds.
    """
    inside = copy_of(module.get_submodule(attention.path))
    tensors = _tensors_of_heads(inside, attention)
    for of_heads in [
        OfHeads(counts, each) for each in dict.fromkeys((tensors, ())) for counts in _guesses(inside, attention)
    ]:
        if _holds(inside, attention, of_heads, call):
            return of_heads
    return None


def _tensors_of_heads(inside: nn.Module, attention: Attention) -> tuple[tuple[str, int], ...]:
    layers = tuple(
        f"{each.removeprefix(attention.path + '.')}." for each in (*attention.writers, attention.reader or "")
    )
    return tuple(
        (name, list(tensor.shape).index(attention.heads))
        for name, tensor in inside.state_dict().items()
        if not name.startswith(layers) and list(tensor.shape).count(attention.heads) == 1
    )


def _guesses(inside: nn.Module, attention: Attention) -> list[dict[str, int]]:
    heads, inner = attention.heads, attention.inner
    of_each = {heads: 1, inner: attention.value_dim, heads * attention.head_dim: attention.head_dim}
    total = heads * (2 * attention.head_dim + attention.value_dim)
    of_each[total] = total // heads
    of_each.pop(0, None)
    ambiguous = heads in (attention.head_dim, attention.value_dim)
    every: dict[str, int] = {}
    for name, value in number_attributes(inside).items():
        sizes_one = ambiguous and value == heads and any(word in name for word in ("dim", "size", "width", "channels"))
        if isinstance(value, int) and value in of_each and not sizes_one:
            every[name] = of_each[value]
    without = {name: each for name, each in every.items() if name not in _SAME_AS_INPUT}
    alone = {name: 1 for name, each in every.items() if each == 1}
    guesses: list[dict[str, int]] = []
    for guess in (without, every, alone):
        if guess not in guesses:
            guesses.append(guess)
    return guesses


def _holds(inside: nn.Module, attention: Attention, of_heads: OfHeads, call: Call) -> bool:
    kept = np.arange(attention.heads)[attention.heads // 2 :]
    gone = np.arange(attention.heads)[: attention.heads // 2]
    columns = np.arange(attention.inner).reshape(attention.heads, -1)
    full, less = copy_of(inside), copy_of(inside)
    prefix = f"{attention.path}."
    for writer, rows in attention.rows().items():
        _take(less, writer.removeprefix(prefix), 0, np.sort(rows[kept].ravel()))
    if attention.reader is not None:
        reader = attention.reader.removeprefix(prefix)
        weight = full.get_submodule(reader).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight[:, torch.from_numpy(columns[gone].ravel())] = 0
        _take(less, reader, 1, columns[kept].ravel())
    for name, axis in of_heads.tensors:
        _keep(less, name, axis, kept)
    for name, each in of_heads.counts.items():
        setattr(less, name, getattr(less, name) - each * len(gone))
    with torch.no_grad():
        expected = call.on(full)
        try:
            found = call.on(less)
        except Exception:  # noqa: BLE001 - whatever the user's module raises, the guess was wrong
            return False
    if attention.reader is None and expected is not None:
        axis = 1 if expected.ndim == 4 else -1
        expected = expected.index_select(axis, torch.from_numpy(columns[kept].ravel()).to(expected.device))
    return found is not None and expected is not None and close(found, expected)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal but for rounding."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    scale = expected.double().square().mean().sqrt()
    return float((found.double() - expected.double()).square().mean().sqrt()) <= 1e-3 * float(scale) + 1e-9


def _take(module: nn.Module, layer: str, axis: int, positions: npt.NDArray[np.int64]) -> None:
    state = module.state_dict()
    for name in ("weight", "bias"):
        if f"{layer}.{name}" in state and (axis == 0 or name == "weight"):
            _keep(module, f"{layer}.{name}", axis, positions)


def _keep(module: nn.Module, name: str, axis: int, positions: npt.NDArray[np.int64]) -> None:
    tensor = module.state_dict()[name]
    set_tensor(module, name, tensor.detach().index_select(axis, torch.from_numpy(positions).to(tensor.device)))


def _width(layer: nn.Module, axis: int) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[axis]
