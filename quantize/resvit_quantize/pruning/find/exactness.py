"""The safety net under discovery: removing units must do what is claimed, on the module itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from resvit_quantize.pruning.answers import tensors_in
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.copies import copy_of, forgetting
from resvit_quantize.pruning.find.attention_heads import close
from resvit_quantize.pruning.find.frozen_norms import channel_buffers
from resvit_quantize.pruning.groups import Group, Kept, Kind, Role


def probe(module: nn.Module) -> nn.Module:
    """A copy whose norms and biases are random, so that no error hides behind ones and zeros. In evaluation mode."""
    made = copy_of(module).eval()
    with torch.no_grad():
        for owner in made.modules():
            frozen = channel_buffers(owner)
            for name, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                if not value.is_floating_point() or not value.numel():
                    continue
                if name == "running_mean" or (value.ndim <= 1 and "bias" in name):
                    value.normal_(0, 0.1)
                elif name == "running_var" or name in frozen or (value.ndim <= 1 and isinstance(value, nn.Parameter)):
                    value.uniform_(0.5, 1.5)
                elif isinstance(value, nn.Parameter) and bool((value == value.flatten()[0]).all()):
                    value.normal_(0, 0.1)
    return made


def failures(module: nn.Module, groups: Sequence[Group], image: Tensor) -> dict[str, str]:
    """By name, the groups whose units cannot simply be removed from ``module`` (a ``probe``), and why.

    Of every group a random half of the units goes. Where the group is exact, the outputs must equal those of the
    module with what reads these units zeroed; otherwise they must be finite and keep their shapes. Many groups are
    tried at once, and halved where that fails.
    """
    random = np.random.default_rng(0)
    kept: dict[str, np.ndarray] = {}
    for group in groups:
        stay = 0 if group.kind is Kind.BLOCKS else max(1, group.units // 2)
        kept[group.name] = np.sort(random.permutation(group.units)[:stay]).astype(np.int64)
    before = _outputs(module, image)
    found: dict[str, str] = {}
    exact = [group for group in groups if group.exact]
    _search(exact, lambda part: _differs(module, part, kept, image), found)
    rest = [group for group in groups if group.kind is not Kind.BLOCKS and group.name not in found]
    _search(rest, lambda part: _breaks(module, part, kept, image, before), found)
    blocks = [group for group in groups if group.kind is Kind.BLOCKS]
    _search(blocks, lambda part: _breaks(module, part, kept, image, before), found)
    return found


def _search(groups: Sequence[Group], problem: Callable[[Sequence[Group]], str], found: dict[str, str]) -> None:
    if not groups:
        return
    why = problem(groups)
    if not why:
        return
    if len(groups) == 1:
        found[groups[0].name] = why
        return
    known = len(found)
    half = len(groups) // 2
    _search(groups[:half], problem, found)
    _search(groups[half:], problem, found)
    if len(found) == known:  # only together do they fail: none can be called innocent
        found.update(dict.fromkeys((group.name for group in groups), why))


def _differs(module: nn.Module, groups: Sequence[Group], kept: Kept, image: Tensor) -> str:
    zeroed = copy_of(module)
    state = zeroed.state_dict()
    for group in groups:
        gone = np.setdiff1d(np.arange(group.units), kept[group.name])
        for part in group.slices:
            if part.role is Role.READS:
                tensor = state[part.tensor]
                tensor.index_fill_(part.axis, torch.from_numpy(part.index[gone].ravel()).to(tensor.device), 0)
    expected = _outputs(zeroed, image)
    del zeroed, state
    found = _pruned(module, groups, kept, image)
    if isinstance(found, str):
        return found
    if len(found) != len(expected) or not all(close(a, b) for a, b in zip(found, expected, strict=True)):
        return "the outputs are not those of the model without what reads them"
    return ""


def _breaks(module: nn.Module, groups: Sequence[Group], kept: Kept, image: Tensor, before: list[Tensor]) -> str:
    found = _pruned(module, groups, kept, image)
    if isinstance(found, str):
        return found
    if [each.shape for each in found] != [each.shape for each in before]:
        return "the outputs change their shapes"
    finite = all(bool(torch.isfinite(each).all()) for each in found)
    return "" if finite else "the outputs are no longer finite"


def _pruned(module: nn.Module, groups: Sequence[Group], kept: Kept, image: Tensor) -> list[Tensor] | str:
    less = copy_of(module)
    try:
        prune(less, groups, {group.name: kept[group.name] for group in groups})
        return _outputs(less, image)
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises is the answer
        lines = str(error).strip().splitlines()
        return f"the model then fails with {type(error).__name__}: {lines[0][:200] if lines else ''}"


def _outputs(module: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad(), forgetting(module):
        return tensors_in(module(image))
