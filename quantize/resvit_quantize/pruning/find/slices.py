"""From the modules that a set of channels reaches to tensors, axes and attributes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from resvit_quantize.pruning.copies import copy_of
from resvit_quantize.pruning.find.attention_heads import LAYERS, close
from resvit_quantize.pruning.find.dependencies import Touched
from resvit_quantize.pruning.find.frozen_norms import channel_buffers
from resvit_quantize.pruning.find.joins import EntangledError
from resvit_quantize.pruning.groups import Count, Role, Slice
from resvit_quantize.pruning.structure import number_attributes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = CONVOLUTIONS[3:]
_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Side:
    """One module and what of it goes with the channels."""

    path: str
    tensors: tuple[tuple[str, int], ...]
    """(name, axis) of each tensor."""
    attributes: tuple[str, ...]
    writes: bool
    size: int
    """Channels of this side."""
    tuples: bool = False


def side_from_touched(touched: Touched, names: Mapping[nn.Module | nn.Parameter, str]) -> Side | None:
    """What of a module goes with its channels; None where nothing does. Raises ``EntangledError`` with the reason."""
    module = touched.module
    path = names.get(module, "")
    if isinstance(module, nn.Parameter):
        return Side(path, ((path, touched.axis),), (), True, module.shape[touched.axis])
    if isinstance(module, CONVOLUTIONS):
        return _convolution(module, path, touched.writes)
    if isinstance(module, nn.Linear):
        own = [("weight", 0), ("bias", 0)] if touched.writes else [("weight", 1)]
        attributes = ("out_features",) if touched.writes else ("in_features",)
        size = module.out_features if touched.writes else module.in_features
        return _side(module, path, own, attributes, touched.writes, size)
    each = [(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(module, _PER_CHANNEL):
        return _side(module, path, each, ("num_features",), True, module.num_features)
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            raise EntangledError(f"the LayerNorm {path} runs over more than the channels")
        side = _side(module, path, each, ("normalized_shape",), True, module.normalized_shape[0])
        return Side(side.path, side.tensors, side.attributes, True, side.size, tuples=True)
    if isinstance(module, nn.GroupNorm):
        return _side(module, path, each, ("num_channels",), True, module.num_channels)
    if isinstance(module, nn.PReLU):
        return (
            _side(module, path, each, ("num_parameters",), True, len(module.weight)) if len(module.weight) > 1 else None
        )
    if frozen := channel_buffers(module):
        size = len(getattr(module, frozen[0]))
        counted = tuple(name for name, value in number_attributes(module).items() if value == size)
        return _side(module, path, [(name, 0) for name in frozen], counted, True, size)
    if path and any(True for _ in module.parameters(recurse=True)):
        raise EntangledError(f"{path} ({type(module).__name__}) ties their number to other things")
    return None


def _convolution(module: nn.Module, path: str, writes: bool) -> Side:
    groups, width_in, width_out = (getattr(module, name) for name in ("groups", "in_channels", "out_channels"))
    if groups > 1:
        if not groups == width_in == width_out:
            raise EntangledError(f"{path} is a grouped convolution ({groups} groups)")
        own = [("weight", 0), ("bias", 0), *_gains(module, groups)]
        return _side(module, path, own, ("in_channels", "out_channels", "groups"), True, groups)
    axis_out = 1 if isinstance(module, _TRANSPOSED) else 0
    if writes:
        own = [("weight", axis_out), ("bias", 0), *_gains(module, width_out)]
        return _side(module, path, own, ("out_channels",), True, width_out)
    return _side(module, path, [("weight", 1 - axis_out)], ("in_channels",), False, width_in)


def _gains(module: nn.Module, width: int) -> Iterator[tuple[str, int]]:
    """Parameters of a convolution's own kind that hold one number for each output channel: NFNet's gain."""
    for name, parameter in module.named_parameters(recurse=False):
        if name not in ("weight", "bias") and parameter.shape[:1] == (width,) and parameter.numel() == width:
            yield name, 0


def _side(
    module: nn.Module,
    path: str,
    tensors: list[tuple[str, int]],
    attributes: tuple[str, ...],
    writes: bool,
    size: int,
) -> Side:
    own = module.state_dict()
    missing = isinstance(module, (*LAYERS, *_TRANSPOSED)) and "weight" not in own
    if missing or any(name.startswith("parametrizations.") for name in own):
        raise EntangledError(f"the weight of {path} is computed from others (weight norm or another parametrization)")
    found = tuple((f"{path}.{name}", axis) for name, axis in tensors if name in own)
    return Side(path, found, attributes, writes, size)


@dataclass(frozen=True)
class Placed:
    """A side, and where every unit's channels sit in it: [units, each]."""

    side: Side
    module: nn.Module | nn.Parameter
    index: npt.NDArray[np.int64]

    def slices(self) -> Iterator[Slice]:
        """One for each tensor."""
        role = Role.WRITES if self.side.writes else Role.READS
        return (Slice(tensor, axis, self.index, role) for tensor, axis in self.side.tensors)

    def counts(self) -> Iterator[Count]:
        """One for each attribute."""
        each = self.index.shape[1]
        for attribute in self.side.attributes:
            yield Count(self.side.path, attribute, each, self.side.tuples)
        if isinstance(self.module, nn.GroupNorm):
            channels = self.module.num_channels // self.module.num_groups
            yield Count(self.side.path, "num_groups", each // channels)


def width_counts(path: str, owner: nn.Module, parameter: nn.Parameter, axis: int, each: int) -> Iterator[Count]:
    """Attributes that say how many channels a free parameter has, as a hand-written norm's ``normalized_shape``."""
    for name, value in number_attributes(owner).items():
        if name in ("normalized_shape", "num_features", "num_channels", "dim", "hidden_size", "channels", "features"):
            size = parameter.shape[axis]
            if value in (size, (size,)):
                yield Count(path, name, each, isinstance(value, tuple))


def placed(
    reached: tuple[Touched, ...], width: int, names: Mapping[nn.Module | nn.Parameter, str], unit: int = 1
) -> tuple[list[Placed], int]:
    """Where the units of ``width`` root channels sit in everything reached, and how many channels a unit has.

    A unit is at least ``unit`` channels that stand side by side, more where a GroupNorm needs it: the statistics of the
    groups that stay must not change. Raises ``EntangledError`` where units cannot be told apart.
    """
    sides = []
    for touched in reached:
        side = side_from_touched(touched, names)
        if side is None:
            continue
        positions = np.array(touched.positions, dtype=np.int64)
        if positions[:, 0].max() >= side.size:
            raise EntangledError(f"{side.path} has {side.size} channels where {positions[:, 0].max() + 1} meet it")
        sides.append((side, touched.module, positions))
    labels = _components(width, [positions for _, _, positions in sides])
    for _, module, _ in sides:
        if isinstance(module, nn.GroupNorm):
            unit = math.lcm(unit, module.num_channels // module.num_groups)
    labels = _merge(labels, np.arange(width) // unit)
    order, labels = np.unique(labels, return_inverse=True)
    units = len(order)
    if width % units or len(set(np.bincount(labels).tolist())) > 1:
        raise EntangledError("they do not fall into units of one size")
    found = []
    for side, module, positions in sides:
        pairs = np.unique(np.stack([labels[positions[:, 1]], positions[:, 0]], axis=1), axis=0)
        if len(np.unique(pairs[:, 1])) != len(pairs) or len(pairs) % units:
            raise EntangledError(f"{side.path} does not hold the same share of every unit")
        if len(set(np.bincount(pairs[:, 0], minlength=units).tolist())) > 1:
            raise EntangledError(f"{side.path} does not hold the same share of every unit")
        index = pairs[:, 1].reshape(units, -1)
        if isinstance(module, nn.GroupNorm):
            _check_group_norm(module, side.path, index)
        found.append(Placed(side, module, index))
    return found, width // units


def _check_group_norm(module: nn.GroupNorm, path: str, index: npt.NDArray[np.int64]) -> None:
    channels = module.num_channels // module.num_groups
    for row in index:
        if len(row) % channels or not (np.bincount(row // channels)[np.unique(row // channels)] == channels).all():
            raise EntangledError(f"they cut through the groups of the GroupNorm {path}")


def _components(width: int, sides: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Root channels that meet in one position belong together."""
    labels = np.arange(width)
    for positions in sides:
        if len(np.unique(positions[:, 0])) != len(positions):
            at = np.zeros(int(positions[:, 0].max()) + 1, dtype=np.int64)
            for _ in range(width):
                smallest = np.full(len(at), width)
                np.minimum.at(smallest, positions[:, 0], labels[positions[:, 1]])
                new = labels.copy()
                np.minimum.at(new, positions[:, 1], smallest[positions[:, 0]])
                if (new == labels).all():
                    break
                labels = new
    return labels


def _merge(labels: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    pairs = np.stack([others, np.arange(len(others))], axis=1)
    size = len(labels)
    for _ in range(size):
        smallest = np.full(size, size)
        np.minimum.at(smallest, pairs[:, 0], labels)
        new = np.minimum(labels, smallest[others])
        by_label = np.full(size, size)
        np.minimum.at(by_label, labels, new)
        new = by_label[labels]
        if (new == labels).all():
            return labels
        labels = new
    return labels


def reads_linearly(module: nn.Module) -> bool:
    """Whether zeroing what a layer reads equals removing it: not so where its forward normalises the weights.

    Weight standardisation (Qiao et al. 2019) runs over the input channels, for one.
    """
    plain = {each.forward for each in (*LAYERS, *_TRANSPOSED)}
    if type(module).forward in plain or not isinstance(module, (*LAYERS, *_TRANSPOSED)):
        return True
    axis = 0 if isinstance(module, _TRANSPOSED) else 1
    zeroed, less = copy_of(module), copy_of(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    kept = max(1, weight.shape[axis] // 2)
    if weight.shape[axis] < 2:
        return True
    with torch.no_grad():
        zeroed.weight = nn.Parameter(weight.detach().clone())
        zeroed.weight.narrow(axis, kept, weight.shape[axis] - kept).zero_()
        less.weight = nn.Parameter(weight.detach().narrow(axis, 0, kept).clone())
        if isinstance(less, nn.Linear):
            less.in_features = kept
            image = torch.randn(2, weight.shape[axis], dtype=weight.dtype, device=weight.device)
            part = image[:, :kept]
        else:
            setattr(less, "in_channels", kept)  # noqa: B010 - one of several classes
            sizes = (max(4, size) for size in weight.shape[2:])
            image = torch.randn(1, weight.shape[axis], *sizes, dtype=weight.dtype, device=weight.device)
            part = image[:, :kept]
        try:
            return close(less(part), zeroed(image))
        except Exception:  # noqa: BLE001 - a user's own layer may refuse; the check of the whole network decides
            return True
