"""Removing units from a module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from resvit_engines.errors import ResvitError
from resvit_quantize.pruning.groups import Group, Kept, Kind
from resvit_quantize.pruning.structure import Attribute, Structure, make_identity, number_attributes, set_tensor


def prune(module: nn.Module, groups: Iterable[Group], kept: Kept, before: Structure | None = None) -> Structure:
    """Remove from ``module``, in place, the units that are not ``kept``.

    ``before`` is the structure of an earlier pruning of the same module. Returns what an unpruned module of the
    architecture needs to take this shape, earlier pruning included. Parameters are new objects afterwards, so an
    optimiser must be made anew. Raises ``ResvitError``, with the module untouched, for a group that would be left
    without units (blocks may go), an unknown group, and positions that are not there.
    """
    by_name = {group.name: group for group in groups}
    gone = {name: _gone(by_name, name, units) for name, units in kept.items()}
    identities = tuple(sorted(path for name, units in gone.items() if units.size for path in by_name[name].identities))

    def stays(path: str) -> bool:
        return not any(path == each or path.startswith(f"{each}.") for each in identities)

    state = module.state_dict(keep_vars=True)
    keep: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
    attributes: dict[str, dict[str, Attribute]] = defaultdict(dict)
    for name, units in gone.items():
        if not units.size:
            continue
        for part in by_name[name].slices:
            if not stays(part.tensor):
                continue
            if part.tensor not in state:
                raise ResvitError(f"{name} touches {part.tensor}, which the module lacks.", "Find the groups again.")
            size = state[part.tensor].shape[part.axis]
            mask = keep.setdefault((part.tensor, part.axis), np.ones(size, dtype=np.bool_))
            mask[part.index[units].ravel()] = False
        for count in by_name[name].counts:
            if stays(count.module):
                values = attributes[count.module]
                old = values.get(
                    count.attribute, number_attributes(module.get_submodule(count.module))[count.attribute]
                )
                values[count.attribute] = _less(old, count.each * units.size)
    shapes = _take(module, keep)
    for path, values in attributes.items():
        for attribute, value in values.items():
            setattr(module.get_submodule(path), attribute, value)
    for path in identities:
        make_identity(module, path)
    return (before or Structure()).followed_by(Structure(shapes, dict(attributes), identities))


def _gone(groups: dict[str, Group], name: str, units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if name not in groups:
        raise ResvitError(f"There is no group '{name}' to prune.", f"The groups are {', '.join(groups)}.")
    group = groups[name]
    if not units.size and group.kind is not Kind.BLOCKS:
        raise ResvitError(
            f"{name} would be left without a single one of its {group.units} units.",
            "Keep at least one, or a larger share of the network.",
        )
    if units.size and (units.min() < 0 or units.max() >= group.units or len(np.unique(units)) != len(units)):
        raise ResvitError(
            f"The units to keep of {name} are not different numbers from 0 to {group.units - 1}.",
            "Choose them from this network's groups.",
        )
    return np.setdiff1d(np.arange(group.units), units)


def _take(module: nn.Module, keep: dict[tuple[str, int], npt.NDArray[np.bool_]]) -> dict[str, tuple[int, ...]]:
    state = module.state_dict(keep_vars=True)
    shapes: dict[str, tuple[int, ...]] = {}
    by_tensor: dict[str, list[tuple[int, npt.NDArray[np.bool_]]]] = defaultdict(list)
    for (tensor, axis), mask in keep.items():
        if not mask.any():
            raise ResvitError(f"{tensor} would be left empty.", "Keep a larger share of the network.")
        by_tensor[tensor].append((axis, mask))
    for tensor, axes in by_tensor.items():
        value = state[tensor].detach()
        for axis, mask in axes:
            value = value.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
        set_tensor(module, tensor, value)
        shapes[tensor] = tuple(value.shape)
    return shapes


def _less(value: Attribute, by: int) -> Attribute:
    return (value[0] - by,) if isinstance(value, tuple) else value - by
