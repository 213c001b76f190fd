"""Which channels hang together: Torch-Pruning's DepGraph, followed by index arithmetic that hybrids need.

Torch-Pruning (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning") traces the module and knows which layers
each layer's channels reach. Three things are done here instead, since they go wrong on hybrids: what ``cat`` and
``split`` do along another axis than the channels (tokens), the inside of an attention (cut out, see ``_Core``), and
the walk itself, which has a bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_quantize.pruning.answers import tensors_in
from resvit_quantize.pruning.copies import copy_of
from resvit_quantize.pruning.find.attention_heads import LAYERS, Attention, Call, call_of
from resvit_quantize.pruning.find.frozen_norms import channel_buffers, frozen_norms
from resvit_quantize.pruning.find.joins import EntangledError, Node, Part, set_maps, unknown_joins_passed

_ENTANGLED = 64
"""A group with this many times more positions than channels in one tensor went round in circles."""
_STEPS = 20_000


@dataclass(frozen=True)
class Touched:
    """One side of one module that a set of channels reaches."""

    module: nn.Module | nn.Parameter
    """Of the traced copy."""
    axis: int
    """For a parameter on its own: the axis of its channels."""
    writes: bool
    positions: tuple[tuple[int, int], ...]
    """(position, channel of the root)."""


class _Cut(torch.autograd.Function):
    """Its first argument's value, with edges to the others in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor) -> Tensor:
        del ctx, sources
        return value.clone()


class _Core(nn.Module):
    """Stands for what an attention does between the layers that write Q, K and V and the one that reads the result."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.sources: list[Tensor] = []

    def forward(self, value: Tensor) -> Tensor:
        """Give ``value``, as computed from ``sources``."""
        cut: Tensor = _Cut.apply(value.detach(), *self.sources)  # type: ignore[no-untyped-call]
        return cut


@dataclass
class Traced:
    """A copy of the module, traced; ``names`` gives the paths of its modules and parameters."""

    module: nn.Module
    names: dict[nn.Module | nn.Parameter, str]
    cores: dict[str, nn.Module]
    """By the path of the attention."""
    outputs: frozenset[nn.Module]
    graph: Any
    """Torch-Pruning's ``DependencyGraph``."""
    calls: dict[str, int]
    """How often every module with parameters of its own was called."""
    records: dict[str, list[Call]]
    """By path of what was asked to be watched: every call that takes and gives a tensor."""

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers and convolutions that were reached, in the order of the module's definition."""
        for path, each in self.module.named_modules():
            if isinstance(each, LAYERS) and each in self.graph.module2node:
                yield path, each

    def follow(self, root: nn.Module, width: int) -> tuple[Touched, ...]:
        """Everything that the output channels of ``root`` reach, ``root`` first; raises ``EntangledError``."""
        return _follow(self, root, width)


