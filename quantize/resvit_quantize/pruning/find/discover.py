"""Which units of a module can be removed, found by tracing it and proven by removing some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.find.attention_heads import LAYERS, Attention, attentions, found_of_heads
from resvit_quantize.pruning.find.dependencies import Touched, Traced, traced
from resvit_quantize.pruning.find.exactness import failures, probe
from resvit_quantize.pruning.find.joins import EntangledError
from resvit_quantize.pruning.find.residual_blocks import candidates, residual_blocks
from resvit_quantize.pruning.find.slices import CONVOLUTIONS, Placed, placed, reads_linearly, width_counts
from resvit_quantize.pruning.groups import Count, Group, Kind, Role, Slice


@dataclass(frozen=True)
class Discovery:
    """What pruning may do to a module."""

    groups: tuple[Group, ...]
    left_alone: dict[str, str]
    """By module path, in a sentence, why its channels stay."""


@dataclass
class _Search:
    """The module under discovery, and what is known so far."""

    module: nn.Module
    """A probe: see ``exactness``."""
    image: Tensor
    trace: Traced
    shared: dict[str, str]
    """Module paths whose tensors or calls are shared, and how."""
    left_alone: dict[str, str] = field(default_factory=dict)
    claimed: dict[tuple[str, int], set[int]] = field(default_factory=dict)


def groups_from_module(module: nn.Module, example: Tensor, kinds: frozenset[Kind]) -> Discovery:
    """Find the groups of ``kinds`` in ``module``, which is left as it is.

    ``example`` is a batch of inputs [N, ...]; its values do not matter. Every group that is returned was tried: half
    of its units were removed from a copy with random norms, and what came out was as ``Group.exact`` says.
    Raises ``ResvitError`` for a module that cannot be run or traced.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.randn(2, *example.shape[1:], dtype=example.dtype, device=example.device)
        try:
            tried = probe(module)
            with torch.enable_grad():
                heads = attentions(tried, image)
        except ResvitError:
            raise
        except Exception as error:
            raise ResvitError(
                f"The model does not run on a batch of 2 inputs of shape {tuple(example.shape[1:])}: "
                f"{type(error).__name__}: {str(error).strip()[:200]}",
                "Mend the model or the shape of its input.",
            ) from error
        watch = candidates(tried) if Kind.BLOCKS in kinds else frozenset()
        trace = traced(tried, image, heads, watch | {each.path for each in heads})
        search = _Search(tried, image, trace, _shared(tried, trace))
        groups = _head_groups(search, heads) if Kind.HEADS in kinds else []
        groups += [group for group in _channel_groups(search, heads) if group.kind in kinds]
        if Kind.BLOCKS in kinds:
            records = {path: calls for path, calls in trace.records.items() if path in watch}
            blocks = (path for path in residual_blocks(records) if not _within(path, search.shared))
            groups += [Group(path, Kind.BLOCKS, 1, (), (), identities=(path,), exact=False) for path in blocks]
        for name, why in failures(tried, groups, image).items():
            search.left_alone[name] = f"removing channels here does not only remove them: {why}"
    return Discovery(tuple(group for group in groups if group.name not in search.left_alone), search.left_alone)


def _shared(module: nn.Module, trace: Traced) -> dict[str, str]:
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    found = {path: f"{path} is called {times} times" for path, times in trace.calls.items() if times > 1}
    for paths in owners.values():
        if len(paths) > 1:
            found |= {path: f"{' and '.join(paths)} share their weights" for path in paths}
    return found


def _within(path: str, shared: Iterable[str]) -> bool:
    return any(each == path or each.startswith(f"{path}.") for each in shared)


def _channel_groups(search: _Search, heads: tuple[Attention, ...]) -> list[Group]:
    trace = search.trace
    visited = {writer for each in heads for writer in each.writers}
    groups = []
    for path, layer in trace.layers():
        if path in visited:
            continue
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(width, int)
        try:
            reached = trace.follow(layer, width)
            visited |= {trace.names[each.module] for each in reached if each.writes and each.module in trace.names}
            found, channels = _checked(search, reached, width)
            kind = _kind(trace, found)
            groups.append(_group(search, path, kind, found, channels))
        except EntangledError as why:
            search.left_alone[path] = f"its channels stay: {why}"
    return groups


def _checked(search: _Search, reached: tuple[Touched, ...], width: int) -> tuple[list[Placed], int]:
    from torch_pruning import ops

    trace = search.trace
    for touched in reached:
        node = trace.graph.module2node[touched.module]
        if node.type == ops.OPTYPE.OUTPUT or (touched.writes and touched.module in trace.outputs):
            raise EntangledError("they are the model's outputs")
        if touched.module in trace.cores.values():
            raise EntangledError("an attention mixes them with others")
        owner = trace.names.get(touched.module, "")
        owner = owner.rpartition(".")[0] if isinstance(touched.module, nn.Parameter) else owner
        if owner in search.shared:
            raise EntangledError(search.shared[owner])
    found, channels = placed(reached, width, trace.names)
    if width // channels < 2:
        raise EntangledError("they are one unit, of which nothing can go")
    return found, channels


