"""Masks of ones in front of the layers that read prunable units: their gradients, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resvit_quantize.pruning.copies import forgetting
from resvit_quantize.pruning.groups import Group, Role, Slice

Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]


class Masks:
    """While entered, every reading convolution and linear layer multiplies its input by ones that gather gradients.

    Where a unit is read by something else (a bare parameter, a layer inside ``nn.MultiheadAttention``), the sum of
    weight times gradient over its positions says the same for one image at a time: then ``most_at_once`` is 1.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group], example: Tensor) -> None:
        self.groups = groups
        self.module = module
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        readers = {part.tensor.rpartition(".")[0] for group in groups for part in _reads(group, self.parameters)}
        called = _called(module, readers, example)
        self.masked: dict[str, list[tuple[str, Slice]]] = {}
        """By the path of the layer, the groups that it reads."""
        self.weighed: list[tuple[str, Slice]] = []
        for group in groups:
            for part in _reads(group, self.parameters):
                path, _, name = part.tensor.rpartition(".")
                if path in called and name == "weight" and part.axis == 1 and _is_plain(module.get_submodule(path)):
                    self.masked.setdefault(path, []).append((group.name, part))
                else:
                    self.weighed.append((group.name, part))
        self._handles: list[RemovableHandle] = []
        self._ones: list[tuple[str, Tensor]] = []
        self._images = 0

    @property
    def most_at_once(self) -> int | None:
        """Images per pass; ``None`` for any number."""
        return 1 if self.weighed else None

    def __enter__(self) -> Masks:
        """Put the masks on."""
        self._handles = [self.module.register_forward_pre_hook(self._count)]
        self._handles += [
            self.module.get_submodule(path).register_forward_pre_hook(self._hook(path)) for path in self.masked
        ]
        for _, part in self.weighed:
            self.parameters[part.tensor].requires_grad_(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        for _, part in self.weighed:
            self.parameters[part.tensor].grad = None

    def taken(self, images: int) -> dict[str, Tensor]:
        """Of the last backward pass, the derivative by each unit's mask: [B, units] by group. Starts anew."""
        sums = {group.name: torch.zeros(images, group.units, dtype=torch.float64) for group in self.groups}
        for path, ones in self._ones:
            if ones.grad is None:
                continue
            for name, part in self.masked[path]:
                sums[name] += by_unit(ones.grad, part)
        for name, part in self.weighed:
            weight = self.parameters[part.tensor]
            if weight.grad is not None:
                products = over_axis(weight.detach() * weight.grad, part.axis)
                sums[name] += by_unit(products[None], part)
        for tensor in {part.tensor for _, part in self.weighed}:
            self.parameters[tensor].grad = None
        self._ones.clear()
        return sums

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        self._images = len(inputs[0])

    def _hook(self, path: str) -> Hook:
        def masked(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            last = isinstance(module, nn.Linear)
            channels = x.shape[-1] if last else x.shape[1]
            ones = torch.ones(self._images, channels, device=x.device, dtype=x.dtype, requires_grad=True)
            self._ones.append((path, ones))
            # Windows and patches of an image stand one behind the other in the batch.
            rows = ones.repeat_interleave(len(x) // self._images, 0)
            shape = (len(x), *(1,) * (x.ndim - 2), channels) if last else (len(x), channels, *(1,) * (x.ndim - 2))
            return (x * rows.reshape(shape), *inputs[1:])

        return masked


def by_unit(values: Tensor, part: Slice) -> Tensor:
    """Sums over a unit's positions: [B, positions] into float64 [B, units], on the CPU."""
    values = values.detach().double().cpu()
    return values[:, torch.from_numpy(part.index)].sum(-1)


def over_axis(values: Tensor, axis: int) -> Tensor:
    """Sums over all axes but one."""
    return values.movedim(axis, 0).flatten(1).sum(1) if values.ndim > 1 else values


def _reads(group: Group, parameters: dict[str, nn.Parameter]) -> list[Slice]:
    """Where the group is read: weights by their inputs, else whatever parameter it has."""
    parts = [part for part in group.slices if part.tensor in parameters]
    reads = [part for part in parts if part.role is Role.READS]
    return [part for part in reads if part.axis == 1 and parameters[part.tensor].ndim > 1] or reads or parts


def _is_plain(module: nn.Module) -> bool:
    """Whether weight axis 1 is the input's channels."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, nn.Linear) or (isinstance(module, convolutions) and module.groups == 1)


def _called(module: nn.Module, paths: set[str], example: Tensor) -> set[str]:
    """The modules among ``paths`` that a forward pass calls, with a batch that images can be told apart in."""
    found: set[str] = set()

    def noting(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            if inputs and inputs[0].ndim > 1 and len(inputs[0]) % len(example) == 0:
                found.add(path)

        return note

    handles = [module.get_submodule(path).register_forward_pre_hook(noting(path)) for path in sorted(paths)]
    try:
        with torch.no_grad(), forgetting(module):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