def traced(
    module: nn.Module, example: Tensor, attentions: Sequence[Attention], watch: frozenset[str] = frozenset()
) -> Traced:
    """Trace a copy of ``module`` on ``example``. Raises ``ResvitError`` where Torch-Pruning is missing or fails."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ResvitError(
            f"Pruning follows the channels with Torch-Pruning, which does not import: {error}",
            "pip install 'resvit-export[host]'.",
            ExitCode.MISSING,
        ) from error
    model = copy_of(module).eval().requires_grad_(True)
    cores: dict[str, nn.Module] = {}
    for attention in attentions:
        cores[attention.path] = _Core(attention)
        model.get_submodule(attention.path).add_module("_resvit_core", cores[attention.path])
    calls: dict[str, int] = {}
    records: dict[str, list[Call]] = {}
    ends: list[Any] = []

    def forward(model: nn.Module, inputs: Tensor) -> object:
        with _hooked(model, cores, calls, records, watch):
            out = model(inputs)
        found = tensors_in(out)
        ends.extend(each.grad_fn for each in found)
        return [each for each in found if each.grad_fn is not None]

    class CorePruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        """What comes in and what goes out of a core are different channels."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:  # noqa: ARG002
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:  # noqa: ARG002
            return layer

        def get_out_channels(self, layer: _Core) -> int:
            return layer.attention.inner

        def get_in_channels(self, layer: _Core) -> int:
            first = model.get_submodule(layer.attention.writers[0]).weight
            assert isinstance(first, Tensor)
            return first.shape[0]

    class FrozenNormPruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        """What comes in and what goes out are the same channels."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:  # noqa: ARG002
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            return len(getattr(layer, channel_buffers(layer)[0]))

        get_in_channels = get_out_channels

    pruners: dict[type[nn.Module], Any] = {_Core: CorePruner()}
    pruners |= {type(each): FrozenNormPruner() for each in frozen_norms(model).values()}
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), unknown_joins_passed():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                model,
                example,
                forward_fn=forward,
                customized_pruners=pruners,
                verbose=False,
            )
    except ResvitError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ResvitError(
            f"The model cannot be traced for pruning: {type(error).__name__}: {text[0] if text else ''}",
            "Prune it by hand, or export it unpruned.",
        ) from error
    names: dict[nn.Module | nn.Parameter, str] = {each: path for path, each in model.named_modules()}
    names |= {each: name for name, each in model.named_parameters()}
    outputs = frozenset(
        each for each, node in graph.module2node.items() if any(node.grad_fn is end for end in ends if end is not None)
    )
    set_maps(graph)
    return Traced(model, names, cores, outputs, graph, calls, records)


@contextmanager
def _hooked(
    model: nn.Module,
    cores: dict[str, nn.Module],
    calls: dict[str, int],
    records: dict[str, list[Call]],
    watch: frozenset[str],
) -> Iterator[None]:
    """Hooks that come after Torch-Pruning's own, so that it sees the layers' real outputs."""
    handles = []

    def counting(path: str) -> Callable[..., None]:
        def count(_: nn.Module, inputs: tuple[object, ...], named: dict[str, object], output: object) -> None:
            calls[path] = calls.get(path, 0) + 1
            call = call_of(inputs, named, output) if path in watch else None
            if call is not None:
                records.setdefault(path, []).append(call)

        return count

    def writing(core: _Core) -> Callable[..., Tensor]:
        def write(_: nn.Module, inputs: tuple[object, ...], output: Tensor) -> Tensor:
            del inputs
            core.sources.append(output)
            return output.detach()

        return write

    def reading(core: _Core) -> Callable[..., tuple[Tensor]]:
        return lambda _, inputs: (core(inputs[0]),)

    def ending(core: _Core) -> Callable[..., object]:
        def end(_: nn.Module, inputs: tuple[object, ...], output: object) -> object:
            del inputs
            return (core(output[0]), *output[1:]) if isinstance(output, tuple | list) else core(output)

        return end

    for path, each in model.named_modules():
        if path in watch or channel_buffers(each) or any(True for _ in each.parameters(recurse=False)):
            handles.append(each.register_forward_hook(counting(path), with_kwargs=True))
    for path, core in cores.items():
        assert isinstance(core, _Core)
        handles += [model.get_submodule(each).register_forward_hook(writing(core)) for each in core.attention.writers]
        if core.attention.reader is not None:
            reader = model.get_submodule(core.attention.reader)
            handles.append(reader.register_forward_pre_hook(reading(core)))
        else:
            handles.append(model.get_submodule(path).register_forward_hook(ending(core)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mapped(mapping: Callable[[list[Any]], list[Any]], indices: list[Any]) -> list[tuple[int, int]]:
    """The channels behind an operator by Torch-Pruning's map of it, which not every shape agrees with."""
    lost = "they pass a view or an expansion that is not followed"
    try:
        found = [(each.idx, each.root_idx) for each in mapping(indices)]
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise EntangledError(lost) from error
    if any(None in each for each in found):  # its maps of some views forget which channel they began with
        raise EntangledError(lost)
    return found


def _follow(traced: Traced, root: nn.Module, width: int) -> tuple[Touched, ...]:
    from torch_pruning._helpers import _HybridIndex

    graph = traced.graph
    if root not in graph.module2node:
        raise EntangledError("what they compute is not followed to the model's outputs")
    start = graph.get_pruner_of_module(root).prune_out_channels
    first = graph.module2node[root]
    reached: dict[tuple[Node, object], dict[tuple[int, int], None]] = {}
    stack = [(first, start, [(each, each) for each in range(width)])]
    seen: set[tuple[int, object, tuple[tuple[int, int], ...]]] = set()
    while stack:
        node, side, indices = stack.pop()
        key = (id(node), side, tuple(indices))
        if key in seen:
            continue
        seen.add(key)
        if len(seen) > _STEPS or len(indices) > _ENTANGLED * max(width, 64):
            raise EntangledError("they are mixed with each other in a way that is not followed")
        reached.setdefault((node, side), {}).update(dict.fromkeys(indices))
        for edge in node.dependencies:
            if not edge.is_triggered_by(side):
                continue
            new = indices
            for mapping in edge.index_mapping:
                if isinstance(mapping, Part):
                    new = mapping(new)
                elif mapping is not None:
                    new = _mapped(mapping, [_HybridIndex(*each) for each in new])
            if new:
                stack.append((edge.target, edge.handler, sorted(set(new))))
    return tuple(
        Touched(node.module, node.pruning_dim, graph.is_out_channel_pruning_fn(side), tuple(sorted(indices)))
        for (node, side), indices in reached.items()
    )
