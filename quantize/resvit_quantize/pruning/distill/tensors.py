"""The tensors of a module: all of them by name, their moving average, and masks on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from resvit_engines.errors import ResvitError


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, shared ones once; training changes what they hold and never replaces them."""
    return {**{n: p.detach() for n, p in module.named_parameters()}, **dict(module.named_buffers())}


def load_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into what :func:`tensors_of` gives."""
    own = tensors_of(module)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


@contextlib.contextmanager
def holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, ``module`` holds ``values``."""
    own = {name: value.clone() for name, value in tensors_of(module).items()}
    load_tensors(module, values)
    try:
        yield
    finally:
        load_tensors(module, own)


def move_average(average: Mapping[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights and the statistics of BatchNorms; counters are copied.

    The first steps average over few, as in TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``: the
    pruned weights are soon forgotten.
    """
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, value in tensors_of(module).items():
            if value.is_floating_point():
                average[name].lerp_(value.to(average[name].dtype), weight)
            else:
                average[name].copy_(value)


def checked_masks(module: nn.Module, masks: Mapping[str, Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and its mask. Raises ``ResvitError`` for a mask that fits none."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            what = "no parameter" if parameter is None else f"one of shape {list(parameter.shape)}"
            raise ResvitError(
                f"There is a mask of shape {list(mask.shape)} for '{name}', and the network has {what} of that name.",
                "Make the masks for the network that is trained, behind all other pruning.",
            )
        pairs.append((parameter, mask.to(device=device, dtype=torch.bool)))
    return pairs