def _kind(trace: Traced, found: list[Placed]) -> Kind:
    """Linear layers alone are an MLP, or the token stream where a norm or an attention reads them or several write."""
    writers = [each for each in found if each.side.writes and isinstance(each.module, LAYERS)]
    tokens = {path for each in trace.cores.values() for path in _around(each)}
    attended = any(isinstance(each.module, nn.Linear) and trace.names[each.module] in tokens for each in found)
    norms = any(isinstance(each.module, nn.LayerNorm) for each in found)
    # Positions and class tokens stand in the stream; what scales one layer's hidden channels does not make it one.
    parameters = any(isinstance(each.module, nn.Parameter) for each in found)
    linear = any(isinstance(each.module, nn.Linear) for each in writers)
    convolutions = any(isinstance(each.module, CONVOLUTIONS) for each in writers)
    if attended or (linear and (norms or (len(writers) > 1 and (parameters or not convolutions)))):
        return Kind.EMBED
    return Kind.CHANNELS if convolutions else Kind.MLP


def _around(core: nn.Module) -> tuple[str, ...]:
    attention = core.attention
    assert isinstance(attention, Attention)
    return (*attention.writers, *([attention.reader] if attention.reader else []))


def _group(
    search: _Search,
    name: str,
    kind: Kind,
    placed: list[Placed],
    channels: int,
    more: tuple[list[Slice], list[Count]] = ([], []),
) -> Group:
    trace = search.trace
    slices, counts = list(more[0]), list(more[1])
    exact = True
    for each in placed:
        slices += each.slices()
        counts += each.counts()
        if isinstance(each.module, nn.Parameter):
            path = each.side.path.rpartition(".")[0]
            owner = trace.module.get_submodule(path)
            axis = each.side.tensors[0][1]
            more_counts = width_counts(path, owner, each.module, axis, each.index.shape[1])
            counts += [count for count in more_counts if count not in counts]
            exact = exact and kind is not Kind.EMBED
        else:
            reads = each.side.writes or reads_linearly(each.module)
            exact = exact and reads and not isinstance(each.module, nn.LayerNorm)
    exact = exact and kind is not Kind.EMBED
    if not any(part.role is Role.READS for part in slices):
        raise EntangledError("nothing is known to read them")
    for part in slices:
        taken = search.claimed.setdefault((part.tensor, part.axis), set())
        if not taken.isdisjoint(part.index.ravel().tolist()):
            raise EntangledError(f"{part.tensor} belongs to another group as well")
    for part in slices:
        search.claimed[part.tensor, part.axis].update(part.index.ravel().tolist())
    return Group(name, kind, len(slices[0].index), tuple(slices), tuple(counts), channels, exact=exact)


def _head_groups(search: _Search, heads: tuple[Attention, ...]) -> list[Group]:
    groups = []
    for attention in heads:
        try:
            groups.append(_head_group(search, attention))
        except EntangledError as why:
            search.left_alone[attention.path] = f"its heads stay: {why}"
    return groups


def _head_group(search: _Search, attention: Attention) -> Group:
    trace = search.trace
    if attention.refusal:
        raise EntangledError(attention.refusal)
    calls = trace.records.get(attention.path, [])
    if len(calls) != 1:
        raise EntangledError("its module is called more than once, or with no tensor")
    core = trace.cores[attention.path]
    for writer in attention.writers:
        layer = trace.module.get_submodule(writer)
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(width, int)
        known = {core, *map(trace.module.get_submodule, attention.writers)}
        others = [each for each in trace.follow(layer, width) if each.module not in known]
        if writer in search.shared or any(each.module in trace.names for each in others):
            raise EntangledError(search.shared.get(writer, f"the output of {writer} is read elsewhere as well"))
    of_heads = found_of_heads(search.module, attention, calls[0])
    if of_heads is None:
        raise EntangledError("with fewer heads it does not compute what it did for those that stay")
    reached = tuple(each for each in trace.follow(core, attention.inner) if each.module is not core)
    for each in reached:
        if each.writes and (isinstance(each.module, LAYERS) or each.module in trace.outputs):
            raise EntangledError("its outputs are added to those of other layers, or leave the model")
        if trace.names.get(each.module) in search.shared:
            raise EntangledError(search.shared[trace.names[each.module]])
    found, channels = placed(reached, attention.inner, trace.names, attention.value_dim)
    if channels != attention.value_dim:
        raise EntangledError("what reads its heads' outputs does not keep the heads apart")
    counts = [Count(attention.path, name, each) for name, each in of_heads.counts.items()]
    each_head = np.arange(attention.heads)[:, None]
    slices = [Slice(f"{attention.path}.{name}", axis, each_head, Role.WRITES) for name, axis in of_heads.tensors]
    for writer, rows in attention.rows().items():
        layer = search.module.get_submodule(writer)
        tensors = [name for name in ("weight", "bias") if getattr(layer, name, None) is not None]
        slices += [Slice(f"{writer}.{name}", 0, rows, Role.WRITES) for name in tensors]
        counts.append(Count(writer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", rows.shape[1]))
    return _group(search, attention.writers[0], Kind.HEADS, found, channels, (slices, counts))
