"""Norms whose numbers are buffers: every channel is scaled and shifted by constants, and nothing is trained.

Detectors keep the BatchNorm of their convolutional trunk so (``FrozenBatchNorm2d`` of torchvision, timm and a dozen
detectors of transformers), each by a class of its own: they are known by what they hold.
"""

from __future__ import annotations

from torch import nn

_LEAST = 2
"""A scale and a shift; one buffer alone may be anything, as the frequencies of a position embedding."""


def channel_buffers(module: nn.Module) -> tuple[str, ...]:
    """The names of its constants for each channel, all [C]; empty for what is no such norm."""
    if next(module.parameters(), None) is not None:
        return ()
    kept = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
    numbers = [
        (name, buffer) for name, buffer in kept if buffer.ndim and name not in module._non_persistent_buffers_set
    ]
    lengths = {tuple(buffer.shape) for _, buffer in numbers}
    if len(numbers) < _LEAST or len(lengths) != 1 or len(lengths.pop()) != 1:
        return ()
    if not all(buffer.is_floating_point() for _, buffer in numbers):
        return ()
    return tuple(name for name, _ in numbers)


def frozen_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Those inside ``module``, by path; none that has layers of its own."""
    return {path: each for path, each in module.named_modules() if channel_buffers(each)}
